"""Where a credential goes is decided for each request, by the request's own address."""

import json
import logging
import os
import pty
import shutil
import subprocess
import sys
import threading

import mlflow
import pytest
import requests
from conftest import KEY, ROOT, clean_environment, free_port, mlflow_server, run, serving
from gateway import Gateway
from mlflow.exceptions import MlflowException

from common import connection
from common.connection.credentials import AUTH, Credentials
from common.errors import Printed, UserError

TOKEN = "bearer-token-0123456789"
OWN = "https://own.example"


def sent_to(url, own=OWN, **headers):
    """The headers of a request of MLflow's as it would leave this machine."""
    mlflow.set_tracking_uri(own)
    request = requests.Request("GET", url, headers=headers, auth=Credentials())
    return requests.Session().prepare_request(request).headers


@pytest.mark.parametrize(
    ("url", "own", "goes"),
    [
        (f"{OWN}/api", OWN, True),
        ("https://OWN.example:443/api", OWN, True),
        (f"{OWN}/api", "https://own.example:443/mlflow/", True),
        ("http://127.0.0.1:5000/api", "http://127.0.0.1:5000", True),
        ("http://localhost/api", "http://localhost", True),
        ("https://xn--bcher-kva.example/api", "https://bücher.example", True),
        ("https://far.example/api", OWN, False),
        ("https://own.example.far.example/api", OWN, False),
        ("https://own.example@far.example/api", OWN, False),
        ("https://own.example:8443/api", OWN, False),
        ("http://own.example/api", OWN, False),
        ("http://own.example:443/api", OWN, False),
        ("http://127.0.0.1:5001/api", "http://127.0.0.1:5000", False),
        ("https://far.example/api", "sqlite:///mlflow.db", False),
    ],
)
def test_credentials_go_to_the_servers_own_origin_only(url, own, goes, user):
    user(AM_SC_API_KEY=KEY)
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    if goes:
        headers = sent_to(url, own, **bearer)
        assert headers["X-Api-Key"] == KEY and headers["Authorization"] == f"Bearer {TOKEN}"
        return
    with pytest.raises(UserError, match="the artifacts lie on another server, .*must go there"):
        sent_to(url, own)
    del os.environ["AM_SC_API_KEY"]
    for authorization in (f"Bearer {TOKEN}", "Basic bWU6cGE1NXdvcmQ="):
        with pytest.raises(UserError, match="must go there") as raised:
            sent_to(url, own, Authorization=authorization)
        assert TOKEN not in str(raised.value) and "bWU6" not in str(raised.value)
    assert "Authorization" not in sent_to(url, own), "where there is nothing to give away"


def test_plain_http_beyond_this_machine_gets_neither_key_nor_token(user):
    own = "http://own.example:5000"
    user(AM_SC_API_KEY=KEY, MLFLOW_TRACKING_TOKEN=TOKEN)
    headers = sent_to(f"{own}/api", own, Authorization=f"Bearer {TOKEN}")
    assert not {"X-Api-Key", "Authorization"} & set(headers)
    assert connection.credential() == (
        "X-Api-Key withheld: plain http, bearer token withheld: plain http"
    )


def test_this_machine_by_way_of_a_proxy_does_not_count_as_loopback(user):
    own = "http://127.0.0.1:5000"
    user(AM_SC_API_KEY=KEY, http_proxy="http://proxy.example:3128")
    assert "X-Api-Key" not in sent_to(f"{own}/api", own)


def test_key_is_read_for_each_request(user):
    for key in (KEY, " renewed-0123456789\n"):
        user(AM_SC_API_KEY=key)
        assert sent_to(f"{OWN}/api")["X-Api-Key"] == key.strip()


def test_password_in_netrc_is_not_sent(user, tmp_path):
    (tmp_path / "netrc").write_text("machine own.example login me password of-another-place")
    user(NETRC=str(tmp_path / "netrc"))
    assert "Authorization" not in sent_to(f"{OWN}/api")
    own = requests.Session().prepare_request(requests.Request("GET", f"{OWN}/api"))
    assert "Authorization" in own.headers, "a witness: `requests` by itself would send it"


@pytest.mark.parametrize(
    ("name", "value"), [(AUTH, "theirs"), ("MLFLOW_TRACKING_AWS_SIGV4", "true")]
)
def test_whatever_would_take_the_place_of_the_key_is_refused(name, value, user):
    user(**{name: value})
    with pytest.raises(UserError, match=f"{name} is set, and with it MLflow would not send"):
        connection.settle()
    user(**{name: "" if name == AUTH else "false"})
    connection.settle()
    connection.settle()  # and in a process that inherits the variable
    assert os.environ[AUTH] == "x-api-key"


