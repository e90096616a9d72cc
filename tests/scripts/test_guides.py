"""Guides 2 to 5: each command runs as a process, and what it promises stands in the store."""

import contextlib
import errno
import importlib
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from conftest import (
    REAL_DATA,
    REAL_MNIST,
    ROOT,
    Finished,
    Session,
    clean_environment,
    free_port,
    mlflow_server,
    run,
    serving,
    wait_for_line,
)
from gateway import Gateway

PAGE = ROOT / "scripts" / "README.md"
TRAIN = "python scripts/train_and_register_model.py"
USE = "python scripts/load_and_use_models.py"

# The guides' commands, in an order in which they work: the guide shows --stage before transition.
SCRIPT_COMMANDS = [
    TRAIN,
    f'{TRAIN} --experiment-name "production-models" --run-name "cnn-v1" '
    '--model-name "image-classifier-v1" --epochs 10 --batch-size 32 --lr 0.001',
    f"{USE} from-run <RUN_ID> --predict",
    f"{USE} from-run 0676488122104f66a433df1d95c2332e --predict",
    f"{USE} from-registry simple-cnn-classifier --predict",
    f"{USE} from-registry simple-cnn-classifier --version 1 --predict",
    f"{USE} transition simple-cnn-classifier 1 Staging",
    f"{USE} transition simple-cnn-classifier 1 Production",
    f"{USE} transition simple-cnn-classifier 0 Archived",
    f"{USE} from-registry simple-cnn-classifier --stage Production",
    f"{USE} versions simple-cnn-classifier",
    f'{TRAIN} --experiment-name "production" --model-name "image-classifier"',
    f"{USE} list",
    f"{USE} versions image-classifier",
    f"{USE} from-registry image-classifier --version 1 --predict",
    f"{USE} transition image-classifier 1 Staging",
    f"{USE} transition image-classifier 1 Production",
]
# What is MLflow's own, or a shell's; server/local.py starts the servers with these flags.
OTHER_COMMANDS = [
    "python -m mlflow ui --backend-store-uri sqlite:///mlflow.db --port 5000",
    "ls -la mlruns/0/<run_id>/artifacts/pytorch_model/",
    "pip install mlflow",
    "mlflow server --backend-store-uri sqlite:///mlflow.db --default-artifact-root ./artifacts "
    "--host 0.0.0.0 --port 5000",
    "export MLFLOW_TRACKING_URI=http://localhost:5000",
    "$ tree artifacts/",
    "mflow --version",
    "mlflow server --backend-store-uri sqlite:///mlflow.db --default-artifact-root ./mlruns "
    "--host 0.0.0.0 --port 5000",
]


def test_these_are_the_commands_of_the_guides():
    ours = set(SCRIPT_COMMANDS + OTHER_COMMANDS)
    assert len(ours) == 25
    folder = ROOT.parent / "shared" / "guides"
    if not folder.is_dir():
        pytest.skip(f"no guides in {folder}: their texts, 2-save-log-register.md ..., go there")
    theirs = set()
    for guide in ("2-save-log-register", "3-tutorial", "4-intro", "5-demo"):
        text = (folder / f"{guide}.md").read_text(errors="replace")
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for block in (block for language, block in blocks if language in ("bash", "")):
            for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
                if re.match(r"(python |pip |mlflow |mflow |export |ls |\$ )", line):
                    theirs.add(line.strip())
    assert theirs == ours


# Everything through a box with TLS, key and token

KEY = "key-of-the-guides-0123456789"
TOKEN = "token-of-the-guides-0123456789"


class Walk:
    """The guides, one after another on one server, as a reader would; each is gone through once.

    All that is written is below one folder: the server's database, artifacts and log, the working
    directory, HOME and TMPDIR.
    """

    def __init__(self, folder, server, box, session):
        self.folder, self.server, self.box, self.session = folder, server, box, session
        self.client = mlflow.MlflowClient(server)
        self.outcomes = {}

    def guide(self, number):
        """Go through a guide, unless that has been done; fail as it failed then."""
        if number not in self.outcomes:
            mlflow.set_tracking_uri(self.server)
            guide = {2: guide_2, 3: guide_3, 4: guide_4, 5: guide_5}[number]
            try:
                guide(self)
                self.outcomes[number] = None
            except BaseException as error:
                self.outcomes[number] = error
                raise
        if error := self.outcomes[number]:
            raise AssertionError(f"guide {number} failed") from error

    def all(self):
        for number in (2, 3, 4, 5):
            self.guide(number)


