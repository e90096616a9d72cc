"""The connection on its bad days: each fault has its message and exit code, in bounded time.

A fault that is there from the start ends every script before it does any work; one that comes in
the middle ends the run as FAILED. scripts/check_connection.py tells them apart one by one.
"""

import functools
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gateway
import mlflow
import pytest
import requests
from conftest import (
    KEY,
    ROOT,
    SCRIPTS,
    SECONDS,
    clean_environment,
    fails,
    run,
    training_process,
    wait_for_line,
)
from gateway import Gateway
from mlflow.exceptions import MlflowException

from common import connection

CHECK = "scripts/check_connection.py"

ARGUMENTS = {
    "train_mnist_mlflow.py": ("--dataset", "digits"),
    "register_and_inference.py": ("--run_id", "0" * 32),
    "upload_external_model.py": ("--model_path", "weights.pth", "--dataset", "digits"),
    "Modify_artifact_location.py": ("--dataset", "digits", "--target_path", "shared"),
    "Modify_artifact_location_register_inference.py": ("--run_id", "0" * 32),
    CHECK: (),
}

# (what goes wrong, its kind, exit code of the scripts, of the check, words of the message)
FAULTS = [
    ("401", "unauthenticated", 1, 20, "refuses access (error 401)"),
    ("403", "forbidden", 1, 21, "forbids the request (error 403)"),
    ("429", "too_many_requests", 75, 23, "too many requests (error 429)"),
    ("500", "server_error", 75, 24, "an error of its own (error 500)"),
    ("503", "unavailable", 75, 25, "is not available (error 503)"),
    ("json", "unauthenticated", 1, 20, "refuses access (error 401), and says: No API key found"),
    ("login", "web_page", 1, 19, "answers with a web page"),
    ("redirect", "redirect", 1, 18, "redirects to another address"),
    ("echo", "forbidden", 1, 21, "forbids the request (error 403)"),
    ("late", "unavailable", 75, 25, "is not available (error 502)"),
    ("hang", "timeout", 75, 16, "did not answer in time"),
    ("drip", "timeout", 75, 16, "did not answer in time"),
    ("drop", "dropped", 75, 17, "dropped the connection halfway"),
    ("down", "no_server", 75, 14, "no server answers at"),
]


@pytest.fixture
def folder(tmp_path):
    """A working directory with weights for the script that asks for some."""
    import torch

    from common import training

    torch.save(training.MNISTCNN().state_dict(), tmp_path / "weights.pth")
    return tmp_path


@pytest.fixture
def check(prefork, tmp_path):
    """Runs check_connection.py, forked from a process that has imported MLflow."""
    return functools.partial(run, CHECK, cwd=tmp_path, timeout=SECONDS, prefork=prefork)


def break_down(box, fault):
    box.die() if fault == "down" else setattr(box, "fault", fault)


def test_every_fault_is_injected():
    assert {fault for fault, *_ in FAULTS} == set(gateway.FAULTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "script"),
    list(zip(("401", "503", "login", "hang", "down"), SCRIPTS, strict=True)),
)
def test_fault_before_work_starts(fault, script, box, box_variables, folder):
    """One for each script: what they share is `connect`, which the check below meets with all."""
    _, code, check_code, words = {name: rest for name, *rest in FAULTS}[fault]
    code = check_code if script == CHECK else code
    before = sorted(folder.iterdir())
    break_down(box, fault)
    error = fails(script, *ARGUMENTS[script], code=code, cwd=folder, **box_variables)
    assert words in error and error.count("\n") == 2
    left = set(folder.iterdir()) - set(before) - {folder / "shared"}
    assert left == set(), "something was written before the server had answered"
    # At most the first try and two more, whatever the server's Retry-After says.
    assert len(box.requests) <= 3


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "kind", "code", "check_code", "words"), FAULTS)
def test_fault_has_its_kind_and_code(
    fault, kind, code, check_code, words, box, box_variables, user
):
    """In this process: what `connect` raises, and what `diagnose` makes of it."""
    user(**box_variables)
    break_down(box, fault)
    with pytest.raises((MlflowException, requests.RequestException)) as raised:
        connection.connect()
    failure = connection.diagnose(raised.value)
    assert (failure.kind, failure.code) == (kind, code)
    assert words in failure.what and KEY not in str(failure)
    assert str(failure).count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "words"), [(fault, code, words) for fault, _, _, code, words in FAULTS]
)
def test_check_names_each_fault(fault, code, words, box, box_variables, check):
    break_down(box, fault)
    finished = check(code=code, **box_variables)
    assert words in finished.error and "Traceback" not in finished.err
    assert finished.result["exit_code"] == code
    assert words in finished.result["failures"][0]
    assert f"FAILED, exit code {code}" in finished.out
    assert KEY not in finished.out + finished.err
    assert all(r.headers.get("x-api-key") == KEY for r in box.requests)


