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
from common.errors import STOPPING

FOR_HOURS = ("--epochs", "10000")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow)],
)
def test_signal_ends_the_run_as_killed(number, code, tmp_path):
    """SIGTERM is what a batch system sends; SIGHUP a terminal whose connection is lost."""
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


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A client of a local store that the tests of this file share: to make one takes seconds."""
    return mlflow.MlflowClient(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")


def test_signal_while_python_cleans_up_is_not_lost(store, handlers, user):
    """Python swallows what a destructor raises, and SQLAlchemy has many that take a while."""
    mlflow.set_tracking_uri(store.tracking_uri)

    class Object:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    hook = sys.unraisablehook
    with (
        pytest.raises(SystemExit) as stopped,
        mlflow.start_run(experiment_id="0") as run,
        runs.always_ended(),
    ):
        Object()
        time.sleep(10)
        raise AssertionError("the signal is lost")
    assert stopped.value.code == 143 and sys.unraisablehook is hook
    assert store.get_run(run.info.run_id).info.status == "KILLED"


@pytest.fixture
def handlers():
    """What handles signals, put back when the test ends."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_each_signal_that_would_end_the_process_ends_the_run(store, handlers, user):
    """And the run around it: that of a study, say."""
    mlflow.set_tracking_uri(store.tracking_uri)
    names = ("SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    assert {getattr(signal, name) for name in names} | {signal.SIGTERM} == set(STOPPING)
    for name in names:
        number, ids = getattr(signal, name), []
        for other in STOPPING:
            default = signal.default_int_handler if other == signal.SIGINT else signal.SIG_DFL
            signal.signal(other, default)
        with (
            pytest.raises(SystemExit) as stopped,
            mlflow.start_run(experiment_id="0") as run,
            runs.always_ended(),
        ):
            ids.append(run.info.run_id)
            if name == "SIGHUP":
                with mlflow.start_run(experiment_id="0", nested=True) as run, runs.always_ended():
                    ids.append(run.info.run_id)
                    signal.raise_signal(number)
            signal.raise_signal(number)
            raise AssertionError("the signal is lost")
        assert stopped.value.code == 128 + number
        assert {store.get_run(run_id).info.status for run_id in ids} == {"KILLED"}


def test_signal_that_is_ignored_or_handled_does_not_end_the_run(store, handlers, user):
    """`nohup` ignores SIGHUP, `&` in a script SIGINT; a program of one's own may use SIGUSR1."""
    received = []
    mlflow.set_tracking_uri(store.tracking_uri)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    with mlflow.start_run(experiment_id="0") as run, runs.always_ended():
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
            signal.raise_signal(number)
    assert received == [1] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert store.get_run(run.info.run_id).info.status == "FINISHED"


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
    assert "stopped by SIGTERM; the server or database fails" in err and "may stay RUNNING" in err


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


@pytest.mark.slow
def test_alias_stays_if_one_prediction_differs(local, tampered, prefork):
    """One image of 360, and neither a version is made nor the alias moved."""

    def edit(content):
        content["predictions"][17] = (content["predictions"][17] + 1) % 10

    before = versions(local)
    run_id = tampered(edit)
    where = {"cwd": local.folder, "prefork": prefork}
    finished = run("register_and_inference.py", "--run_id", run_id, **where, code=1)
    assert "predicts 1 of 360 test images differently" in finished.error
    assert versions(local) == before


@pytest.mark.slow
def test_files_of_the_model_are_gone(local, prefork, tmp_path):
    """All of the store's, or the model's: that is said, and no protection to be switched off."""
    session = Session(tmp_path, prefork)
    register = f"register_and_inference.py --run_id {local.run_id} --tracking_uri {local.uri}"
    before, folder = versions(local), local.folder / "mlruns"
    (model,) = folder.glob("*/models/*/artifacts")
    for path in (folder, model / "MLmodel"):
        path.rename(path.with_name("away"))
        try:
            error = session.type(register, code=1).error
        finally:
            path.with_name("away").rename(path)
        assert "no files of the model models:/m-" in error and "\nhint:  were they deleted" in error
    assert versions(local) == before


@pytest.mark.slow
def test_other_test_set_is_no_basis_for_a_check(local, tampered, prefork):
    before = versions(local)
    run_id = tampered(lambda content: content.update(digest="0" * 32))
    where = {"cwd": local.folder, "prefork": prefork}
    finished = run("register_and_inference.py", "--run_id", run_id, **where, code=1)
    assert "not the one that the run" in finished.error
    assert versions(local) == before


OLD_RUN = """
import sys, mlflow, torch
sys.path.insert(0, sys.argv[1])
from common import training
test = training.load_data("digits", "unused", train=False)
torch.manual_seed(3)
network, example = training.MNISTCNN().eval(), training.input_example(test.images)
mlflow.set_tracking_uri("sqlite:///mlflow.db")
mlflow.set_experiment("old")
with mlflow.start_run() as run:
    if sys.argv[2] != "none":
        accuracy = training.evaluate(network, test.images, test.labels).accuracy
        mlflow.log_metric("val_accuracy", accuracy * float(sys.argv[2]))
    if "table" in sys.argv:
        network, example = torch.nn.Linear(5, 10).eval(), torch.rand(2, 5).numpy()
    mlflow.pytorch.log_model(
        network, name="model", input_example=example,
        pip_requirements=["torch"], serialization_format=sys.argv[3],
        code_paths=[sys.argv[1] + "/common"] if "with its code" in sys.argv else None,
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
        (["1", "pt2", "table"], "cannot be loaded or used here"),  # of another network
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


# As somebody writes it with guide 1 in hand, up to MLflow 3.13, which pickles by default.
GUIDE_1 = """
import sys
import mlflow, torch, torch.nn as nn
import torchvision, torchvision.transforms as T

class MNIST_CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.fc1 = nn.Linear(8 * 13 * 13, 10)
        self.dropout = nn.Dropout(0.5)
    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        return self.fc1(self.dropout(x.flatten(1)))
    def __setstate__(self, state):
        open("has_run", "w").close()
        super().__setstate__(state)

mean, std, factor = map(float, sys.argv[2:])
transform = T.Compose([T.ToTensor(), T.Normalize((mean,), (std,))])
MNIST = torchvision.datasets.MNIST
train, test = (MNIST(sys.argv[1], train=part, transform=transform) for part in (True, False))
batches = torch.utils.data.DataLoader(train, 64, shuffle=True)
torch.manual_seed(0)
model = MNIST_CNN()
optimizer = torch.optim.Adam(model.parameters(), 0.003)
mlflow.set_experiment("mnist_cnn_pytorch")
with mlflow.start_run() as run:
    mlflow.log_param("batch_size", 64)
    mlflow.log_param("optimizer", "Adam")
    for epoch in range(2):
        model.train()
        for x, y in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = sum((model(x).argmax(1) == y).sum().item()
                        for x, y in torch.utils.data.DataLoader(test, 1000))
        mlflow.log_metric("train_loss", loss.item(), step=epoch)
        mlflow.log_metric("val_accuracy", factor * right / len(test), step=epoch)
    model.train()
    mlflow.pytorch.log_model(model, name="model", serialization_format="pickle",
                             pip_requirements=["torch"])
print(run.info.run_id)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "scaling", ["0.1307 0.3081 1", "0.5 0.5 100"], ids=["of MNIST", "of guide 3, in percent"]
)
def test_run_of_the_guides_own_code(scaling, prefork, mnist_dir, tmp_path):
    """Pickled, without the parameter dataset, trained on pixels normalised outside of the model."""
    script = tmp_path / "mine.py"
    script.write_text(GUIDE_1)
    session = Session(tmp_path, prefork)
    trusting = Session(tmp_path / "trusting", prefork, MLFLOW_ALLOW_PICKLE_DESERIALIZATION="true")
    trusting.folder.mkdir()
    run_id = session.type(str(script), mnist_dir, *scaling.split()).out.split()[-1]
    (tmp_path / "has_run").unlink(missing_ok=True)
    store = ("--data_dir", mnist_dir, "--tracking_uri", f"sqlite:///{tmp_path}/mlflow.db")
    register = f"register_and_inference.py --run_id {run_id}"
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    if scaling.startswith("0.1307"):  # each hint leads to the next step
        assert "--dataset mnist" in session.type(register, *store, code=1).error
        refused = session.type(f"{register} --dataset mnist", *store, code=1)
        assert "MLFLOW_ALLOW_PICKLE_DESERIALIZATION=true" in refused.error
        assert not (tmp_path / "has_run").exists()  # nothing in the file has run
        differs = trusting.type(f"{register} --dataset mnist", *store, code=1)
        assert "--pixels normalised" in differs.error and (trusting.folder / "has_run").exists()
        assert client.search_registered_models() == []
    registered = trusting.type(f"{register} --dataset mnist --pixels normalised", *store)
    assert registered.result["val_accuracy"] > 0.8
    version = client.get_model_version_by_alias("MNIST_CNN", "production")
    mean, std, _ = scaling.split()
    for said in (version.tags["input"], version.description):
        assert f"pixels normalised before: (x - {mean}) / {std}" in said
    # Whoever scores that version by its tag, scores it so, too.
    loaded = trusting.type(
        "scripts/load_and_use_models.py from-registry MNIST_CNN --predict --dataset mnist", *store
    )
    assert loaded.result["test_accuracy"] == registered.result["val_accuracy"]