@pytest.fixture(scope="module")
def walk(prefork, tls, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guides")
    for name in ("server", "work", "home", "tmp", "downloads"):
        (folder / name).mkdir()
    with mlflow_server(folder / "server") as server, Gateway(server, KEY, tls=tls[0]) as box:
        session = Session(
            folder / "work",
            prefork,
            MLFLOW_TRACKING_URI=box.uri,
            MLFLOW_TRACKING_SERVER_CERT_PATH=str(tls[1]),
            AM_SC_API_KEY=KEY,
            MLFLOW_TRACKING_TOKEN=TOKEN,
            HOME=str(folder / "home"),
            TMPDIR=str(folder / "tmp"),
            MLFLOW_LOGGING_LEVEL="DEBUG",
        )
        yield Walk(folder, server, box, session)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_guide(number, walk):
    walk.guide(number)


@pytest.mark.slow
def test_the_page_shows_what_was_printed(walk):
    """Each line that scripts/README.md shows under a command is of a kind that it has printed."""
    walk.all()
    blocks = re.findall(r"```bash\n([^`]*)```\n\n```text\n([^`]*)```", PAGE.read_text())
    assert len(blocks) >= 10
    for commands, shown in blocks:
        scripts = re.findall(r"^python scripts/\w+\.py", commands, re.MULTILINE)
        assert scripts, commands
        ended = walk.session.ended
        printed = [f.out for command, f in ended if command.startswith(tuple(scripts))]
        unknown = shapes(shown) - shapes("\n".join(printed))
        assert not unknown, f"{commands}\n{unknown}"


@pytest.mark.slow
def test_no_request_was_refused_or_went_without_the_key(walk):
    walk.all()
    requests = walk.box.requests
    assert len(requests) > 300
    assert [r for r in requests if r.status in (401, 413) or r.status >= 500] == []
    assert [r.path for r in requests if r.headers.get("x-api-key") != KEY] == []


@pytest.mark.slow
def test_a_process_of_a_study_that_is_refused(walk):
    """In a process of --jobs, by a page that repeats the request's headers.

    The parent run's tags and parameters are the first two that are logged.
    """
    logged = itertools.count(1)
    walk.box.fault_on = lambda method, path: "log-batch" in path and next(logged) > 2
    walk.box.fault = "echo"
    flags = "--dataset digits --epochs 1 --trials 1 --jobs 2 --storage refused.log"
    try:
        refused = walk.session.type(f"{TUNE} {flags}", code=1)
    finally:
        walk.box.fault = None
    assert "forbids the request (error 403)" in refused.error and "<secret>" in refused.error
    assert "a process of the study ended early" in refused.error
    assert "Traceback" not in refused.err


@pytest.mark.slow
def test_neither_key_nor_token_is_written_anywhere(walk):
    """The database, artifacts, logs, working directory, HOME and TMPDIR are searched for them."""
    walk.all()
    assert [path for path in (walk.folder / "tmp").rglob("*") if path.is_file()] == []
    files = [path for path in walk.folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        assert KEY.encode() not in content and TOKEN.encode() not in content, path


def guide_2(walk):
    """All its commands, on digits, and shorter where they train."""
    session, client, downloads = walk.session, walk.client, walk.folder / "downloads"
    ended = {}
    for command in SCRIPT_COMMANDS:
        typed, more, code = command, (), 0
        if command.startswith(TRAIN):
            more = ("--dataset", "digits", "--epochs", 1 if ended else 2)
        if "from-run" in command:
            if "<RUN_ID>" not in command:
                continue  # the same with the guide's own run
            typed = command.replace("<RUN_ID>", ended[TRAIN].result["run_id"])
        if " 0 Archived" in command:
            code = 1  # versions begin with 1
        ended[command] = session.type(typed, *more, code=code)
    check_what_is_printed(ended)
    check_what_is_logged(client, ended, downloads)
    check_what_is_registered(session, client, ended)
    # What is not there is said.
    finished = session.type(f"{INFER} --run_id {ended[TRAIN].result['run_id']}", code=1)
    assert "has no model.pth" in finished.error
    missing = session.type(f"{USE} versions no-such-model", code=1)
    assert "there is no registered model 'no-such-model'" in missing.error
    missing = session.type(f"{PLOT} --experiment nowhere", code=1)
    assert "there is no experiment 'nowhere'" in missing.error


def data_sets(run):
    return {(item.dataset.name, item.tags[0].value) for item in run.inputs.dataset_inputs}


def check_what_is_logged(client, ended, downloads):
    result = ended[TRAIN].result
    trained = client.get_run(result["run_id"])
    assert trained.info.status == "FINISHED"
    assert data_sets(trained) == {("digits", "training"), ("digits", "test")}
    params = trained.data.params
    assert params["model"] == "SimpleCNN" and params["total_parameters"] == "95050"
    assert params["batch_size"] == "32" and params["learning_rate"] == "0.001"
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        history = client.get_metric_history(result["run_id"], name)
        assert [point.step for point in history] == [1, 2], name
    accuracies = [p.value for p in client.get_metric_history(result["run_id"], "val_accuracy")]
    assert result["best_val_accuracy"] == max(accuracies)
    assert result["best_epoch"] == 1 + accuracies.index(max(accuracies))
    names = {file.path for file in client.list_artifacts(result["run_id"])}
    assert {"best_model.pt", "model_metadata.json", "model_summary.txt"} <= names

    # The checkpoint loads without MLflow, and is the epoch that the metadata names.
    uri = f"runs:/{result['run_id']}"
    metadata = mlflow.artifacts.load_dict(f"{uri}/model_metadata.json")
    assert metadata["best_epoch"] == result["best_epoch"]
    assert "95,050" in mlflow.artifacts.load_text(f"{uri}/model_summary.txt")
    path = mlflow.artifacts.download_artifacts(f"{uri}/best_model.pt", dst_path=str(downloads))
    # As the page has it, pasted.
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (n,) = (n for n, block in enumerate(blocks) if "torch.load(" in block[1])
    assert shlex.split(blocks[n - 1][1]) == [
        *("python", "-m", "common.connection", "artifacts", "download", "--run-id", "<RUN_ID>"),
        *("--artifact-path", "best_model.pt", "--dst-path", "."),
    ]
    code = (
        f"{blocks[n][1]}"
        "import sys\n"
        "from common import training\n"
        "assert 'mlflow' not in sys.modules\n"
        "test = training.load_data('digits', '', train=False)\n"
        "print(training.evaluate(model, test.images, test.labels).accuracy)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(path).parent,
        env=clean_environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=True,
    )
    printed = process.stdout
    assert float(printed) == pytest.approx(result["test_accuracy"], abs=1e-9)

    custom = client.get_run(ended[SCRIPT_COMMANDS[1]].result["run_id"])
    assert custom.info.run_name == "cnn-v1"
    assert client.get_experiment(custom.info.experiment_id).name == "production-models"


def check_what_is_registered(session, client, ended):
    result = ended[TRAIN].result
    version = client.get_model_version("simple-cnn-classifier", "1")
    assert version.run_id == result["run_id"]
    assert version.description == "SimpleCNN trained with lr=0.001, batch_size=32"
    assert version.tags["dataset"] == "digits" and "pixels in [0, 1]" in version.tags["input"]
    assert version.current_stage == "Production"
    for name in ("simple-cnn-classifier", "image-classifier"):
        aliases = client.get_registered_model(name).aliases
        assert {key: str(value) for key, value in aliases.items()} == {"production": "1"}
    assert "Model Name: image-classifier\nModel Version: 1\n" in ended[SCRIPT_COMMANDS[11]].out

    # A name that exists gets a new version, and the alias stays where it is.
    more = ("--dataset", "digits", "--epochs", 1, "--model-name", "image-classifier")
    assert session.type(TRAIN, *more).result["model_version"] == "2"
    by_alias = session.type(f"{USE} from-registry image-classifier --alias production").result
    assert by_alias["model_version"] == "1" and by_alias["parameters"] == 95050
    latest = session.type(f"{USE} from-registry image-classifier").result
    assert latest["model_version"] == "2"
    # A stage may hold several versions, and its address loads the newest: that is said.
    session.type(f"{USE} transition image-classifier 2 Production")
    back = session.type(f"{USE} transition image-classifier 1 Production")
    address = "stage    models:/image-classifier/Production loads version"
    assert f"{address} 2, the newest of 1, 2: --archive_existing takes out the others" in back.out
    staged = session.type(f"{USE} from-registry image-classifier --stage Production").result
    assert staged["model_version"] == "2" and back.result["aliases"] == {"production": "1"}
    alone = session.type(f"{USE} transition image-classifier 1 Production --archive_existing")
    assert f"{address} 1\n" in alone.out
    staged = session.type(f"{USE} from-registry image-classifier --stage Production").result
    assert staged["model_version"] == "1"
    assert client.get_model_version("image-classifier", "2").current_stage == "Archived"
    wrong = session.type(f"{USE} transition image-classifier 1 None --archive_existing", code=2)
    assert "--archive_existing is for Staging and Production" in wrong.err
    # Leaving a stage takes its alias away.
    archived = session.type(f"{USE} transition image-classifier 1 Archived").result
    assert archived["aliases"] == {}
    assert client.get_model_version("image-classifier", "1").current_stage == "Archived"


def check_what_is_printed(ended):
    run_id = ended[TRAIN].result["run_id"]
    assert "Registered Models in MLflow Model Registry\n" + "=" * 45 in ended[f"{USE} list"].out
    assert (
        "Model: simple-cnn-classifier\n"
        "   Description: SimpleCNN trained with lr=0.001, batch_size=32\n"
        "   Latest Version: 1\n"
        "   Latest Stage: Production\n"
        "   Aliases: @production is version 1\n"
    ) in ended[f"{USE} list"].out
    assert (
        "Versions of Model: simple-cnn-classifier\n"
        "========================================\n"
        "\n"
        "Version 1:\n"
        "  Stage: Production\n"
        "  Aliases: @production\n"
        "  Status: READY\n"
        "  Description: SimpleCNN trained with lr=0.001, batch_size=32\n"
        f"  Run ID: {run_id}\n"
    ) in ended[f"{USE} versions simple-cnn-classifier"].out
    transition = ended[f"{USE} transition simple-cnn-classifier 1 Production"]
    assert "version 1: Staging -> Production" in transition.out
    assert "\nalias    staging  version 1 -> none\n" in transition.out
    assert "\nalias    production  version none -> 1\n" in transition.out
    assert "aliases replace them" in transition.out and "FutureWarning" not in transition.err
    staged = ended[f"{USE} from-registry simple-cnn-classifier --stage Production"]
    assert "models:/simple-cnn-classifier@production" in staged.out
    archived = ended[f"{USE} transition simple-cnn-classifier 0 Archived"]
    assert "is no version of the model; it has 1." in archived.error
    from_run = ended[f"{USE} from-run <RUN_ID> --predict"]
    assert from_run.out.count("\nsample ") == 5
    for command in (f"{USE} from-run <RUN_ID> --predict", SCRIPT_COMMANDS[5]):
        accuracy = ended[command].result["test_accuracy"]
        assert accuracy == pytest.approx(ended[TRAIN].result["test_accuracy"])


INFER = "python scripts/download_and_infer.py"
EPOCH = r"Epoch \d: train_loss=\d\.\d{4}, train_acc=(\d\.\d{4}), val_loss=\d\.\d{4}, val_acc=(.*)"


def guide_3(walk):
    session, client = walk.session, walk.client
    trained = session.type("python scripts/train_simple_mnist.py --dataset digits")
    assert len(re.findall(EPOCH, trained.out)) == 5
    run_id = trained.result["run_id"]
    logged = client.get_run(run_id)
    assert client.get_experiment(logged.info.experiment_id).name == "MNIST_experiment"
    assert {"lr": "0.001", "batch_size": "64", "epochs": "5"}.items() <= logged.data.params.items()
    assert set(logged.data.metrics) == {"train_loss", "train_acc", "val_loss", "val_acc"}
    assert logged.data.metrics["val_acc"] > 0.9
    assert logged.data.tags["model.type"] == "Computer Vision"  # the guide's step 5
    assert data_sets(logged) == {("digits", "training"), ("digits", "validation")}
    assert [file.path for file in client.list_artifacts(run_id)] == ["model.pth"]

    latest = session.type(f"{INFER} --seed 1")
    assert "Found experiment 'MNIST_experiment' with ID: " in latest.out
    assert f"Using run_id: {run_id}\n" in latest.out
    sample = r"^Sample +\d+ — true label: \d  \|  predicted: \d$"
    assert len(re.findall(sample, latest.out, re.MULTILINE)) == 5
    named = session.type(f"{INFER} --seed 1 --run_id {run_id} --download_dir downloaded_ckpt")
    assert named.result == latest.result
    assert (session.folder / "downloaded_ckpt" / "model.pth").is_file()
    samples = named.result["samples"]
    assert sum(sample["true"] == sample["predicted"] for sample in samples) >= 3


FOREST = "python scripts/train_with_mlflow.py"
REGISTER = "python scripts/register_model.py"
SCORE = "python scripts/score_rest.py"


def guide_4(walk):
    """Train, register, serve, ask; then everything that can be wrong with asking.

    test_serving.py asks for images, of the model that is served there.
    """
    session, client, server, folder = walk.session, walk.client, walk.server, walk.folder
    trained = session.type(FOREST)
    run_id = trained.result["run_id"]
    logged = client.get_run(run_id)
    experiment = client.get_experiment(logged.info.experiment_id)
    assert experiment.name == "RandomForest_Training"
    assert {"n_estimators", "max_depth"} <= set(logged.data.params)
    assert logged.data.metrics["accuracy"] > 0.9
    files = {file.path for file in client.list_artifacts(run_id)}
    assert files == {
        "confusion_matrix.png",
        "classification_report.txt",
        "feature_importances.json",
    }
    assert len(logged.outputs.model_outputs) == 1  # the fourth artifact
    (data,) = [item.dataset for item in logged.inputs.dataset_inputs]  # name, type and schema
    assert data.name == "iris" and data.source_type == "http"
    columns = [column["name"] for column in json.loads(data.schema)["mlflow_colspec"]]
    assert columns[0] == "sepal_length" and len(columns) == 5
    assert "Failed to validate" not in trained.err
    versions = [session.type(REGISTER).result["model_version"] for _ in range(2)]
    assert versions == ["1", "2"]
    again = session.type(f"{REGISTER} --run_id {run_id} --model_name iris").result
    assert again["model_name"] == "iris" and again["model_version"] == "1"
    description = client.get_model_version("iris", "1").description
    assert f"accuracy {trained.result['accuracy']:.4f}, " in description
    assert f"data: iris ({data.digest})" in description and run_id in description
    assert client.get_model_version("New Registered Model", "1").run_id == run_id
    forest = session.type(f'{USE} from-registry "New Registered Model"', code=1)
    assert "it is of the flavor python_function, sklearn" in forest.error
    assert "mlflow.FLAVOR.load_model" in forest.error and "PICKLE" not in forest.error

    port = free_port()
    command = [
        *("mlflow", "models", "serve", "-m", "models:/New Registered Model/1"),
        *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)),
    ]
    environment = clean_environment(MLFLOW_TRACKING_URI=server)  # `mlflow` knows no key
    url = f"http://127.0.0.1:{port}"
    nobody = session.type(f"{SCORE} --url {url}", code=1)
    assert "no served model answers at" in nobody.error and "Connection refused" in nobody.error
    with serving(command, folder, environment, f"{url}/ping", folder / "serve.log"):
        asked = session.type(f"{SCORE} --url {url}/invocations")
        assert asked.result["predictions"] == ["setosa"]
        assert "row      [5.1, 3.5, 1.4, 0.2]  predicted setosa" in asked.out
        rows = '--data "[[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]"'
        asked = session.type(f"{SCORE} --url {url} {rows}")
        assert asked.result["predictions"] == ["setosa", "virginica"]
        refused = session.type(f"{SCORE} --url {url} --columns a b --data [[1,2]]", code=1)
        assert "the served model refuses the request (error 400): Model is missing" in refused.error
        wrong = session.type(f"{SCORE} --url {url}/ping", code=1)
        assert "but not as a served model" in wrong.error or "refuses" in wrong.error
    assert "--data must be rows of 4 values" in session.type(f"{SCORE} --data [[1]]", code=2).err