@pytest.mark.slow
def test_answer_of_another_form(box, box_variables, check):
    """It is JSON, and not MLflow's."""
    box.fault = (200, {"Content-Type": "application/json"}, b'{"experiments": "x"}')
    finished = check(code=19, **box_variables)
    assert "not as an MLflow server" in finished.error
    assert finished.result["exit_code"] == 19


@pytest.mark.slow
def test_short_trouble_is_waited_out(box, box_variables, check):
    """And then an answer: a batch job does not die of that."""
    left = iter(range(2))
    box.fault, box.fault_on = "503", lambda method, path: next(left, None) is not None
    box.body_limit = 1_500_000
    assert "granted" in check(**box_variables).out
    assert [r.status for r in box.requests[:3]] == [503, 503, 200]


# Faults in the middle of the work


def artifact_put(method, path):
    return method == "PUT" and "/mlflow-artifacts/" in path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("redirect", 1, "redirects to another address"),
        ("503", 75, "is not available (error 503)"),
        ("drop", 75, "dropped the connection halfway"),
        ("413", 1, "Modify_artifact_location.py"),
    ],
)
def test_fault_at_the_upload_fails_the_run(
    fault, code, words, box, box_variables, server, prefork, folder
):
    """Of the model or of what comes before it: one message, and the run says FAILED."""
    if fault == "413":
        box.body_limit = 1_000_000
    else:
        box.fault, box.fault_on = fault, artifact_put
    arguments = ("--dataset", "digits", "--experiment", f"upload {fault}", "--register")
    error = fails(
        "train_mnist_mlflow.py",
        *(*arguments, "--model_name", f"NEVER_{fault}"),
        code=code,
        cwd=folder,
        prefork=prefork,
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="1",  # a user's own choice; by default minutes
        **box_variables,
    )
    assert words in error and error.count("\n") == 2
    (kept,) = folder.glob("checkpoint-*")
    assert (kept / "training.pt").stat().st_size > 4_000_000 and str(kept) in error
    if fault == "413":
        assert re.search(r"a request of \d+\.\d MB", error)
        assert len([r for r in box.requests if r.status == 413]) == 1, "it was tried again"
    client = mlflow.MlflowClient(server)
    experiment = client.get_experiment_by_name(f"upload {fault}")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FAILED"
    models = client.search_logged_models([experiment.experiment_id])
    assert {model.status for model in models} <= {"FAILED"}
    assert not client.search_registered_models(f"name = 'NEVER_{fault}'")


LOST = [
    ("login", "web_page"),
    ("redirect", "redirect"),
    ((302, {"Location": "/login"}, gateway.LOGIN_PAGE), "redirect"),
    ((303, {"Content-Type": "application/json"}, b"{}"), "redirect"),
    ((200, {"Content-Type": "text/plain"}, b"\n <html>busy"), "web_page"),
    ((200, {"Content-Type": "text/plain"}, b"Please sign in"), "web_page"),
    ((201, {"Content-Type": "application/json"}, b'["quota exceeded"]'), "web_page"),
    ((204, {}, b""), "web_page"),
    (
        (200, {"Content-Type": "application/json"}, b'{"error_code": "X", "message": "no"}'),
        "web_page",
    ),
    ((400, {"Content-Type": "application/json"}, b'{"error_code": ["X"]}'), "web_page"),
]


