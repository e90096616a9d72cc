"""What happens in a batch queue: jobs are killed, servers go away, answers are lost.

Everything is done by processes, against real stores, and what counts is what stands there in the
end: one run, with each point once, one model, one version.
"""

import contextlib
import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time

import mlflow
import pytest
from conftest import (
    ROOT,
    Session,
    clean_environment,
    fails,
    free_port,
    run,
    training_process,
    wait_for_line,
)
from gateway import Gateway

TRAIN = "train_mnist_mlflow.py"
SHARED = "Modify_artifact_location.py"
SMALL = ("--dataset", "digits", "--batch_size", "256", "--precision", "fp32", "--register")
IMPATIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}


def what_is_there(uri, name):
    """The one training in the experiment `name`: its points, as (step, value), and its run."""
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(name)
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FINISHED"
    models = client.search_logged_models([experiment.experiment_id])
    assert [model.status for model in models].count("READY") == 1
    assert {model.status for model in models} <= {"READY", "FAILED"}  # FAILED: cut off by a kill
    linked = {output.model_id for output in logged.outputs.model_outputs}
    assert linked == {model.model_id for model in models}
    (version,) = client.search_model_versions(f"name = '{name}'")
    assert client.get_model_version_by_alias(name, "production").version == version.version
    points = {
        metric: [
            (point.step, point.value)
            for point in client.get_metric_history(logged.info.run_id, metric)
        ]
        for metric in ("train_loss", "val_accuracy")
    }
    return points, logged


@pytest.mark.slow
@pytest.mark.parametrize(("script", "kills", "seed"), [(TRAIN, 6, 1), (SHARED, 4, 2)])
def test_killed_at_random_moments(script, kills, seed, prefork, tmp_path):
    """With SIGKILL mostly; whatever the moment, the next start goes on as if nothing happened."""
    moments, uri = random.Random(seed), f"sqlite:///{tmp_path}/store.db"
    session = Session(tmp_path, prefork)

    def train(name, **options):
        more = ["--epochs", 3, "--experiment", name, "--model_name", name, "--tracking_uri", uri]
        more += ["--target_path", tmp_path / f"shared-{name}"] if script == SHARED else []
        return session.type(script, *SMALL, *more, "--checkpoint", tmp_path / name, **options)

    train("first")  # makes the tables, too
    start = time.monotonic()
    train("whole")
    seconds, case = time.monotonic() - start, 0
    expected, _ = what_is_there(uri, "whole")
    while kills > 0:
        case, code, attempts = case + 1, None, 0
        while code != 0:
            end = time.monotonic() + moments.uniform(0, 1.1) * seconds
            number = moments.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            killed = {"until": lambda end=end: time.monotonic() > end, "stop": number}
            finished = train(f"case-{case}", code=None, **(killed if kills > 0 else {}))
            code, attempts = finished.code, attempts + 1
            assert code in (0, -9, 143, -15), finished.err  # -15: before Python was ready for it
            # MLflow logs one if SQLite's file is locked just then, by its thread of system metrics.
            assert "Traceback" not in finished.err or "database is locked" in finished.err
            kills -= code != 0
        points, logged = what_is_there(uri, f"case-{case}")
        assert points == expected
        assert int(logged.data.tags.get("continuations", 0)) < attempts
        again = train(f"case-{case}")
        assert again.result == finished.result and "\nepoch" not in again.out
        assert what_is_there(uri, f"case-{case}")[1].info == logged.info
    assert not list(tmp_path.rglob("*.unfinished")) and not list(tmp_path.rglob("*.new"))
    # No model that nobody knows of. One that a kill cut off is removed from the shared folder;
    # beside a store MLflow keeps it, as FAILED or deleted, until `mlflow gc`.
    files = list(tmp_path.rglob("model.pt2"))
    with contextlib.closing(sqlite3.connect(tmp_path / "store.db")) as store:
        known = {model for (model,) in store.execute("SELECT model_id FROM logged_models")}
    assert len(files) >= case + 2 and (script == TRAIN or len(files) == case + 2)
    assert script == SHARED or {file.parts[-4] for file in files} <= known


# The server goes away


@pytest.fixture
def gateway(server):
    with Gateway(server, None) as gateway:
        yield gateway


