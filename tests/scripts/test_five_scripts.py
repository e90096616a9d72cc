"""The first command of the README, on a machine with nothing set up: what stands in the store."""

import hashlib
import io
import json
import platform
import subprocess
import sys
from importlib import metadata

import mlflow
import numpy as np
import pytest
from conftest import ROOT, clean_environment, run


@pytest.fixture
def client(local):
    return mlflow.MlflowClient(local.uri)


@pytest.fixture
def logged_run(local, client):
    return client.get_run(local.run_id)


def test_first_lines_say_what_takes_time_and_where_and_the_last_is_json(local):
    first, second, third, *lines = local.trained.out.splitlines()
    versions = [f"{name} {metadata.version(name)}" for name in ("mlflow", "torch")]
    assert first == f"import   {'  '.join(versions)}  Python {platform.python_version()}"
    assert second.startswith("tracking sqlite:///mlflow.db  (local, because neither")
    assert third == f"store    creating {local.folder / 'mlflow.db'}"
    result = local.trained.result
    assert result["model_name"] == "MNIST_CNN"
    assert result["model_version"] == "1"
    assert result["model_uri"] == "models:/MNIST_CNN/1"
    assert result["alias"] == "production" and result["previous_version"] is None
    assert "alias    production  version none -> 1" in lines
    assert result["val_accuracy"] > 0.9
    (check,) = (line for line in lines if line.startswith("check "))
    assert "360 of 360 predictions as recorded" in check
    assert sum(line.startswith("epoch ") for line in lines) == 8


def test_only_the_default_store_is_written(local):
    assert sorted(path.name for path in local.folder.iterdir()) == ["mlflow.db", "mlruns"]


def test_run_name_status_and_tags(logged_run):
    assert logged_run.info.run_name == "MNIST_production_8cf"
    assert logged_run.info.status == "FINISHED"
    tags = logged_run.data.tags
    assert tags["owner"] == "8cf"
    assert tags["project.phase"] == "production"
    assert tags["model.type"] == "Computer Vision"
    assert tags["model.class"] == "MNISTCNN"
    assert tags["mlflow.note.content"] == "Baseline CNN model"
    assert tags["host"]


def test_git_tags_are_those_of_the_checkout(logged_run):
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    process = subprocess.run(git, capture_output=True, text=True)
    tags = logged_run.data.tags
    if process.returncode:  # the project as an archive, without its history
        assert "git.commit" not in tags
    else:
        assert tags["git.commit"] == process.stdout.strip()
        assert tags["git.branch"]
        assert tags["git.dirty"] in ("true", "false")


def test_params(logged_run):
    params = logged_run.data.params
    assert params["batch_size"] == "64"
    assert params["epochs"] == "8"
    assert params["learning_rate"] == "0.001"
    assert params["optimizer"] == "Adam"
    assert params["seed"] == "0"
    assert params["dataset"] == "digits"


def test_metrics_have_one_point_per_epoch(local, client):
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        history = client.get_metric_history(local.run_id, name)
        assert [point.step for point in history] == list(range(1, 9))
    losses = [point.value for point in client.get_metric_history(local.run_id, "train_loss")]
    assert losses[0] > losses[3] > losses[7] > 0
    accuracy = client.get_metric_history(local.run_id, "val_accuracy")[-1].value
    assert accuracy == local.trained.result["val_accuracy"]


def test_data_sets_are_inputs_with_the_digest_of_their_content(logged_run):
    from common import training

    inputs = {item.tags[0].value: item.dataset for item in logged_run.inputs.dataset_inputs}
    assert set(inputs) == {"training", "validation"}
    for context, train in (("training", True), ("validation", False)):
        split = training.load_data("digits", "unused", train=train)
        assert inputs[context].name == "digits"
        content = split.images.numpy().tobytes() + split.labels.numpy().tobytes()
        assert inputs[context].digest == hashlib.sha256(content).hexdigest()[:32]
        assert json.loads(inputs[context].profile)["features_size"] == split.images.numel()