@pytest.mark.parametrize(("fault", "kind"), LOST)
def test_upload_that_is_answered_by_something_else(fault, kind, box, box_variables, user, tmp_path):
    """MLflow takes all of these for success; so it does with a download."""
    user(**box_variables)
    connection.connect()
    client = mlflow.MlflowClient()
    run_id = client.create_run("0").info.run_id
    client.log_text(run_id, "kept", "kept.txt")
    (tmp_path / "file").write_text("lost")
    box.fault, box.fault_on = fault, lambda method, path: "/mlflow-artifacts/" in path
    acts = [
        lambda: client.log_text(run_id, "lost", "file.txt"),
        lambda: client.log_artifacts(run_id, str(tmp_path)),
        lambda: client.list_artifacts(run_id),
    ]
    if kind == "redirect":
        acts.append(lambda: client.download_artifacts(run_id, "kept.txt", str(tmp_path)))
    for act in acts:
        with pytest.raises(MlflowException) as raised:
            act()
        failure = connection.diagnose(raised.value)
        assert (failure.kind, failure.code) == (kind, 1), repr(raised.value)


@pytest.mark.slow
def test_server_that_dies_and_comes_back_costs_nothing(box, box_variables, server, tmp_path):
    with training_process(tmp_path, "--epochs", "12", **box_variables) as process:
        run_id = wait_for_line(process, "run ").split()[1]
        wait_for_line(process, "epoch 2/")
        box.die()
        # Nothing comes through while it is away.
        threading.Timer(6, box.come_back).start()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    client = mlflow.MlflowClient(server)
    assert client.get_run(run_id).info.status == "FINISHED"
    steps = [metric.step for metric in client.get_metric_history(run_id, "val_accuracy")]
    assert steps == list(range(1, 13))


# The key


@pytest.mark.slow
def test_key_is_renewed_during_a_run(box, box_variables, server, tmp_path):
    key_file = tmp_path / "key"
    key_file.write_text("first-key-0123456789\n")
    key_file.chmod(0o600)
    box.key = "first-key-0123456789"
    del box_variables["AM_SC_API_KEY"]
    variables = box_variables | {"AM_SC_API_KEY_FILE": str(key_file)}
    with training_process(tmp_path, "--epochs", "12", **variables) as process:
        assert "X-Api-Key from AM_SC_API_KEY_FILE" in wait_for_line(process, "tracking ")
        run_id = wait_for_line(process, "run ").split()[1]
        wait_for_line(process, "epoch 2/")
        renewed = tmp_path / "key.new"
        renewed.touch(mode=0o600)
        renewed.write_text(KEY)
        # Between two requests, as far as the job is concerned: the old key is taken until then.
        both = ("first-key-0123456789", KEY)
        box._refusal = lambda headers: None if headers.get("x-api-key") in both else b"no key"
        renewed.replace(key_file)
        wait_for_line(process, "epoch 4/")
        box.key = KEY
        del box._refusal
        # Now something is wrong with the file: what has been read goes on.
        key_file.chmod(0o644)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err.count("is open to others than its owner") == 1
    assert err.count("The last one is used.") == 1
    assert mlflow.MlflowClient(server).get_run(run_id).info.status == "FINISHED"
    sent = [r.headers["x-api-key"] for r in box.requests]
    assert sent[0] == "first-key-0123456789" and sent[-1] == KEY


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (KEY, 0o640, "is open to others than its owner"),
        pytest.param(KEY, 0o604, "is open to others than its owner", marks=pytest.mark.slow),
        pytest.param(" \n", 0o600, "it is empty", marks=pytest.mark.slow),
        pytest.param("two\nlines", 0o600, "no header can carry it", marks=pytest.mark.slow),
        pytest.param(f'"{KEY}"', 0o600, "no header can carry it", marks=pytest.mark.slow),
        pytest.param(None, 0o600, "No such file", marks=pytest.mark.slow),
        pytest.param("a pipe", 0o600, "it is not a file", marks=pytest.mark.slow),
    ],
)
def test_key_file_that_cannot_be_used(content, mode, words, box, box_variables, check, tmp_path):
    key_file = tmp_path / "key"
    if content == "a pipe":  # which nobody will ever write into
        os.mkfifo(key_file, mode)
    elif content is not None:
        key_file.write_text(content)
        key_file.chmod(mode)
    variables = box_variables | {"AM_SC_API_KEY_FILE": str(key_file)}
    finished = check(code=11, **variables)
    assert words in finished.error
    assert KEY not in finished.out + finished.err
    assert box.requests == []
    if mode == 0o604:
        assert words in fails(
            "train_mnist_mlflow.py",
            *ARGUMENTS["train_mnist_mlflow.py"],
            code=1,
            cwd=tmp_path,
            **variables,
        )
        assert box.requests == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AM_SC_API_KEY", "AM_SC_API_KEY_FILE"])