# Through MLflow


@pytest.fixture
def elsewhere_server(tls):
    """Another server: what arrives there was not stopped."""
    with Gateway("http://127.0.0.1:9", None, tls=tls[0]) as other:
        yield other


@pytest.fixture(scope="module")
def database_and_server(tmp_path_factory):
    """(address of a database, address of the server on it): servers by themselves refuse to keep
    artifacts on other hosts, but an old one, or its settings, may have it otherwise.
    """
    folder = tmp_path_factory.mktemp("database")
    with mlflow_server(folder) as uri:
        yield f"sqlite:///{folder}/mlflow.db", uri


@pytest.mark.parametrize("secret", ["AM_SC_API_KEY", "MLFLOW_TRACKING_TOKEN"])
@pytest.mark.parametrize("scheme", ["mlflow-artifacts", "https", "http"])
def test_artifacts_elsewhere_are_stopped_and_diagnosed(
    scheme, secret, database_and_server, elsewhere_server, tls, user, tmp_path
):
    """Of an experiment that is used without having been named to `connect`."""
    database, server = database_and_server
    with Gateway(server, KEY, tls=tls[0], token=TOKEN) as box:
        user(MLFLOW_TRACKING_URI=box.uri, MLFLOW_TRACKING_SERVER_CERT_PATH=str(tls[1]))
        user(**{secret: KEY if secret == "AM_SC_API_KEY" else TOKEN})
        use_artifacts_elsewhere(box, elsewhere_server, database, scheme, secret, tmp_path)


def use_artifacts_elsewhere(box, elsewhere_server, database, scheme, secret, tmp_path):
    connection.connect()
    host = elsewhere_server.uri.removeprefix("https://")
    path = "" if scheme == "mlflow-artifacts" else "/api/2.0/mlflow-artifacts/artifacts"
    location = f"{scheme}://{host}{path}/{secret}"
    client = mlflow.MlflowClient()
    name = f"elsewhere {host} {scheme}"
    experiment_id = mlflow.MlflowClient(database).create_experiment(name, location)
    run_id = client.create_run(experiment_id).info.run_id
    model_id = client.create_logged_model(experiment_id, "model").model_id
    registry, registered = mlflow.MlflowClient(database), f"{scheme}-{secret}"
    registry.create_registered_model(registered)
    registry.create_model_version(registered, f"{location}/model")
    registry.set_registered_model_alias(registered, "production", "1")
    for act in (
        lambda: mlflow.artifacts.download_artifacts(f"models:/{model_id}"),
        lambda: mlflow.artifacts.download_artifacts(f"models:/{registered}@production"),
        lambda: client.log_text(run_id, "text", "file.txt"),
        lambda: client.list_artifacts(run_id),
        lambda: client.download_artifacts(run_id, "file.txt", str(tmp_path)),
    ):
        with pytest.raises(MlflowException) as raised:
            act()
        failure = connection.diagnose(raised.value)
        assert isinstance(failure, UserError) and failure.code == 1, repr(raised.value)
        shown = f"{'http' if scheme == 'http' else 'https'}://{host}"
        assert f"the artifacts lie on another server, {shown}," in failure.what
    assert box.requests and elsewhere_server.requests == []
    with pytest.raises(UserError, match="the artifacts lie on another server"):
        connection.connect(experiment=name)


def test_secret_in_what_others_log_or_raise_in_threads(user, capsys, monkeypatch):
    """MLflow's thread for system metrics warns with all that an error answer repeats."""
    user(AM_SC_API_KEY=KEY, MLFLOW_TRACKING_TOKEN=TOKEN)
    connection.settle()
    logger = logging.getLogger("mlflow.system_metrics.system_metrics_monitor")
    logger.warning(f"Failed to log: x-api-key: {KEY}")
    logger.warning("Failed to log: %s", f"Bearer {TOKEN}")
    monkeypatch.setattr(sys, "stderr", Printed(sys.stderr, one_line=False))
    monkeypatch.setattr(sys, "stdout", Printed(sys.stdout))

    def act():
        print(KEY)
        raise ValueError(TOKEN)

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # not pytest's
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    shown = capsys.readouterr()
    assert KEY not in shown.out + shown.err and TOKEN not in shown.out + shown.err
    assert shown.out == "<secret>\n" and shown.err.count("<secret>") >= 3