def points_have_their_own_times(uri, run_id):
    history = mlflow.MlflowClient(uri).get_metric_history(run_id, "train_loss")
    times = [point.timestamp for point in history]
    assert times == sorted(times) and len(set(times)) == len(times)
    return times


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "kept"), [("hang", True), ("drop", False)], ids=["checkpoint", "no checkpoint"]
)
def test_server_that_stays_away(fault, kept, gateway, server, prefork, tmp_path):
    """The epochs so far are kept, with the flag or without, and logged when it is back."""
    name = f"away-{fault}-{kept}"
    session = Session(tmp_path, prefork, **IMPATIENT, MLFLOW_TRACKING_URI=gateway.uri)
    flags = (*SMALL, "--epochs", 4, "--experiment", name, "--model_name", name)
    folder = ("--checkpoint", tmp_path / "kept") if kept else ()

    # Printing comes before logging: the second epoch is trained, and its points are not sent.
    gateway.fault, output = fault, tmp_path / "0.out"
    gateway.fault_on = lambda method, path: "epoch 2/4" in output.read_text()
    finished = session.type(TRAIN, *flags, *folder, code=75)
    trained = re.findall(r"^epoch (\d)/4", finished.out, re.M)
    assert len(trained) >= 2 and "Traceback" not in finished.err
    hint = finished.err.splitlines()[-1]
    if not kept:
        (made,) = tmp_path.glob("checkpoint-*")
        assert f"The same command with --checkpoint {made} goes on" in hint
        folder = ("--checkpoint", made)
    assert hint.endswith(f"goes on after epoch {trained[-1]}.")

    gateway.fault = None
    finished = session.type(TRAIN, *flags, *folder)
    assert f"\nresume   {folder[1]}  after epoch {trained[-1]}\n" in finished.out
    points, logged = what_is_there(server, name)
    assert [step for step, _ in points["train_loss"]] == [1, 2, 3, 4]
    assert logged.data.tags["continuations"] == "1"
    points_have_their_own_times(server, logged.info.run_id)
    whole = ("--experiment", f"{name}-whole", "--model_name", f"{name}-whole")
    session.type(TRAIN, *flags, *whole)
    assert what_is_there(server, f"{name}-whole")[0] == points


@pytest.mark.slow
def test_server_that_hangs_while_two_processes_train(gateway, server, tmp_path):
    """Process 0 says so, and the other one ends without a word; both go on together."""
    flags = [*SMALL, "--epochs", "3", "--experiment", "hangs-two", "--model_name", "hangs-two"]
    command = [sys.executable, str(ROOT / TRAIN), *flags, "--checkpoint", str(tmp_path / "kept")]

    def train(name):
        common = {"PMI_SIZE": "2", "MASTER_PORT": str(free_port()), **IMPATIENT}
        processes = []
        for rank in "01":
            with (tmp_path / f"{name}.{rank}").open("w") as output:
                environment = clean_environment(
                    PMI_RANK=rank, MLFLOW_TRACKING_URI=gateway.uri, PYTHONUNBUFFERED="1", **common
                )
                processes.append(
                    subprocess.Popen(
                        *(command, -1), cwd=tmp_path, env=environment, stdout=output, stderr=output
                    )
                )
        codes = [process.wait(timeout=300) for process in processes]
        return codes, [(tmp_path / f"{name}.{rank}").read_text() for rank in "01"]

    gateway.fault, output = "hang", tmp_path / "first.0"
    gateway.fault_on = lambda method, path: "epoch 2/3" in output.read_text()
    codes, (first, second) = train("first")
    assert codes == [75, 1], first + second
    assert "error: " in first and "did not answer in time" in first
    assert "Traceback" not in first and "error" not in second and "Traceback" not in second
    gateway.fault = None
    codes, (first, second) = train("again")
    assert codes == [0, 0], first + second
    points, logged = what_is_there(server, "hangs-two")
    assert [step for step, _ in points["train_loss"]] == [1, 2, 3]
    assert logged.data.params["processes"] == "2"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["plots/confusion_matrix.png", "mlflow/logged-models"])
def test_server_that_goes_away_at_the_end(place, gateway, server, prefork, tmp_path):
    """After the last epoch: neither the weights nor the work are lost."""
    name = place.partition("/")[2]
    session = Session(tmp_path, prefork, **IMPATIENT, MLFLOW_TRACKING_URI=gateway.uri)
    flags = (*SMALL, "--epochs", 2, "--experiment", name, "--model_name", name)
    gateway.fault = "503"
    gateway.fault_on = lambda method, path: place in path and method in ("POST", "PUT")
    finished = session.type(TRAIN, *flags, code=75)
    (folder,) = tmp_path.glob("checkpoint-*")
    assert finished.err.endswith(f"--checkpoint {folder} goes on after epoch 2.\n")
    gateway.fault = None
    finished = session.type(TRAIN, *flags, "--checkpoint", folder)
    points, _ = what_is_there(server, name)
    assert len(points["train_loss"]) == 2
    assert finished.result["val_accuracy"] == points["val_accuracy"][-1][1]