def test_key_alone_chooses_the_amsc_server(name, tmp_path):
    """There is no proxy at that port, so the request ends at once, on any machine."""
    key_file = tmp_path / "key"
    key_file.write_text(KEY)
    key_file.chmod(0o600)
    finished = run(
        *("train_mnist_mlflow.py", "--dataset", "digits"),
        cwd=tmp_path,
        code=75,
        https_proxy="http://127.0.0.1:9",
        **{name: KEY if name == "AM_SC_API_KEY" else str(key_file)},
    )
    assert finished.out.splitlines()[1:] == [
        "tracking https://mlflow.american-science-cloud.org  "
        f"(the AmSC server, because {name} is set; X-Api-Key from {name})"
    ]
    assert "the proxy on the way" in finished.error
    assert KEY not in finished.out + finished.err


@pytest.mark.slow
def test_bearer_token(box, box_variables, check, tmp_path):
    """In place of the key; what was used is said, its value is not."""
    token = "bearer-token-0123456789"
    box.key, box.token = "another key", token
    del box_variables["AM_SC_API_KEY"]
    variables = box_variables | {"MLFLOW_TRACKING_TOKEN": token + "\n"}
    # With this, `requests` would send the password in place of the token.
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password of-another-place")
    variables["HOME"] = str(tmp_path)
    finished = run("train_mnist_mlflow.py", "--dataset", "digits", cwd=tmp_path, **variables)
    words = "(from MLFLOW_TRACKING_URI; bearer token from MLFLOW_TRACKING_TOKEN)"
    assert finished.out.splitlines()[1].endswith(words)
    assert box.artifact_uploads()
    assert {r.headers.get("authorization") for r in box.requests} == {f"Bearer {token}"}
    assert not [r for r in box.requests if "x-api-key" in r.headers]
    box.token = "renewed"
    refused = check(code=20, **variables)
    assert "sent: bearer token" in refused.error
    assert token not in finished.out + finished.err + refused.out + refused.err
    variables["MLFLOW_TRACKING_TOKEN"] = token.replace("-", " ")
    refused = check(code=11, **variables)
    assert "MLFLOW_TRACKING_TOKEN holds a space" in refused.error
    assert "0123456789" not in refused.out + refused.err


# The check's own findings


@pytest.fixture
def leftovers(server):
    """What a check leaves on the server: nothing that was not there before."""

    def state():
        client = mlflow.MlflowClient(server)
        return (
            {experiment.name for experiment in client.search_experiments()},
            {model.name for model in client.search_registered_models()},
        )

    return state


