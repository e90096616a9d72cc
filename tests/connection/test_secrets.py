"""The key and the token go to the tracking server only: everything else is searched for them."""

import logging
import os
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

import mlflow
import pytest
import requests
from conftest import ROOT, clean_environment, free_port, mlflow_server, run, serving
from gateway import BODY_LIMIT, Gateway

from common import connection
from common.connection.credentials import Credentials

pytestmark = pytest.mark.slow

KEY = "key-to-search-for-0123456789"
TOKEN = "token-to-search-for-0123456789"


def found_in(folder):
    """The files below a folder that hold a secret. Weights lie uncompressed in their archives."""
    secrets = (KEY.encode(), TOKEN.encode())
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(secret in path.read_bytes() for secret in secrets)]


def test_the_search_would_find_one(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"\0..." + KEY.encode() + b"...")
    assert found_in(tmp_path) == [tmp_path / "deep" / "file"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory, tls):
    """All five scripts and the check through a box, well and badly.

    Everything that is written is below one folder: the server's database, artifacts and log, the
    working directory, the home directory, TMPDIR, the shared filesystem.
    """
    import torch

    from common import training

    folder, results = tmp_path_factory.mktemp("scene"), {}
    for name in ("server", "work", "home", "tmp"):
        (folder / name).mkdir()
    torch.save(training.MNISTCNN().state_dict(), folder / "work" / "weights.pth")
    digits = ("--dataset", "digits")
    outputs = []

    def script(name, *arguments, **extra):
        finished = run(name, *arguments, cwd=folder / "work", **variables | extra)
        outputs.append(finished.out + finished.err)
        if finished.code == 0:
            results[name] = finished.result | {"printed": finished.out, "until": len(box.requests)}
        return results.get(name)

    with (
        mlflow_server(folder / "server") as uri,
        Gateway(uri, KEY, tls=tls[0]) as box,
        Gateway(uri, None) as elsewhere,
    ):
        variables = {
            "MLFLOW_TRACKING_URI": box.uri,
            "MLFLOW_TRACKING_SERVER_CERT_PATH": str(tls[1]),
            "AM_SC_API_KEY": KEY,
            "MLFLOW_TRACKING_TOKEN": TOKEN,
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "tmp"),
            "MLFLOW_LOGGING_LEVEL": "DEBUG",
        }
        name = ("--model_name", "SERVED_CNN")
        run_id = script("train_mnist_mlflow.py", *digits, "--register", *name)["run_id"]
        script("register_and_inference.py", "--run_id", run_id, *name)
        name = ("--model_name", "UPLOADED_CNN", "--alias", "candidate")
        script("upload_external_model.py", "--model_path", "weights.pth", *digits, *name)
        target, name = ("--target_path", folder / "shared"), ("--model_name", "LARGE_CNN")
        run_id = script("Modify_artifact_location.py", *digits, *target)["run_id"]
        script("Modify_artifact_location_register_inference.py", "--run_id", run_id, *name)
        store = mlflow.MlflowClient(uri)
        found = {
            "run": store.get_run(results["train_mnist_mlflow.py"]["run_id"]),
            "SERVED_CNN": store.get_model_version_by_alias("SERVED_CNN", "production"),
            "UPLOADED_CNN": store.get_model_version_by_alias("UPLOADED_CNN", "candidate"),
            "LARGE_CNN": store.get_model_version_by_alias("LARGE_CNN", "production"),
        }
        box.body_limit = 1_500_000
        script("scripts/check_connection.py")
        # Badly: an error page that repeats the request's headers, first and in the middle.
        box.fault = "echo"
        script("scripts/check_connection.py", code=21)
        box.fault_on = lambda method, path: "log-batch" in path
        script("train_mnist_mlflow.py", *digits, code=1)
        box.fault, box.redirect_to = "redirect", elsewhere.uri
        script("train_mnist_mlflow.py", *digits, code=1)
    return Scene(folder, outputs, box, elsewhere, results, found)


class Scene(NamedTuple):
    folder: Path
    outputs: list  # what each script printed
    box: Gateway
    elsewhere: Gateway  # where a redirect leads
    results: dict  # the last line of each script that succeeded, and how many requests there were
    found: dict  # what was looked up in the store when all five had succeeded


def test_every_request_carries_the_key(scene):
    assert scene.box.requests
    assert [r.path for r in scene.box.requests if r.headers.get("x-api-key") != KEY] == []


