"""The large-model pair on a local store: files on the target path, and nowhere else."""

import hashlib
import os
import platform
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlflow
import pytest
from conftest import ROOT, clean_environment, fails, run

PAIR = "Modify_artifact_location_register_inference.py"


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def large():
    """(working directory, target path, the finished training script).

    It ran under a umask that shuts out everybody, with 1 MB in TMPDIR where a test may mount one.
    The folder is one that another user can get to.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        target, scratch = folder / "lustre" / "models", folder / "scratch"
        scratch.mkdir()
        (folder / "work").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", scratch]
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
        umask = os.umask(0o077)
        try:
            trained = run(
                *("Modify_artifact_location.py", "--dataset", "digits", "--target_path", target),
                cwd=folder / "work",
                TMPDIR=str(scratch),
            )
        finally:
            os.umask(umask)
            if mounted:
                subprocess.run(["umount", scratch], check=True)
        trained.small_tmpdir = mounted
        yield folder, target, trained


def store_of(folder):
    """The local store of whoever trains in the folder `work` of this one."""
    return f"sqlite:///{folder / 'work' / 'mlflow.db'}"


@pytest.fixture
def client(large):
    return mlflow.MlflowClient(store_of(large[0]))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_files_are_on_the_target_path_and_nowhere_else(large, client):
    folder, target, trained = large
    run_id, model_id = trained.result["run_id"], trained.result["model_uri"].split("/")[1]
    experiment = client.get_experiment_by_name("mnist_cnn_pytorch_shared")
    assert experiment.artifact_location == target.as_uri()
    model_path = target / "models" / model_id / "artifacts" / "data" / "model.pt2"
    assert trained.result["model_path"] == str(model_path)
    written = files(target)
    assert f"{run_id}/artifacts/plots/confusion_matrix.png" in written
    assert f"models/{model_id}/artifacts/data/model.pt2" in written
    assert f"models/{model_id}/artifacts/MLmodel" in written
    assert files(folder / "work") == ["mlflow.db"]


def test_model_is_linked_from_its_run(large, client):
    trained = large[2].result
    logged = client.get_run(trained["run_id"])
    assert [f"models:/{m.model_id}" for m in logged.outputs.model_outputs] == [trained["model_uri"]]
    model = client.get_logged_model(trained["model_uri"].split("/")[1])
    assert (model.name, model.status, model.source_run_id) == ("model", "READY", trained["run_id"])


def test_nothing_of_the_model_passes_through_tmpdir(large):
    size = os.path.getsize(large[2].result["model_path"])
    assert size > 4_000_000
    if not large[2].small_tmpdir:
        pytest.skip("a small TMPDIR cannot be mounted here")


def test_file_is_recorded(large, client):
    """Size and SHA-256 as the file has them, on the model; what writing it took, on the run."""
    trained = large[2].result
    content = Path(trained["model_path"]).read_bytes()
    tags = client.get_logged_model(trained["model_uri"].split("/")[1]).tags
    assert {name: value for name, value in tags.items() if name.startswith("file.")} == {
        "file.path": trained["model_path"],
        "file.size_bytes": str(len(content)),
        "file.sha256": hashlib.sha256(content).hexdigest(),
        "file.host": platform.node(),
    }
    metrics = client.get_run(trained["run_id"]).data.metrics
    assert metrics["write.size_bytes"] == len(content)
    seconds, speed = metrics["write.seconds"], metrics["write.gigabytes_per_second"]
    assert speed == pytest.approx(len(content) / 1e9 / seconds)
    (line,) = [line for line in large[2].out.splitlines() if line.startswith("write  ")]
    assert line == f"write    {len(content) / 1e6:.1f} MB in {seconds:.3f} s"
    assert speed == pytest.approx(len(content) / 1e9 / seconds)


def test_the_group_may_read_and_others_not(large):
    """Whatever the umask; it was 077."""
    target, seen = large[1], 0
    for path in [target.parent, target, *target.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o750 if path.is_dir() else 0o640), path
        seen += 1
    assert seen > 2


def test_register_and_load_by_path(large, client):
    folder, target, trained = large
    before = files(target)
    finished = run(
        *(PAIR, "--run_id", trained.result["run_id"], "--model_name", "LARGE", "--verify"),
        cwd=folder / "work",
    )
    assert finished.result["model_path"] == trained.result["model_path"]
    assert finished.result["val_accuracy"] == trained.result["val_accuracy"]
    assert files(target) == before, "registering and loading wrote into the model's folder"
    version = client.get_model_version_by_alias("LARGE", "production")
    assert version.run_id == trained.result["run_id"]
    uri = client.get_model_version_download_uri("LARGE", version.version)
    assert f"{uri}/data/model.pt2" == "file://" + trained.result["model_path"]
    assert version.tags["file.sha256"] in finished.out
    assert version.tags["file.size_bytes"] == str(os.path.getsize(trained.result["model_path"]))
    metrics = client.get_run(trained.result["run_id"]).data.metrics
    assert metrics["load.size_bytes"] == metrics["write.size_bytes"] and metrics["load.seconds"] > 0


def test_colleague_in_the_group_loads_it(large, tmp_path):
    """Another user, who may read and not write: the same script, in a process of that user's."""
    folder, target, trained = large
    before = files(target)
    theirs = folder / "colleague"
    theirs.mkdir()
    shutil.copy(folder / "work" / "mlflow.db", theirs)
    if os.getuid() == 0:
        for path in (theirs, theirs / "mlflow.db"):
            os.chown(path, 65534, -1)
    else:
        subprocess.run(["chmod", "-R", "a-w", target], check=True)
    command = [sys.executable, "-c", COLLEAGUE, theirs, target, trained.result["run_id"]]
    environment = clean_environment(PYTHONPATH=str(ROOT))
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    subprocess.run(["chmod", "-R", "u+w", target], check=True)
    assert process.returncode == 0, process.stderr
    assert files(target) == before
    client = mlflow.MlflowClient(f"sqlite:///{theirs}/mlflow.db")
    assert (
        client.get_model_version_by_alias("THEIRS", "production").run_id
        == (trained.result["run_id"])
    )


