"""Models on a shared filesystem: metadata on the tracking server, the heavy files on a path.

MLflow writes to a `file://` location itself, from the machine that the script runs on, and would
create the folder anywhere: on a node without the mount the run would look fine and the model be
gone. So the folder is checked before any work. Copy `prepare` and `existing_path` if you want that.
"""

import os
import tempfile
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mlflow


def prepare(target_path):
    """Create the folder if need be, check that it can be written, and return it as a `Path`.

    Raises SystemExit if it cannot be written, or if not even its topmost folder exists: that is how
    a machine looks on which the filesystem is not mounted.
    """
    if "%" in target_path or "://" in target_path:
        raise SystemExit(
            f"error: --target_path {target_path} is an address, or holds a %, which MLflow "
            "takes for an escape when it loads.\n"
            "hint:  give the path of a folder, without a %."
        )
    folder = Path(target_path).expanduser().absolute()
    topmost = Path(*folder.parts[:2])
    if not topmost.is_dir():
        raise SystemExit(
            f"error: there is no {topmost} on this machine, so --target_path {folder} cannot be "
            "the shared filesystem.\n"
            "hint:  correct the path, or run where that filesystem is mounted."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SystemExit(
            f"error: --target_path {folder} cannot be written: {error.strerror}.\n"
            "hint:  choose a folder in which you may create files, on a filesystem with space left."
        ) from error
    return folder


def check_experiment(name, folder):
    """Raise SystemExit if the experiment `name` exists and keeps its files elsewhere than `folder`.

    An experiment's location is fixed when it is created, and `--target_path` could only be ignored.
    """
    experiment = mlflow.get_experiment_by_name(name)
    if experiment is None:
        return
    location = urlsplit(experiment.artifact_location)
    if location.scheme in ("", "file") and os.path.realpath(
        url2pathname(location.path)
    ) == os.path.realpath(folder):
        return
    raise SystemExit(
        f"error: the experiment {name!r} keeps its files at {experiment.artifact_location}, and "
        f"not at --target_path {folder}; that cannot be changed.\n"
        "hint:  give --experiment another name, or the --target_path of that experiment."
    )


def new_path(location):
    """Return the absolute path that a `file://` artifact location stands for.

    Raises SystemExit if it stands for none: the files would have to travel to the server.
    """
    parts = urlsplit(location)
    if parts.scheme not in ("", "file"):
        raise SystemExit(
            f"error: this model lies on the server ({location}), not on a shared filesystem.\n"
            "hint:  use register_and_inference.py, or train with Modify_artifact_location.py."
        )
    return Path(url2pathname(parts.path))


def existing_path(location):
    """Like `new_path`, for a model that is there. Raises SystemExit if it is not there."""
    path = new_path(location)
    if not (path / "MLmodel").is_file():
        raise SystemExit(
            f"error: there is no model at {path}, where the tracking server says it is.\n"
            "hint:  is that filesystem mounted on this machine, and may you read it? A purge "
            "policy may have removed it, too."
        )
    return path


def path_of_model(model_uri):
    """Return the path of the logged model `models:/m-...`, as `existing_path` does."""
    return existing_path(
        mlflow.get_logged_model(model_uri.removeprefix("models:/")).artifact_location
    )


def path_of_alias(model_name, alias):
    """Return the path of the version that `models:/model_name@alias` stands for.

    Only MLflow's metadata is asked. Loading by `models:/` itself would write a file into the folder
    (MLflow up to 3.17), which may be read-only and belong to someone else.
    """
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias(model_name, alias)
    return existing_path(client.get_model_version_download_uri(model_name, version.version))