@pytest.mark.slow
def test_check_finds_all_well_and_cleans_up(box, box_variables, leftovers, server, tls, tmp_path):
    before = leftovers()
    box.body_limit = 5_000_000
    variables = box_variables | {"MLFLOW_TRACKING_SERVER_CERT_PATH": ""}
    finished = run(CHECK, "--ca_bundle", tls[1], cwd=tmp_path, **variables)
    found = finished.result
    assert found["exit_code"] == 0 and found["failures"] == []
    lines = finished.out.splitlines()[1:]
    assert len(lines) == len(found) - 2 + 1, "a line for each finding"
    assert found["address"] == f"{box.uri}  (from MLFLOW_TRACKING_URI)"
    assert found["credential"] == "X-Api-Key from AM_SC_API_KEY"
    assert found["ca_bundle"] == f"{tls[1]}  (from --ca_bundle)"
    assert "signed by Test Institute" in found["tls"] and found["tls"].endswith("; trusted")
    assert found["versions"] == f"server MLflow {mlflow.__version__}, client {mlflow.__version__}"
    assert found["body_limit"].startswith("5 MB pass, 6 MB do not")
    assert found["multipart"] == "not offered by the server"
    assert KEY not in finished.out + finished.err
    assert box.requests and all(r.headers.get("x-api-key") == KEY for r in box.requests)
    assert leftovers() == before
    folders = {r.path.split("/artifacts/", 1)[1] for r in box.artifact_uploads()}
    assert folders  # and each is gone: the server lists nothing there any more
    run_id = next(iter(folders)).split("/")[1]
    assert mlflow.MlflowClient(server).list_artifacts(run_id) == []
    assert mlflow.MlflowClient(server).get_run(run_id).info.lifecycle_stage == "deleted"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "code", "name", "goes_on"),
    [
        ("/runs/create", 30, "run", False),
        ("/mlflow-artifacts/", 31, "artifact", False),
        ("/registered-models/", 32, "registry", True),
        ("/experiments/delete", 33, "clean_up", True),
    ],
)
def test_check_of_each_permission(path, code, name, goes_on, box, box_variables, check):
    box.fault, box.fault_on = "403", lambda method, requested: path in requested
    box.body_limit = 1_500_000
    finished = check(code=code, **box_variables)
    assert finished.result[name] == f"FAILED, exit code {code}"
    assert "forbids the request (error 403)" in finished.error
    assert ("multipart" in finished.result) == goes_on
    assert [value for value in finished.result.values() if "FAILED" in str(value)] == [
        f"FAILED, exit code {code}"
    ] or name in ("artifact", "registry")  # what cannot be written cannot be deleted either


@pytest.mark.slow
def test_check_deletes_what_it_was_told_it_could_not_make(box, box_variables, leftovers, check):
    """A gateway gives up on an answer, and the server has made the experiment all the same."""
    before = leftovers()
    box.fault, box.fault_on = "late", lambda method, path: "experiments/create" in path
    check(code=25, **box_variables)
    assert leftovers() == before


@pytest.mark.slow
def test_details_that_a_gateway_hides_do_not_fail_the_check(box, box_variables, check):
    box.fault = "login"
    box.fault_on = lambda method, path: path == "/version"
    box.body_limit = 1_500_000
    found = check(**box_variables).result
    assert found["versions"].startswith("server MLflow of unknown version")
    assert found["multipart"] == "not offered by the server"


@pytest.mark.slow
def test_server_on_this_machine_is_not_reached_through_a_proxy(server, tmp_path):
    """An ssh tunnel on a node with a proxy: over plain http, the proxy would read the key."""
    with Gateway(server, KEY, body_limit=1_500_000) as box, Gateway(server, None) as proxy:
        found = run(
            CHECK,
            cwd=tmp_path,
            MLFLOW_TRACKING_URI=box.uri,
            AM_SC_API_KEY=KEY,
            http_proxy=proxy.uri,
        ).result
        assert found["access"] == "granted" and found["tls"] == "none: plain http"
        assert proxy.requests == []


