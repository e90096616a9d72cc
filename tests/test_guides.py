"""Guides 2 to 5: each command runs as a process, and what it promises stands in the store."""

import importlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time

import mlflow
import pytest
from conftest import (
    KEY,
    REAL_DATA,
    REAL_MNIST,
    ROOT,
    Finished,
    clean_environment,
    free_port,
    run,
    serving,
)
from gateway import Gateway

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
        pytest.skip(f"no guides in {folder}")
    theirs = set()
    for guide in ("2-save-log-register", "3-tutorial", "4-intro", "5-demo"):
        text = (folder / f"{guide}.md").read_text(errors="replace")
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for block in (block for language, block in blocks if language in ("bash", "")):
            for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
                if re.match(r"(python |pip |mlflow |mflow |export |ls |\$ )", line):
                    theirs.add(line.strip())
    assert theirs == ours


# Guide 2, through the box with the key


class Session:
    """Commands typed one after another in a folder: {command: how it ended}."""

    def __init__(self, folder, uri, gateway=None, **variables):
        self.folder, self.uri, self.gateway, self.variables = folder, uri, gateway, variables
        self.client = mlflow.MlflowClient(uri)

    def type(self, command, *more, code=0):
        script, *arguments = shlex.split(command.removeprefix("python "))
        return run(script, *arguments, *more, cwd=self.folder, code=code, **self.variables)


@pytest.fixture(scope="module")
def session(tmp_path_factory, server, tls):
    """In an empty folder, with the address and the key of the box exported."""
    folder = tmp_path_factory.mktemp("guides")
    with Gateway(server, KEY, tls=tls[0]) as gateway:
        yield Session(
            folder,
            server,
            gateway,
            MLFLOW_TRACKING_URI=gateway.uri,
            MLFLOW_TRACKING_SERVER_CERT_PATH=str(tls[1]),
            AM_SC_API_KEY=KEY,
        )


def typed_guide_2(session):
    """All commands of guide 2, on digits, and shorter where they train: {command: its end}."""
    ended = {}
    for command in SCRIPT_COMMANDS:
        typed, more, code = command, (), 0
        if command.startswith(TRAIN):
            more = ("--dataset", "digits", "--epochs", 3)
        if "from-run" in command:
            if "<RUN_ID>" not in command:
                continue  # the same with the guide's own run
            typed = command.replace("<RUN_ID>", ended[TRAIN].result["run_id"])
        if " 0 Archived" in command:
            code = 1  # versions begin with 1
        ended[command] = session.type(typed, *more, code=code)
    return ended


@pytest.mark.slow
def test_guide_2(session, tmp_path):
    """One test, so that the trainings are run once however the tests are spread."""
    ended = typed_guide_2(session)
    check_what_is_printed(ended)
    check_what_is_logged(session, ended, tmp_path)
    check_what_is_registered(session, ended)
    # What is not there is said.
    finished = session.type(f"{INFER} --run_id {ended[TRAIN].result['run_id']}", code=1)
    assert "has no model.pth" in finished.error
    missing = session.type(f"{USE} versions no-such-model", code=1)
    assert "there is no registered model 'no-such-model'" in missing.error
    missing = session.type("python scripts/log_plot.py --experiment nowhere", code=1)
    assert "there is no experiment 'nowhere'" in missing.error


def check_what_is_logged(session, ended, tmp_path):
    client, result = session.client, ended[TRAIN].result
    trained = client.get_run(result["run_id"])
    assert trained.info.status == "FINISHED"
    params = trained.data.params
    assert params["model"] == "SimpleCNN" and params["total_parameters"] == "95050"
    assert params["batch_size"] == "32" and params["learning_rate"] == "0.001"
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        history = client.get_metric_history(result["run_id"], name)
        assert [point.step for point in history] == [1, 2, 3], name
    accuracies = [p.value for p in client.get_metric_history(result["run_id"], "val_accuracy")]
    assert result["best_val_accuracy"] == max(accuracies)
    assert result["best_epoch"] == 1 + accuracies.index(max(accuracies))
    names = {file.path for file in client.list_artifacts(result["run_id"])}
    assert {"best_model.pt", "model_metadata.json", "model_summary.txt"} <= names

    # The checkpoint loads without MLflow, and is the epoch that the metadata names.
    mlflow.set_tracking_uri(session.uri)
    uri = f"runs:/{result['run_id']}"
    metadata = mlflow.artifacts.load_dict(f"{uri}/model_metadata.json")
    assert metadata["best_epoch"] == result["best_epoch"]
    assert "95,050" in mlflow.artifacts.load_text(f"{uri}/model_summary.txt")
    path = mlflow.artifacts.download_artifacts(f"{uri}/best_model.pt", dst_path=str(tmp_path))
    code = (
        "import sys, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from common.model import SimpleCNN\n"
        "from common import data, training\n"
        "checkpoint = torch.load(sys.argv[1])\n"
        "model = SimpleCNN()\n"
        "model.load_state_dict(checkpoint)\n"
        "assert 'mlflow' not in sys.modules\n"
        "test = data.load('digits', '', train=False)\n"
        "print(training.evaluate(model.eval(), test.images, test.labels).accuracy)\n"
    )
    command = [sys.executable, "-c", code, path]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(printed) == pytest.approx(result["test_accuracy"], abs=1e-9)

    custom = client.get_run(ended[SCRIPT_COMMANDS[1]].result["run_id"])
    assert custom.info.run_name == "cnn-v1"
    assert client.get_experiment(custom.info.experiment_id).name == "production-models"


