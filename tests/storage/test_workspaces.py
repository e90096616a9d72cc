"""The large-model pair on a server with workspaces, which sets the location of each experiment."""

import contextlib
import hashlib
import os
import signal
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import mlflow
import pytest
import torch
from conftest import Session, mlflow_server, run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from common import runs, storage
from common.errors import UserError

TRAIN, PAIR = "Modify_artifact_location.py", "Modify_artifact_location_register_inference.py"
EXPERIMENT = "mnist_cnn_pytorch_shared"
SMALL = ("--dataset", "digits", "--batch_size", "256", "--precision", "fp32")


class Server(NamedTuple):
    uri: str
    folder: Path
    prefork: subprocess.Popen

    @property
    def artifacts(self):
        return files(self.folder / "artifacts")

    def variables(self, workspace):
        return {"MLFLOW_TRACKING_URI": self.uri, "MLFLOW_WORKSPACE": workspace}

    def session(self, folder, workspace):
        return Session(folder, self.prefork, **self.variables(workspace))

    def train(self, folder, workspace, *flags):
        """The script, under a umask that shuts out everybody."""
        umask = os.umask(0o077)
        try:
            return run(TRAIN, *SMALL, *flags, cwd=folder, **self.variables(workspace))
        finally:
            os.umask(umask)

    @contextlib.contextmanager
    def client(self, workspace):
        """MLflow in this process, pointed at the server as a user's would be."""
        with mock.patch.dict(os.environ, MLFLOW_WORKSPACE=workspace):
            mlflow.set_tracking_uri(self.uri)
            try:
                yield mlflow.MlflowClient()
            finally:
                mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def server(tmp_path_factory, prefork):
    """With the workspaces default, team-a, and team-b, whose files lie in its folder "shared"."""
    folder = tmp_path_factory.mktemp("workspaces")
    with mlflow_server(folder, "--enable-workspaces") as uri:
        client = mlflow.MlflowClient(uri)
        client.create_workspace("team-a")
        client.create_workspace("team-b", default_artifact_root=(folder / "shared").as_uri())
        yield Server(uri, folder, prefork)


@pytest.fixture(scope="module")
def trained(server, tmp_path_factory):
    """(target path, session in the same folder, the finished script), in team-a."""
    folder = tmp_path_factory.mktemp("team-a")
    finished = server.train(folder, "team-a", "--target_path", folder / "lustre", "--register")
    return folder / "lustre", server.session(folder, "team-a"), finished


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def modes(folder):
    """{whether it is a folder: the permissions seen}"""
    return {
        (path.is_dir(), oct(stat.S_IMODE(path.stat().st_mode)))
        for path in (folder, *folder.rglob("*"))
    }


