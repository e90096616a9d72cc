"""The file that holds a model's weights: where it is, and whether it is still the one it was.

Path, size, SHA-256 and host go to the tracking server as tags of the model and of its versions, so
that whoever loads it can tell.
"""

import hashlib
import platform
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import mlflow

from common.errors import UserError

from .folders import path_of
from .layout import MODEL_FILE

TAGS = ("file.path", "file.size_bytes", "file.sha256", "file.host")


class ModelFile(NamedTuple):
    """A file, and what was recorded of it when it was written."""

    path: Path
    size: int | None = None
    sha256: str | None = None
    host: str | None = None

    @property
    def tags(self):
        """The tags that record it: {"file.path": ..., "file.size_bytes": ...}."""
        return {n: str(v) for n, v in zip(TAGS, self, strict=True) if v is not None}


def recorded(path, sha256):
    """Return the `ModelFile` at `path`, which this machine has just written, or read."""
    return ModelFile(Path(path), Path(path).stat().st_size, sha256, platform.node())


def of_model(model_uri):
    """Return the `ModelFile` of the logged model `models:/m-...`, as `of_alias` for a version."""
    logged = mlflow.get_logged_model(model_uri.removeprefix("models:/"))
    return _checked(logged.tags, logged.artifact_location)


def of_alias(model_name, alias):
    """Return the `ModelFile` of the version that `models:/model_name@alias` stands for.

    Only MLflow's metadata is asked. Loading by `models:/` itself would write a file into the folder
    (MLflow up to 3.17), which may be read-only and belong to someone else. A version without a
    record of its file has it at MODEL_FILE in its folder. Raises UserError if the file is not
    there, has another size than the one recorded, or lies on the server.
    """
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias(model_name, alias)
    if TAGS[0] in version.tags:
        return _checked(version.tags)
    if version.source.startswith("models:/m-"):
        return of_model(version.source)
    return _checked({}, client.get_model_version_download_uri(model_name, version.version))


def _checked(tags, location=None):
    if TAGS[0] in tags:
        path, size, sha256, host = (tags.get(name) for name in TAGS)
        file = ModelFile(Path(path), int(size), sha256, host)
        origin = (
            f"Recorded: {size} bytes, SHA-256 {sha256}, on the host {host}; "
            f"this is {platform.node()}."
        )
    elif urlsplit(location).scheme in ("", "file"):
        file = ModelFile(path_of(location) / MODEL_FILE)
        origin = "Neither size nor SHA-256 were recorded."
    else:
        raise UserError(
            f"this model lies on the server ({location}), not on a shared filesystem.",
            "use register_and_inference.py, or train with Modify_artifact_location.py.",
        )
    try:
        size = file.path.stat().st_size
    except OSError as error:
        raise UserError(
            f"there is no model at {file.path}, where the tracking server says it is: "
            f"{error.strerror}. {origin}",
            "is that filesystem mounted on this machine, and may you read it? A purge policy may "
            "have removed it, too. A model in MLflow's older pickle format has no such file: "
            "register_and_inference.py takes it.",
        ) from error
    if file.size not in (None, size):
        raise UserError(
            f"the model {file.path} has {size} bytes and not those that were recorded. {origin}",
            "it was cut short, or replaced. Bring the file back, or train again.",
        )
    return file._replace(size=size)


def verify(file):
    """Raise UserError unless the file has the SHA-256 that was recorded when it was written."""
    if file.sha256 is None:
        raise UserError(
            f"no SHA-256 was recorded of {file.path}: there is nothing to verify.",
            "leave --verify out, or write the model with Modify_artifact_location.py.",
        )
    found = sha256(file.path)
    if found != file.sha256:
        raise UserError(
            f"the model {file.path} was changed: its SHA-256 is {found}, and {file.sha256} was "
            f"recorded on the host {file.host}.",
            "do not use it. Bring the file back, or train again.",
        )


def sha256(path):
    """Return the SHA-256 of a file. One core reads all of it, at some 1.4 GB/s."""
    digest, buffer = hashlib.sha256(), bytearray(16 * 2**20)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()