TUNE = "python scripts/tune_fashion_mnist.py"
ONE_RUN = "python scripts/train_fashion_mnist.py"
PLOT = "python scripts/log_plot.py"


def children(client, parent):
    return client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    )


def guide_5(walk):
    """One run from a settings file; a study of several processes; both in one figure."""
    session, client = walk.session, walk.client
    one = session.type(f"{ONE_RUN} --config {ROOT}/scripts/cfg/quick.yaml --epochs 2").result
    logged = client.get_run(one["run_id"])
    assert client.get_experiment(logged.info.experiment_id).name == "Image classification"
    assert logged.data.params["epochs"] == "2"  # the flag wins
    assert data_sets(logged) == {("digits", "training"), ("digits", "test")}
    assert logged.data.params["learning_rate"] == "0.003"  # of the file
    assert logged.data.metrics["val_accuracy"] > 0.3 and "test_accuracy" in logged.data.metrics
    drawn = session.type(PLOT)  # of the latest run
    assert drawn.result["run_ids"] == [one["run_id"]] and "val_loss  2 points" in drawn.out
    nothing = session.type(f"{PLOT} --run_id {one['run_id']} --metrics no_such", code=1)
    assert "none of these runs has a metric no_such" in nothing.error

    flags = "--dataset digits --epochs 1 --storage sqlite:///study.db"
    result = session.type(f"{TUNE} {flags} --trials 2 --jobs 2").result
    parent = client.get_run(result["run_id"])
    trials = children(client, parent)
    assert len(trials) == result["trials"] == 2
    assert {trial.info.status for trial in trials} == {"FINISHED"}
    (best,) = [trial for trial in trials if trial.data.tags.get("best") == "true"]
    assert best.info.run_id == result["best_run_id"]
    values = [trial.data.metrics["val_accuracy"] for trial in trials]
    assert best.data.metrics["val_accuracy"] == result["best_val_accuracy"] == max(values)
    for name in ("learning_rate", "batch_size", "dropout"):
        assert parent.data.params[f"best_{name}"] == best.data.params[name]
    assert parent.data.metrics["test_accuracy"] == result["test_accuracy"]
    assert {file.path for file in client.list_artifacts(result["run_id"], "study")} == {
        "study/trials.png",
        "study/val_accuracy.png",
    }
    # The same study with more trials: the same parent run.
    more = session.type(f"{TUNE} {flags} --trials 3").result
    assert more["run_id"] == result["run_id"] and len(children(client, parent)) == 3
    drawn = session.type(PLOT)  # the latest run is a trial: its study
    assert drawn.result["run_ids"] == [result["run_id"]] and drawn.result["curves"] == 3 * 2
    other = session.type(f"{TUNE} {flags.replace('epochs 1', 'epochs 2')}", code=1)
    assert "was begun with other settings" in other.error
    # Several runs in one figure, the study as its children; on the pages of those named.
    drawn = session.type(f"{PLOT} --run_id {one['run_id']} {result['run_id']}").result
    assert drawn["curves"] == 2 + 3 * 2  # none of them twice, or under another's name
    for run_id in drawn["run_ids"]:
        paths = [file.path for file in client.list_artifacts(run_id, "plots")]
        assert "plots/loss_curves.png" in paths


