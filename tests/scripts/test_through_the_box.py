"""All five scripts against a real `mlflow server` behind a gateway: TLS, a key, zero leaks."""

import mlflow
import pytest
from conftest import KEY, run
from gateway import Gateway

pytestmark = pytest.mark.slow


@pytest.fixture
def gateway(box):
    """The box; whatever it let through, every request carried the key."""
    yield box
    assert box.requests
    without_key = [r for r in box.requests if r.headers.get("x-api-key") != KEY]
    assert without_key == []
    assert not [r for r in box.requests if r.status in (401, 403, 413) or r.status >= 500]


@pytest.fixture
def variables(box_variables):
    return box_variables


def assert_key_was_not_shown(finished):
    assert KEY not in finished.out + finished.err


def test_train_register_and_infer(server, gateway, variables, tmp_path):
    client = mlflow.MlflowClient(server)
    scratch, work = tmp_path / "scratch", tmp_path / "work"
    scratch.mkdir()
    work.mkdir()
    variables["TMPDIR"] = str(scratch)
    trained = run(
        "train_mnist_mlflow.py",
        *("--dataset", "digits", "--register", "--model_name", "SERVED_CNN"),
        cwd=work,
        **variables,
    )
    first, second = trained.out.splitlines()[:2]
    words = "(from MLFLOW_TRACKING_URI; X-Api-Key from AM_SC_API_KEY)"
    assert first == f"tracking {gateway.uri}  {words}"
    run_id = trained.result["run_id"]
    assert second.endswith(f"/runs/{run_id}") and second.startswith(f"run      {run_id}")
    assert list(work.iterdir()) == []

    # The plot, the predictions and the model went through the gateway, with the key.
    uploads = [r.path for r in gateway.artifact_uploads()]
    for name in ("confusion_matrix.png", "predictions/test.json", "MLmodel", "model.pt2"):
        assert sum(path.endswith(name) for path in uploads) == 1, name

    logged = client.get_run(run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics["val_accuracy"] == trained.result["val_accuracy"]
    version = client.get_model_version_by_alias("SERVED_CNN", "production")
    assert (str(version.version), version.run_id) == ("1", run_id)
    assert KEY not in str(logged.to_dictionary())

    # The guide's second command, on the same run: another version, and the alias on it.
    registered = run(
        "register_and_inference.py",
        *("--run_id", run_id, "--model_name", "SERVED_CNN"),
        cwd=work,
        **variables,
    )
    assert registered.result["model_version"] == "2"
    assert registered.result["val_accuracy"] == trained.result["val_accuracy"]
    version = client.get_model_version_by_alias("SERVED_CNN", "production")
    assert str(version.version) == "2"
    assert_key_was_not_shown(trained)
    assert_key_was_not_shown(registered)
    # MLflow leaves each model that it downloads in TMPDIR; the scripts do not.
    assert [path for path in scratch.rglob("*") if path.is_file()] == []


def test_upload(server, gateway, variables, tmp_path):
    import torch

    from common import training

    torch.save(training.MNISTCNN().state_dict(), tmp_path / "weights.pth")
    uploaded = run(
        "upload_external_model.py",
        *("--model_path", "weights.pth", "--dataset", "digits"),
        *("--model_name", "UPLOADED_CNN", "--alias", "candidate"),
        cwd=tmp_path,
        **variables,
    )
    version = mlflow.MlflowClient(server).get_model_version_by_alias("UPLOADED_CNN", "candidate")
    assert version.run_id == uploaded.result["run_id"]
    assert any(r.path.endswith("model.pt2") for r in gateway.artifact_uploads())
    assert_key_was_not_shown(uploaded)


def test_large_model_pair_sends_no_file_to_the_server(server, gateway, variables, tmp_path):
    target, work = tmp_path / "shared", tmp_path / "work"
    work.mkdir()
    trained = run(
        "Modify_artifact_location.py",
        *("--dataset", "digits", "--target_path", target, "--experiment", tmp_path.name),
        cwd=work,
        **variables,
    )
    registered = run(
        "Modify_artifact_location_register_inference.py",
        *("--run_id", trained.result["run_id"], "--model_name", "LARGE_CNN"),
        cwd=work,
        **variables,
    )
    assert registered.result["model_path"] == trained.result["model_path"]
    assert registered.result["val_accuracy"] == trained.result["val_accuracy"]
    assert [r.path for r in gateway.requests if "mlflow-artifacts" in r.path] == []
    assert list(work.iterdir()) == []
    version = mlflow.MlflowClient(server).get_model_version_by_alias("LARGE_CNN", "production")
    assert version.run_id == trained.result["run_id"]


def test_weights_registered_where_they_lie(server, gateway, variables, tmp_path):
    """The server's own checks of a version's source pass; the file stays as and where it is."""
    import torch
    from safetensors.torch import save_file

    from common import training

    torch.manual_seed(0)
    shared = tmp_path / "shared"
    shared.mkdir()
    path = shared / "weights.safetensors"
    save_file(training.MNISTCNN().state_dict(), path)
    before = path.stat()
    uploaded = run(
        "upload_external_model.py",
        *("--dataset", "digits", "--in_place", "--model_path", path),
        *("--model_name", "IN_PLACE", "--alias", "candidate"),
        cwd=tmp_path,
        **variables,
    )
    assert not [r for r in gateway.artifact_uploads() if r.size > 100_000]
    registered = run(
        "Modify_artifact_location_register_inference.py",
        *("--run_id", uploaded.result["run_id"], "--model_name", "IN_PLACE", "--verify"),
        cwd=tmp_path,
        **variables,
    )
    assert registered.result["model_path"] == str(path)
    assert registered.result["val_accuracy"] == uploaded.result["val_accuracy"]
    assert path.stat().st_mtime_ns == before.st_mtime_ns and list(shared.iterdir()) == [path]
    client = mlflow.MlflowClient(server)
    for alias in ("candidate", "production"):
        version = client.get_model_version_by_alias("IN_PLACE", alias)
        assert version.tags["file.path"] == str(path)
        assert version.tags["file.size_bytes"] == str(before.st_size)
        assert version.tags["file.sha256"] in registered.out
        assert version.run_id == uploaded.result["run_id"]


def test_tls_unverified_is_the_users_own_choice_and_said_once(box, tmp_path):
    finished = run(
        *("train_mnist_mlflow.py", "--dataset", "digits"),
        cwd=tmp_path,
        MLFLOW_TRACKING_URI=box.uri,
        MLFLOW_TRACKING_INSECURE_TLS="true",
        AM_SC_API_KEY=KEY,
    )
    assert finished.err.count("TLS is not verified") == 1
    assert "InsecureRequestWarning" not in finished.err


GUIDES_PATCH = """
import os, mlflow.utils.rest_utils as rest, mlflow
original = rest.http_request
def patched(host_creds, endpoint, method, **kwargs):
    kwargs["extra_headers"] = {"X-Api-Key": os.environ["AM_SC_API_KEY"]}
    return original(host_creds, endpoint, method, **kwargs)
rest.http_request = patched
with mlflow.start_run(experiment_id=mlflow.create_experiment("patched")):
    mlflow.log_param("reached", "rest")
    mlflow.log_text("text", "file.txt")
"""


def test_the_gateway_would_catch_a_missing_key(server, tmp_path):
    """A witness: the patch that the guide used to describe fails at the artifact upload."""
    script = tmp_path / "patch.py"
    script.write_text(GUIDES_PATCH)
    with Gateway(server, KEY) as gateway:
        finished = run(
            script, cwd=tmp_path, code=1, MLFLOW_TRACKING_URI=gateway.uri, AM_SC_API_KEY=KEY
        )
    assert "401" in finished.err
    refused = [r for r in gateway.requests if r.status == 401]
    assert [r.method for r in refused] == ["PUT"] and "/mlflow-artifacts/" in refused[0].path
    assert any(r.path.endswith("/runs/log-parameter") and r.status == 200 for r in gateway.requests)
