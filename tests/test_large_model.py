"""The large-model pair on a local store: files on the target path, and nowhere else."""

import os
import resource
import shutil

import mlflow
import pytest
from conftest import run


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """(working directory, target path, the finished training script)."""
    folder = tmp_path_factory.mktemp("large")
    target, scratch = folder / "lustre" / "models", folder / "scratch"
    scratch.mkdir()
    (folder / "work").mkdir()
    trained = run(
        *("Modify_artifact_location.py", "--dataset", "digits", "--target_path", target),
        cwd=folder / "work",
        TMPDIR=str(scratch),
    )
    return folder, target, trained


@pytest.fixture
def client(large):
    return mlflow.MlflowClient(f"sqlite:///{large[0]}/work/mlflow.db")


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_files_are_on_the_target_path_and_nowhere_else(large, client):
    folder, target, trained = large
    run_id, model_id = trained.result["run_id"], trained.result["model_uri"].split("/")[1]
    experiment = client.get_experiment_by_name("mnist_cnn_pytorch_shared")
    assert experiment.artifact_location == target.as_uri()
    assert trained.result["model_path"] == str(target / "models" / model_id / "artifacts")
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


@pytest.mark.slow
def test_nothing_of_the_model_passes_through_tmpdir(tmp_path):
    """With a TMPDIR in which only the folders, not the files of a model have room."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    trained = run(
        *("Modify_artifact_location.py", "--dataset", "digits", "--target_path", tmp_path / "t"),
        cwd=tmp_path,
        TMPDIR=str(scratch),
    )
    size = os.path.getsize(f"{trained.result['model_path']}/data/model.pt2")
    left = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    assert left < size / 10


@pytest.mark.slow
def test_register_and_load_by_path(large, client):
    folder, target, trained = large
    before = files(target)
    finished = run(
        "Modify_artifact_location_register_inference.py",
        *("--run_id", trained.result["run_id"], "--model_name", "LARGE"),
        cwd=folder / "work",
    )
    assert finished.result["model_path"] == trained.result["model_path"]
    assert finished.result["val_accuracy"] == trained.result["val_accuracy"]
    assert files(target) == before, "registering and loading wrote into the model's folder"
    version = client.get_model_version_by_alias("LARGE", "production")
    assert version.run_id == trained.result["run_id"]
    uri = client.get_model_version_download_uri("LARGE", version.version)
    assert uri == "file://" + trained.result["model_path"]


@pytest.mark.slow
def test_plain_mlflow_loads_the_same_version(large):
    """As anyone would who knows MLflow and not this project."""
    import torch

    folder, _, trained = large
    mlflow.set_tracking_uri(f"sqlite:///{folder}/work/mlflow.db")
    try:
        version = mlflow.register_model(trained.result["model_uri"], "PLAIN")
        model = mlflow.pytorch.load_model(f"models:/PLAIN/{version.version}")
        assert model(torch.rand(5, 1, 28, 28)).shape == (5, 10)
    finally:
        mlflow.set_tracking_uri(None)


@pytest.mark.slow
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


@pytest.mark.slow
def test_other_target_path_for_the_same_experiment(large, tmp_path):
    folder, target, _ = large
    finished = run(
        *("Modify_artifact_location.py", "--dataset", "digits", "--target_path", tmp_path / "t"),
        cwd=folder / "work",
        code=1,
    )
    assert f"keeps its files at {target.as_uri()}" in finished.error


@pytest.mark.slow
def test_run_whose_model_lies_elsewhere(local):
    """A model of the local store is a path, too: this pair takes it."""
    finished = run(
        "Modify_artifact_location_register_inference.py",
        *("--run_id", local.run_id, "--model_name", "BY_PATH"),
        cwd=local.folder,
    )
    assert finished.result["model_path"].startswith(str(local.folder / "mlruns"))


@pytest.mark.slow
def test_model_that_is_gone(tmp_path):
    target = tmp_path / "t"
    trained = run(
        *("Modify_artifact_location.py", "--dataset", "digits", "--target_path", target),
        cwd=tmp_path,
    ).result
    shutil.rmtree(target / "models")
    finished = run(
        *("Modify_artifact_location_register_inference.py", "--run_id", trained["run_id"]),
        cwd=tmp_path,
        code=1,
    )
    assert f"there is no model at {trained['model_path']}" in finished.error
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.search_registered_models() == []


@pytest.mark.slow
def test_failed_write_leaves_nothing_that_looks_finished(tmp_path):
    """A limit on the size of a file stands for a full filesystem.

    The exit code is not looked at: PyTorch's archive writer aborts the process while it is being
    cleaned up, after the script has put everything in order.
    """
    target = tmp_path / "t"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        run(
            *("Modify_artifact_location.py", "--dataset", "digits", "--target_path", target),
            cwd=tmp_path,
            code=None,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (logged,) = client.search_runs(["1"])
    assert logged.info.status == "FAILED"
    (model,) = client.search_logged_models(["1"])
    assert model.status == "FAILED"
    written = files(target)
    assert any(name.endswith("confusion_matrix.png") for name in written)
    assert not [name for name in written if name.startswith("models/")]
