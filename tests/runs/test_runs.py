"""How runs end, and what is promoted: no zombie, no alias on a model that was not checked."""

import json
import shutil
import signal
import subprocess
import sys
import time

import mlflow
import pytest
from conftest import KEY, ROOT, Session, clean_environment, run, training_process, wait_for_line
from gateway import Gateway

from common import runs

FOR_HOURS = ("--epochs", "10000")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_signal_ends_the_run_as_killed(number, code, tmp_path):
    """SIGTERM is what a batch system sends; Ctrl-C what a user does."""
    with training_process(tmp_path, *FOR_HOURS) as process:
        wait_for_line(process, "epoch 2/")
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"stopped by {number.name}; the run is marked KILLED" in err
    assert "Traceback" not in err
    (logged,) = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    assert logged.info.status == "KILLED"
    assert logged.info.end_time
    assert logged.data.metrics["val_accuracy"] > 0


def test_signal_while_python_cleans_up_is_not_lost(tmp_path):
    """Python swallows what a destructor raises, and SQLAlchemy has many that take a while."""
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(client.tracking_uri)

    class Object:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    handler, hook = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    try:
        with (
            pytest.raises(SystemExit) as stopped,
            mlflow.start_run(experiment_id="0") as run,
            runs.always_ended(),
        ):
            Object()
            time.sleep(10)
            raise AssertionError("the signal is lost")
    finally:
        mlflow.set_tracking_uri(None)
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert stopped.value.code == 143 and sys.unraisablehook is hook
    assert client.get_run(run.info.run_id).info.status == "KILLED"


AMID_SQL = """
import os, signal, sys
import mlflow, sqlalchemy
from common import runs

def once(connection, cursor, statement, *_):
    if statement.startswith(sys.argv[1]):
        sqlalchemy.event.remove(sqlalchemy.Engine, "after_cursor_execute", once)
        os.kill(os.getpid(), signal.SIGTERM)

mlflow.set_tracking_uri("sqlite:///mlflow.db")
with mlflow.start_run(experiment_id="0"), runs.always_ended():
    mlflow.log_metrics({"a": 1, "b": 1}, step=0)
    sqlalchemy.event.listen(sqlalchemy.Engine, "after_cursor_execute", once)
    mlflow.log_metrics({"a": 1, "b": 1}, step=1)
    raise AssertionError("the signal is lost")
"""


SLOW = [pytest.param(verb, marks=pytest.mark.slow) for verb in ("SELECT", "INSERT")]


@pytest.mark.parametrize("statement", ["UPDATE", *SLOW])
def test_signal_amid_a_statement_of_sql(statement, tmp_path):
    """What it interrupts holds SQLite's lock, and the end of the run needs that lock."""
    done = run_text(AMID_SQL, statement, cwd=tmp_path)
    assert done.returncode == 143 and "the run is marked KILLED" in done.stderr, done.stderr
    (logged,) = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["0"])
    assert logged.info.status == "KILLED"


