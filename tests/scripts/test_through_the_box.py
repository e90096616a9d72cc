"""A `mlflow server` behind a gateway: weights in place, TLS unverified, the copied key patch."""

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