def test_confusion_matrix_is_a_picture(local, client):
    from matplotlib import image

    path = client.download_artifacts(local.run_id, "plots/confusion_matrix.png")
    pixels = image.imread(path)
    assert pixels.shape[0] > 400 and pixels.shape[1] > 400
    assert pixels[..., :3].std() > 0.05  # not a blank page


def test_confusion_matrix_counts_and_labels():
    from common import runs

    figure = runs.confusion_matrix_figure([0, 1, 1, 2], [0, 1, 2, 2], ["a", "b", "c"], "title")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == list("100011001")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Predicted label", "True label")
    assert axes.get_title() == "title"
    figure.savefig(io.BytesIO())


def test_registered_version_points_at_the_run(local, client):
    version = client.get_model_version_by_alias("MNIST_CNN", "production")
    assert str(version.version) == "1"
    assert version.run_id == local.run_id


def test_the_version_and_the_model_say_what_they_are(local, client, logged_run):
    """Its score, its data and what it takes, in words that the UI shows."""
    from common import training

    version, digest = client.get_model_version("MNIST_CNN", "1"), logged_run.inputs.dataset_inputs
    digest = {item.tags[0].value: item.dataset.digest for item in digest}["validation"]
    accuracy = f"{local.trained.result['val_accuracy']:.4f}"
    said = {"dataset": "digits", "dataset.digest": digest, "val_accuracy": accuracy}
    assert said | {"run_id": local.run_id, "input": training.INPUT} == {
        name: value for name, value in version.tags.items() if name != "launch"
    }
    for words in (*said.values(), local.run_id, "pixels in [0, 1]", "normalises them itself"):
        assert words in version.description
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    assert logged.tags["input"] == training.INPUT
    uri = client.get_model_version_download_uri("MNIST_CNN", "1")
    folder = mlflow.artifacts.download_artifacts(uri)
    assert mlflow.models.Model.load(folder).metadata["input"] == training.INPUT
    assert logged_run.data.tags["settings"] == "digits, 8 epochs, batch 64, lr 0.001, seed 0"


def test_the_line_run_names_the_experiment_and_ends_in_an_address(local):
    (line,) = (line for line in local.trained.out.splitlines() if line.startswith("run "))
    store, page = "mlflow ui --backend-store-uri sqlite:///mlflow.db", "#/experiments/1/runs"
    assert line == (
        f"run      {local.run_id}  experiment mnist_cnn_pytorch  "
        f"{store}  # http://127.0.0.1:5000/{page}/{local.run_id}"
    )


LOAD_ELSEWHERE = """
import sys, json, mlflow, torch
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pytorch.load_model("models:/MNIST_CNN@production")
pyfunc = mlflow.pyfunc.load_model("models:/MNIST_CNN@production")
shapes = {n: list(model(torch.rand(n, 1, 28, 28)).shape) for n in (1, 2, 7)}
served = list(pyfunc.predict(torch.rand(3, 1, 28, 28).numpy()).shape)
print(json.dumps([shapes, served, "common" in sys.modules]))
"""


