"""A tracking server that cannot be used: two lines and an exit code, before any work is done."""

import os
import socket
import time

import mlflow
import pytest
import requests
import sqlalchemy
from conftest import KEY, fails, run
from gateway import Gateway
from google.protobuf.json_format import ParseError
from mlflow.exceptions import MlflowException

from common import connection
from common.errors import UserError, of_system


def train(*arguments, cwd, **variables):
    return fails("train_mnist_mlflow.py", "--dataset", "digits", *arguments, cwd=cwd, **variables)


# The tracking server


@pytest.mark.slow
def test_amsc_server_without_key(tmp_path):
    """No request is made: this passes on a machine without a network."""
    uri = "https://mlflow.american-science-cloud.org"
    error = train("--tracking_uri", uri, cwd=tmp_path)
    assert "AM_SC_API_KEY is not set" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_server_not_there(tmp_path):
    error = train(code=75, cwd=tmp_path, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert "no server answers at http://127.0.0.1:9" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_certificate_not_trusted(box, tmp_path):
    variables = {"MLFLOW_TRACKING_URI": box.uri, "AM_SC_API_KEY": KEY}
    error = train(cwd=tmp_path, **variables)
    assert "no trusted TLS connection" in error and "--ca_bundle" in error
    assert box.requests == []


@pytest.mark.slow
def test_empty_certificate_path_does_not_switch_verification_off(box, tmp_path):
    variables = {"MLFLOW_TRACKING_URI": box.uri, "MLFLOW_TRACKING_SERVER_CERT_PATH": ""}
    error = train(cwd=tmp_path, **variables)
    assert "no trusted TLS connection" in error


@pytest.mark.slow
def test_ca_bundle_that_is_none(box, tmp_path):
    (tmp_path / "ca.pem").write_text("no certificate")
    for name in ("ca.pem", "missing.pem"):
        error = train("--ca_bundle", name, cwd=tmp_path, MLFLOW_TRACKING_URI=box.uri)
        assert "no PEM certificates" in error and name in error


@pytest.mark.slow
def test_insecure_and_ca_bundle_contradict(box, tls, tmp_path):
    error = train(
        "--ca_bundle",
        tls[1],
        cwd=tmp_path,
        MLFLOW_TRACKING_URI=box.uri,
        MLFLOW_TRACKING_INSECURE_TLS="true",
    )
    assert "contradicts" in error


@pytest.mark.parametrize(
    "uri",
    [
        *("localhost:5000", "file:///tmp/mlruns", "ftp://host", "mlruns", "SQLITE:///mlflow.db"),
        *("https://:pa55word@host", "http+unix://x", "https://a..b", "https://a\nb"),
        *("http://[abc", "http://127.0.0.1:abc", "http://a b", "http://host/?token=secret"),
        *("sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite://mlflow.db"),
    ],
)
def test_address_of_no_server(uri, tmp_path):
    """In this process: a script for each would take long. The one below shows that scripts ask."""
    with pytest.raises(UserError, match="the tracking address") as raised:
        connection.connect(uri)
    assert "secret" not in str(raised.value) and "pa55word" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql:///db?user=me&password=pa55", "postgresql:///db"),
        ("postgresql://?password=pa55", "postgresql://"),
        ("postgresql+psycopg://me:pa/55@host:5432/db?x#y", "postgresql+psycopg://host:5432/db"),
        ("postgresql://me:pa/5?5@host:5432/db?x#y", "postgresql://..."),
        ("postgresql://me:pa@55@host/db", "postgresql://..."),
        ("postgresql://host:5432/db?password=pa@55", "postgresql://..."),
        ("postgresql://me:p@5?a=b@55@host", "postgresql://..."),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("https://me:pa55@host/path?key=pa55#pa55", "https://host/path"),
        ("sqlite:////home/me@work/mlflow.db?key=pa55", "sqlite:////home/me@work/mlflow.db"),
        ("sqlite+pysqlcipher://:pa55@/mlflow.db", "sqlite+pysqlcipher:///mlflow.db"),
    ],
)
def test_address_is_shown_without_its_secrets(uri, shown):
    assert connection.printable(uri) == shown