def test_error_that_survives_as_text_only_is_found(user):
    """MLflow fetches files in threads, and makes one text of what goes wrong there."""
    user(AM_SC_API_KEY=KEY)
    connection.settle()
    mlflow.set_tracking_uri(OWN)
    request = requests.Request(
        "GET", "https://far.example/x", auth=connection.credentials.CREDENTIALS
    )
    with pytest.raises(UserError) as raised:
        request.prepare()
    text = f"The following failures occurred while downloading:\n## a\n{raised.value}"
    assert connection.diagnose(MlflowException(text)) is raised.value
    assert connection.diagnose(MlflowException("The following failures occurred")) is None


def test_database_whose_artifacts_go_through_a_server(user, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    connection.connect(uri)
    mlflow.MlflowClient().create_experiment("served", "mlflow-artifacts:/1")
    with pytest.raises(UserError, match="go through a tracking server, mlflow-artifacts:/1"):
        connection.connect(uri, experiment="served")


@pytest.mark.parametrize(
    ("location", "accepted"),
    [
        ("mlflow-artifacts:/1", True),
        ("file:///lustre/models", True),
        ("s3://bucket/1", True),
        ("https://own.example/api/1", True),
        ("mlflow-artifacts://own.example/1", True),
        ("http://own.example/api/1", False),  # the key would go unencrypted
        ("https://far.example/api/1", False),
        ("mlflow-artifacts://far.example/1", False),
        ("https://own.example:8443/api/1", False),
    ],
)
def test_locations_that_an_experiment_may_have(location, accepted, user):
    from common.connection.preflight import _check_location

    mlflow.set_tracking_uri(OWN)
    if accepted:
        _check_location(location)
    else:
        with pytest.raises(UserError, match="no credential must go there"):
            _check_location(location)


# What a failure means


def chained(text, *causes):
    """An MlflowException that has causes, as MLflow's have."""
    error = MlflowException(text)
    for outer, inner in zip((error, *causes), causes, strict=False):
        outer.__context__ = inner
    return error


PROXY = requests.exceptions.ProxyError
NAME = "NameResolutionError(Failed to resolve 'x' ([Errno {}] {}))"


@pytest.mark.parametrize(
    ("text", "cause", "kind", "code"),
    [
        ("Tunnel connection failed: 403 Forbidden", PROXY(), "proxy", 1),
        ("Tunnel connection failed: 502 Bad Gateway", PROXY(), "proxy", 75),
        ("[Errno 111] Connection refused", PROXY(), "proxy", 75),
        (NAME.format(-2, "Name or service not known"), None, "name", 1),
        (NAME.format(-3, "Temporary failure in name resolution"), None, "name", 75),
        ("x", requests.exceptions.SSLError(), "tls", 1),
        ("BadStatusLine", None, "no_mlflow", 1),
        ("failed with error code 404 != 200", None, "no_mlflow", 1),
        ("failed with error code 413 != 200", None, "too_large", 1),
        ("failed with error code 400 != 200", None, "refused", 1),
        ("too many 503 error responses", requests.exceptions.RetryError(), "unavailable", 75),
        ("Failed to upload at least one part of x", None, "object_store", 1),
    ],
)
def test_kind_and_code(text, cause, kind, code, user):
    mlflow.set_tracking_uri(OWN)
    failure = connection.diagnose(chained(text, *filter(None, [cause])))
    assert (failure.kind, failure.code) == (kind, code)


def test_words_of_the_server_are_said_without_control_characters(box, box_variables, user):
    """MLflow's own refusal has a message that no table here can know."""
    user(**box_variables)
    connection.connect()
    said = {"error_code": "INVALID_PARAMETER_VALUE", "message": "no\x1b[31m such \a\u202ething"}
    box.fault = (400, {"Content-Type": "application/json"}, json.dumps(said).encode())
    with pytest.raises(MlflowException) as raised:
        mlflow.MlflowClient().create_experiment("x")
    failure = connection.diagnose(raised.value)
    assert (failure.kind, failure.code) == ("refused", 1)
    assert failure.what.endswith("(error 400), and says: no such thing.")


def test_error_of_anything_else_is_not_diagnosed():
    assert connection.diagnose(ValueError("error code 503")) is None
    assert connection.diagnose(MlflowException("the model has no signature")) is None


# The `mlflow` command, and the room alone


def command(folder, *arguments, code=0, **variables):
    process = subprocess.run(
        [sys.executable, "-m", "common.connection", *arguments],
        cwd=folder,
        env=clean_environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == code, process.stdout + process.stderr
    assert KEY not in process.stdout + process.stderr
    return process


@pytest.fixture
def alone(tmp_path):
    """An empty folder with what the room's docstring says to copy."""
    folder = tmp_path / "mine" / "common"
    shutil.copytree(ROOT / "common" / "connection", folder / "connection")
    shutil.copy(ROOT / "common" / "errors.py", folder)
    (folder / "__init__.py").touch()
    return folder.parent


def read_terminal(terminal):
    try:
        return os.read(terminal, 2**16)
    except OSError:  # how Linux says that the other end is closed
        return b""


@pytest.mark.slow
def test_mlflow_command_with_the_credentials(alone, box, box_variables, server):
    mlflow.MlflowClient(server).create_run("0")
    listed = command(alone, "runs", "list", "--experiment-id", "0", **box_variables)
    assert listed.stdout.startswith("Date") and "tracking" not in listed.stdout
    assert listed.stderr.startswith(f"tracking {box.uri}  (from MLFLOW_TRACKING_URI; X-Api-Key")
    assert box.requests and all(r.headers.get("x-api-key") == KEY for r in box.requests)
    wrong = command(alone, "runs", "describe", "--run-id", "0" * 32, code=1, **box_variables)
    assert "and says: " in wrong.stderr and "Traceback" not in wrong.stderr
    # On a terminal, what others have written is not obeyed.
    mlflow.MlflowClient(server).create_run("0", run_name="x\x1b]0;taken\x07y")
    terminal, other = pty.openpty()
    asked = [sys.executable, "-m", "common.connection", "runs", "list", "--experiment-id", "0"]
    variables = clean_environment(**box_variables)
    with subprocess.Popen(asked, cwd=alone, env=variables, stdout=other) as process:
        os.close(other)
        shown = b"".join(iter(lambda: read_terminal(terminal), b""))
    assert process.returncode == 0
    assert b"x y" in shown and b"\x1b" not in shown and b"\x07" not in shown
    box.die()
    away = command(alone, "runs", "list", "--experiment-id", "0", code=75, **box_variables)
    assert "error: no server answers at" in away.stderr


SERVED = """
import mlflow
from common import connection
connection.connect()
with open("double.py", "w") as file:
    file.write('''
import mlflow
class Double(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: list[float]) -> list[float]:
        return [2 * value for value in model_input]
mlflow.models.set_model(Double())
''')
with mlflow.start_run():
    logged = mlflow.pyfunc.log_model(name="model", python_model="double.py", pip_requirements=[])
version = mlflow.register_model(logged.model_uri, "DOUBLE").version
mlflow.MlflowClient().set_registered_model_alias("DOUBLE", "production", version)
"""


@pytest.mark.slow
def test_model_is_served_through_the_gateway_by_the_room_alone(alone, box, box_variables):
    """`connect` by the copied room, and then the command that serves what was logged."""
    (alone / "script.py").write_text(SERVED)
    run(alone / "script.py", cwd=alone, **box_variables)
    assert box.artifact_uploads()
    port, url = free_port(), "http://127.0.0.1:{}"
    serve = ("models", "serve", "-m", "models:/DOUBLE@production", "--env-manager", "local")
    with serving(
        [sys.executable, "-m", "common.connection", *serve, "--port", str(port)],
        alone,
        clean_environment(**box_variables, MLFLOW_ALLOW_MODEL_CODE_EXECUTION="true"),
        f"{url.format(port)}/health",
        alone / "log",
    ):
        answer = requests.post(f"{url.format(port)}/invocations", json={"inputs": [1.0, 2.0]})
    assert answer.json() == {"predictions": [2.0, 4.0]}, (alone / "log").read_text()
    assert all(r.headers.get("x-api-key") == KEY for r in box.requests)
    assert "Could not find any registered plugin" not in (alone / "log").read_text()


@pytest.mark.slow
def test_files_that_may_be_left_out(alone):
    room = alone / "common" / "connection"
    for name in ("__main__.py", "failures.py"):
        (room / name).unlink()
    text = (room / "__init__.py").read_text()
    (room / "__init__.py").write_text(
        text.replace("from .failures import Failure, diagnose\n", "").replace('"diagnose", ', "")
    )
    (alone / "script.py").write_text("from common import connection\nconnection.connect()\n")
    assert run(alone / "script.py", cwd=alone).out.startswith(
        "tracking sqlite:///mlflow.db  (local"
    )
