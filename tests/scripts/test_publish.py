"""publish.py: what is stored on the server afterwards, whatever happens on the way."""

import contextlib
import itertools
import json
import os
import random
import resource
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import mlflow
import pytest
import yaml
from conftest import KEY, ROOT, Session, clean_environment, mlflow_server
from conftest import run as run_script
from gateway import Gateway

from common import storage
from common.errors import UserError
from scripts import local_store

PUBLISH = "scripts/publish.py --source 'sqlite:///../a job/mlflow.db'"  # from a folder beside it
PARENT = "mlflow.parentRunId"
TOKEN = "token-0123456789"

# Somebody's own code: autologging, nested runs, odd values, more of everything than fits into one
# request, and each way to end.
OWN_CODE = """
import math, mlflow, numpy, warnings
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
mlflow.set_experiment("own code")
mlflow.sklearn.autolog()
x, y = load_iris(return_X_y=True, as_frame=True)
RandomForestClassifier(n_estimators=3).fit(x, y)
mlflow.sklearn.autolog(disable=True)
with mlflow.start_run(run_name="odd values", description="a note, with ü") as run:
    client = mlflow.MlflowClient()
    points = [("loss", 1 / (i + 1), 1_700_000_000_000 + i, i) for i in range(2500)]
    points += [("nan", math.nan, 1, 1), ("nan", math.nan, 2, 1), ("nan", 1.0, 2, 1)]
    points += [("inf", math.inf, 1, 1), ("inf", -math.inf, 2, 2), ("inf", 0.1 + 0.2, 3, -3)]
    points += [("loss", 0.5, 1_700_000_000_009, 9), ("system/a b", 1e-300, 5, 0)]
    client.log_batch(run.info.run_id, [mlflow.entities.Metric(*point) for point in points])
    mlflow.log_params({f"p{i}": "ü" * 400 for i in range(150)})
    mlflow.set_tags({f"t{i}": "v" * 500 for i in range(150)})
    for i in range(2):
        data = mlflow.data.from_numpy(numpy.arange(i + 3), name=f"data{i}")
        mlflow.log_input(data, context="training")
    model = mlflow.initialize_logged_model("unfinished")
    code = lambda model_input: model_input
    model = mlflow.pyfunc.log_model(
        name="fn", python_model=code, pip_requirements=["numpy"], registered_model_name="OWN"
    )
    mlflow.log_metric("score", 0.5, step=3, model_id=model.model_id, dataset=data)
    with mlflow.start_run(run_name="evaluation", nested=True) as evaluation:
        given = [mlflow.entities.LoggedModelInput(model.model_id)]
        client.log_inputs(evaluation.info.run_id, models=given)
    mlflow.log_text("a file", "deep/er/file with blank.txt")
    mlflow.log_text("", "empty.txt")
    for i in range(2):
        with mlflow.start_run(run_name=f"child {i}", nested=True):
            mlflow.log_metric("m", i)
            with mlflow.start_run(run_name=f"grandchild {i}", nested=True):
                mlflow.log_metric("m", i)
try:
    with mlflow.start_run(run_name="fails"):
        raise ValueError
except ValueError:
    pass
client.set_terminated(client.create_run("0", run_name="killed").info.run_id, "KILLED")
client.create_run("0", run_name="killed outright")
gone = client.create_run("0", run_name="deleted")
client.set_terminated(gone.info.run_id)
client.delete_run(gone.info.run_id)
"""


class Offline(NamedTuple):
    """A folder in which scripts have run on its local store, and a client of that store."""

    folder: Path
    trained: dict  # the result of train_mnist_mlflow.py
    study: dict  # that of tune_fashion_mnist.py
    client: mlflow.MlflowClient

    def runs(self, experiment=None):
        experiments = self.client.search_experiments()
        numbers = [e.experiment_id for e in experiments if experiment in (None, e.name)]
        return {r.info.run_id: r for r in self.client.search_runs(numbers)}


class Target(NamedTuple):
    """A server behind a gateway that takes a key or a token, and a client past the gateway."""

    uri: str  # past the gateway
    box: Gateway
    client: mlflow.MlflowClient
    session: Session  # somebody who publishes to it, in a folder beside that of `offline`

    def twins(self, run_id, experiment=None):
        """The active runs that the local `run_id` was published as."""
        experiments = self.client.search_experiments()
        numbers = [e.experiment_id for e in experiments if experiment in (None, e.name)]
        return self.client.search_runs(numbers, f"tags.`published.run_id` = '{run_id}'")