@pytest.mark.slow
def test_answer_that_comes_byte_by_byte(server, user):
    """The time limit of each request begins anew with each byte; below 1 kB/s it does not."""
    with Gateway(server, None) as box:
        user(MLFLOW_TRACKING_URI=box.uri)
        connection.connect()
        with mlflow.start_run(experiment_id="0") as run:  # no other test's, with files elsewhere
            mlflow.log_text("weights " * 200_000, "large.txt")
        path = mlflow.artifacts.download_artifacts(f"{run.info.artifact_uri}/large.txt")
        assert Path(path).stat().st_size == 1_600_000, "in many pieces"
        box.fault = "drip"
        user(MLFLOW_HTTP_REQUEST_TIMEOUT="2")
        asks = (
            lambda: mlflow.MlflowClient().search_runs([run.info.experiment_id]),
            lambda: mlflow.artifacts.download_artifacts(f"{run.info.artifact_uri}/large.txt"),
        )
        for ask in asks:
            start = time.monotonic()
            with pytest.raises(MlflowException) as raised:
                ask()
            assert time.monotonic() - start < SECONDS
            failure = connection.diagnose(raised.value)
            assert failure.kind == "timeout" and failure.code == 75
            assert re.search(r"in time: \d+ bytes of an answer in \d+ s", str(failure))
            box.fault_on = lambda method, path: "mlflow-artifacts" in path and method == "GET"


@pytest.mark.slow
def test_answer_that_is_too_large(server, user):
    """Only files may have more than 256 MB; this one would be read into memory as a whole."""
    with Gateway(server, None) as box:
        user(MLFLOW_TRACKING_URI=box.uri)
        connection.connect()
        box.fault = (200, {"Content-Type": "application/json"}, b"{}" + b" " * 2**28)
        with pytest.raises(MlflowException) as raised:
            mlflow.MlflowClient().search_runs(["0"])
    assert connection.diagnose(raised.value).kind == "web_page"


@pytest.mark.slow
def test_check_of_the_clock(box, box_variables, check):
    box.clock_lead, box.body_limit = 1000, 1_500_000
    finished = check(code=28, **box_variables)
    assert re.search(r"clock and the server's differ by (99\d|100\d) s", finished.error)
    assert "registry" in finished.result, "the rest is checked all the same"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "code", "words"),
    [
        ({"MLFLOW_TRACKING_URI": ""}, 10, "there is no server to check"),
        ({"MLFLOW_TRACKING_URI": "ftp://host"}, 10, "the tracking address"),
        ({"MLFLOW_TRACKING_URI": "https://no-such-host.invalid"}, 13, "is unknown"),
        ({"MLFLOW_TRACKING_SERVER_CERT_PATH": "/none.pem"}, 15, "no PEM certificates"),
        ({"MLFLOW_TRACKING_CLIENT_CERT_PATH": "/none.pem"}, 15, "no PEM certificates"),
        ({"MLFLOW_TRACKING_SERVER_CERT_PATH": ""}, 15, "no trusted TLS connection"),
        ({"https_proxy": "http://127.0.0.1:9"}, 12, "the proxy on the way to"),
        ({"https_proxy": "http://me:pa#ss@127.0.0.1:9"}, 10, "is no address"),
        ({"https_proxy": "socks5://127.0.0.1:9"}, 10, "pip install pysocks"),
        ({"MLFLOW_HTTP_REQUEST_TIMEOUT": "soon"}, 10, "has an impossible value"),
        ({"MLFLOW_TRACKING_INSECURE_TLS": "yes"}, 10, "has an impossible value"),
    ],
)
def test_check_of_what_the_user_has_set(
    variables, code, words, box, box_variables, check, tmp_path
):
    settings = {k: v for k, v in (box_variables | variables).items() if v}
    if variables == {"MLFLOW_TRACKING_URI": ""}:
        del settings["AM_SC_API_KEY"]
    finished = check(code=code, **settings)
    assert words in finished.error
    if code == 15 and words.endswith("connection"):
        assert "signed by Test Institute" in finished.result["tls"]
        assert "NOT trusted: " in finished.result["tls"]
    assert box.requests == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_https_to_a_plain_http_port(server, tmp_path):
    uri = server.replace("http:", "https:")
    error = fails(CHECK, "--tracking_uri", uri, code=15, cwd=tmp_path)
    assert "no trusted TLS connection" in error and "http://" in error