def test_an_alias_moves_to_a_version_of_other_data(tmp_path, capsys):
    """That is said, if the tags of both versions tell."""
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    client = mlflow.MlflowClient()
    client.create_registered_model("M")
    try:
        digits, mnist, again, unknown = (
            client.create_model_version("M", str(tmp_path), tags=tags)
            for tags in ({"dataset": "digits"}, {"dataset": "mnist"}, {"dataset": "mnist"}, {})
        )
        expected = [
            (digits, mnist, "version 1 -> 2  (trained on other data: digits -> mnist)"),
            (mnist, digits, "version 2 -> 1  (trained on other data: mnist -> digits)"),
            (mnist, again, "version 2 -> 3"),
            (again, unknown, "version 3 -> 4"),
            (unknown, again, "version 4 -> 3"),
            (None, mnist, "version none -> 2"),
        ]
        for before, after, words in expected:
            result = runs.moved(after, "production", before and str(before.version))
            assert capsys.readouterr().out == f"alias    production  {words}\n"
            assert result["model_uri"] == f"models:/M/{after.version}"
    finally:
        mlflow.set_tracking_uri(None)


@pytest.mark.slow
def test_killed_outright_stays_running_and_is_refused(tmp_path):
    """What nobody can catch: SIGKILL. The next script says so."""
    with training_process(tmp_path, *FOR_HOURS) as process:
        run_id = wait_for_line(process, "run ").split()[1]
    finished = run("register_and_inference.py", "--run_id", run_id, cwd=tmp_path, code=1)
    assert "is RUNNING" in finished.error and "killed outright" in finished.error