def check_what_is_registered(session, ended):
    client, result = session.client, ended[TRAIN].result
    version = client.get_model_version("simple-cnn-classifier", "1")
    assert version.run_id == result["run_id"]
    assert version.description == "SimpleCNN trained with lr=0.001, batch_size=32"
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
    assert "@staging is removed" in transition.out and "@production is version 1" in transition.out
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


# Guide 3

INFER = "python scripts/download_and_infer.py"
EPOCH = r"Epoch \d: train_loss=\d\.\d{4}, train_acc=(\d\.\d{4}), val_loss=\d\.\d{4}, val_acc=(.*)"


@pytest.mark.slow
def test_guide_3(session):
    command = "python scripts/train_simple_mnist.py --dataset digits"
    trained = session.type(command)
    assert len(re.findall(EPOCH, trained.out)) == 5
    run_id, client = trained.result["run_id"], session.client
    logged = client.get_run(run_id)
    assert client.get_experiment(logged.info.experiment_id).name == "MNIST_experiment"
    assert {"lr": "0.001", "batch_size": "64", "epochs": "5"}.items() <= logged.data.params.items()
    assert set(logged.data.metrics) == {"train_loss", "train_acc", "val_loss", "val_acc"}
    assert logged.data.metrics["val_acc"] > 0.9
    assert [file.path for file in client.list_artifacts(run_id)] == ["model.pth"]

    latest = session.type(f"{INFER} --seed 1")
    assert "Found experiment 'MNIST_experiment' with ID: " in latest.out
    assert f"Using run_id: {run_id}\n" in latest.out
    assert (
        len(re.findall(r"^Sample +\d+ — true label: \d  \|  predicted: \d$", latest.out, re.M)) == 5
    )
    named = session.type(f"{INFER} --seed 1 --run_id {run_id} --download_dir downloaded_ckpt")
    assert named.result == latest.result
    assert (session.folder / "downloaded_ckpt" / "model.pth").is_file()
    samples = named.result["samples"]
    assert sum(sample["true"] == sample["predicted"] for sample in samples) >= 3


@pytest.mark.slow
@REAL_MNIST
def test_guide_3_accuracies_on_mnist(tmp_path):
    """The last line that the guide prints: train_acc=0.9693, val_acc=0.9677."""
    finished = run("scripts/train_simple_mnist.py", "--data_dir", REAL_DATA, cwd=tmp_path)
    assert finished.result["train_acc"] == pytest.approx(0.9693, abs=0.01)
    assert finished.result["val_acc"] == pytest.approx(0.9677, abs=0.01)


# Guide 4

FOREST = "python scripts/train_with_mlflow.py"
REGISTER = "python scripts/register_model.py"
SCORE = "python scripts/score_rest.py"


@pytest.mark.slow
def test_guide_4_through_the_box(session):
    trained = session.type(FOREST).result
    assert session.type(REGISTER).result["model_version"] == "1"
    again = session.type(f"{REGISTER} --run_id {trained['run_id']} --model_name iris").result
    assert again["model_name"] == "iris" and again["model_version"] == "1"
    version = session.client.get_model_version("New Registered Model", "1")
    assert version.run_id == trained["run_id"]