@pytest.mark.slow
@pytest.mark.parametrize("script", [TRAIN, SHARED])
def test_answers_that_are_lost_after_the_server_acted(script, gateway, server, prefork, tmp_path):
    """The first answer to every kind of request that writes; MLflow then sends it again.

    But for those that delete, which are there because of a lost answer: two in a row are too many.
    """
    name, lost = f"lost-{script}", []

    def first_of_its_kind(method, path):
        kind = re.sub(r"[0-9a-f]{32}|m-[0-9a-f]{32}|/\d+", "*", path.partition("?")[0])
        reads = method == "GET" or "search" in path
        new = not reads and "delete" not in path and method != "DELETE" and kind not in lost
        lost.extend([kind] if new else [])
        return new

    gateway.fault, gateway.fault_on = "late", first_of_its_kind
    session = Session(tmp_path, prefork, MLFLOW_TRACKING_URI=gateway.uri)
    flags = [*SMALL, "--experiment", name, "--model_name", name]
    flags += ["--target_path", tmp_path / "shared"] if script == SHARED else []
    finished = session.type(script, *flags)
    for needed in ("runs/create", "runs/outputs", "logged-models", "model-versions/create"):
        assert any(kind.endswith(needed) for kind in lost), lost
    points, logged = what_is_there(server, name)
    assert logged.info.run_id == finished.result["run_id"]
    assert len(points["train_loss"]) == 1
    assert len(logged.inputs.dataset_inputs) == 2


# What does not belong together


@pytest.mark.slow
def test_only_the_same_training_goes_on(local, server, prefork, tmp_path):
    """Other settings, another server, a run that was deleted, a second job: two lines each."""
    flags = ("--dataset", "digits", "--batch_size", "512", "--checkpoint", tmp_path / "kept")
    flags += ("--tracking_uri", server, "--experiment", "same")
    where = {"cwd": tmp_path, "prefork": prefork}
    result = run(TRAIN, *flags, **where).result
    before = (tmp_path / "kept" / "training.pt").read_bytes()
    assert "epochs was 1 and is 2" in fails(TRAIN, *flags, "--epochs", "2", **where)
    error = fails(TRAIN, *flags, "--tracking_uri", "sqlite:///other.db", **where)
    assert f"tracking_uri was '{server}' and is 'sqlite:///other.db'" in error
    mlflow.MlflowClient(server).delete_run(result["run_id"])
    error = fails(TRAIN, *flags, **where)
    assert "the run of this training was deleted" in error
    assert f"mlflow runs restore --run-id {result['run_id']}" in error
    mlflow.MlflowClient(server).restore_run(result["run_id"])
    assert run(TRAIN, *flags, **where).result == result
    assert (tmp_path / "kept" / "training.pt").read_bytes() == before

    endless = ("--epochs", "1000", "--checkpoint", str(tmp_path / "used"))
    with training_process(tmp_path, *endless) as process:
        wait_for_line(process, "epoch 1")
        error = fails(TRAIN, "--dataset", "digits", *endless, **where)
    assert "another job is already using" in error


@pytest.mark.slow
def test_a_continued_run_names_its_jobs(prefork, tmp_path):
    session = Session(tmp_path, prefork)
    flags = (*SMALL, "--epochs", "3", "--checkpoint", "kept", "--model_name", "jobs")
    flags += ("--experiment", "jobs", "--tracking_uri", f"sqlite:///{tmp_path}/store.db")
    output = tmp_path / "0.out"
    session.environment |= {"SLURM_JOB_ID": "11", "SLURM_JOB_NAME": "mnist"}
    session.type(TRAIN, *flags, until=lambda: "epoch 1" in output.read_text(), code=143)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/store.db")
    (logged,) = client.search_runs([client.get_experiment_by_name("jobs").experiment_id])
    assert logged.info.status == "KILLED" and logged.data.tags["jobs"] == "slurm 11"
    assert "continuations" not in logged.data.tags
    session.environment["SLURM_JOB_ID"] = "12"
    result = session.type(TRAIN, *flags).result
    _, continued = what_is_there(f"sqlite:///{tmp_path}/store.db", "jobs")
    assert continued.data.tags["jobs"] == "slurm 11, slurm 12"
    assert continued.data.tags["continuations"] == "1"
    assert continued.data.params == logged.data.params
    assert continued.info.start_time == logged.info.start_time
    assert json.dumps(result)