@pytest.fixture(scope="module")
def offline(prefork, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene") / "a job"
    folder.mkdir()
    session = Session(folder, prefork)
    trained = session.type(
        "train_mnist_mlflow.py --dataset digits --epochs 2 --register --note 'a note'"
    )
    flags = "--dataset digits --trials 2 --epochs 1"
    study = session.type(f"scripts/tune_fashion_mnist.py {flags}")
    session.type("scripts/train_with_mlflow.py")
    session.type("scripts/register_model.py")
    session.type("scripts/train_simple_mnist.py --dataset digits --epochs 1")
    session.type("scripts/train_and_register_model.py --dataset digits --epochs 1")
    (folder / "own.py").write_text(OWN_CODE)
    session.type(shlex.quote(str(folder / "own.py")))
    uri = f"sqlite:///{folder}/mlflow.db"
    return Offline(folder, trained.result, study.result, mlflow.MlflowClient(uri, uri))


@pytest.fixture(scope="module")
def target(prefork, offline, tls, tmp_path_factory):
    folder = offline.folder.with_name("login node")
    folder.mkdir()
    with (
        mlflow_server(tmp_path_factory.mktemp("server")) as uri,
        Gateway(uri, KEY, tls=tls[0], token=TOKEN) as box,
    ):
        session = Session(
            folder,
            prefork,
            MLFLOW_TRACKING_URI=box.uri,
            MLFLOW_TRACKING_SERVER_CERT_PATH=str(tls[1]),
            AM_SC_API_KEY=KEY,
        )
        yield Target(uri, box, mlflow.MlflowClient(uri, uri), session)


def points(client, run_id):
    """Every point of every metric of a run, sorted."""
    keys = client.get_run(run_id).data.metrics
    return sorted(
        (key, m.timestamp, m.step, repr(m.value))
        for key in keys
        for m in client.get_metric_history(run_id, key)
    )


def contents(folder):
    """{name: bytes} of the files in a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def inputs(run):
    return {
        (*dict(entry.dataset).values(), *((tag.key, tag.value) for tag in entry.tags))
        for entry in run.inputs.dataset_inputs
    }


def models(client, run):
    wanted = f"source_run_id = '{run.info.run_id}'"
    return client.search_logged_models([run.info.experiment_id], wanted)


def assert_published(offline, target, local, tmp_path, experiment=None):
    """The run is on the server, once, and whole. Returns it."""
    run_id = local.info.run_id
    (there,) = target.twins(run_id, experiment)
    number, source, server = there.info.run_id, offline.client, target.client
    for name in ("run_name", "status", "start_time", "end_time"):
        assert getattr(there.info, name) == getattr(local.info, name), name
    assert there.data.params == local.data.params
    expected = {k: v for k, v in local.data.tags.items() if k != PARENT}
    if local.info.end_time:
        expected["published.end_time"] = str(local.info.end_time)
    if PARENT in local.data.tags:
        (parent,) = target.twins(local.data.tags[PARENT], experiment)
        expected[PARENT] = parent.info.run_id
    assert there.data.tags == expected | {"published.run_id": run_id}
    assert points(server, number) == points(source, run_id)
    assert repr(there.data.metrics) == repr(
        {key: local.data.metrics[key] for key in there.data.metrics}
    )
    assert inputs(there) == inputs(local)
    given = [entry.model_id for entry in there.inputs.model_inputs]
    given = [server.get_logged_model(m).tags["published.model_id"] for m in given]
    assert given == [entry.model_id for entry in local.inputs.model_inputs]
    folder = storage.path_of(local.info.artifact_uri)
    if local.info.end_time:
        (tmp_path / number).mkdir()
        server.download_artifacts(number, "", str(tmp_path / number))
        assert contents(tmp_path / number) == contents(folder)
    assert_models_published(offline, target, local, there, tmp_path)
    return there


def assert_models_published(offline, target, local, there, tmp_path):
    uri = target.uri
    ready = {m.model_id: m for m in models(offline.client, local) if m.status == "READY"}
    twins = {m.tags["published.model_id"]: m for m in models(target.client, there)}
    assert set(twins) == set(ready)
    steps = {output.model_id: output.step for output in local.outputs.model_outputs}
    linked = {output.model_id: output.step for output in there.outputs.model_outputs}
    assert len(linked) == len(there.outputs.model_outputs)
    assert linked == {twins[m].model_id: step for m, step in steps.items() if m in twins}
    for model_id, model in ready.items():
        twin = twins[model_id]
        assert twin.status == "READY" and twin.name == model.name
        assert twin.tags["published.model_id"] == model.model_id
        assert twin.params == model.params and (twin.model_type or None) == model.model_type
        ours = ("published.model_id", "mlflow.modelVersions")
        assert {k: v for k, v in twin.tags.items() if k not in ours} == {
            k: v for k, v in model.tags.items() if k not in ours
        }
        names = ("key", "timestamp", "step", "value", "dataset_name", "dataset_digest")
        measured = [
            sorted(tuple(map(str, (getattr(m, name) for name in names))) for m in one.metrics or [])
            for one in (model, twin)
        ]
        assert measured[0] == measured[1]
        before = contents(storage.path_of(model.artifact_location))
        before.pop("registered_model_meta", None)
        (tmp_path / twin.model_id).mkdir()
        after = contents(
            mlflow.artifacts.download_artifacts(
                twin.artifact_location, dst_path=str(tmp_path / twin.model_id), tracking_uri=uri
            )
        )
        description = yaml.safe_load(after.pop("MLmodel"))
        expected = yaml.safe_load(before.pop("MLmodel"))
        assert description == expected | {
            "model_id": twin.model_id,
            "model_uuid": twin.model_id,
            "run_id": there.info.run_id,
            "artifact_path": twin.artifact_location,
        }
        assert after == before


@pytest.mark.slow
def test_everything_arrives_once(offline, target, tmp_path):
    """Through a gateway, with a key: every run of every script, and of somebody's own code."""
    published = target.session.type(PUBLISH)
    local = offline.runs()
    ended = {run_id for run_id, run in local.items() if run.info.end_time}
    assert len(ended) == len(local) - 1 > 12  # one was killed outright
    for run_id in ended:
        (tmp_path / run_id).mkdir()
        assert_published(offline, target, local[run_id], tmp_path / run_id)
    assert [target.twins(run_id) for run_id in set(local) - ended] == [[]]
    all_points = sum(len(points(offline.client, run_id)) for run_id in ended)
    counts = {name: published.result[name] for name in ("runs", "points", "versions")}
    assert counts == {"runs": len(ended), "points": all_points, "versions": 0}
    assert target.client.search_registered_models() == []
    assert KEY not in published.out + published.err
    assert published.out.count("\nrun      ") == len(ended)
    assert {r.headers.get("x-api-key") for r in target.box.requests} == {KEY}
    assert max(r.size for r in target.box.requests if "log-batch" in r.path) < 1e6

    # Once more: nothing is sent, and nothing changes there.
    target.box.requests.clear()
    again = target.session.type(PUBLISH).result
    assert {again[name] for name in ("runs", "points", "files", "models", "versions")} == {0}
    writing = [r.path for r in target.box.requests if r.method in ("PUT", "PATCH", "DELETE")]
    writing += [
        r.path for r in target.box.requests if r.method == "POST" and "search" not in r.path
    ]
    assert writing == []
    # The local store was only read.
    assert set(offline.runs()) == set(local)


@pytest.mark.slow
def test_a_published_run_is_used_like_any_other(offline, target, tmp_path):
    """With a token: the model loads by plain MLflow, and can be registered and promoted."""
    session, run_id = target.session, offline.trained["run_id"]
    environment = session.environment | {"MLFLOW_TRACKING_TOKEN": TOKEN}
    environment.pop("AM_SC_API_KEY")
    token = Session(offline.folder.with_name("with a token"), session.prefork, **environment)
    token.folder.mkdir()
    finished = token.type(f"{PUBLISH} --run_id {run_id} --to_experiment used")
    there = finished.result["run_id"]
    used = token.type(f"register_and_inference.py --run_id {there} --model_name USED")
    assert used.result["model_version"] == "1"
    (model,) = models(target.client, target.client.get_run(there))
    (token.folder / "load.py").write_text(
        "import mlflow, sys, torch\n"
        "network = mlflow.pytorch.load_model(sys.argv[1])\n"
        "print(network(torch.full((3, 1, 28, 28), 0.5)).tolist())\n"
        "print(mlflow.models.get_model_info(sys.argv[1]).signature)\n"
    )
    said = []
    for uri, tracking in (
        (f"models:/{model.model_id}", target.uri),
        ("models:/MNIST_CNN/1", f"sqlite:///{offline.folder}/mlflow.db"),
    ):
        safely = {"MLFLOW_TRACKING_URI": tracking, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
        reader = Session(tmp_path, session.prefork, **safely)
        said.append(reader.type(shlex.quote(str(token.folder / "load.py")), uri).out)
    assert said[0] == said[1] and "28" in said[0]


@pytest.mark.slow
def test_versions_and_an_alias_come_along_when_asked(offline, target):
    client, flags = target.client, "--experiment mnist_cnn_pytorch --to_experiment registry"
    target.session.type(f"{PUBLISH} {flags}")
    before = len(client.search_model_versions("name = 'MNIST_CNN'"))
    first = target.session.type(f"{PUBLISH} {flags} --register")
    assert first.result["versions"] == 1 and first.result["models"] == 0
    (there,) = target.twins(offline.trained["run_id"], "registry")
    (model,) = models(client, there)
    (version,) = [
        version
        for version in client.search_model_versions("name = 'MNIST_CNN'")
        if version.source == f"models:/{model.model_id}"
    ]
    assert version.run_id == there.info.run_id
    assert client.get_registered_model("MNIST_CNN").aliases == {}
    again = target.session.type(f"{PUBLISH} {flags} --register --alias production")
    assert again.result["versions"] == 0
    assert len(client.search_model_versions("name = 'MNIST_CNN'")) == before + 1
    aliases = client.get_registered_model("MNIST_CNN").aliases
    assert {k: str(v) for k, v in aliases.items()} == {"production": str(version.version)}
    last = target.session.type(f"{PUBLISH} {flags} --register --alias production")
    assert "alias    " in again.out and "alias    " not in last.out


@pytest.mark.slow
def test_killed_at_random_moments(offline, target, tmp_path):
    """SIGKILL at random moments; whenever all is there, it begins anew in another experiment."""
    random_delays, names, kills = random.Random(14), ["whole", "kills 1"], 0
    local = [run for run in offline.runs("own code").values() if run.info.end_time]
    publish = f"{PUBLISH} --experiment 'own code' --register --to_experiment"
    start = time.monotonic()
    target.session.type(f"{publish} {names[0]}")
    duration = time.monotonic() - start

    def is_there(name):
        there = [twin for run in local for twin in target.twins(run.info.run_id, name)]
        ended = {run.info.run_id for run in there if run.info.end_time}
        versions = target.client.search_model_versions("name = 'OWN'")
        return len(ended) == len(local) and not ended.isdisjoint(v.run_id for v in versions)

    while kills < int(os.environ.get("KILLS", 7)):
        delay = random_delays.uniform(0, duration)
        ended = target.session.type(
            f"{publish} '{names[-1]}'",
            code=None,
            until=lambda delay=delay: time.sleep(delay) or True,
            stop=signal.SIGKILL,
        )
        assert ended.code in (0, -signal.SIGKILL), ended.err
        kills += ended.code != 0
        if is_there(names[-1]):
            names.append(f"kills {len(names)}")
    target.session.type(f"{publish} '{names[-1]}'")
    print(f"{kills} kills, {len(names) - 1} publications of {duration:.1f} s")
    assert len(names) > 2
    for name, run in itertools.product(names, local):
        (there,) = target.twins(run.info.run_id, name)
        versions = target.client.search_model_versions(f"run_id = '{there.info.run_id}'")
        assert len(versions) == (run.info.run_name == "odd values")
        if name == names[-1] or run.info.run_name == "odd values":
            folder = tmp_path / name / run.info.run_id
            folder.mkdir(parents=True)
            assert_published(offline, target, run, folder, name)


@pytest.mark.slow
def test_two_at_once(offline, target, tmp_path):
    """One waits for the other, and finds nothing to do."""
    run_id, results = offline.trained["run_id"], []
    # As processes: the lock is one between processes.
    command = [sys.executable, str(ROOT / "scripts/publish.py"), "--run_id", run_id]
    command += ["--to_experiment", "at once"]
    processes = [
        subprocess.Popen(
            command,
            cwd=offline.folder,
            env=target.session.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        results.append((json.loads(out.splitlines()[-1])["runs"], "\nwait     " in out))
    assert sorted(runs for runs, _ in results) == [0, 1]
    (tmp_path / "at once").mkdir()
    assert_published(
        offline, target, offline.client.get_run(run_id), tmp_path / "at once", "at once"
    )


@pytest.mark.slow
def test_a_lock_is_waited_for(offline, target):
    fcntl = pytest.importorskip("fcntl")
    run_id = offline.trained["run_id"]
    with open(offline.folder / "mlflow.db.publishing", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(5, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        ended = target.session.type(f"{PUBLISH} --run_id {run_id} --to_experiment waited")
        assert "\nwait     another process" in ended.out and ended.result["runs"] == 1
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "requests",
    [
        "POST runs/create",
        "POST runs/log-batch",
        "POST runs/log-inputs",
        "POST runs/outputs",
        "POST runs/update",
        "POST /logged-models",
        "PATCH /logged-models",
        "PUT mlflow-artifacts",
        "POST experiments/create",
        "POST registered-models/create",
        "POST model-versions/create",
    ],
)
def test_answers_that_are_lost(requests, offline, target, tmp_path):
    """The server acts, and a gateway answers 502: the first time for each kind of request."""
    method, _, part = requests.partition(" ")
    late, name = itertools.count(), f"late {requests.replace('/', ' ')}"

    def first(asked, path):
        return asked == method and part in path and next(late) == 0

    target.box.fault_on, target.box.fault = first, "late"
    try:
        wanted = f"--run_id {offline.trained['run_id']} --to_experiment '{name}' --register"
        target.session.type(f"{PUBLISH} {wanted}")
    finally:
        target.box.fault = None
    assert next(late) > 0, "nothing was lost"
    local = offline.client.get_run(offline.trained["run_id"])
    (tmp_path / "files").mkdir()
    there = assert_published(offline, target, local, tmp_path / "files", name)
    versions = target.client.search_model_versions(f"run_id = '{there.info.run_id}'")
    assert len(versions) == 1


@pytest.mark.slow
def test_a_server_that_goes_away(offline, target, tmp_path):
    """Exit code 75, and the same command completes it. In between, errors 503 are waited out."""
    local = offline.client.get_run(offline.trained["run_id"])
    wanted = f"--run_id {local.info.run_id} --to_experiment away"
    box, few = target.box, itertools.count()
    variables = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1"}
    impatient = Session(
        offline.folder.with_name("impatient"),
        target.session.prefork,
        **target.session.environment | variables,
    )
    impatient.folder.mkdir()
    box.fault_on = lambda method, path: "log-inputs" in path or "artifacts" in path
    box.fault = "503"
    try:
        ended = impatient.type(f"{PUBLISH} {wanted}", code=75)
        assert "is not available (error 503)" in ended.error
        box.fault_on = lambda method, path: method == "PUT" and next(few) % 2 == 0
        impatient.type(f"{PUBLISH} {wanted}")
    finally:
        box.fault = None
    (tmp_path / "files").mkdir()
    assert_published(offline, target, local, tmp_path / "files", "away")


@pytest.mark.slow
def test_cut_off_between_the_parameters_of_a_model(offline, target, tmp_path):
    """MLflow sends more than 100 of them in a second request, after it has made the model."""
    own = offline.runs("own code").values()
    (local,) = [run for run in own if run.info.run_name == "odd values"]
    publish = f"{PUBLISH} --experiment 'own code' --to_experiment parameters"
    target.box.fault_on = lambda method, path: path.endswith("/params")
    target.box.fault = "403"
    try:
        target.session.type(publish, code=1)
    finally:
        target.box.fault = None
    (there,) = target.twins(local.info.run_id, "parameters")
    (model,) = models(target.client, there)
    assert len(model.params) == 100 < len(local.data.params)
    target.session.type(publish)
    (tmp_path / "files").mkdir()
    assert_published(offline, target, local, tmp_path / "files", "parameters")


@pytest.mark.slow
def test_follow(offline, target, prefork, tmp_path):
    """A run is on the server while it is running, and whole in the end, with what came after it.

    In between, the server is away for longer than MLflow waits here.
    """
    job = Session(offline.folder.with_name("running job"), prefork)
    job.folder.mkdir()
    (job.folder / "job.py").write_text(
        "import mlflow, pathlib, time\n"
        "with mlflow.start_run() as run:\n"
        "    print(run.info.run_id, flush=True)\n"
        "    for step in range(26):\n"
        "        mlflow.log_metric('m', step, step=step)\n"
        "        time.sleep(0.5)\n"
        "    model = mlflow.create_external_model('model')\n"
        "    mlflow.log_text('a', 'file')\n"
        "time.sleep(4)\n"
        "mlflow.register_model(f'models:/{model.model_id}', 'FOLLOWED')\n"
    )
    command = [sys.executable, str(job.folder / "job.py")]
    folder = offline.folder.with_name("follower")
    folder.mkdir()
    with (
        Gateway(target.uri, None) as gateway,
        subprocess.Popen(
            command, cwd=job.folder, env=clean_environment(), stdout=subprocess.PIPE, text=True
        ) as training,
    ):
        run_id, seen = training.stdout.readline().strip(), []

        def look():
            while not seen or seen[-1][0] == "RUNNING":
                time.sleep(0.5)
                for there in target.twins(run_id, "followed"):
                    seen.append((there.info.status, len(points(target.client, there.info.run_id))))
                if seen and seen[-1][1] and gateway.fault is None and not away:
                    away.append(gateway.die())
                    threading.Timer(14, gateway.come_back).start()

        away, thread = [], threading.Thread(target=look, daemon=True)
        thread.start()
        follower = Session(
            folder,
            prefork,
            MLFLOW_TRACKING_URI=gateway.uri,
            MLFLOW_HTTP_REQUEST_MAX_RETRIES="1",
        )
        follow = "scripts/publish.py --source 'sqlite:///../running job/mlflow.db' --follow"
        ended = follower.type(f"{follow} --to_experiment followed --register")
        training.communicate()
    thread.join(10)
    uri = f"sqlite:///{job.folder}/mlflow.db"
    scene = Offline(job.folder, {}, {}, mlflow.MlflowClient(uri, uri))
    (tmp_path / "files").mkdir()
    assert_published(scene, target, scene.client.get_run(run_id), tmp_path / "files", "followed")
    status, whole = seen[-1]
    assert status == "FINISHED" and whole == 26
    assert [count for status, count in seen if status == "RUNNING" and 0 < count < whole]
    assert ended.out.count("\nrun      ") == 1 and "\nwait     no server answers" in ended.out
    assert (ended.result["runs"], ended.result["versions"]) == (1, 1)


@pytest.mark.slow
def test_files_on_a_shared_filesystem_stay_there(offline, target, prefork, tmp_path):
    """The server's model is the same file; it is registered and mapped as if logged there."""
    job = Session(offline.folder.with_name("large job"), prefork)
    job.folder.mkdir()
    shared = tmp_path / "shared"
    trained = job.type(
        "Modify_artifact_location.py --dataset digits --experiment large --target_path", shared
    )
    before = contents(shared)
    target.box.requests.clear()
    publish = "scripts/publish.py --source 'sqlite:///../large job/mlflow.db'"
    ended = target.session.type(f"{publish} --experiment large")
    assert target.box.artifact_uploads() == []
    again = target.session.type(f"{publish} --experiment large --run_id x", code=2)
    assert "not allowed with" in again.err
    there = target.client.get_run(ended.result["run_id"])
    (model,) = models(target.client, there)
    path, old = Path(model.tags["file.path"]), Path(trained.result["model_path"])
    assert path != old and path.samefile(old) and model.artifact_location in path.as_uri()
    assert {name: before[name] for name in before} == {
        name: content for name, content in contents(shared).items() if name in before
    }
    used = target.session.type(
        "Modify_artifact_location_register_inference.py --verify "
        f"--run_id {there.info.run_id} --model_name LARGE"
    )
    assert used.result["model_path"] == str(path)
    assert used.result["val_accuracy"] == trained.result["val_accuracy"]
    loaded = target.session.type(
        "scripts/load_and_use_models.py from-registry LARGE --alias production"
    )
    assert loaded.result["parameters"] > 0
    # They do not go into an experiment that has its files elsewhere.
    target.client.create_experiment("on the server")
    elsewhere = target.session.type(f"{publish} --to_experiment 'on the server'", code=1)
    assert "are to stay, and the experiment 'on the server'" in elsewhere.error


@pytest.mark.slow
def test_a_run_that_was_continued(offline, target, prefork, tmp_path):
    """More points, a later end, and a file rewritten in the same size."""
    job = Session(offline.folder.with_name("continued job"), prefork)
    job.folder.mkdir()
    (job.folder / "one.py").write_text(
        "import sys, mlflow\n"
        "with mlflow.start_run(run_id=sys.argv[1] if sys.argv[1:] else None) as run:\n"
        "    mlflow.log_metric('m', len(sys.argv), step=len(sys.argv))\n"
        "    mlflow.log_text(f'epoch {len(sys.argv)}', 'checkpoint')\n"
        "print('{\"run_id\": \"' + run.info.run_id + '\"}')\n"
    )
    script = shlex.quote(str(job.folder / "one.py"))
    uri = f"sqlite:///{job.folder}/mlflow.db"
    scene = Offline(job.folder, {}, {}, mlflow.MlflowClient(uri, uri))
    publish = "scripts/publish.py --source 'sqlite:///../continued job/mlflow.db'"
    run_id = job.type(script).result["run_id"]
    for number, more in enumerate(["", run_id, f"{run_id} x"]):
        if more:
            job.type(f"{script} {more}")
        sent = target.session.type(f"{publish} --to_experiment continued").result
        assert (sent["runs"], sent["points"], sent["files"]) == (number == 0, 1, 1)
        (tmp_path / str(number)).mkdir()
        local = scene.client.get_run(run_id)
        assert_published(scene, target, local, tmp_path / str(number), "continued")


@pytest.mark.slow
def test_a_store_that_was_copied_from_another_machine(offline, target, tmp_path):
    """The database names folders that are not here; the files lie beside it."""
    run_id, moved = offline.trained["run_id"], offline.folder.with_name("moved")
    local = offline.client.get_run(run_id)
    publish = "scripts/publish.py --source sqlite:///../moved/mlflow.db"
    offline.folder.rename(moved)
    try:
        target.session.type(f"{publish} --run_id {run_id} --to_experiment moved")
        (moved / "mlruns").rename(moved / "lost")
        ended = target.session.type(f"{publish} --run_id {run_id} --to_experiment lost", code=1)
        (moved / "lost").rename(moved / "mlruns")
    finally:
        moved.rename(offline.folder)
    assert "there are no files of the model m-" in ended.error
    (tmp_path / "files").mkdir()
    assert_published(offline, target, local, tmp_path / "files", "moved")


@pytest.mark.slow
def test_from_store_to_store_to_server(offline, target, tmp_path):
    """A local store can be where runs are published to, and from there they go on."""
    wanted = f"--run_id {offline.trained['run_id']}"
    middle = "--tracking_uri sqlite:///middle.db"
    there = target.session.type(f"{PUBLISH} {wanted} {middle}").result["run_id"]
    uri = f"sqlite:///{target.session.folder}/middle.db"
    scene = Offline(target.session.folder, {}, {}, mlflow.MlflowClient(uri, uri))
    publish = "scripts/publish.py --source sqlite:///middle.db --to_experiment chain"
    for models_sent in (1, 0):
        ended = target.session.type(f"{publish} --run_id {there}")
        assert ended.result["models"] == models_sent
        (tmp_path / str(models_sent)).mkdir()
        local = scene.client.get_run(there)
        assert_published(scene, target, local, tmp_path / str(models_sent), "chain")


@pytest.mark.slow
def test_nothing_in_a_model_runs(target, prefork, offline, tmp_path):
    """A model is copied, whatever is in it."""
    job = Session(offline.folder.with_name("evil job"), prefork)
    job.folder.mkdir()
    (job.folder / "evil.py").write_text(
        "import mlflow, os, pickle\n"
        "class Evil:\n"
        "    def __reduce__(self): return os.mkdir, ('ran',)\n"
        "with mlflow.start_run() as run:\n"
        "    model = mlflow.initialize_logged_model('evil')\n"
        "    from pathlib import Path\n"
        "    folder = Path(model.artifact_location.removeprefix('file://'))\n"
        "    folder.mkdir(parents=True)\n"
        "    (folder / 'model.pkl').write_bytes(pickle.dumps(Evil()))\n"
        "    (folder / 'MLmodel').write_bytes(b'!!python/object/apply:os.mkdir [ran] #\\xe9')\n"
        "    mlflow.finalize_logged_model(model.model_id, 'READY')\n"
    )
    job.type(shlex.quote(str(job.folder / "evil.py")))
    publish = "scripts/publish.py --source 'sqlite:///../evil job/mlflow.db' --to_experiment evil"
    assert target.session.type(publish).result["models"] == 1
    assert not (target.session.folder / "ran").exists() and not (job.folder / "ran").exists()


# What is wrong is said in two lines


ELSEWHERE = ["--tracking_uri", "sqlite:///elsewhere.db"]


@pytest.fixture(scope="module")
def small(prefork, tmp_path_factory):
    """A folder with a local store of one run, of somebody's own code."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "own.py").write_text("import mlflow\nmlflow.log_metric('m', 1)\n")
    Session(folder, prefork).type(str(folder / "own.py"))
    for name in ("0.out", "0.err"):
        (folder / name).unlink()
    return folder


@pytest.mark.slow
def test_files_that_were_left_behind(small, prefork, tmp_path):
    """The database alone was copied: whether there were files, it does not know."""
    session = Session(tmp_path, prefork)
    shutil.copy(small / "mlflow.db", tmp_path / "copied.db")
    database = tmp_path / "copied.db"
    with contextlib.closing(sqlite3.connect(database)) as copied, copied:
        places = f"replace(artifact_uri, '{small}', '{tmp_path}/job')"
        copied.execute(f"UPDATE runs SET artifact_uri = {places}")
    publish = f"scripts/publish.py --source sqlite:///{database} --tracking_uri"
    said = session.type(publish, "sqlite:///there.db").out
    assert f"\nfiles    none: there is no {tmp_path}/job/mlruns; when it is back" in said
    (tmp_path / "job" / "mlruns").mkdir(parents=True)
    assert "files    none" not in session.type(publish, "sqlite:///other.db").out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--source", "sqlite:///missing.db"], "cannot be read: unable to open database file"),
        (["--source", "sqlite:///no/folder/missing.db"], "cannot be read"),
        (["--source", "sqlite:///own.py"], "file is not a database"),
        (["--source", "sqlite:///study.db"], "is no store of MLflow's"),
        (["--source", "sqlite:///newer.db"], "cannot be read: Detected out-of-date database"),
        (["--source", "http://127.0.0.1:1"], "is no local store"),
        (["--run_id", "0" * 32, *ELSEWHERE], "there is no run 00000000000000000000000000000000 in"),
        (["--experiment", "nowhere", *ELSEWHERE], "there is no experiment 'nowhere' in"),
        (["--tracking_uri", "sqlite:///../small/mlflow.db"], "in the store that they are in"),
        ([], "in the store that they are in"),
    ],
)
@pytest.mark.slow
def test_what_is_wrong_is_said(flags, words, small, prefork, tmp_path):
    """And nothing is made: no file, no table."""
    folder = tmp_path / "small"
    shutil.copytree(small, folder)
    with contextlib.closing(sqlite3.connect(folder / "study.db")) as study, study:
        study.execute("CREATE TABLE alembic_version (version_num)")
    shutil.copy(folder / "mlflow.db", folder / "newer.db")
    with contextlib.closing(sqlite3.connect(folder / "newer.db")) as newer, newer:
        newer.execute("UPDATE alembic_version SET version_num = 'of the future'")
    session, before = Session(folder, prefork), contents(folder)
    ended = session.type("scripts/publish.py", *flags, code=1)
    assert words in ended.error and "\nhint:  " in ended.error and "Traceback" not in ended.err
    made = set(contents(folder)) - {"0.out", "0.err"}
    assert {name: contents(folder)[name] for name in made} == before


def test_no_room_for_the_copy(small, tmp_path):
    """A limit on the size of a file stands for a full filesystem."""
    store = local_store.LocalStore(f"sqlite:///{small}/mlflow.db", tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, before[1]))
    try:
        with pytest.raises(UserError, match=f"\nhint:  is there room in TMPDIR\\?.* {tmp_path}"):
            store.read()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_alias_belongs_to_a_registered_model(tmp_path):
    finished = run_script("scripts/publish.py", "--alias", "production", cwd=tmp_path, code=2)
    assert "--alias needs --register" in finished.err


@pytest.mark.slow
def test_the_server_of_the_source(small, target):
    session = Session(small, target.session.prefork)
    with mlflow_server(small) as uri:
        ended = session.type("scripts/publish.py --tracking_uri", uri, code=1)
    assert "in the store that they are in" in ended.error
    assert list(small.glob("*.publishing")) == []


@pytest.mark.slow
def test_what_is_deleted_there_stays_deleted(small, target):
    session = Session(small / "again", target.session.prefork, **target.session.environment)
    session.folder.mkdir()
    publish = "scripts/publish.py --source sqlite:///../mlflow.db --to_experiment deleted"
    there = session.type(publish).result["run_id"]
    target.client.delete_run(there)
    ended = session.type(publish)
    assert ended.result["runs"] == 0 and "\nskip     " in ended.out
    number = target.client.get_experiment_by_name("deleted").experiment_id
    target.client.delete_experiment(number)
    ended = session.type(publish, code=1)
    assert "the experiment 'deleted' was deleted on the server" in ended.error