def test_what_is_trained_is_tracked_registered_and_promoted(scene):
    """The plot, the predictions and the model go through the gateway, each once."""
    trained = scene.results["train_mnist_mlflow.py"]
    registered = scene.results["register_and_inference.py"]
    words = "(from MLFLOW_TRACKING_URI; X-Api-Key from AM_SC_API_KEY, bearer token from "
    words += "MLFLOW_TRACKING_TOKEN)"
    _, first, second = trained["printed"].splitlines()[:3]  # after the line of the imports
    assert first == f"tracking {scene.box.uri}  {words}"
    run_id = trained["run_id"]
    assert second.endswith(f"/runs/{run_id}") and second.startswith(f"run      {run_id}")
    sent = [r.path for r in scene.box.requests[: trained["until"]] if r.method == "PUT"]
    for name in ("confusion_matrix.png", "predictions/test.json", "MLmodel", "model.pt2"):
        assert sum(path.endswith(name) for path in sent) == 1, name
    run, version = scene.found["run"], scene.found["SERVED_CNN"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val_accuracy"] == trained["val_accuracy"]
    assert (trained["model_version"], registered["model_version"]) == ("1", "2")
    assert (str(version.version), version.run_id) == ("2", run_id)
    assert registered["val_accuracy"] == trained["val_accuracy"]


def test_what_is_uploaded_is_registered(scene):
    uploaded = scene.results["upload_external_model.py"]
    start = scene.results["register_and_inference.py"]["until"]
    sent = scene.box.requests[start : uploaded["until"]]
    assert any(r.method == "PUT" and r.path.endswith("model.pt2") for r in sent)
    assert scene.found["UPLOADED_CNN"].run_id == uploaded["run_id"]


def test_large_model_pair_sends_no_file_to_the_server(scene):
    trained = scene.results["Modify_artifact_location.py"]
    registered = scene.results["Modify_artifact_location_register_inference.py"]
    assert registered["model_path"] == trained["model_path"]
    assert registered["val_accuracy"] == trained["val_accuracy"]
    start = scene.results["upload_external_model.py"]["until"]
    sent = scene.box.requests[start : registered["until"]]
    assert sent and [r.path for r in sent if "mlflow-artifacts" in r.path] == []
    assert scene.found["LARGE_CNN"].run_id == trained["run_id"]


def test_nothing_is_left_behind(scene):
    """In the working directory; and MLflow leaves each model that it downloads in TMPDIR."""
    assert [path.name for path in (scene.folder / "work").iterdir()] == ["weights.pth"]
    assert [path for path in (scene.folder / "tmp").rglob("*") if path.is_file()] == []


def test_nothing_that_was_printed_holds_a_secret(scene):
    assert scene.outputs
    repeated = sum("<secret>" in text for text in scene.outputs)
    assert repeated == 2, "the error pages were not repeated"
    for text in scene.outputs:
        assert KEY not in text and TOKEN not in text


def test_nothing_that_was_written_holds_a_secret(scene):
    names = {path.name for path in scene.folder.rglob("*")}
    assert {"mlflow.db", "server.log", "model.pt2", "MLmodel", "confusion_matrix.png"} <= names
    assert found_in(scene.folder) == []


def test_nothing_was_sent_to_where_a_redirect_leads(scene):
    assert scene.elsewhere.requests == []


def test_no_traceback_holds_a_secret(tmp_path):
    """Of an error that nobody expected; here one whose text is the secrets."""
    script = tmp_path / "unexpected.py"
    script.write_text(
        "import os, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from common import cli\n"
        "def main():\n"
        "    import mlflow\n"
        "    raise ValueError(os.environ['AM_SC_API_KEY'] + os.environ['MLFLOW_TRACKING_TOKEN'])\n"
        "cli.run(main)\n"
    )
    variables = {"AM_SC_API_KEY": KEY, "MLFLOW_TRACKING_TOKEN": TOKEN}
    finished = run(script, ROOT, cwd=tmp_path, code=1, **variables)
    assert "Traceback" in finished.err and "ValueError: <secret><secret>" in finished.err


def test_what_servers_repeat_is_struck_out(monkeypatch):
    """Keys before the present one, too; quoted as HTML and JSON; a password in Basic's code."""
    sender = Credentials()
    monkeypatch.setattr("common.connection.credentials.CREDENTIALS", sender)
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "https://127.0.0.1:9")

    def send(key):
        monkeypatch.setenv("AM_SC_API_KEY", key)
        sender(requests.Request("GET", "https://127.0.0.1:9/").prepare())

    send("first&key-0123")
    send("second-key-0123")
    monkeypatch.delenv("AM_SC_API_KEY")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pa55word")
    text = "first&key-0123 first&amp;key-0123 second-key-0123 pa55word Basic bWU6cGE1NXdvcmQ= seen"
    shown = connection.without_secrets(text)
    assert shown == "<secret> <secret> <secret> <secret> Basic <secret> seen"
    send("aB3/xY+z9Qw/12==")
    for again in (
        *("aB3/xY%2Bz9Qw/12%3D%3D", "aB3%2fxY%2bz9Qw%2f12==", r"aB3\/xY+z9Qw\/12=="),
        *("aB3&#x2F;xY&#43;z9Qw&sol;12&equals;=", r"aB3\u002FxY\u002bz9Qw/12\u003d\u003D"),
    ):
        assert connection.without_secrets(f"key={again}.") == "key=<secret>."
    assert connection.without_secrets("aB3/xY-z9Qw/12==") == "aB3/xY-z9Qw/12=="
    send("e")
    assert connection.without_secrets("these") == "these"