@pytest.mark.slow
def test_guide_4(tmp_path):
    """Locally: train, register twice, serve, ask; then everything that can be wrong with asking."""
    here = Session(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    trained = here.type(FOREST)
    logged = here.client.get_run(trained.result["run_id"])
    experiment = here.client.get_experiment(logged.info.experiment_id)
    assert experiment.name == "RandomForest_Training"
    assert {"n_estimators", "max_depth"} <= set(logged.data.params)
    assert logged.data.metrics["accuracy"] > 0.9
    files = {file.path for file in here.client.list_artifacts(logged.info.run_id)}
    assert files == {
        "confusion_matrix.png",
        "classification_report.txt",
        "feature_importances.json",
    }
    assert len(logged.outputs.model_outputs) == 1  # the fourth artifact
    assert "Failed to validate" not in trained.err
    versions = [here.type(REGISTER).result["model_version"] for _ in range(2)]
    assert versions == ["1", "2"]

    port = free_port()
    command = [
        *("mlflow", "models", "serve", "-m", "models:/New Registered Model/1"),
        *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)),
    ]
    environment = clean_environment(MLFLOW_TRACKING_URI=here.uri)
    url = f"http://127.0.0.1:{port}"
    nobody = here.type(f"{SCORE} --url {url}", code=1)
    assert "no served model answers at" in nobody.error and "Connection refused" in nobody.error
    with serving(command, tmp_path, environment, f"{url}/ping", tmp_path / "serve.log"):
        asked = here.type(f"{SCORE} --url {url}/invocations")
        assert asked.result["predictions"] == ["setosa"]
        assert "row      [5.1, 3.5, 1.4, 0.2]  predicted setosa" in asked.out
        refused = here.type(f"{SCORE} --url {url} --columns a b --data [[1,2]]", code=1)
        assert "the served model refuses the request (error 400): Model is missing" in refused.error
        wrong = here.type(f"{SCORE} --url {url}/ping", code=1)
        assert "but not as a served model" in wrong.error or "refuses" in wrong.error
    assert "--data must be rows of 4 values" in here.type(f"{SCORE} --data [[1]]", code=2).err


# Pictures are asked for in test_serving.py, of the model that is served there.


# Guide 5

TUNE = "python scripts/tune_fashion_mnist.py"
ONE_RUN = "python scripts/train_fashion_mnist.py"


def children(client, parent):
    return client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    )


@pytest.mark.slow
def test_guide_5_one_run_and_its_curves(session):
    config = f"--config {ROOT}/scripts/cfg/quick.yaml"
    one, two = (session.type(f"{ONE_RUN} {config} --epochs {n}").result["run_id"] for n in (1, 2))
    logged = session.client.get_run(two)
    assert session.client.get_experiment(logged.info.experiment_id).name == "Image classification"
    assert logged.data.params["epochs"] == "2"  # the flag wins
    assert logged.data.params["learning_rate"] == "0.003"  # of the file
    assert logged.data.metrics["val_accuracy"] > 0.3 and "test_accuracy" in logged.data.metrics
    # Two runs in one picture, on both of their pages.
    drawn = session.type(f"python scripts/log_plot.py --run_id {two} {one}")
    assert drawn.result["curves"] == 4 and "val_loss  2 points" in drawn.out
    for run_id in (one, two):
        paths = [file.path for file in session.client.list_artifacts(run_id, "plots")]
        assert "plots/loss_curves.png" in paths
    nothing = session.type(f"python scripts/log_plot.py --run_id {one} --metrics no_such", code=1)
    assert "none of these runs has a metric no_such" in nothing.error


@pytest.mark.slow
def test_guide_5_a_study_shared_by_processes(session):
    flags = "--dataset digits --epochs 2 --jobs 2 --storage sqlite:///study.db"
    first = session.type(f"{TUNE} {flags} --trials 4")
    client, result = session.client, first.result
    parent = client.get_run(result["run_id"])
    trials = children(client, parent)
    assert len(trials) == result["trials"] == 4
    assert {trial.info.status for trial in trials} == {"FINISHED"}
    (best,) = [trial for trial in trials if trial.data.tags.get("best") == "true"]
    assert best.info.run_id == result["best_run_id"]
    values = [t.data.metrics["val_accuracy"] for t in trials]
    assert best.data.metrics["val_accuracy"] == result["best_val_accuracy"] == max(values)
    for name in ("learning_rate", "batch_size", "dropout"):
        assert parent.data.params[f"best_{name}"] == best.data.params[name]
    assert parent.data.metrics["test_accuracy"] == result["test_accuracy"]
    assert {file.path for file in client.list_artifacts(result["run_id"], "study")} == {
        "study/trials.png",
        "study/val_accuracy.png",
    }
    # The same study with more trials: the same parent run. All that is drawn is its children.
    more = session.type(f"{TUNE} {flags} --trials 5").result
    assert more["run_id"] == result["run_id"] and len(children(client, parent)) == 5
    drawn = session.type(f"python scripts/log_plot.py --run_id {result['run_id']}")
    assert drawn.result["curves"] == 10
    other = session.type(f"{TUNE} {flags.replace('epochs 2', 'epochs 3')}", code=1)
    assert "was begun with other settings" in other.error
    requests = session.gateway.requests
    assert requests and all(r.headers.get("x-api-key") == KEY for r in requests)