def shapes(text):
    """The kinds of lines in a text: the words, or the names in a line of JSON."""
    kinds = set()
    for line in filter(None, text.splitlines()):
        if line.startswith("{"):
            kinds.add(tuple(json.loads(line)))
            continue
        line = re.sub(r"^tracking .*", "tracking", line)
        line = re.sub(r"mlflow ui .*|https://\S+", "ADDRESS", line)
        line = re.sub(r"(?<= )/\S+", "PATH", line)
        line = re.sub(r"\b[0-9a-f]{32}\b", "ID", line)
        line = re.sub(r"\b[a-z]+-[a-z]+-\d+\b", "NAME", line)  # MLflow makes them up
        line = re.sub(r"\b(complete|pruned)\b", "STATE", line)
        kinds.add(re.sub(r" *\d+(\.\d+)?", " N", line))
    return kinds


# Apart from that


@pytest.mark.slow
@REAL_MNIST
def test_guide_3_accuracies_on_mnist(tmp_path):
    """The last line that the guide prints: train_acc=0.9693, val_acc=0.9677."""
    finished = run("scripts/train_simple_mnist.py", "--data_dir", REAL_DATA, cwd=tmp_path)
    assert finished.result["train_acc"] == pytest.approx(0.9693, abs=0.01)
    assert finished.result["val_acc"] == pytest.approx(0.9677, abs=0.01)