def test_artifacts_of_a_new_experiment_elsewhere_do_not_get_the_key(tls, tmp_path):
    """The server decides where a new experiment keeps its files; here, on another server."""
    with (
        Gateway("http://127.0.0.1:9", None, tls=tls[0]) as elsewhere,
        mlflow_server(
            tmp_path,
            *("--default-artifact-root", elsewhere.uri.replace("https", "mlflow-artifacts")),
        ) as server,
        Gateway(server, KEY, tls=tls[0]) as box,
    ):
        variables = {
            "MLFLOW_TRACKING_URI": box.uri,
            "MLFLOW_TRACKING_SERVER_CERT_PATH": str(tls[1]),
            "AM_SC_API_KEY": KEY,
        }
        train = ("train_mnist_mlflow.py", "--dataset", "digits")
        finished = run(*train, cwd=tmp_path, code=1, **variables)
        assert "the artifacts lie on another server" in finished.error
        finished = run("scripts/check_connection.py", cwd=tmp_path, code=31, **variables)
        assert "the artifacts lie on another server" in finished.error
        assert box.requests and elsewhere.requests == []


# An object store behind the server: large files go to it in parts, past the gateway.


@pytest.fixture(scope="module")
def object_store(tmp_path_factory):
    """A stand-in for S3, behind a gateway that lets everything in and records it."""
    folder, port = tmp_path_factory.mktemp("s3"), free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    url = f"http://127.0.0.1:{port}"
    with (
        serving(command, folder, clean_environment(), f"{url}/moto-api/", folder / "log"),
        Gateway(url, None, body_limit=1 << 40) as store,
    ):
        bucket = urllib.request.Request(f"{store.uri}/models", method="PUT")
        urllib.request.urlopen(bucket).close()
        yield store


@pytest.fixture(scope="module")
def s3_server(object_store, tmp_path_factory):
    variables = {
        "MLFLOW_S3_ENDPOINT_URL": object_store.uri,
        "AWS_ACCESS_KEY_ID": "store",
        "AWS_SECRET_ACCESS_KEY": "store-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with mlflow_server(
        tmp_path_factory.mktemp("s3"), artifacts="s3://models/art", **variables
    ) as uri:
        yield uri


@pytest.fixture
def s3_box(s3_server, object_store, tls):
    """(gateway, variables to export) of a server that offers multipart upload."""
    with Gateway(s3_server, KEY, tls=tls[0], body_limit=2_000_000) as box:
        variables = {
            "MLFLOW_TRACKING_URI": box.uri,
            "MLFLOW_TRACKING_SERVER_CERT_PATH": str(tls[1]),
            "AM_SC_API_KEY": KEY,
            "MLFLOW_TRACKING_TOKEN": TOKEN,
        }
        yield box, variables
    object_store.fault = None


def test_model_beyond_the_limit_goes_in_parts_without_the_key(s3_box, object_store, tmp_path):
    """The limit is put below the size of the model here, and so is where parts begin."""
    box, variables = s3_box
    before = len(object_store.requests)
    finished = run(
        *("train_mnist_mlflow.py", "--dataset", "digits", "--register"),
        cwd=tmp_path,
        MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE="1000000",
        **variables,
    )
    assert finished.result["alias"] == "production"
    assert not [r for r in box.requests if r.status == 413]
    assert max(r.size for r in box.requests) < 2_000_000
    from_client = [r for r in object_store.requests[before:] if "Signature=" in r.path]
    assert max(r.size for r in from_client if r.method == "PUT") > 2_000_000
    assert any(r.method == "GET" for r in from_client), "loading went past the gateway, too"
    for request in from_client:
        assert "x-api-key" not in request.headers
        assert TOKEN not in str(request) and KEY not in str(request)