def run_text(text, *arguments, cwd):
    """Run lines of Python that import from common/, in a process of their own."""
    return subprocess.run(
        [sys.executable, "-c", text, *arguments],
        cwd=cwd,
        env=clean_environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_signal_while_the_server_is_away_ends_within_the_time_that_slurm_leaves(server, tmp_path):
    """30 seconds lie between SIGTERM and SIGKILL. The run cannot be marked, and that is said."""
    with Gateway(server, KEY) as gateway:
        variables = {"MLFLOW_TRACKING_URI": gateway.uri, "AM_SC_API_KEY": KEY}
        with training_process(tmp_path, *FOR_HOURS, **variables) as process:
            wait_for_line(process, "epoch 2/")
            gateway.fault = (503, {}, b"away")
            time.sleep(5)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "stopped by SIGTERM; the server does not answer" in err and "may stay RUNNING" in err


@pytest.mark.slow
def test_two_trainings_at_once_on_a_new_local_store(tmp_path):
    """As a job array does: each wants to make the tables of the same file."""
    command = [sys.executable, str(ROOT / "train_mnist_mlflow.py"), "--dataset", "digits"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    trainings = [
        subprocess.Popen(command, cwd=tmp_path, env=clean_environment(), **pipes) for _ in range(3)
    ]
    for process in trainings:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    found = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    assert [run.info.status for run in found] == ["FINISHED"] * 3


@pytest.mark.slow
def test_training_that_diverges_fails(tmp_path):
    finished = run(
        "train_mnist_mlflow.py",
        *("--dataset", "digits", "--lr", "1e30", "--epochs", "50", "--register"),
        cwd=tmp_path,
        code=1,
    )
    assert "diverged" in finished.error and "--lr" in finished.error
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (logged,) = client.search_runs(["1"])
    assert logged.info.status == "FAILED"
    assert client.search_registered_models() == []


@pytest.fixture
def tampered(local, tmp_path):
    """Changes the predictions that the run in `local` recorded, and puts them back afterwards."""
    (path,) = local.folder.glob(f"mlruns/*/{local.run_id}/artifacts/predictions/test.json")
    kept = tmp_path / "test.json"
    shutil.copy(path, kept)

    def change(edit):
        content = json.loads(kept.read_text())
        edit(content)
        path.write_text(json.dumps(content))
        return local.run_id

    yield change
    shutil.copy(kept, path)


def versions(local):
    client = mlflow.MlflowClient(local.uri)
    production = client.get_model_version_by_alias("MNIST_CNN", "production")
    return len(client.search_model_versions("name = 'MNIST_CNN'")), str(production.version)


def test_alias_stays_if_one_prediction_differs(local, tampered):
    """One image of 360, and neither a version is made nor the alias moved."""

    def edit(content):
        content["predictions"][17] = (content["predictions"][17] + 1) % 10

    before = versions(local)
    run_id = tampered(edit)
    finished = run("register_and_inference.py", "--run_id", run_id, cwd=local.folder, code=1)
    assert "predicts 1 of 360 test images differently" in finished.error
    assert versions(local) == before


@pytest.mark.slow
def test_other_test_set_is_no_basis_for_a_check(local, tampered):
    before = versions(local)
    run_id = tampered(lambda content: content.update(digest="0" * 32))
    finished = run("register_and_inference.py", "--run_id", run_id, cwd=local.folder, code=1)
    assert "not the one that the run" in finished.error
    assert versions(local) == before


OLD_RUN = """
import sys, mlflow, torch
sys.path.insert(0, sys.argv[1])
from common import training
test = training.load_data("digits", "unused", train=False)
torch.manual_seed(3)
network = training.MNISTCNN().eval()
mlflow.set_tracking_uri("sqlite:///mlflow.db")
mlflow.set_experiment("old")
with mlflow.start_run() as run:
    if sys.argv[2] != "none":
        accuracy = training.evaluate(network, test.images, test.labels).accuracy
        mlflow.log_metric("val_accuracy", accuracy * float(sys.argv[2]))
    mlflow.pytorch.log_model(
        network, name="model", input_example=training.input_example(test.images),
        pip_requirements=["torch"], serialization_format=sys.argv[3],
        code_paths=[sys.argv[1] + "/common"] if len(sys.argv) > 4 else None,
    )
print(run.info.run_id)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1", "pt2"], None),
        (["100", "pt2"], None),  # a percentage
        (["0.9", "pt2"], "has an accuracy of"),
        (["none", "pt2"], "recorded neither"),
        (["1", "pickle"], "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"),
        (["1", "pt2", "with its code"], "MLmodel has code: code"),
    ],
)
def test_run_of_an_older_script(arguments, message, prefork, tmp_path):
    """Without recorded predictions, its val_accuracy is what a loaded model is checked against."""
    script = tmp_path / "old.py"
    script.write_text(OLD_RUN)
    session = Session(tmp_path, prefork, PYTHONPATH=str(ROOT))
    run_id = session.type(str(script), ROOT, *arguments).out.split()[-1]
    register = f"register_and_inference.py --run_id {run_id}"
    finished = session.type(register, code=1)
    assert "does not say which data set" in finished.error
    finished = session.type(f"{register} --dataset digits", code=1 if message else 0)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    if message:
        assert message in finished.error
        assert client.search_registered_models() == []
    else:
        assert finished.result["model_version"] == "1"


@pytest.mark.slow
def test_killed_outright_stays_running_and_is_refused(tmp_path):
    """What nobody can catch: SIGKILL. The next script says so."""
    with training_process(tmp_path, *FOR_HOURS) as process:
        run_id = wait_for_line(process, "run ").split()[1]
    finished = run("register_and_inference.py", "--run_id", run_id, cwd=tmp_path, code=1)
    assert "is RUNNING" in finished.error and "killed outright" in finished.error