@pytest.mark.slow
def test_guide_5_an_interrupted_study_goes_on_and_prunes(tmp_path):
    flags = "--dataset digits --epochs 3 --trials 7 --storage study.log"
    arguments = [sys.executable, str(ROOT / "scripts/tune_fashion_mnist.py"), *flags.split()]
    process = subprocess.Popen(
        arguments, cwd=tmp_path, env=clean_environment(), stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("trial    1"):
            break
    time.sleep(0.5)  # into the next trial
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    here = Session(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e for e in here.client.search_experiments() if e.name != "Default"]
    before = here.client.search_runs([experiment.experiment_id])
    assert {r.info.status for r in before} == {"FINISHED", "KILLED"}

    result = here.type(f"{TUNE} {flags}").result
    parent = here.client.get_run(result["run_id"])
    assert parent.info.run_id in [r.info.run_id for r in before]
    assert parent.info.status == "FINISHED" and result["trials"] == 7
    trials = children(here.client, parent)
    states = [trial.data.tags.get("optuna.state") for trial in trials]
    assert states.count("complete") + states.count("pruned") == 7
    assert states.count("pruned") == result["pruned"] >= 1
    pruned = [t for t in trials if t.data.tags.get("optuna.state") == "pruned"]
    assert {trial.info.status for trial in pruned} == {"FINISHED"}
    # No two trials try the same.
    rates = [trial.data.params["learning_rate"] for trial in trials]
    assert len(set(rates)) == len(rates)
    bad = here.type(f"{TUNE} --dataset digits --storage /no/such/folder/study.log", code=1)
    assert "the study cannot be kept in" in bad.error


CONFIGS = {
    "quick": "train_fashion_mnist",
    "fashion_mnist": "train_fashion_mnist",
    "search": "tune_fashion_mnist",
}


def test_settings_files_hold_flags(tmp_path, capsys):
    from common import cli

    there = {path.stem for path in (ROOT / "scripts" / "cfg").glob("*.yaml")}
    assert there == set(CONFIGS)
    for name, script in CONFIGS.items():
        parser = importlib.import_module(f"scripts.{script}").build_parser()
        path = str(ROOT / "scripts" / "cfg" / f"{name}.yaml")
        args = cli.parse_with_config(parser, ["--config", path, "--epochs", "99"])
        assert args.epochs == 99 and args.dataset in ("digits", "fashion_mnist")
    for text, said in (
        ("epoch: 3", "sets epoch: no such flag"),
        ("epochs: many", "--epochs: must be a whole number"),
        ("- epochs", "must hold lines of the form"),
        ("{", "--config"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(SystemExit) as stopped:
            cli.parse_with_config(parser, ["--config", str(tmp_path / "bad.yaml")])
        assert stopped.value.code == 2 and said in capsys.readouterr().err


# The server of guides 2, 3 and 4

SERVER = ROOT / "server" / "local.py"


@pytest.mark.slow
def test_the_local_server_starts_serves_and_stops(tmp_path):
    port = str(free_port())

    def local(command, *arguments, code=0):
        everything = [sys.executable, str(SERVER), command, "--port", port, *arguments]
        process = subprocess.run(
            everything, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True
        )
        assert process.returncode == code, process.stdout + process.stderr
        return Finished(process)

    flags = ("--backend-store-uri", "sqlite:///mlflow.db", "--default-artifact-root", "./artifacts")
    started = local("start", *flags)
    try:
        uri = f"http://127.0.0.1:{port}"
        assert f"export MLFLOW_TRACKING_URI={uri}\n" in started.out
        assert "runs from this folder already" in local("start", code=1).error
        # Guide 3: the run goes to the database, its file into the folder.
        arguments = ("--dataset", "digits", "--epochs", 1)
        script = "scripts/train_simple_mnist.py"
        trained = run(script, *arguments, cwd=tmp_path, MLFLOW_TRACKING_URI=uri)
        run_id = trained.result["run_id"]
        assert (tmp_path / "artifacts" / "1" / run_id / "artifacts" / "model.pth").is_file()
        # Past the server, the files cannot be reached.
        past = run(script, *arguments, cwd=tmp_path, code=1)
        assert "the artifacts go through a tracking server" in past.error
    finally:
        stopped = local("stop")
    assert "stopped" in stopped.out
    assert "no server on port" in local("stop", code=1).error
    assert list(tmp_path.glob("*.pid")) == []
    # The guides' --host 0.0.0.0 is possible, and says what it means. Loopback is the default.
    with_others = local("start", *flags, "--host", "0.0.0.0")
    local("stop")
    assert "no key is asked for" in with_others.err and "no key" not in started.err


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

PAGE = ROOT / "scripts" / "README.md"


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


def test_the_page_shows_what_is_printed():
    """The JSON lines on the page have the names that the scripts print."""
    sources = "".join(path.read_text() for path in ROOT.glob("scripts/*.py"))
    lines = re.findall(r"^\{.*\}$", PAGE.read_text(), flags=re.MULTILINE)
    assert len(lines) >= 12
    for line in lines:
        for name in json.loads(line):
            assert re.search(rf'"{name}"|\b{name}=', sources), name