def test_check_uploads_in_parts(s3_box, object_store, tmp_path):
    _, variables = s3_box
    finished = run("scripts/check_connection.py", cwd=tmp_path, **variables)
    store = object_store.uri.removeprefix("http://")
    assert finished.result["multipart"] == f"works; the parts go to {store}"
    assert finished.result["body_limit"].startswith("2 MB pass, 3 MB do not")


def test_object_store_that_takes_no_parts(s3_box, object_store, tmp_path):
    box, variables = s3_box
    object_store.fault = "403"
    object_store.fault_on = lambda method, path: "partNumber" in path
    finished = run(
        *("train_mnist_mlflow.py", "--dataset", "digits"),
        cwd=tmp_path,
        code=1,
        MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE="1000000",
        **variables,
    )
    assert "the object store 127.0.0.1" in finished.error
    assert "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD=false" in finished.error
    check = run("scripts/check_connection.py", cwd=tmp_path, code=27, **variables)
    assert check.result["multipart"] == "FAILED, exit code 27"
    (kept,) = os.listdir(tmp_path)
    assert kept.startswith("checkpoint-") and kept in finished.error


def test_check_says_that_parts_are_switched_off(s3_box, tmp_path):
    _, variables = s3_box
    switch = {"MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false"}
    finished = run("scripts/check_connection.py", cwd=tmp_path, **variables, **switch)
    assert finished.result["multipart"] == f"switched off by {next(iter(switch))}"


# MLflow is imported before the settings are made, as in the scripts.
UPLOAD = """
import sys

import mlflow

from common import cli, connection


def main():
    connection.connect()
    with mlflow.start_run() as run, open("zeros.bin", "wb") as file:
        file.truncate(int(sys.argv[1]))
        mlflow.log_artifact(file.name)
    cli.print_result(artifact_uri=run.info.artifact_uri)


cli.run(main)
"""


def upload(size, folder, code=0, **variables):
    script = folder / "upload.py"
    script.write_text(UPLOAD)
    return run(script, size, cwd=folder, code=code, PYTHONPATH=str(ROOT), **variables)


@pytest.mark.parametrize("says_so", [True, False])
def test_large_file_goes_in_parts_by_default(says_so, s3_box, object_store, tmp_path):
    """Also if the server does not say that it offers that: most versions of MLflow do not."""
    box, variables = s3_box
    box.body_limit = BODY_LIMIT
    if not says_so:
        box.fault, box.fault_on = (404, {}, b""), lambda method, path: "server-info" in path
    before = len(object_store.requests)
    finished = upload(20_000_000, tmp_path, **variables)
    assert finished.err == ""
    sent = [r for r in object_store.requests[before:] if "partNumber=" in r.path]
    assert sorted(r.size for r in sent) == [20_000_000 - 10 * 2**20, 10 * 2**20]
    assert max(r.size for r in box.requests) < 10_000
    path = finished.result["artifact_uri"].removeprefix("mlflow-artifacts:/")
    stored = urllib.request.Request(
        f"{object_store.uri}/models/art/{path}/zeros.bin", method="HEAD"
    )
    with urllib.request.urlopen(stored) as answer:
        assert answer.headers["Content-Length"] == "20000000"


def test_large_file_where_the_server_takes_no_parts(box, box_variables, tmp_path):
    """It goes whole, and nothing is said, up to the gateway's limit."""
    finished = upload(12_000_000, tmp_path, **box_variables)
    assert finished.err == ""
    asked, sent = [r for r in box.requests if "/mlflow-artifacts/" in r.path]
    assert ("/mpu/create/" in asked.path, asked.status) == (True, 501)
    assert (sent.method, sent.size, sent.status) == ("PUT", 12_000_000, 200)
    finished = upload(20_000_000, tmp_path, code=1, **box_variables)
    assert "(error 413): the gateway's limit is lower" in finished.error
    assert "Traceback" not in finished.err and "WARNING" not in finished.err


def test_what_mlflow_logs_of_a_servers_words(user, capsys):
    """Its thread for system metrics does; and where a log has been opened before."""
    user(MLFLOW_TRACKING_TOKEN=TOKEN)
    connection.settle()
    connection.settle()
    logging.getLogger("mlflow.system_metrics").warning("forbidden for %s", f"Bearer {TOKEN}")
    assert capsys.readouterr().err.endswith("forbidden for Bearer <secret>\n")
