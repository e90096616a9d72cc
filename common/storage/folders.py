"""Models on a shared filesystem: metadata on the tracking server, the heavy files on a path.

MLflow writes to a `file://` location itself, from the machine that the script runs on, and would
create the folder anywhere: on a node without the mount the run would look fine and the model be
gone. So the folder is checked before any work. A model appears in its folder only when all of it is
on the disk.
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

from common.errors import UserError


def prepare(target_path):
    """Create the folder if need be, check that it can be written, and return it as a `Path`.

    Raises UserError if it cannot be written, or if not even its topmost folder exists: that is how
    a machine looks on which the filesystem is not mounted.
    """
    if "%" in target_path or "://" in target_path:
        raise UserError(
            f"--target_path {target_path} is an address, or holds a %, which MLflow takes for an "
            "escape when it loads.",
            "give the path of a folder, without a %.",
        )
    folder = Path(target_path).expanduser().absolute()
    topmost = Path(*folder.parts[:2])
    if not topmost.is_dir():
        raise UserError(
            f"there is no {topmost} on this machine, so --target_path {folder} cannot be the "
            "shared filesystem.",
            "correct the path, or run where that filesystem is mounted.",
        )
    try:
        for part in _missing(folder):
            _make_folder(part)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--target_path {folder} cannot be written: {error.strerror}.",
            "choose a folder in which you may create files, on a filesystem with space left.",
        ) from error
    return folder


def check_space(folder, network):
    """Raise UserError if the filesystem has less space left than the weights of `network` take."""
    needed = sum(tensor.nbytes for tensor in network.state_dict().values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the model takes {needed / 1e9:.2f} GB, and {folder} has space for "
            f"{free / 1e9:.2f} GB.",
            "make room there, or choose another --target_path.",
        )


def check_experiment(name, folder):
    """Raise UserError if the experiment `name` exists and keeps its files elsewhere than `folder`.

    An experiment's location is fixed when it is created, and `--target_path` could only be ignored.
    """
    experiment = mlflow.get_experiment_by_name(name)
    if experiment is None:
        return
    location = experiment.artifact_location
    local = urlsplit(location).scheme in ("", "file")
    if not local or os.path.realpath(path_of(location)) != os.path.realpath(folder):
        raise UserError(
            f"the experiment {name!r} keeps its files at {location}, and not at --target_path "
            f"{folder}; that cannot be changed.",
            "give --experiment another name, or the --target_path of that experiment.",
        )


def path_of(location):
    """Return the path that a `file://` artifact location stands for."""
    return Path(url2pathname(urlsplit(location).path))


@contextlib.contextmanager
def staged(path):
    """Give a new folder to write a model into, which becomes `path` when all is on the disk.

    It lies beside `path`, where renaming moves no byte. A job that is killed leaves nothing at
    `path`. If anything fails, the new folder goes, and of those above it the ones that were made
    for it. The group may read the result, whatever the umask.
    """
    path = Path(path)
    try:
        with contextlib.ExitStack() as undo:
            for part in _missing(path.parent):
                _make_folder(part)
                undo.callback(_remove_if_empty, part)
            if path.exists():
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            staging = path.with_name(path.name + ".unfinished")
            staging.mkdir()
            undo.callback(shutil.rmtree, staging, ignore_errors=True)
            yield staging
            open_to_group(staging)
            for folder, _, files in os.walk(staging):
                for name in files:
                    _to_disk(Path(folder, name))
                _to_disk(folder)
            staging.rename(path)
            undo.callback(shutil.rmtree, path, ignore_errors=True)
            _to_disk(path.parent)
            undo.pop_all()
    except OSError as error:
        raise UserError(
            f"the model could not be written to {path}: {error.strerror or error}. "
            "Nothing of it is left there.",
            "is the filesystem full, or your quota on it?",
        ) from error


def size_of(folder):
    """Return the bytes in the files of `folder`."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def open_to_group(folder):
    """Let the group read `folder` and all in it, and others no more than before."""
    for parent, _, files in os.walk(folder):
        _add_mode(parent, stat.S_IRGRP | stat.S_IXGRP)
        for name in files:
            _add_mode(Path(parent, name), stat.S_IRGRP)


def _missing(folder):
    """Return `folder` and those above it, from the top, as far as they do not exist."""
    return [part for part in (*reversed(folder.parents), folder) if not part.exists()]


def _make_folder(folder):
    """Create a folder that is open to the group."""
    folder.mkdir(exist_ok=True)  # another process may be as far
    _add_mode(folder, stat.S_IRGRP | stat.S_IXGRP)


def _remove_if_empty(folder):
    with contextlib.suppress(OSError):  # somebody has put something there
        folder.rmdir()


def _add_mode(path, bits):
    os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) | bits)


def _to_disk(path):
    """Wait until what was written to a file, or which names a folder holds, survives a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