@pytest.mark.slow
def test_an_interrupted_study_goes_on_and_prunes(prefork, tmp_path):
    here = Session(tmp_path, prefork)
    here.type(f"{USE} list")  # makes the store, which is looked into from here, too
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    command = f"{TUNE} --dataset digits --epochs 2 --trials 6 --storage study.log"

    def in_the_second_trial():
        experiments = [e.experiment_id for e in client.search_experiments()]
        found = client.search_runs(experiments, "attributes.run_name = 'trial 1'")
        return any("val_loss" in run.data.metrics for run in found)

    stopped = here.type(command, code=143, until=in_the_second_trial)
    assert "stopped by SIGTERM; the run is marked KILLED" in stopped.error
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    before = client.search_runs([experiment.experiment_id])
    assert "RUNNING" not in {r.info.status for r in before}
    (parent,) = [r for r in before if "mlflow.parentRunId" not in r.data.tags]
    assert parent.info.status == "KILLED"

    result = here.type(command).result
    assert result["run_id"] == parent.info.run_id and result["trials"] == 6
    parent = client.get_run(result["run_id"])
    assert parent.info.status == "FINISHED"
    trials = children(client, parent)
    states = [trial.data.tags.get("optuna.state") for trial in trials]
    assert states.count("complete") + states.count("pruned") == 6
    assert states.count("pruned") == result["pruned"] >= 1
    pruned = [trial for trial in trials if trial.data.tags.get("optuna.state") == "pruned"]
    assert {trial.info.status for trial in pruned} == {"FINISHED"}
    # No two trials try the same.
    rates = [t.data.params["learning_rate"] for t in trials if t.data.params]
    assert len(set(rates)) == len(rates) >= 6
    bad = here.type(f"{TUNE} --dataset digits --storage /no/such/folder/study.log", code=1)
    assert "the study cannot be kept in" in bad.error
    for own in ("mlflow.db", "../" + tmp_path.name + "/mlflow.db"):  # Optuna's tables in it?
        before = (tmp_path / "mlflow.db").read_bytes()
        bad = here.type(f"{TUNE} --dataset digits --storage sqlite:///{own}", code=1)
        assert "it is MLflow's own store" in bad.error
        assert (tmp_path / "mlflow.db").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("number, everyone", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_ends_a_study_of_several_processes(number, everyone, tmp_path):
    """`scancel --full` and Ctrl-C reach each process, a plain `kill` only the first."""
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    flags = ("--dataset", "digits", "--epochs", "10000", "--trials", "4", "--jobs", "2")
    process = subprocess.Popen(
        [sys.executable, ROOT / TUNE.split()[1], *flags],
        cwd=tmp_path,
        env=clean_environment(TMPDIR=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for_line(process, "run ")
        deadline = time.monotonic() + 120
        while sum("val_loss" in run.data.metrics for run in client.search_runs(["1"])) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        (os.killpg if everyone else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert err.count(f"stopped by {number.name}; the run is marked KILLED") >= 2
        assert "Traceback" not in err
        assert [run.info.status for run in client.search_runs(["1"])] == ["KILLED"] * 3
        with pytest.raises(ProcessLookupError):  # nobody is left, some seconds later
            for _ in range(20):
                os.killpg(process.pid, 0)
                time.sleep(0.5)
        assert not list(tmp_path.glob("tmp*"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


CONFIGS = {
    "quick": "train_fashion_mnist",
    "fashion_mnist": "train_fashion_mnist",
    "search": "tune_fashion_mnist",
}


def test_settings_files_hold_flags(tmp_path, capsys):
    from scripts import settings

    there = {path.stem for path in (ROOT / "scripts" / "cfg").glob("*.yaml")}
    assert there == set(CONFIGS)
    for name, script in CONFIGS.items():
        parser = importlib.import_module(f"scripts.{script}").build_parser()
        path = str(ROOT / "scripts" / "cfg" / f"{name}.yaml")
        args = settings.parse_with_config(parser, ["--config", path, "--epochs", "99"])
        assert args.epochs == 99 and args.dataset in ("digits", "fashion_mnist")
    # A value is what stands there, and none if nothing does.
    text = "storage:\nstudy: 010\nseed: ~\nexperiment: no\ndata_dir: ~/data\n"
    (tmp_path / "odd.yaml").write_text(text)
    args = settings.parse_with_config(parser, ["--config", str(tmp_path / "odd.yaml")])
    assert (args.storage, args.study, args.seed, args.experiment) == (None, "010", 0, "no")
    assert args.data_dir == os.path.expanduser("~/data")
    for text, said in (
        ("epoch: 3", "sets epoch: no such flag"),
        ("epochs: many", "--epochs: must be a whole number"),
        ("- epochs", "must hold lines of the form"),
        ("{", "--config"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(SystemExit) as stopped:
            settings.parse_with_config(parser, ["--config", str(tmp_path / "bad.yaml")])
        assert stopped.value.code == 2 and said in capsys.readouterr().err


# The server of guides 2, 3 and 4

SERVER = ROOT / "server" / "local.py"


@pytest.mark.slow
def test_the_local_server_starts_serves_and_stops(prefork, tmp_path):
    port = str(free_port())
    uri = f"http://127.0.0.1:{port}"

    def local(command, *arguments, code=0):
        everything = [sys.executable, str(SERVER), command, "--port", port, *arguments]
        process = subprocess.run(
            everything, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True
        )
        assert process.returncode == code, process.stdout + process.stderr
        return Finished(process)

    # The command of guide 3; that of guide 4 differs in the folder of the artifacts.
    store = ("--backend-store-uri", "sqlite:///mlflow.db")
    flags = (*store, "--default-artifact-root", "./artifacts", "--host", "0.0.0.0")
    started = local("start", *flags)
    try:
        assert f"export MLFLOW_TRACKING_URI={uri}\n" in started.out
        assert "no key is asked for" in started.err
        assert "runs from this folder already" in local("start", code=1).error
        # Another account cannot hold its lock, or write another process id into it.
        assert (tmp_path / f"mlflow-server-{port}.pid").stat().st_mode & 0o077 == 0
        # The run goes to the database, its file into the folder.
        command = "python scripts/train_simple_mnist.py --dataset digits --epochs 1"
        with_server = Session(tmp_path, prefork, MLFLOW_TRACKING_URI=uri)
        run_id = with_server.type(command).result["run_id"]
        assert (tmp_path / "artifacts" / "1" / run_id / "artifacts" / "model.pth").is_file()
        # Past the server, the files cannot be reached.
        past = Session(tmp_path, prefork).type(command, code=1)
        assert "the artifacts go through a tracking server" in past.error
    finally:
        stopped = local("stop")
    assert "stopped" in stopped.out
    assert "no server on port" in local("stop", code=1).error
    assert list(tmp_path.glob("*.pid")) == []

    # The command of guide 2: the same store. Only this machine is let in.
    started = local("start", *store)
    try:
        assert mlflow.MlflowClient(uri).get_run(run_id).info.status == "FINISHED"
        page = (ROOT / "server" / "README.md").read_text()
        (shown,) = re.findall(r"local\.py start\n```\n\n```text\n(.*?)```", page, re.DOTALL)
        number = re.compile(r"\d+")
        assert number.sub("N", started.out) == number.sub("N", shown) and started.err == ""
        with socket.socket() as other:
            other.settimeout(5)
            # Loopback as well, and not the address that the server listens on.
            assert other.connect_ex(("127.0.0.2", int(port))) == errno.ECONNREFUSED
    finally:
        local("stop")


def test_the_local_server_on_windows_says_what_to_do(tmp_path):
    (tmp_path / "fcntl.py").write_text("raise ImportError")
    command = [sys.executable, str(SERVER), "start"]
    variables = clean_environment(PYTHONPATH=str(tmp_path))
    process = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "mlflow server --backend-store-uri sqlite:///mlflow.db" in process.stderr


def test_flags_of_the_local_server_are_those_on_its_page():
    """Tables of both pages: each flag with its default."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import local\n"
        "args = local.build_parser().parse_args(['start'])\n"
        "print(*(f'{name} {value}' for name, value in vars(args).items()), sep='\\n')\n"
    )
    command = [sys.executable, "-c", code, str(SERVER.parent)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    defaults = dict(line.split() for line in printed.splitlines() if "command" not in line)
    page = (ROOT / "server" / "README.md").read_text()
    rows = re.findall(r"^\| `--([\w-]+)` \| (.*?) \|", page, flags=re.MULTILINE)
    table = {name.replace("-", "_"): default.strip("`") for name, default in rows}
    assert table.keys() >= defaults.keys() and len(defaults) == 5
    for name, default in defaults.items():
        assert table[name] == default or default == "None"


# The page


def test_each_guide_has_its_lesson_its_commands_and_its_differences():
    """For those who do not have the guides: in order, and in this order within each section."""
    page = PAGE.read_text()
    sections = re.split(r"^## (?=Guide )", page, flags=re.MULTILINE)[1:]
    assert [section.split(":")[0] for section in sections] == [f"Guide {n}" for n in (2, 3, 4, 5)]
    for section in sections:
        title, text = section.split("\n", 1)
        assert text.startswith("\nYou learn "), title
        assert re.search(r"^```bash\npython scripts/\w+\.py", text, re.MULTILINE), title
        assert re.search(r"^```\n\n```text\n", text, re.MULTILINE), title
        assert "In the MLflow UI you now see" in text, title
        last = text.rstrip().split("\n\n")[-1].splitlines()
        assert last[:2] == ["| in the guide | here |", "| --- | --- |"] and len(last) > 3, title


def test_the_page_maps_the_guides():
    """Each script and settings file is on it, its commands have real flags, its links lead on."""
    page = PAGE.read_text()
    for path in [*ROOT.glob("scripts/*.py"), *ROOT.glob("scripts/cfg/*.yaml")]:
        assert path.name in page, path
    commands = re.findall(r"^python scripts/(\w+)\.py(.*)$", page, flags=re.MULTILINE)
    assert len(commands) >= 14
    for script, arguments in commands:
        parser = importlib.import_module(f"scripts.{script}").build_parser()
        parser.parse_args(shlex.split(arguments))  # an unknown flag ends the test
    for flag in set(re.findall(r"--[a-z][a-z-]+", " ".join(SCRIPT_COMMANDS))) - {"--predict"}:
        assert flag in page, flag

    def anchors(text):
        headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    links = re.findall(r"\]\(([^)]+)\)", page)
    links += [f"../scripts/{link}" for link in links if not link.startswith(("..", "#"))]
    assert len(links) >= 20
    for link in links:
        path, _, anchor = link.partition("#")
        target = PAGE.parent / path if path else PAGE
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link
    root = (ROOT / "README.md").read_text()
    for anchor in re.findall(r"\]\(scripts/README\.md#([^)]+)\)", root):
        assert anchor in anchors(page), anchor
