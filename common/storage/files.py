"""The file that holds a model's weights: where it is, and whether it is still the one it was.

Path, size, SHA-256 and host are tags of the model and of its versions, for whoever loads it.
"""

import hashlib
import platform
import stat
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import mlflow

from common.errors import UserError

from .folders import path_of
from .layout import MODEL_FILE

TAGS = ("file.path", "file.size_bytes", "file.sha256", "file.host")
REPLACED = "do not use it. Bring the file back, or train again."


class ModelFile(NamedTuple):  # with what was recorded when it was written
    path: Path
    size: int | None = None
    sha256: str | None = None
    host: str | None = None
    seen: int | None = None  # its ctime in ns, for `verify`

    @property
    def tags(self):
        return {n: str(v) for n, v in zip(TAGS, self[:4], strict=True) if v is not None}


def recorded(path, sha256):
    """Return the `ModelFile` at `path`, which this machine has just written, or read."""
    state = Path(path).stat()
    return ModelFile(Path(path), state.st_size, sha256, platform.node(), state.st_ctime_ns)


def of_model(model_uri):
    """Return the `ModelFile` of the logged model `models:/m-...`, as `of_alias` for a version."""
    logged = mlflow.get_logged_model(model_uri.removeprefix("models:/"))
    return _checked(logged.tags, logged.artifact_location)


def of_alias(model_name, alias):
    """Return the `ModelFile` of the version that `models:/model_name@alias` stands for.

    Only MLflow's metadata is asked. Loading by `models:/` itself would write a file into the folder
    (MLflow up to 3.17), which may be read-only and belong to someone else.
    """
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias(model_name, alias)
    if TAGS[0] not in version.tags and version.source.startswith("models:/m-"):
        return of_model(version.source)
    location = client.get_model_version_download_uri(model_name, version.version)
    return _checked(version.tags, location)


def _checked(tags, location):
    if TAGS[0] in tags:
        path, size, sha256, host = map(tags.get, TAGS)
        number = int(size) if size and size.isdecimal() and len(size) < 20 else -1
        file = ModelFile(Path(path), number, sha256, host)
        record = f"Recorded: {size} bytes, SHA-256 {sha256}, on the host {host}."
    elif urlsplit(location).scheme in ("", "file"):
        file = ModelFile(path_of(location) / MODEL_FILE)
        record = "Nothing was recorded of it; a model in MLflow's pickle format has no such file."
    else:
        what = f"this model lies on the server ({location}), not on a shared filesystem."
        raise UserError(what, "use register_and_inference.py.")
    try:
        state = file.path.stat()
        if not (stat.S_ISREG(state.st_mode) and file.path.is_absolute()):
            raise ValueError("that is not the whole path of a file")
    except (OSError, ValueError) as error:
        what = f"there is no model at {file.path}: {getattr(error, 'strerror', error)}. {record}"
        hint = "is that filesystem mounted here, and may you read it? A purge may have removed it."
        raise UserError(what, hint) from error
    if file.size not in (None, size := state.st_size):
        what = f"the model {file.path} has {size} bytes and not those that were recorded. {record}"
        raise UserError(what, REPLACED)
    return file._replace(size=size, seen=state.st_ctime_ns)


def verify(file):
    """Raise UserError unless the file, mapped before, has the SHA-256 that was recorded."""
    if file.sha256 is None:
        raise UserError(f"no SHA-256 was recorded of {file.path}.", "leave --verify out.")
    found = sha256(file.path)
    if file.seen not in (None, file.path.stat().st_ctime_ns):  # else another one may be mapped
        raise UserError(f"the model {file.path} was replaced or changed just now.", "try again.")
    if found != file.sha256:
        record = f"{file.sha256} was recorded on the host {file.host}"
        what = f"the model {file.path} was changed: its SHA-256 is {found}, and {record}."
        raise UserError(what, REPLACED)


def sha256(path):
    """Return the SHA-256 of a file. One core reads all of it, at some 1.4 GB/s."""
    digest, buffer = hashlib.sha256(), bytearray(16 * 2**20)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()


def throughput(what, size, seconds):
    """Print how long it took to write or load `size` bytes, and return that as metrics."""
    how = "mapped " if what == "load" else ""
    print(f"{what:<8} {size / 1e6:.1f} MB {how}in {seconds:.3f} s", flush=True)
    speed = size / 1e9 / seconds
    values = {"seconds": seconds, "size_bytes": size, "gigabytes_per_second": speed}
    return {f"{what}.{name}": value for name, value in values.items()}