@pytest.mark.slow
def test_web_server_that_is_no_mlflow(box, box_variables, tmp_path):
    box.fault = (404, {"Content-Type": "text/html"}, b"<html>not here</html>")
    error = fails(CHECK, code=22, cwd=tmp_path, **box_variables)
    assert "but no MLflow" in error


class Tunnel(BaseHTTPRequestHandler):
    """A proxy that knows CONNECT and nothing else."""

    def do_CONNECT(self):  # noqa: N802 (http.server names it)
        self.server.asked.append((self.path, self.headers.get("Proxy-Authorization")))
        host, port = self.path.split(":")
        with socket.create_connection((host, int(port))) as far:
            self.send_response(200)
            self.end_headers()
            ends = {self.connection: far, far: self.connection}
            while True:
                for end in select.select(list(ends), [], [])[0]:
                    data = end.recv(1 << 16)
                    if not data:
                        return
                    ends[end].sendall(data)

    def log_message(self, *arguments):
        pass


@pytest.mark.slow
def test_through_a_proxy(box, box_variables, check):
    """Whose password is not shown; the certificate that is looked at is the server's."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Tunnel) as proxy:
        proxy.asked, proxy.daemon_threads = [], True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{proxy.server_port}"
        variables = box_variables | {"https_proxy": f"http://me:pa55word@{address}"}
        box.body_limit = 1_500_000
        finished = check(**variables)
        proxy.shutdown()
    assert finished.result["proxy"] == f"http://{address}  (set: https_proxy)"
    assert finished.result["tcp"].startswith(f"127.0.0.1 port {proxy.server_port}, ")
    assert "signed by Test Institute" in finished.result["tls"]
    assert "pa55word" not in finished.out + finished.err
    there = box.uri.removeprefix("https://")
    assert proxy.asked and {path for path, _ in proxy.asked} == {there}
    assert all(credentials for _, credentials in proxy.asked)


@pytest.mark.slow
def test_signal_during_the_check_cleans_up(box, box_variables, leftovers, tmp_path):
    before = leftovers()
    box.fault, box.fault_on = "hang", lambda method, path: "/mpu/create" in path
    command = [sys.executable, "-u", str(ROOT / CHECK)]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=clean_environment(**box_variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for_line(process, "run ")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143
    assert leftovers() == before


@pytest.mark.slow
def test_box_is_one_command(tmp_path):
    """What a person does with it: start, export, break, mend."""
    command = [sys.executable, "-u", str(ROOT / "tests" / "box.py"), "--body_limit", "1500000"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as box:
        try:
            exports = [wait_for_line(box, "export ") for _ in range(3)]
            variables = dict(line.split()[1].split("=", 1) for line in exports)
            assert "signed by Test Institute" in run(CHECK, cwd=tmp_path, **variables).out
            for word, code in (("503", 25), ("down", 14)):
                box.stdin.write(f"{word}\n")
                box.stdin.flush()
                wait_for_line(box, f"now: {word}")
                run(CHECK, cwd=tmp_path, code=code, **variables)
            box.stdin.write("ok\n")
            box.stdin.flush()
            wait_for_line(box, "now: ok")
            run(CHECK, cwd=tmp_path, **variables)
        finally:
            box.send_signal(signal.SIGTERM)
            box.stdin.close()
            rest = box.stdout.read()
    assert "POST /api/2.0/mlflow/experiments/search" in rest and "   key" in rest
    assert not os.path.exists(variables["AM_SC_API_KEY_FILE"])
