"""Bearer tokens: where they come from, where they go, how long they last. Versions of servers."""

import base64
import os
import time

import mlflow
import pytest
from conftest import fails, run
from gateway import Gateway, jwt
from test_credentials import OWN, sent_to

from common import connection
from common.connection import secret
from common.connection.address import AMSC_TOKEN_URIS
from common.errors import UserError

HOUR, CHECK = 3600, "scripts/check_connection.py"
TRAIN = ("train_mnist_mlflow.py", "--dataset", "digits")


@pytest.fixture
def token_file(tmp_path, user):
    path = tmp_path / "token"
    path.touch(mode=0o600)
    user(MLFLOW_TRACKING_TOKEN_FILE=str(path))
    return path


def test_token_from_a_file_is_read_for_each_request(token_file):
    for token in ("first-token-0123456789", "second-token-0123456789\n"):
        token_file.write_text(token)
        assert sent_to(f"{OWN}/api")["Authorization"] == f"Bearer {token.strip()}"
    words = "bearer token from MLFLOW_TRACKING_TOKEN_FILE"
    assert connection.credential() == words
    # As the key's file, it comes before the variable.
    os.environ["MLFLOW_TRACKING_TOKEN"] = "token-of-yesterday"
    sent = sent_to(f"{OWN}/api", Authorization="Bearer token-of-yesterday")
    assert sent["Authorization"] == f"Bearer {token.strip()}"


def test_user_and_password_come_before_a_token(token_file):
    token_file.write_text("a-token-0123456789")
    sent = sent_to(f"{OWN}/api", Authorization="Basic bWU6cGE1NXdvcmQ=")
    assert sent["Authorization"] == "Basic bWU6cGE1NXdvcmQ="


def test_login_in_a_file_of_mlflow_is_named(token_file, user, tmp_path):
    """MLflow takes it in place of the token, without a word."""
    token_file.write_text("a-token-0123456789")
    login = tmp_path / ".mlflow" / "credentials"
    login.parent.mkdir()
    lines = ("[mlflow]", "mlflow_tracking_username = me", "mlflow_tracking_password = pa55word")
    login.write_text("\n".join(lines))
    user(HOME=str(tmp_path))
    mlflow.set_tracking_uri(OWN)
    words = "user and password from ~/.mlflow/credentials, in place of the token"
    assert connection.credential() == words


@pytest.mark.parametrize("url", ["http://own.example/api", "https://far.example/api"])
def test_token_from_a_file_goes_nowhere_else(url, token_file):
    token_file.write_text("a-token-0123456789")
    if "own" in url:  # plain http
        assert "Authorization" not in sent_to(url, "http://own.example")
    else:
        with pytest.raises(UserError, match="no credential must go there"):
            sent_to(url)


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        ("a-token", 0o640, "the token file .* is open to others than its owner"),
        ("", 0o600, "there is no token in MLFLOW_TRACKING_TOKEN_FILE, .*it is empty"),
        ("two\nlines", 0o600, "MLFLOW_TRACKING_TOKEN_FILE holds .*no header can carry it"),
        (None, 0o600, "there is no token in .*No such file"),
    ],
)
def test_token_file_that_cannot_be_used(content, mode, words, token_file):
    token_file.unlink()
    if content is not None:
        token_file.write_text(content)
        token_file.chmod(mode)
    with pytest.raises(UserError, match=words):
        sent_to(f"{OWN}/api")


def test_expired_token(user, capsys):
    user(MLFLOW_TRACKING_TOKEN=jwt(exp=time.time() - 60))
    with pytest.raises(UserError, match="the token in MLFLOW_TRACKING_TOKEN expired at 20"):
        secret.check_token()
    mlflow.set_tracking_uri(OWN)
    assert "expired at 20" in connection.credential()
    user(MLFLOW_TRACKING_TOKEN=jwt(exp=time.time() + 60))
    secret.check_token()
    assert capsys.readouterr().err == ""
    until = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + 60))
    assert f"bearer token from MLFLOW_TRACKING_TOKEN valid until {until[:13]}" in (
        connection.credential()
    )


@pytest.mark.parametrize(
    ("end", "warned"),
    [
        ({"SLURM_JOB_END_TIME": HOUR + 600}, True),
        ({"SLURM_JOB_END_TIME": HOUR - 600}, False),
        ({"PBS_WALLTIME": "7200"}, True),
        ({"PBS_WALLTIME": "1800"}, False),
        ({"SLURM_JOB_END_TIME": "soon"}, False),
        ({"SLURM_JOB_END_TIME": "inf"}, False),
        ({}, False),
    ],
)
def test_token_and_the_end_of_the_job(end, warned, user, capsys):
    """Slurm gives a time, PBS a duration."""
    now = int(time.time())
    end = {n: str(now + v) if isinstance(v, int) else v for n, v in end.items()}
    user(MLFLOW_TRACKING_TOKEN=jwt(exp=now + HOUR), **end)
    secret.check_token()
    err = capsys.readouterr().err
    assert bool(err) == warned
    assert not warned or ("and this job may last until" in err and "_TOKEN_FILE" in err)