@pytest.mark.slow
def test_model_loads_without_this_project_and_without_pickle(local, tmp_path):
    """Any batch size, in a folder without our code, with MLflow's pickle loading switched off."""
    process = subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, local.uri],
        cwd=tmp_path,
        env=clean_environment(MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false"),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    shapes, served, project_imported = json.loads(process.stdout.splitlines()[-1])
    assert shapes == {"1": [1, 10], "2": [2, 10], "7": [7, 10]}
    assert served == [3, 10]
    assert not project_imported


def test_recorded_environment_is_the_one_at_hand(local, client):
    import torch

    version = client.get_model_version_by_alias("MNIST_CNN", "production")
    uri = client.get_model_version_download_uri("MNIST_CNN", version.version)
    folder = mlflow.artifacts.download_artifacts(uri)
    with open(f"{folder}/requirements.txt") as file:
        requirements = file.read().split()
    assert f"mlflow=={mlflow.__version__}" in requirements
    assert f"torch=={torch.__version__.split('+')[0]}" in requirements
    assert f"numpy=={np.__version__}" in requirements
    assert len(requirements) == 3


@pytest.mark.slow
def test_register_and_inference(local, client):
    """The guide's next command; --dataset is known from the run."""
    before = client.get_model_version_by_alias("MNIST_CNN", "production").version
    finished = run("register_and_inference.py", "--run_id", local.run_id, cwd=local.folder)
    result = finished.result
    assert result["previous_version"] == str(before)
    moved = f"\nalias    production  version {before} -> {result['model_version']}\n"
    assert moved in finished.out
    assert result["model_name"] == "MNIST_CNN"
    assert result["alias"] == "production"
    assert result["val_accuracy"] == local.trained.result["val_accuracy"]
    version = client.get_model_version_by_alias("MNIST_CNN", "production")
    assert str(version.version) == result["model_version"]
    assert version.run_id == local.run_id
    assert "predicted" in finished.out


@pytest.mark.slow
def test_same_seed_same_run(local, tmp_path):
    """On the CPU, the logged seed determines the run; another seed gives another one."""
    flags = ("--dataset", "digits", "--epochs", 8, "--precision", "fp32", "--seed")
    again = run("train_mnist_mlflow.py", *flags, 0, cwd=tmp_path).result
    other = run("train_mnist_mlflow.py", *flags, 1, cwd=tmp_path).result
    assert again["train_loss"] == local.trained.result["train_loss"]
    assert again["val_accuracy"] == local.trained.result["val_accuracy"]
    assert other["train_loss"] != again["train_loss"]


@pytest.mark.slow
def test_mnist_files_are_found_in_data_dir(mnist_dir, tmp_path):
    """The guide's first command, word for word but for the folder of the data."""
    finished = run(
        "train_mnist_mlflow.py",
        *("--epochs", 5, "--phase", "development", "--data_dir", mnist_dir),
        cwd=tmp_path,
    )
    assert finished.result["val_accuracy"] > 0.9
    assert "alias" not in finished.result
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.search_registered_models() == []


@pytest.mark.slow
def test_script_and_common_alone_are_enough(tmp_path):
    """What people copy: one script and common/, into a git checkout of something else.

    Started from a notebook, in an odd locale: what these leave in the environment does not matter.
    """
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "common", copy / "common")
    shutil.copy(ROOT / "train_mnist_mlflow.py", copy)
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "of something else").touch()
    for command in ("init -q", "add of*", "-c user.name=a -c user.email=a@b commit -q -m x"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    left = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "ascii"}
    experiment = ("--dataset", "digits", "--experiment", "Zürich")
    result = run(copy / "train_mnist_mlflow.py", *experiment, cwd=work, **left).result
    tags = mlflow.MlflowClient(f"sqlite:///{work}/mlflow.db").get_run(result["run_id"]).data.tags
    assert not [name for name in tags if name.startswith("git.")]
    assert tags["model.class"] == "MNISTCNN"


@pytest.mark.slow
def test_artifacts_of_a_local_store_lie_beside_it(tmp_path):
    """Even if the script runs in another folder, which then stays empty."""
    store, work = tmp_path / "store", tmp_path / "work"
    store.mkdir()
    work.mkdir()
    uri = f"sqlite:///{store}/mlflow.db"
    run("train_mnist_mlflow.py", "--dataset", "digits", "--tracking_uri", uri, cwd=work)
    assert list(work.iterdir()) == []
    assert sorted(path.name for path in store.iterdir()) == ["mlflow.db", "mlruns"]


@pytest.mark.slow
def test_batch_job_and_system_metrics(tmp_path):
    """Tags of the batch job; system metrics, because the test requirements bring psutil."""
    result = run(
        "train_mnist_mlflow.py",
        *("--dataset", "digits", "--epochs", 5),
        cwd=tmp_path,
        SLURM_JOB_ID="4711",
        SLURM_JOB_NAME="mnist",
        MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL="1",
    ).result
    logged = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(result["run_id"])
    assert logged.data.tags["job.scheduler"] == "slurm"
    assert logged.data.tags["job.id"] == "4711"
    assert logged.data.tags["job.name"] == "mnist"
    assert "system/cpu_utilization_percentage" in logged.data.metrics