# The script is run once as we are, and the digits are kept: the other user may not be allowed to
# read this Python's modules, nor what scikit-learn carries with it.
COLLEAGUE = """
import os, sys
import sklearn.datasets
import Modify_artifact_location_register_inference as script

digits = sklearn.datasets.load_digits()
sklearn.datasets.load_digits = lambda: digits

folder, target, run_id = sys.argv[1:]
os.chdir(folder)
flags = ["--run_id", run_id, "--tracking_uri", "sqlite:///mlflow.db", "--model_name"]
script.main([*flags, "OURS"])
if os.getuid() == 0:
    os.setgroups([])
    os.setuid(65534)
try:
    open(target + "/probe", "w")
except PermissionError:
    script.main([*flags, "THEIRS"])
else:
    sys.exit("the folder can be written to")
"""


@pytest.mark.parametrize("kind", ["changed", "truncated", "missing"])
def test_file_that_is_no_longer_the_one_recorded(kind, large):
    """One bit in 4.8 MB changes no prediction: only --verify can tell."""
    folder, _, trained = large
    path, flags = Path(trained.result["model_path"]), ("--run_id", trained.result["run_id"])
    content = path.read_bytes()
    if kind == "changed":
        at = content.index(b"Z" * 8) - 100_000
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        flags, message = (*flags, "--verify"), f"the model {path} was changed: its SHA-256 is"
        recorded = hashlib.sha256(content).hexdigest()
    elif kind == "truncated":
        path.write_bytes(content[:-1])
        message, recorded = f"the model {path} has {len(content) - 1} bytes", str(len(content))
    else:
        path.rename(path.with_suffix(".away"))
        message, recorded = f"there is no model at {path}", f"on the host {platform.node()}"
    try:
        finished = run(PAIR, *flags, "--model_name", "NEVER", cwd=folder / "work", code=1)
    finally:
        path.with_suffix(".away").unlink(missing_ok=True)
        path.write_bytes(content)
        path.chmod(0o640)
    assert message in finished.error and recorded in finished.error
    client = mlflow.MlflowClient(store_of(folder))
    assert client.search_model_versions("name = 'NEVER'") == []