@pytest.mark.parametrize(
    "uri",
    [
        *("sqlite:////dev/null", "sqlite:///pipe", "sqlite:///.", "sqlite:///a%00b.db"),
        *(f"sqlite:///{'x' * 300}.db", f"sqlite:///{'y/' * 3000}m.db", "postgresql+none://h/db"),
    ],
)
def test_store_that_cannot_be_opened(uri, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"^error: the (local )?store .*\nhint:  [^\n]+$"):
        connection.connect(uri)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "unit", ["x", " ", "\n", "'", "(", "<", "[Errno 2] ", "host='", "\x1b[", "1"]
)
def test_long_text_of_a_server(unit, user):
    """Some login pages are long, and MLflow puts all of it into its message."""
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    for start in (
        "",
        "API request to endpoint /x failed with error code 403 != 200. Response body: '",
    ):
        error = MlflowException(start + unit * (400_000 // len(unit)))
        of_system(error)
        failure = connection.diagnose(error)
        assert failure is None or len(str(failure)) < 2000


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ((400, b"[" * 100_000 + b"]" * 100_000), "web_page"),
        ((200, b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "web_page"),
        ((400, b'{"message": ' + b"9" * 5000 + b"}"), "refused"),
        ((200, b'{"experiments": ' + b"9" * 5000 + b"}"), "web_page"),
        ((200, b'{"experiments": "abc"}'), "web_page"),
        ((200, b'{"experiments": [{"creation_time": "NaN"}]}'), "web_page"),
        ((200, b"null"), "web_page"),
    ],
)
def test_answer_of_another_form(answer, kind, server, user):
    status, body = answer
    with Gateway(server, None) as box:
        box.fault = (status, {"Content-Type": "application/json"}, body)
        user(MLFLOW_TRACKING_URI=box.uri)
        with pytest.raises((ParseError, MlflowException, requests.RequestException)) as raised:
            connection.connect()
    failure = connection.diagnose(raised.value)
    assert failure.kind == kind and failure.code == 1


def test_empty_answer_and_a_server_below_a_path(server, user):
    """Nothing is MLflow's answer to an upload alone; what has no JSON may lie beside the API."""
    with Gateway(server, None) as box:
        user(MLFLOW_TRACKING_URI=box.uri)
        connection.connect()
        run_id = mlflow.MlflowClient().create_run("0").info.run_id
        box.fault = (200, {"Content-Type": "application/json"}, b"")
        with pytest.raises(MlflowException) as raised:
            mlflow.MlflowClient().set_tag(run_id, "lost", "1")
        assert connection.diagnose(raised.value).kind == "web_page"
        box.fault = (200, {"Content-Type": "text/plain"}, b"2.22.0")
        mlflow.set_tracking_uri(f"{box.uri}/mlflow")
        assert connection.server_version() == "2.22.0"


@pytest.mark.parametrize(("answers", "words"), [(False, "refused"), (True, "timeout expired")])
def test_database_that_is_away(answers, words, user):
    """MLflow would try for 100 s, and PostgreSQL's client wait for one that never says a word."""
    user(PGCONNECT_TIMEOUT="3")
    with socket.socket() as database:
        database.bind(("127.0.0.1", 0))
        if answers:
            database.listen()
        uri = f"postgresql+psycopg2://me:pa55@127.0.0.1:{database.getsockname()[1]}/mlflow"
        start = time.monotonic()
        with pytest.raises(sqlalchemy.exc.OperationalError) as raised:
            connection.connect(uri)
        assert time.monotonic() - start < 60
    failure = connection.diagnose(raised.value)
    assert failure.code == 75 and words in str(failure) and "pa55" not in str(failure)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("MLFLOW_HTTP_REQUEST_TIMEOUT", value) for value in ("", "soon", "0", "-1", "9" * 20)),
        *(("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "-1"), ("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1e9")),
        ("MLFLOW_TRACKING_INSECURE_TLS", "perhaps"),
        ("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "often"),  # read after the run has begun
        ("MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE", "10 MB"),  # read after the training
    ],
)
def test_impossible_value_of_a_variable_shows_at_once(name, value, user):
    user(**{name: value})
    with pytest.raises(UserError, match=f"^error: {name} has an impossible value: "):
        connection.connect("sqlite:///mlflow.db")


@pytest.mark.slow
def test_scripts_refuse_an_address_of_no_server(tmp_path):
    assert "the tracking address" in train("--tracking_uri", "ftp://host", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_registry_on_another_server_does_not_get_the_key(server, tmp_path):
    with Gateway(server, KEY) as other:
        error = train(
            cwd=tmp_path,
            MLFLOW_TRACKING_URI=server,
            MLFLOW_REGISTRY_URI=other.uri,
            AM_SC_API_KEY=KEY,
        )
    assert "MLFLOW_REGISTRY_URI names another server" in error
    assert other.requests == []


@pytest.mark.slow
def test_artifacts_on_another_server_do_not_get_the_key(tmp_path):
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.create_experiment("far", artifact_location="mlflow-artifacts://far.example/1")
    error = train("--experiment", "far", cwd=tmp_path)
    assert "the artifacts lie on another server, mlflow-artifacts://far.example/1" in error


@pytest.mark.slow
def test_run_id_in_the_environment_is_not_written_into(local):
    error = train(cwd=local.folder, MLFLOW_RUN_ID=local.run_id)
    assert f"MLflow would write into the run {local.run_id} again" in error


@pytest.mark.slow
def test_password_in_the_address_is_refused_and_not_printed(tmp_path):
    finished = run(
        *("train_mnist_mlflow.py", "--tracking_uri", "https://me:pa55word@host.invalid"),
        cwd=tmp_path,
        code=1,
    )
    assert "MLFLOW_TRACKING_PASSWORD" in finished.error
    assert "pa55word" not in finished.out + finished.err


@pytest.mark.slow
def test_key_that_no_header_can_carry(server, tmp_path):
    error = train(cwd=tmp_path, MLFLOW_TRACKING_URI=server, AM_SC_API_KEY="two\nlines-of-key")
    assert "no header can carry it" in error and "lines-of-key" not in error


@pytest.mark.slow
def test_local_store_in_a_folder_that_is_not_there(tmp_path):
    error = train("--tracking_uri", f"sqlite:///{tmp_path}/missing/mlflow.db", cwd=tmp_path)
    assert "cannot be written" in error and "missing" in error


@pytest.mark.slow
def test_local_store_that_is_no_database(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is no database" * 100)
    assert "mlflow.db is no SQLite database" in train(cwd=tmp_path)


@pytest.mark.slow
def test_deleted_experiment(local, tmp_path):
    client = mlflow.MlflowClient(local.uri)
    client.delete_experiment(client.create_experiment("deleted one"))
    error = train("--experiment", "deleted one", "--tracking_uri", local.uri, cwd=tmp_path)
    assert "was deleted" in error
