"""Bad input: one sentence what, one what to do, exit code 1, in seconds, nothing left behind."""

import functools
import socket
import struct
import sys

import mlflow
import pytest
from conftest import fails, write_mnist

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def forked(prefork, monkeypatch):
    """What the scripts import matters to others of their tests; here it would take the time."""
    monkeypatch.setattr(sys.modules[__name__], "fails", functools.partial(fails, prefork=prefork))


# Runs


def register(run_id, local, script="register_and_inference.py"):
    return fails(script, "--run_id", run_id, cwd=local.folder)


REGISTER_SCRIPTS = ["register_and_inference.py", "Modify_artifact_location_register_inference.py"]


@pytest.mark.parametrize("script", [REGISTER_SCRIPTS[0], REGISTER_SCRIPTS[1]])
def test_unknown_run(local, script):
    error = register("0123456789abcdef0123456789abcdef", local, script)
    assert "there is no run 0123456789abcdef" in error


def test_run_id_that_is_none(local):
    assert "there is no run" in register("<RUN_ID>", local)


@pytest.mark.parametrize("status", ["RUNNING", "FAILED", "KILLED"])
def test_run_that_did_not_finish(local, status):
    client = mlflow.MlflowClient(local.uri)
    run_id = client.create_run("1").info.run_id
    if status != "RUNNING":
        client.set_terminated(run_id, status)
    assert f"is {status}" in register(run_id, local)


def test_deleted_run(local):
    client = mlflow.MlflowClient(local.uri)
    client.delete_run(local.run_id)
    try:
        error = register(local.run_id, local)
    finally:
        client.restore_run(local.run_id)
    assert "it is DELETED" in error and "mlflow runs restore" in error


@pytest.mark.parametrize("script", REGISTER_SCRIPTS)
def test_run_without_a_model(local, script):
    client = mlflow.MlflowClient(local.uri)
    run_id = client.create_run("1").info.run_id
    client.set_terminated(run_id)
    before = len(client.search_model_versions())
    assert "has no model" in register(run_id, local, script)
    assert len(client.search_model_versions()) == before


def test_run_of_another_data_set(local, mnist_dir):
    error = fails(
        "register_and_inference.py",
        *("--run_id", local.run_id, "--dataset", "mnist", "--data_dir", mnist_dir),
        cwd=local.folder,
    )
    assert "was trained on digits, not on mnist" in error


# Data


NO_NETWORK = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist"])
def test_data_missing_and_no_network(dataset, tmp_path):
    error = fails("train_mnist_mlflow.py", "--dataset", dataset, cwd=tmp_path, **NO_NETWORK)
    assert f"{dataset} is not in {tmp_path}/data" in error
    assert "--dataset digits" in error and "copy data/" in error
    store = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert [experiment.name for experiment in store.search_experiments()] == ["Default"]


def test_data_missing_and_a_network_that_swallows_everything(tmp_path):
    """A compute node behind a firewall: connections are neither accepted nor refused in time."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        error = fails("train_mnist_mlflow.py", cwd=tmp_path, https_proxy=proxy, http_proxy=proxy)
    assert "it cannot be downloaded" in error


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("train-images-idx3-ubyte", lambda content: content[:100_000]),
        ("train-images-idx3-ubyte", lambda content: b""),
        ("t10k-labels-idx1-ubyte", lambda content: b"<html>not found</html>"),
        ("t10k-labels-idx1-ubyte", lambda content: content[:-7]),
        ("train-labels-idx1-ubyte", lambda content: content[:8] + bytes([77]) + content[9:]),
        (
            "t10k-images-idx3-ubyte",
            lambda content: struct.pack(">4I", 0x803, 1, 28, 28) + b"0" * 784,
        ),
    ],
    ids=["cut", "empty", "html", "cut-labels", "label-77", "one-image"],
)
def test_damaged_data_file(file, damage, tmp_path):
    path = write_mnist(tmp_path / "data") / "MNIST" / "raw" / file
    path.write_bytes(damage(path.read_bytes()))
    error = fails("train_mnist_mlflow.py", cwd=tmp_path, **NO_NETWORK)
    assert f"the files in {path.parent} are damaged" in error
    assert path.exists()


# The shared filesystem


def test_target_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for target in (tmp_path / "file" / "models", tmp_path / "file"):
        error = fails(
            "Modify_artifact_location.py",
            *("--dataset", "digits", "--target_path", target),
            cwd=tmp_path,
        )
        assert f"--target_path {target} cannot be written" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("target", ["file:///tmp/models", "models%20here"])
def test_target_path_that_mlflow_would_misread(target, tmp_path):
    error = fails(
        "Modify_artifact_location.py",
        *("--dataset", "digits", "--target_path", target),
        cwd=tmp_path,
    )
    assert "is an address, or holds a %" in error
    assert list(tmp_path.iterdir()) == []


def test_target_path_where_nothing_is_mounted(tmp_path):
    target = "/no-such-filesystem/models"
    error = fails("Modify_artifact_location.py", "--target_path", target, cwd=tmp_path)
    assert "there is no /no-such-filesystem on this machine" in error


def test_experiment_with_its_files_elsewhere(local, tmp_path):
    target = tmp_path / "models"
    error = fails(
        "Modify_artifact_location.py",
        *("--dataset", "digits", "--target_path", target, "--experiment", "mnist_cnn_pytorch"),
        *("--tracking_uri", local.uri),
        cwd=tmp_path,
    )
    assert "keeps its files at" in error and str(target) in error and "--experiment" in error