def test_killed_job_leaves_no_model_that_looks_finished(tmp_path):
    """SIGKILL while the model is being written, in the folder that will be renamed.

    When the job goes on, the run's folder is another user's, with a link to a key in it.
    """
    target, key = tmp_path / "t", tmp_path / "key"
    script = ROOT / "Modify_artifact_location.py"
    flags = ("--dataset", "digits", "--target_path", target, "--checkpoint", tmp_path / "kept")
    process = subprocess.Popen(
        [sys.executable, script, *flags],
        cwd=tmp_path,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(target.glob("models/m-*/artifacts.unfinished")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert list(target.glob("models/m-*/artifacts.unfinished"))
    assert list(target.glob("models/m-*/artifacts")) == []
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (model,) = client.search_logged_models(["1"])
    assert model.status == "PENDING"
    if os.getuid() == 0:
        (theirs,) = client.search_runs(["1"])
        folder = target / theirs.info.run_id
        folder.rename(tmp_path / "away")
        key.touch(mode=0o600)
        (folder / "artifacts" / "plots").mkdir(parents=True)
        (folder / "artifacts" / "plots" / "confusion_matrix.png").symlink_to(key)
        os.chown(folder, 65534, -1)
        error = fails("Modify_artifact_location.py", *flags, cwd=tmp_path)
        assert f"the folder {folder} cannot be used: somebody else made it" in error
        assert stat.S_IMODE(key.stat().st_mode) == 0o600 and key.read_bytes() == b""


PLAIN = """
import mlflow, torch
model = mlflow.pytorch.load_model("models:/PLAIN@production")
for count in (1, 5):
    assert model(torch.rand(count, 1, 28, 28)).shape == (count, 10)
print(mlflow.pyfunc.load_model("models:/PLAIN@production").predict(
    torch.rand(3, 1, 28, 28).numpy()).shape)
"""


def test_plain_mlflow_loads_the_same_version(large, client, tmp_path):
    """As anyone would who knows MLflow and not this project, and allows no pickle."""
    store = store_of(large[0])
    mlflow.set_tracking_uri(store)
    try:
        version = mlflow.register_model(large[2].result["model_uri"], "PLAIN")
    finally:
        mlflow.set_tracking_uri(None)
    client.set_registered_model_alias("PLAIN", "production", version.version)
    process = subprocess.run(
        [sys.executable, "-c", PLAIN],
        cwd=tmp_path,
        env=clean_environment(
            MLFLOW_TRACKING_URI=store,
            MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false",
        ),
        capture_output=True,
        text=True,
    )
    assert process.stdout.strip() == "(3, 10)", process.stderr


def test_second_run_joins_the_experiment_and_register_promotes(large, client):
    folder, target, _ = large
    finished = run(
        *("Modify_artifact_location.py", "--dataset", "digits", "--target_path", target),
        "--register",
        cwd=folder / "work",
    )
    assert finished.result["alias"] == "production"
    version = client.get_model_version_by_alias("MNIST_CNN", "production")
    assert version.run_id == finished.result["run_id"]


def test_other_target_path_for_the_same_experiment(large, tmp_path):
    folder, target, _ = large
    finished = run(
        *("Modify_artifact_location.py", "--dataset", "digits", "--target_path", tmp_path / "t"),
        cwd=folder / "work",
        code=1,
    )
    assert f"keeps its files at {target.as_uri()}" in finished.error


def test_run_whose_model_lies_elsewhere(local):
    """A model of the local store is a path, too: this pair takes it."""
    finished = run(
        PAIR,
        *("--run_id", local.run_id, "--model_name", "BY_PATH"),
        cwd=local.folder,
    )
    assert finished.result["model_path"].startswith(str(local.folder / "mlruns"))


def test_failed_write_leaves_nothing_that_looks_finished(tmp_path):
    """A limit on the size of a file stands for a full filesystem."""
    target = tmp_path / "t"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        finished = run(
            *("Modify_artifact_location.py", "--dataset", "digits", "--target_path", target),
            cwd=tmp_path,
            code=1,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the model could not be written to" in finished.error
    assert "Traceback" not in finished.err
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (logged,) = client.search_runs(["1"])
    assert logged.info.status == "FAILED"
    (model,) = client.search_logged_models(["1"])
    assert model.status == "FAILED"
    written = files(target)
    assert any(name.endswith("confusion_matrix.png") for name in written)
    assert not [name for name in written if name.startswith("models/")]
    assert not list(target.glob("models/*")), "a folder of the model was left"
