"""scripts/promote.py: what is promoted, what is not, what is recorded, and where the alias ends."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import crafted
import mlflow
import pytest
import torch
from conftest import KEY, ROOT, Session, clean_environment, mlflow_server
from gateway import Gateway

from common import training
from common.errors import TRY_AGAIN, UserError

PROMOTE = "python scripts/promote.py"
SCRIPT = ROOT / "scripts" / "promote.py"
NAMES = (f"TEAM_{number}" for number in itertools.count(1))

pytestmark = pytest.mark.slow


class Team:
    """A server, with a gateway that asks for a key or without, and two trained networks on it."""

    def __init__(self, folder, server, box, prefork):
        self.folder, self.box = folder, box
        self.variables = {"MLFLOW_TRACKING_URI": box.uri, "AM_SC_API_KEY": KEY}
        self.server, self.client = server, mlflow.MlflowClient(server)
        for name in ("work", "without"):
            (folder / name).mkdir()
        self.with_key = Session(folder / "work", prefork, **self.variables)
        self.without_key = Session(folder / "without", prefork, MLFLOW_TRACKING_URI=server)
        self.session = self.with_key
        self.trained = {}
        for kind, epochs in (("weak", 1), ("strong", 4)):
            command = f"python train_mnist_mlflow.py --dataset digits --epochs {epochs}"
            self.trained[kind] = self.session.type(command, "--precision", "fp32").result

    def model(self, *kinds, production=None):
        """Register a model under a new name, its versions 1, 2 ... being of these kinds."""
        name = next(NAMES)
        self.client.create_registered_model(name)
        for kind in kinds:
            self.version(name, self.trained[kind]["run_id"], self.trained[kind]["model_uri"])
        if production:
            self.client.set_registered_model_alias(name, "production", production)
        return name

    def version(self, name, run_id, model_uri):
        model_id = model_uri.removeprefix("models:/")
        return self.client.create_model_version(name, model_uri, run_id, model_id=model_id).version

    def promote(self, name, arguments, *more, code=0):
        return self.session.type(f"{PROMOTE} {name} {arguments}", *more, code=code)

    def fails(self, name, arguments, *more, code=1):
        """Promote in vain; return the message, which is two lines."""
        finished = self.promote(name, arguments, *more, code=code)
        assert "Traceback" not in finished.err and KEY not in finished.out + finished.err
        assert finished.error.count("\n") == 2 and "\nhint:  " in finished.error
        return finished.error

    def alias(self, name, alias="production"):
        version = self.client.get_registered_model(name).aliases.get(alias)
        return version and str(version)

    def records(self, name):
        """The runs about a model, in the order of their numbers."""
        experiment = self.client.get_experiment_by_name("promotions")
        found = self.client.search_runs(
            [experiment.experiment_id] if experiment else [], f"tags.promotion.model = '{name}'"
        )
        return sorted(found, key=lambda run: int(run.data.tags["promotion.number"]))

    def outcomes(self, name):
        return [run.data.tags["promotion.outcome"] for run in self.records(name)]

    def predictions(self, kind):
        run_id = self.trained[kind]["run_id"]
        path = self.client.download_artifacts(run_id, "predictions/test.json")
        return torch.tensor(json.loads(Path(path).read_text())["predictions"])

    def log(self, network, example):
        """Log a model of somebody else, in a run that says nothing; return (run id, address)."""
        mlflow.set_tracking_uri(self.server)
        try:
            with mlflow.start_run(experiment_id="0") as run:
                if isinstance(network, torch.nn.Module):
                    logged = mlflow.pytorch.log_model(
                        network.eval(), name="model", input_example=example, pip_requirements=[]
                    )
                else:
                    logged = mlflow.sklearn.log_model(network, name="model", pip_requirements=[])
        finally:
            mlflow.set_tracking_uri(None)
        return run.info.run_id, f"models:/{logged.model_id}"


@pytest.fixture(scope="module")
def everybody(tmp_path_factory, prefork):
    folder = tmp_path_factory.mktemp("team")
    with mlflow_server(folder) as server, Gateway(server, KEY) as box:
        yield Team(folder, server, box, prefork)


@pytest.fixture
def team(everybody):
    """The team, whose server asks for a key."""
    yield everybody
    everybody.box.on_request = lambda request: None


@pytest.fixture(params=["with_key", "without_key"])
def anyhow(request, team):
    """The same, also on the way to the server on which nobody asks for a key."""
    team.session = getattr(team, request.param)
    yield team
    team.session = team.with_key


# What is promoted, and what is not


def test_better(anyhow):
    team, name = anyhow, anyhow.model("weak", "strong", production=1)
    finished = team.promote(name, "--version 2")
    assert "\nalias    production  version 1 -> 2\n" in finished.out
    assert team.alias(name) == "2"
    result = finished.result
    assert (result["previous_version"], result["model_version"]) == ("1", "2")
    assert result["outcome"] == "promoted" and result["alias"] == "production"

    (record,) = team.records(name)
    assert record.info.run_id == result["run_id"] and record.info.status == "FINISHED"
    assert record.info.run_name == f"{name}@production 1 -> 2"
    tags = record.data.tags
    expected = {"from": "1", "to": "2", "found": "1", "alias": "production", "number": "1"}
    assert {key: tags[f"promotion.{key}"] for key in expected} == expected
    assert tags["owner"] and tags["host"] and "better by" in tags["promotion.reason"]
    assert (
        "| accuracy |" in tags["mlflow.note.content"] and "promoted" in tags["mlflow.note.content"]
    )
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert git.returncode or tags["git.commit"] == git.stdout.strip()
    version = team.client.get_model_version(name, "2")
    assert version.tags["promotion.run_id"] == record.info.run_id

    # The scores are those of the trained networks, image by image.
    test = training.load_data("digits", "unused", train=False)
    weak, strong = (team.predictions(kind) == test.labels for kind in ("weak", "strong"))
    metrics = record.data.metrics
    assert metrics["current_accuracy"] == team.trained["weak"]["val_accuracy"]
    assert metrics["candidate_accuracy"] == team.trained["strong"]["val_accuracy"]
    assert metrics["only_current_right"] == (weak & ~strong).sum()
    assert metrics["only_candidate_right"] == (strong & ~weak).sum() > 10
    assert metrics["both_right"] == (weak & strong).sum()
    assert metrics["neither_right"] == (~weak & ~strong).sum()
    assert metrics["candidate_loss"] < metrics["current_loss"] and metrics["mcnemar_p"] < 0.01
    (used,) = record.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("digits", test.digest)
    assert record.data.params["dataset"] == "digits" and record.data.params["metric"] == "accuracy"
    plots = {file.path for file in team.client.list_artifacts(record.info.run_id, "plots")}
    assert plots == {f"plots/{name}.png" for name in ("current", "candidate", "difference")}
    assert {request.headers.get("x-api-key") for request in team.box.requests} == {KEY}
    assert team.box.artifact_uploads()


def test_worse_and_forced(anyhow):
    team, name = anyhow, anyhow.model("strong", "weak", production=1)
    error = team.fails(name, "--version 2")
    assert f"version 2 of {name} was not promoted: accuracy" in error and "worse by" in error
    assert team.alias(name) == "1"
    (record,) = team.records(name)
    assert record.info.status == "FINISHED" and record.data.tags["promotion.outcome"] == "refused"
    tags = team.client.get_model_version(name, "2").tags
    assert tags == {"promotion.refused_run_id": record.info.run_id}

    finished = team.promote(name, "--version 2 --force 'version 1 saw the test set'")
    assert finished.result["outcome"] == "forced" and team.alias(name) == "2"
    reason = team.records(name)[1].data.tags["promotion.reason"]
    assert reason.startswith("version 1 saw the test set (accuracy") and "worse by" in reason


def test_versions_of_different_data(team):
    """What serves another purpose gives way only if the user says on which images to compare."""
    name = team.model("weak", "strong", production=1)
    team.client.set_model_version_tag(name, "1", "dataset", "mnist")
    error = team.fails(name, "--version 2")
    assert "version 1, in place, was trained on mnist, and the new one on digits" in error
    assert team.alias(name) == "1" and team.records(name) == [] and "--dataset digits" in error
    finished = team.promote(name, "--version 2 --dataset digits")
    assert "note     version 1 comes from a run on mnist" in finished.out
    assert team.alias(name) == "2"


def test_undone(anyhow):
    team, name = anyhow, anyhow.model("weak", "strong", production=1)
    team.promote(name, "--version 2")
    assert team.promote(name, "--undo").result["previous_version"] == "2"
    assert team.alias(name) == "1"
    assert "version 1 -> 2\n" in team.promote(name, "--undo").out
    assert team.alias(name) == "2"
    team.fails(name, "--version 1")
    history = team.promote(name, "--history")
    rows = [line.split() for line in history.out.splitlines()[2:-1]]
    assert [row[0] for row in rows] == ["promoted", "undone", "undone", "refused"]
    assert [row[5:8] for row in rows] == [
        *(["1", "->", "2"], ["2", "->", "1"], ["1", "->", "2"], ["2", "->", "1"]),
    ]
    listed = [record["run_id"] for record in history.result["promotions"]]
    assert listed == [record.info.run_id for record in team.records(name)]
    first, second = team.records(name)[:2]
    assert second.data.tags["promotion.reason"] == f"undo of {first.info.run_id}"
    assert team.client.get_model_version(name, "1").tags["promotion.run_id"] == second.info.run_id


def test_equal(team):
    name = team.model("weak", "weak", production=1)
    assert "the same (needed: better by 0.001)" in team.fails(name, "--version 2")
    assert team.alias(name) == "1"
    assert team.promote(name, "--version 2 --by 0").result["mcnemar_p"] == 1
    assert team.alias(name) == "2"


def test_not_by_enough_and_by_loss(team):
    name = team.model("weak", "strong", production=1)
    assert "needed: better by 0.5" in team.fails(name, "--version 2 --by 0.5")
    assert "needed: better by 2" in team.fails(name, "--version 2 --metric loss --by 2")
    error = team.fails(name, "--version 2 --metric loss --at_least 0.001")
    assert "needed: at most 0.001" in error
    finished = team.promote(name, "--version 2 --metric loss --by 0.05 --at_least 1")
    assert "loss" in finished.result["reason"] and team.alias(name) == "2"


def test_first(team):
    name = team.model("weak")
    assert "nothing to compare with" in team.fails(name, "--version 1")
    assert team.records(name) == []
    assert "needed: at least 0.99" in team.fails(name, "--version 1 --at_least 0.99")
    assert team.alias(name) is None
    finished = team.promote(name, "--version 1 --at_least 0.5")
    assert "\nalias    production  version none -> 1\n" in finished.out
    assert finished.result["previous_version"] is None and team.alias(name) == "1"
    # Back to when there was none, and forth again.
    assert "version 1 -> none\n" in team.promote(name, "--undo").out
    assert team.alias(name) is None
    team.promote(name, "--undo")
    assert team.alias(name) == "1"
    assert team.outcomes(name) == ["refused", "promoted", "undone", "undone"]


def test_from_an_alias_to_another_and_nothing_to_do(team):
    name = team.model("weak", "strong")
    assert "has no alias staging" in team.fails(name, "--from_alias staging --alias stable")
    team.client.set_registered_model_alias(name, "staging", "2")
    team.client.set_registered_model_alias(name, "stable", "1")
    team.promote(name, "--from_alias staging --alias stable")
    assert team.alias(name, "stable") == "2" and team.alias(name) is None
    finished = team.promote(name, "--from_alias staging --alias stable")
    assert finished.result["outcome"] == "unchanged"
    assert len(team.records(name)) == 1


# Undo: said, not guessed


def test_nothing_to_undo(team):
    name = team.model("weak", production=1)
    assert "no move of" in team.fails(name, "--undo")
    assert "no promotion of" in team.promote(name, "--history").out


def test_predecessor_was_deleted(team):
    name = team.model("weak", "strong", production=1)
    team.promote(name, "--version 2")
    team.client.delete_model_version(name, "1")
    assert f"there is no version 1 of {name}, or it was deleted" in team.fails(name, "--undo")
    assert team.alias(name) == "2" and team.outcomes(name) == ["promoted"]


def test_alias_was_moved_by_hand(team):
    name = team.model("weak", "strong", "weak", production=1)
    team.promote(name, "--version 2")
    team.client.set_registered_model_alias(name, "production", "3")
    error = team.fails(name, "--undo")
    assert "points at version 3" in error and "left it at version 2" in error
    assert "to go to version 1 all the same" in error and team.alias(name) == "3"
    team.promote(name, "--undo --force 'nobody knows why'")
    assert team.alias(name) == "1"
    assert team.records(name)[-1].data.tags["promotion.from"] == "3"


# Two at once, by hand at the same time, and killed


def test_raced(team):
    """Three promotions that have all decided before any of them moves the alias."""
    name = team.model("weak", "strong", "strong", "strong", production=1)
    together = threading.Barrier(3)

    def wait_for_the_others(request):
        if request.path.endswith("/runs/create"):
            together.wait(60)

    team.box.on_request = wait_for_the_others
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, name, "--version", version],
            cwd=team.session.folder,
            env=clean_environment(**team.variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for version in "234"
    ]
    said = [process.communicate(timeout=200) for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 75, 75], said
    records = team.records(name)
    assert sorted(team.outcomes(name)) == ["conflict", "conflict", "promoted"]
    assert len({record.data.tags["promotion.number"] for record in records}) == 3
    assert records[0].data.tags["promotion.outcome"] == "promoted"
    assert team.alias(name) == records[0].data.tags["promotion.to"]
    for record in records[1:]:
        assert record.data.tags["promotion.found"] == team.alias(name)
    for out, err in said:
        last = json.loads(out.splitlines()[-1])
        if last["outcome"] == "conflict":
            assert "by somebody else meanwhile. Nothing was changed." in err


def test_moved_by_hand_meanwhile(team):
    name = team.model("weak", "strong", "weak", production=1)

    def move(request):
        if request.path.endswith("/runs/create"):
            team.client.set_registered_model_alias(name, "production", "3")

    team.box.on_request = move
    error = team.fails(name, "--version 2", code=TRY_AGAIN)
    assert f"{name}@production was moved from version 1 to 3 by somebody else" in error
    assert team.alias(name) == "3"
    tags = team.records(name)[0].data.tags
    assert tags["promotion.outcome"] == "conflict" and tags["promotion.found"] == "3"
    team.box.on_request = lambda request: None
    assert team.promote(name, "--version 2").result["previous_version"] == "3"


def test_moved_on_at_once(team):
    name = team.model("weak", "strong", "weak", production=1)

    def move(request):
        if request.method == "POST" and request.path.endswith("/registered-models/alias"):
            team.client.set_registered_model_alias(name, "production", "3")

    team.box.on_request = move
    assert "was moved on to version 3 by somebody else at once" in team.fails(name, "--version 2")
    assert team.outcomes(name) == ["replaced"]
    team.box.on_request = lambda request: None
    assert "points at version 3" in team.fails(name, "--undo")


def test_killed_between_the_move_and_the_record_of_it(team):
    name = team.model("weak", "strong", production=1)
    moved, ended = threading.Event(), threading.Event()

    def hold(request):
        if request.method == "POST" and request.path.endswith("/registered-models/alias"):
            moved.set()
            ended.wait(20)

    team.box.on_request = hold
    threading.Timer(25, ended.set).start()
    team.session.type(f"{PROMOTE} {name} --version 2", code=143, until=moved.is_set)
    ended.set()
    team.box.on_request = lambda request: None
    (record,) = team.records(name)
    assert record.info.status == "KILLED" and record.data.tags["promotion.outcome"] == "moving"
    assert team.alias(name) == "2"
    assert "\nunfinished" in team.promote(name, "--history").out
    team.promote(name, "--undo")
    assert team.alias(name) == "1" and team.outcomes(name) == ["moving", "undone"]


def test_a_promotion_that_hangs_or_died(team, monkeypatch):
    """It is waited for, and later counts as dead."""
    from scripts import promotions

    monkeypatch.setattr(promotions, "PATIENCE", 0)
    mlflow.set_tracking_uri(team.server)
    try:
        name, runs = team.model("weak"), []
        experiment_id = mlflow.set_experiment("hanging").experiment_id
        for number in (1, 2):
            tags = {"model": name, "alias": "production", "from": "none", "to": "1"}
            tags |= {"outcome": "moving", "number": number, "reason": "-"}
            tags = {f"promotion.{key}": str(value) for key, value in tags.items()}
            run = team.client.create_run(experiment_id, tags=tags | {"owner": "8cf"})
            runs.append(run.info.run_id)
        with pytest.raises(UserError, match=f"is under way: the run {runs[0]}") as refused:
            promotions.take_turn(runs[1], "hanging", name)
        assert refused.value.code == TRY_AGAIN
        assert team.client.get_run(runs[1]).data.tags["promotion.outcome"] == "conflict"
        monkeypatch.setattr(promotions, "DEAD", 0)
        assert promotions.take_turn(runs[1], "hanging", name) == 2
    finally:
        mlflow.set_tracking_uri(None)


# Models of other kinds, and of other people


class Wrong(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear = kind, torch.nn.Linear(784, 5 if kind == "five" else 10)

    def forward(self, x):
        if self.kind == "raises":  # for any batch but one of three
            x = x.reshape(3, 784)
        y = self.linear(x.flatten(1))
        return y * float("nan") if self.kind == "nan" else y


def foreign(kind):
    """(a model that does not classify these images, an example of its input)."""
    images = torch.zeros(2, 1, 28, 28).numpy()
    if kind == "regression":
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression().fit([[0], [1]], [0, 1]), None
    if kind == "table":
        return torch.nn.Linear(3, 10), torch.zeros(2, 3).numpy()
    return Wrong(kind), torch.zeros(3, 1, 28, 28).numpy() if kind == "raises" else images


@pytest.mark.parametrize("kind", ["regression", "table", "five", "raises", "nan"])
def test_foreign_model(kind, team):
    name = team.model("weak", production=1)
    team.version(name, *team.log(*foreign(kind)))
    if kind == "table":
        assert "data that nobody recorded" in team.fails(name, "--version 2")
    error = team.fails(name, "--version 2 --dataset digits")
    if kind == "regression":
        assert "it is of the flavor python_function, sklearn" in error
    else:
        assert "version 2 is no model for these images" in error
    # It is not promoted by force either. The other way round, it can be replaced by force.
    team.fails(name, "--version 2 --dataset digits --force 'it must be good for something'")
    assert team.alias(name) == "1" and team.records(name) == []
    team.client.set_registered_model_alias(name, "production", "2")
    if kind == "table":
        team.fails(name, "--version 1")
    finished = team.promote(name, "--version 1 --at_least 0.1 --force 'that was no classifier'")
    assert team.alias(name) == "1" and finished.result["outcome"] == "forced"
    assert "current_accuracy" not in finished.result and "\nnote     " in finished.out


@pytest.mark.parametrize(
    "kind", [crafted.size, crafted.planted_code, crafted.file_is_made], ids=lambda k: k.__name__
)
def test_model_that_would_run_code(kind, team, tmp_path):
    name, marker = team.model("weak", production=1), tmp_path / "marker"
    run_id, uri = team.log(training.MNISTCNN(), torch.zeros(2, 1, 28, 28).numpy())
    (model,) = (team.folder / "artifacts").glob(
        f"*/models/{uri.removeprefix('models:/')}/artifacts"
    )
    kind(model, f"__import__('pathlib').Path({str(marker)!r}).write_text('')")
    team.version(name, run_id, uri)
    for more in ("", "--force 'trust me'"):
        error = team.fails(name, f"--version 2 --dataset digits {more}")
        assert "may run code when it is loaded" in error
    assert not marker.exists() and not (team.session.folder / "made-by-the-model").exists()
    assert team.alias(name) == "1" and team.records(name) == []


# Models on a shared filesystem, with metadata in a local store


def test_shared_filesystem(tmp_path, prefork):
    """Both are mapped: of one of them, MLflow itself holds no file."""
    session = Session(tmp_path, prefork)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    train = f"python Modify_artifact_location.py --dataset digits --target_path {tmp_path}/lustre"
    weak = session.type(f"{train} --register").result
    assert weak["previous_version"] is None
    strong = session.type(f"{train} --epochs 4").result
    upload = "python upload_external_model.py --in_place --dataset digits --model_name MNIST_CNN"
    staged = session.type(f"{upload} --alias staging --model_path {strong['model_path']}")
    assert "\nalias    staging  version none -> 2\n" in staged.out
    assert staged.result["previous_version"] is None
    mapped = session.type(f"{PROMOTE} MNIST_CNN --from_alias staging").result
    assert mapped["candidate_accuracy"] == strong["val_accuracy"]
    assert mapped["current_accuracy"] == weak["val_accuracy"]
    pair = "python Modify_artifact_location_register_inference.py --alias canary --run_id"
    registered = session.type(f"{pair} {strong['run_id']}")
    assert "\nalias    canary  version none -> 3\n" in registered.out
    assert registered.result["previous_version"] is None
    assert str(client.get_model_version_by_alias("MNIST_CNN", "production").version) == "2"

    # Its file is purged: the version cannot be compared with any more, but it can be replaced.
    os.rename(strong["model_path"], tmp_path / "purged.pt2")
    finished = session.type(f"{PROMOTE} MNIST_CNN --version 1", code=1)
    assert f"there is no model at {strong['model_path']}" in finished.error
    session.type(f"{PROMOTE} MNIST_CNN --version 1 --force 'version 2 was purged'")
    assert str(client.get_model_version_by_alias("MNIST_CNN", "production").version) == "1"

    # Mapping runs nothing in a file, but others may load it otherwise.
    os.rename(tmp_path / "purged.pt2", strong["model_path"])
    kept = tmp_path / "kept"
    shutil.copytree(Path(strong["model_path"]).parents[1], kept)
    crafted.size(Path(strong["model_path"]).parents[1], "print('never')")
    session.type(f"{PROMOTE} MNIST_CNN --version 2", code=1)
    assert str(client.get_model_version_by_alias("MNIST_CNN", "production").version) == "1"


# The arithmetic


def test_mcnemar_is_scipys_and_the_margin_is_what_it_says():
    from scipy.stats import binomtest

    from scripts.comparison import Comparison

    test = training.load_data("digits", "unused", train=False).part(slice(0, 200))
    wrong = (test.labels + 1) % 10
    for only_one, only_other in ((0, 0), (0, 1), (3, 3), (2, 9), (40, 12)):
        scores = {}
        for name, start, count in (("a", 0, only_one), ("b", 100, only_other)):
            predictions = test.labels.clone()
            predictions[start : start + count] = wrong[start : start + count]
            accuracy = 1 - count / 200
            scores[name] = training.loop.Evaluation(0.5, accuracy, predictions)
        compared = Comparison("digits", test, scores)
        assert compared.alone == [only_other, only_one]
        n = only_one + only_other
        assert compared.p == pytest.approx(binomtest(only_one, n).pvalue if n else 1)
    nearly = {"a": scores["a"]._replace(accuracy=0.99), "b": scores["b"]._replace(accuracy=0.991)}
    assert Comparison("digits", test, nearly).verdict("accuracy", 0.001, None)[0]
    assert not Comparison("digits", test, nearly).verdict("accuracy", 0.0011, None)[0]