@pytest.mark.parametrize(
    "token",
    [
        "no-jwt-at-all",
        "a.b.c",
        "a.bm90IGpzb24.c",
        f"a.{'W' * 6}.c",
        jwt(exp="tomorrow"),
        jwt(exp=1e300),
        jwt(exp=-1),
        jwt(exp=True),
        jwt(exp=float("nan")),
        f"a.{base64.urlsafe_b64encode(b'[' * 200_000).decode()}.c",
    ],
)
def test_token_that_says_nothing_of_its_end(token, user, capsys):
    user(MLFLOW_TRACKING_TOKEN=token, SLURM_JOB_END_TIME=str(int(time.time()) + HOUR))
    secret.check_token()
    assert secret.validity(token) == "" and capsys.readouterr().err == ""


@pytest.mark.parametrize("claims", [{"typ": "ID"}, {"token_use": "id"}, {"at_hash": "x"}])
def test_id_token_is_told_from_an_access_token(claims, user, capsys):
    user(MLFLOW_TRACKING_TOKEN=jwt(**claims))
    secret.check_token()
    assert "seems to hold an ID token" in capsys.readouterr().err
    user(MLFLOW_TRACKING_TOKEN=jwt(typ="Bearer", token_use="access"))
    secret.check_token()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("key", [{}, {"AM_SC_API_KEY": "some-key-0123456789"}])
@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_TOKEN_FILE"])
def test_token_without_an_address(name, key, user):
    """It would go to the wrong server, or the run into a local file without a word."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    user(**{name: "a-token-0123456789"}, **key)
    with pytest.raises(UserError, match=f"{name} is set, and no tracking address") as raised:
        connection.address()
    assert "mlflow-staging.american-science-cloud.org" in raised.value.hint
    assert "a-token" not in str(raised.value)
    assert connection.address("sqlite:///mlflow.db")[0] == "sqlite:///mlflow.db"


@pytest.mark.parametrize("key", [{}, {"AM_SC_API_KEY": "some-key-0123456789"}])
def test_amsc_server_that_wants_a_token(key, user):
    """A key alone is sent there, in case that the server takes it."""
    user(**key)
    mlflow.set_tracking_uri(connection.address(AMSC_TOKEN_URIS[0])[0])
    if key:
        assert connection.credential() == "X-Api-Key from AM_SC_API_KEY"
        return
    with pytest.raises(UserError, match="MLFLOW_TRACKING_TOKEN is not set, so the AmSC"):
        connection.credential()


@pytest.mark.slow
def test_expired_token_is_an_error_before_anything_is_sent(server, tmp_path):
    token = jwt(exp=time.time() - 60)
    with Gateway(server, None, users={token: None}) as gateway:
        variables = {"MLFLOW_TRACKING_URI": gateway.uri, "MLFLOW_TRACKING_TOKEN": token}
        message = fails(*TRAIN, cwd=tmp_path, **variables)
        assert "expired at" in message and token not in message
        checked = run(CHECK, cwd=tmp_path, code=11, **variables)
        assert "expired at" in checked.error
        assert gateway.requests == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        ("/version", b"2.22.5", "the server runs MLflow 2.22.5, and the scripts need 3.0"),
        (
            "/server-info",
            b'{"workspaces_enabled": false, "artifacts_presigned_only": true}',
            "the server takes files by direct upload only",
        ),
    ],
)
def test_server_and_client_that_do_not_fit(path, answer, words, server, tmp_path):
    """Before any work. The client's version is said, too."""
    with Gateway(server, None) as gateway:

        def is_another(method, asked):  # an old one has no logged models, either
            status = 404 if asked.endswith("/logged-models/search") else 200
            gateway.fault = (status, {"Content-Type": "application/json"}, answer)
            return status == 404 or asked.endswith(path)

        gateway.fault_on = is_another
        message = fails(*TRAIN, cwd=tmp_path, MLFLOW_TRACKING_URI=gateway.uri)
        assert words in message and mlflow.__version__ in message
        assert not [r for r in gateway.requests if r.method != "GET" and "create" in r.path]


@pytest.mark.parametrize(
    "answer", [(404, {}, b"not here"), (200, {}, b"<html>3.1</html>"), (200, {}, b"1.27.0\n")]
)
def test_gateway_that_withholds_the_version(answer, server, user):
    """Or tells its own."""
    with Gateway(server, None) as gateway:
        gateway.fault, gateway.fault_on = answer, lambda method, path: path.endswith("/version")
        user(MLFLOW_TRACKING_URI=gateway.uri)
        connection.connect()
        assert connection.server_version() in (None, "1.27.0")
