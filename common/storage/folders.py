"""Models on a shared filesystem: metadata on the tracking server, the heavy files on a path.

MLflow writes to a `file://` location from the machine that the script runs on, and would create the
folder anywhere: on a node without the mount the run would look fine and the model be gone.
"""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mlflow
from mlflow.exceptions import MlflowException

from common.errors import UserError

UNFINISHED = ".unfinished"  # after the name of a folder that is being written
# MLflow's words where workspaces are on. If they change, its refusal is shown as it comes.
REFUSED = "artifact_location cannot be specified"


def prepare(target_path):
    """Create the folder if need be, check that it can be written, and return it as a `Path`."""
    if "%" in target_path or "://" in target_path:  # MLflow takes a % for an escape when it loads
        what = f"--target_path {target_path} is an address, or holds a %."
        raise UserError(what, "give the path of a folder, without a %.")
    folder = Path(target_path).expanduser().absolute()
    topmost = Path(*folder.parts[:2])
    if not topmost.is_dir():  # so it looks where the filesystem is not mounted
        what = f"there is no {topmost} on this machine: {folder} cannot be the shared filesystem."
        raise UserError(what, "correct --target_path, or run where that filesystem is mounted.")
    try:
        list(_make_missing(folder))
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        what = f"--target_path {folder} cannot be written: {error.strerror}."
        raise UserError(what, "choose a folder where you may write, with space left.") from error


def check_space(folder, network):
    """Raise UserError if the filesystem has less space left than the weights of `network` take."""
    needed = sum(tensor.nbytes for tensor in network.state_dict().values()) / 1e9
    free = shutil.disk_usage(folder).free / 1e9
    if free < needed:
        what = f"the model takes {needed:.2f} GB, and {folder} has space for {free:.2f} GB."
        raise UserError(what, "make room there, or choose another --target_path.")


def place_experiment(name, folder, create):
    """Have the experiment `name` keep its files in `folder`; `create(name, location)` makes it.

    Returns None, or `folder` if the server, one with workspaces, keeps the files elsewhere and
    allows no location. Raises UserError if the experiment has another: that cannot change.
    """
    home, known, refused = _real(folder.as_uri()), mlflow.get_experiment_by_name(name), False
    if not known or _real(known.artifact_location) != home:
        try:
            create(name, folder.as_uri())  # if it is there: would a location be allowed?
        except MlflowException as error:
            refused = REFUSED in str(error)
            if not (known or refused):
                raise
        if refused and not known:
            create(name)
        known = mlflow.get_experiment_by_name(name)
    location = known.artifact_location
    place = _real(location)
    if place != home and not refused:
        what = f"the experiment {name!r} keeps its files at {location}, and not at {folder}."
        raise UserError(what, "give --experiment another name, or its --target_path.")
    if home not in (place, *place.parents):
        return folder
    list(_make_missing(place))  # MLflow would make it without the group's bits


def _real(location):
    """Return a `file://` location as a path without symbolic links, and others as they are."""
    local = urlsplit(location).scheme in ("", "file")
    return Path(os.path.realpath(path_of(location)) if local else location)


def path_of(location):
    """Return the path that a `file://` artifact location stands for."""
    return Path(url2pathname(urlsplit(location).path))


@contextlib.contextmanager
def staged(path):
    """Give a new folder to write a model into, which becomes `path` when all is on the disk.

    It lies beside `path`, where renaming moves no byte. If anything fails, the new folder goes, and
    of those above it the ones that were made for it. The group may read the result.
    """
    path = Path(path)
    try:
        with contextlib.ExitStack() as undo:
            for part in _make_missing(path.parent):
                undo.callback(_remove_if_empty, part)
            if path.exists():
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            staging = path.with_name(path.name + UNFINISHED)
            staging.mkdir()
            undo.callback(shutil.rmtree, staging, ignore_errors=True)
            yield staging
            open_to_group(staging)
            for part in (*staging.rglob("*"), staging):
                _to_disk(part)
            staging.rename(path)
            undo.callback(shutil.rmtree, path, ignore_errors=True)
            _to_disk(path.parent)
            undo.pop_all()
    except OSError as error:
        what = f"the model could not be written to {path}: {error.strerror or error}."
        raise UserError(what, "nothing of it is left. Is the disk full, or your quota?") from error


def remove_unfinished(folder, location):
    """Remove what is left of a model that was to be at `location`, if that is below `folder`."""
    for path in (path_of(location), path_of(f"{location}{UNFINISHED}")):
        if folder in Path(os.path.abspath(path)).parents:  # the location comes from the server
            shutil.rmtree(path, ignore_errors=True)


def open_to_group(folder):
    """Let the group read `folder` and all in it, and others no more than before."""
    for path in (folder, *folder.rglob("*")):
        _open(path)


def _make_missing(folder):
    """Make `folder` and those above it; yield each of them that did not exist, from the top."""
    for part in (*reversed(folder.parents), folder):
        if not part.exists():
            part.mkdir(exist_ok=True)  # another process may be as far
            _open(part)
            yield part


def _open(path):
    bits = stat.S_IRGRP | (stat.S_IXGRP if path.is_dir() else 0)
    path.chmod(stat.S_IMODE(path.stat().st_mode) | bits)


def _remove_if_empty(folder):
    with contextlib.suppress(OSError):  # somebody has put something there
        folder.rmdir()


def _to_disk(path):
    """Wait until what was written to a file, or which names a folder holds, survives a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
