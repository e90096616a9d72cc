"""The file that holds a model's weights: where it is, and whether it is still the one it was.

Path, size, SHA-256 and host go to the tracking server as tags of the model and of its versions, so
that whoever loads it can tell. Copy this file if you want that for your own large files.
"""

import hashlib
import platform
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mlflow


class File(NamedTuple):
    """A file, and what was recorded of it when it was written."""

    path: Path
    size: int | None = None
    sha256: str | None = None
    host: str | None = None

    @property
    def tags(self):
        """The tags that record it: {"file.path": ..., "file.size_bytes": ...}."""
        values = (self.path, self.size, self.sha256, self.host)
        return {n: str(v) for n, v in zip(TAGS, values, strict=True) if v is not None}


TAGS = ("file.path", "file.size_bytes", "file.sha256", "file.host")


def recorded(path, sha256):
    """Return the `File` at `path`, which this machine has just written, or read."""
    return File(Path(path), Path(path).stat().st_size, sha256, platform.node())


def of_model(model_uri, default):
    """Return the `File` of the logged model `models:/m-...`, as `of_alias` does for a version."""
    logged = mlflow.get_logged_model(model_uri.removeprefix("models:/"))
    return _checked(logged.tags, logged.artifact_location, default)


def of_alias(model_name, alias, default):
    """Return the `File` of the version that `models:/model_name@alias` stands for.

    Only MLflow's metadata is asked. Loading by `models:/` itself would write a file into the folder
    (MLflow up to 3.17), which may be read-only and belong to someone else. A version without a
    record of its file has it at `default` in its folder. Raises SystemExit if the file is not
    there, has another size than the one recorded, or lies on the server.
    """
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias(model_name, alias)
    if TAGS[0] in version.tags:
        return _checked(version.tags)
    if version.source.startswith("models:/m-"):
        return of_model(version.source, default)
    location = client.get_model_version_download_uri(model_name, version.version)
    return _checked({}, location, default)


def _checked(tags, location=None, default=None):
    if TAGS[0] in tags:
        path, size, sha256, host = (tags.get(name) for name in TAGS)
        file = File(Path(path), int(size), sha256, host)
        origin = (
            f"Recorded: {size} bytes, SHA-256 {sha256}, on the host {host}; "
            f"this is {platform.node()}."
        )
    else:
        parts = urlsplit(location)
        if parts.scheme not in ("", "file"):
            raise SystemExit(
                f"error: this model lies on the server ({location}), not on a shared filesystem.\n"
                "hint:  use register_and_inference.py, or train with Modify_artifact_location.py."
            )
        file = File(Path(url2pathname(parts.path)) / default)
        origin = "Neither size nor SHA-256 were recorded."
    try:
        size = file.path.stat().st_size
    except OSError as error:
        raise SystemExit(
            f"error: there is no model at {file.path}, where the tracking server says it is: "
            f"{error.strerror}. {origin}\n"
            "hint:  is that filesystem mounted on this machine, and may you read it? A purge "
            "policy may have removed it, too. A model in MLflow's older pickle format has no such "
            "file: register_and_inference.py takes it."
        ) from error
    if file.size not in (None, size):
        raise SystemExit(
            f"error: the model {file.path} has {size} bytes and not those that were recorded. "
            f"{origin}\n"
            "hint:  it was cut short, or replaced. Bring the file back, or train again."
        )
    return file._replace(size=size)


def verify(file):
    """Raise SystemExit unless the file has the SHA-256 that was recorded when it was written."""
    if file.sha256 is None:
        raise SystemExit(
            f"error: no SHA-256 was recorded of {file.path}: there is nothing to verify.\n"
            "hint:  leave --verify out, or write the model with Modify_artifact_location.py."
        )
    found = sha256(file.path)
    if found != file.sha256:
        raise SystemExit(
            f"error: the model {file.path} was changed: its SHA-256 is {found}, and {file.sha256} "
            f"was recorded on the host {file.host}.\n"
            "hint:  do not use it. Bring the file back, or train again."
        )


def sha256(path):
    """Return the SHA-256 of a file. One core reads all of it, at some 1.4 GB/s."""
    digest, buffer = hashlib.sha256(), bytearray(16 * 2**20)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()