@pytest.mark.slow
def test_model_is_on_the_target_path_and_small_files_on_the_server(trained, server):
    target, _, finished = trained
    run_id, path = finished.result["run_id"], Path(finished.result["model_path"])
    assert path == target / run_id / "artifacts" / "data" / "model.pt2"
    assert {name.split("/")[0] for name in files(target)} == {run_id}
    assert f"{run_id}/artifacts/MLmodel" in files(target)
    assert modes(target) == {(True, "0o750"), (False, "0o640")}
    said = f"external load_model('{path.parents[1]}') works, 'models:/NAME' does not"
    assert said in finished.out.splitlines()
    assert not [name for name in server.artifacts if name.endswith(".pt2")]
    (plot,) = (name for name in server.artifacts if name.endswith("confusion_matrix.png"))
    assert plot.endswith(f"{run_id}/artifacts/plots/confusion_matrix.png")
    with server.client("team-a") as client:
        logged = client.get_run(run_id)
        (output,) = logged.outputs.model_outputs
        model = client.get_logged_model(output.model_id)
        version = client.get_model_version_by_alias("MNIST_CNN", "production")
    assert (model.name, model.status) == ("model", "READY")
    assert model.tags["file.path"] == version.tags["file.path"] == str(path)
    assert model.tags["file.sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (version.run_id, version.source) == (run_id, f"models:/{model.model_id}")
    assert logged.data.metrics["write.size_bytes"] == path.stat().st_size


@pytest.mark.slow
def test_registered_by_the_pair_and_mapped_by_alias(trained, server):
    target, session, train = trained
    before, run_id = files(target), train.result["run_id"]
    finished = session.type(PAIR, "--run_id", run_id, "--model_name", "PAIR", "--verify")
    assert finished.result["model_path"] == train.result["model_path"]
    assert finished.result["val_accuracy"] == train.result["val_accuracy"]
    assert "\nverify   SHA-256 " in finished.out
    with server.client("team-a"):
        file = storage.of_alias("PAIR", "production")
    storage.verify(file)
    assert str(file.path) == train.result["model_path"]
    assert files(target) == before
    path = file.path
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    cut = session.type(PAIR, "--run_id", run_id, "--model_name", "NEVER", code=1)
    path.write_bytes(content)
    assert f"the model {path} has {len(content) - 1} bytes" in cut.error


@pytest.mark.slow
def test_plain_mlflow_loads_the_folder_and_not_the_name(trained, server, user):
    """As the script says. No pickle is allowed."""
    user(MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false")
    model = mlflow.pytorch.load_model(str(Path(trained[2].result["model_path"]).parents[1]))
    for count in (1, 5):
        assert model(torch.rand(count, 1, 28, 28)).shape == (count, 10)
    flavor = 'does not have the "pytorch" flavor'
    with server.client("team-a"), pytest.raises(MlflowException, match=flavor):
        mlflow.pytorch.load_model("models:/MNIST_CNN@production")


@pytest.mark.slow
def test_killed_and_continued_in_an_experiment_that_exists(server, tmp_path):
    """SIGKILL in the second epoch, and again while the model is written."""
    target, session = tmp_path / "lustre", server.session(tmp_path, "default")
    with server.client("default") as client:
        experiment_id = client.create_experiment(EXPERIMENT)
    more = ("--target_path", target, "--epochs", 3, "--register", "--checkpoint", tmp_path / "kept")
    output = tmp_path / "0.out"
    stops = [
        lambda: "epoch 1/3" in output.read_text(),
        lambda: list(target.glob("*/artifacts.unfinished")),
    ]
    for until in stops:
        session.type(TRAIN, *SMALL, *more, code=-9, until=until, stop=signal.SIGKILL)
    assert list(target.glob("*/artifacts.unfinished"))
    finished = session.type(TRAIN, *SMALL, *more)
    again = session.type(TRAIN, *SMALL, *more)
    assert again.result == finished.result and "\nepoch" not in again.out
    run_id = finished.result["run_id"]
    assert [path.name for path in target.iterdir()] == [run_id]
    assert [path.name for path in (target / run_id).iterdir()] == ["artifacts"]
    with server.client("default") as client:
        (run,) = client.search_runs([experiment_id])
        (model,) = client.search_logged_models([experiment_id])
        (version,) = client.search_model_versions("name = 'MNIST_CNN'")
        points = client.get_metric_history(run_id, "train_loss")
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert run.data.tags["continuations"] == "2"
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert version.tags["file.path"] == model.tags["file.path"] == finished.result["model_path"]
    assert [point.step for point in points] == [1, 2, 3]


@pytest.mark.slow
def test_workspace_whose_files_lie_below_the_target_path(server, tmp_path):
    """There it is as on a server without workspaces, whatever the umask."""
    target = server.folder / "shared"
    finished = server.train(tmp_path, "team-b", "--target_path", target)
    with server.client("team-b") as client:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        model_id = finished.result["model_uri"].split("/")[1]
        tags = client.get_logged_model(model_id).tags
    place = target / experiment.experiment_id
    assert experiment.artifact_location == place.as_uri()
    path = place / "models" / model_id / "artifacts" / "data" / "model.pt2"
    assert finished.result["model_path"] == str(path) == tags["file.path"]
    assert "\nexternal" not in finished.out and "mlflow.model.isExternal" not in tags
    assert modes(target) == {(True, "0o750"), (False, "0o640")}


@pytest.mark.slow
def test_model_that_no_run_names_is_written_anew(server):
    """The job ended between the two requests: READY is not yet linked."""
    with server.client("team-a"):
        mlflow.set_experiment("unlinked")
        with mlflow.start_run() as run:
            model = mlflow.create_external_model(name="model", tags={"file.path": "/gone"})
            assert runs.ready_model(run) is None
            assert mlflow.search_logged_models(output_format="list") == []
            model = mlflow.create_external_model(name="model", tags={"file.path": "/there"})
            mlflow.log_outputs([mlflow.entities.LoggedModelOutput(model.model_id, step=1)])
            assert runs.ready_model(run) == f"models:/{model.model_id}"


@pytest.mark.slow
def test_without_workspaces_another_location_stays_an_error(tmp_path, user):
    """Also for those who may log into an experiment and not make one."""
    user(MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")

    def create(*arguments):
        return runs.patiently(mlflow.create_experiment, *arguments)

    def forbidden(*arguments):
        raise MlflowException("you may not", PERMISSION_DENIED)

    folder = tmp_path / "models"
    assert storage.place_experiment("mine", folder, create) is None
    assert storage.place_experiment("mine", folder, forbidden) is None
    for make in (create, forbidden):
        for wrong in (tmp_path / "other", tmp_path):
            with pytest.raises(UserError, match="'mine' keeps its files at"):
                storage.place_experiment("mine", wrong, make)
    with pytest.raises(MlflowException, match="you may not"):
        storage.place_experiment("yours", folder, forbidden)
