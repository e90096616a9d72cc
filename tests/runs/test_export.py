"""Where a run's files will go is tried before the training: TMPDIR, and folders of this machine."""

import tempfile
from types import SimpleNamespace

import mlflow
import pytest
import torch
from conftest import other_user
from mlflow.exceptions import MlflowException

from common import connection, runs
from common.errors import UserError

# A colleague's folder, one below a file, a link that leads nowhere.
PLACES = {
    "somebody else's": "Permission denied.",
    "a file/below": "Not a directory.",
    "a link": "No such file or directory.",
}
STORES = {
    "http://127.0.0.1:9": "ask for a server that takes files itself",
    "sqlite:///mlflow.db": "ask .*; beside a local store, another --experiment",
}


@pytest.mark.parametrize("uri", STORES)
@pytest.mark.parametrize("place", PLACES)
def test_folder_that_cannot_be_written(place, uri, public, user):
    (public / "somebody else's").mkdir()
    (public / "a file").touch()
    (public / "a link").symlink_to("nowhere")
    mlflow.set_tracking_uri(uri)
    folder = public / place
    for location in (str(folder), folder.as_uri()):
        message = f"error: the folder for the experiment's files {folder} cannot be written: "
        message += f"{PLACES[place]}\nhint:  {STORES[uri]}"
        with other_user(), pytest.raises(UserError, match=message):
            runs.check_place(SimpleNamespace(artifact_location=location))


def test_folder_elsewhere_is_named(tmp_path, user, capsys):
    network = torch.nn.Linear(2, 2)
    for uri, location, said in (
        (f"sqlite:///{tmp_path}/mlflow.db", f"{tmp_path}/mlruns/1", ""),  # beside it, as always
        ("sqlite:///mlflow.db", tmp_path.as_uri() + "/mlruns/1", ""),
        ("sqlite:////somewhere/mlflow.db", tmp_path.as_uri(), f"files    {tmp_path}\n"),
        ("http://127.0.0.1:9", f"{tmp_path.parent}/a b", f"files    {tmp_path.parent}/a b\n"),
        ("http://127.0.0.1:9", "mlflow-artifacts:/1", ""),
    ):
        mlflow.set_tracking_uri(uri)
        runs.check_place(SimpleNamespace(artifact_location=location), network)
        assert capsys.readouterr().out == said
    assert list(tmp_path.iterdir()) == []


def test_object_store_that_cannot_be_used(user, tmp_path):
    """By its own words, and without the login in its address; before the training, not after."""
    user(AWS_EC2_METADATA_DISABLED="true", AWS_CONFIG_FILE=str(tmp_path), HOME=str(tmp_path))
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    for location, shown, reason in (
        ("s3://bucket/1", "s3://bucket/1", "Unable to locate credentials"),
        ("wasbs://c@a/1", "wasbs://c@a/1", "No module named 'azure'"),
        ("ftp://me:pa55@host/1", "ftp://host/1", "([Nn]ame|connect)"),
        ("foo://x", "foo://x", "Could not find a registered artifact repository"),
    ):
        with pytest.raises(UserError, match=f"cannot use {shown}, .*{reason}") as raised:
            runs.check_place(SimpleNamespace(artifact_location=location))
        assert "pa55" not in str(raised.value)


def test_too_little_space_for_temporary_files(tmp_path, monkeypatch, user):
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    here = SimpleNamespace(artifact_location="mlflow-artifacts:/1")
    with torch.device("meta"):
        network = torch.nn.Linear(2**24, 2**24)
    with pytest.raises(
        UserError, match=r"(?s)MB, and the folder for temporary files \(TMPDIR\) .*make room"
    ):
        runs.check_place(here, network)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone" / "deeper"))
    (tmp_path / "gone").touch()
    with pytest.raises(UserError, match="TMPDIR.* cannot be written: Not a directory"):
        runs.check_place(here)


def test_copied_database_and_a_database_of_another_user(public, user, capsys):
    """As a script meets them, in this process: `connect`, `set_experiment`, `check_place`."""
    (there := public / "original").mkdir()
    mlflow.MlflowClient(f"sqlite:///{there}/mlflow.db").create_experiment("copied", f"{there}/1")
    (here := public / "copy").mkdir()
    uri, copy = f"sqlite:///{here}/mlflow.db", here / "mlflow.db"
    copy.write_bytes((there / "mlflow.db").read_bytes())
    copy.chmod(0o666)
    connection.connect(uri, experiment="copied")
    with other_user(), pytest.raises(MlflowException) as raised:
        connection.connect(uri, experiment="copied")
        mlflow.create_experiment("a new one")
    failure = connection.diagnose(raised.value)
    assert (
        failure.what == f"the database {uri} cannot be used: attempt to write a readonly database."
    )
    here.chmod(0o777)
    with other_user():
        connection.connect(uri, experiment="copied")
        with pytest.raises(UserError, match="another --experiment gets a folder of its own"):
            runs.check_place(mlflow.set_experiment("copied"))
        runs.check_place(mlflow.set_experiment("a new one"))
    assert capsys.readouterr().out.count("files    ") == 1
