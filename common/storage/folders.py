"""Models on a shared filesystem: metadata on the tracking server, the heavy files on a path.

MLflow writes to a `file://` location from the machine that the script runs on, and would create the
folder anywhere: on a node without the mount the run would look fine and the model be gone.
"""

import contextlib
import errno
import functools
import os
import shutil
import stat
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mlflow
from mlflow.exceptions import MlflowException

from common.errors import UserError, check_folder, cure

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
    for part in (folder, folder / "models"):  # that one a colleague may have made
        check_folder(part, "--target_path")
    list(_make_missing(folder))
    for part in filter(Path.is_dir, (folder, folder / "models")):
        state = part.stat()
        if state.st_mode & 0o022 and not state.st_mode & stat.S_ISVTX:
            try:
                part.chmod(stat.S_IMODE(state.st_mode) | stat.S_ISVTX)
            except OSError:
                what = f"warning: others may rename what you write in {part}; its owner should"
                print(f"{what} chmod +t it.", file=sys.stderr, flush=True)
    return folder


def check_space(folder, network):
    """Raise UserError if the filesystem has less space left than the weights of `network` take."""
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    check_folder(folder, "--target_path", size)


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


@functools.cache
def claim(location):
    """Make the folder above `location` private to this user, until `open_to_group`.

    Returns a path to it, or None if `location` is on a server. Others know its name as soon as
    there is the run, and could plant links there: UserError unless it is new, or this user's own.
    """
    if urlsplit(location).scheme not in ("", "file"):
        return None
    folder = path_of(location).parent
    try:
        list(_make_missing(folder.parent))
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        state = os.fstat(descriptor)
        if state.st_uid != os.geteuid() or state.st_mode & 0o022:
            raise PermissionError(errno.EPERM, "somebody else made it, or may write there")
        os.fchmod(descriptor, 0o700 | state.st_mode & stat.S_ISGID)  # of the folder above
    except OSError as error:
        what = f"the folder {folder} cannot be used: {error.strerror}."
        hint = "ls -ld says whose it is; `chmod +t` on the folder above it keeps others from this."
        raise UserError(what, hint) from error
    held = Path(f"/proc/self/fd/{descriptor}")  # this very folder, whatever its name comes to mean
    return held if held.exists() else folder  # macOS has no such path


@contextlib.contextmanager
def staged(path, own=False):
    """Give a new folder to write a model into, which becomes `path` when all is on the disk.

    It lies beside `path`, where renaming moves no byte. If anything fails, the new folder goes, and
    of those above it the ones that were made for it. The group may read the result. With `own`, the
    folder that both lie in is claimed.
    """
    path = Path(path)
    final = claim(path.as_uri()) / path.name if own else path
    try:
        with contextlib.ExitStack() as undo:
            for part in (path.parent,) if own else _make_missing(path.parent):
                undo.callback(_remove_if_empty, part)
            if final.exists():
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            staging = final.with_name(path.name + UNFINISHED)
            staging.mkdir(0o700)
            undo.callback(shutil.rmtree, staging, ignore_errors=True)
            yield staging
            open_to_group(staging)
            staging.rename(final)
            undo.callback(shutil.rmtree, final, ignore_errors=True)
            parent = os.open(final.parent, os.O_RDONLY)
            os.fsync(parent)  # its new name, too
            os.close(parent)
            undo.pop_all()
        open_to_group(final.parent if own else None)
    except OSError as error:
        what = f"the model could not be written to {path}: {error.strerror or error}."
        hint = cure(error, "nothing of it is left; the reason above says what is in the way.")
        raise UserError(what, hint) from error


def remove_unfinished(folder, location):
    """Remove what is left of a model that was to be at `location`, if that is below `folder`."""
    path = Path(os.path.abspath(path_of(location)))
    if folder in path.parents and path.parent.exists():  # the location comes from the server
        for name in (path.name, path.name + UNFINISHED):
            shutil.rmtree(claim(location) / name, ignore_errors=True)


def open_to_group(own):
    """Let the group read all in a folder, and only the owner write there; put it on the disk."""
    for _, _, files, folder in os.fwalk(f"{own}/.", topdown=False) if own else ():
        for name in (*files, "."):
            try:
                one = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            except FileNotFoundError:  # NFS keeps a file that is deleted and open for a moment
                continue
            mode = os.fstat(one).st_mode
            bits = 0o050 if stat.S_ISDIR(mode) else 0o040
            os.fchmod(one, (stat.S_IMODE(mode) | bits) & ~0o022)
            os.fsync(one)
            os.close(one)


def _make_missing(folder):
    """Make `folder` and those above it; yield each of them that did not exist, from the top."""
    for part in (*reversed(folder.parents), folder):
        if not part.exists():
            above = part.parent.stat().st_mode & stat.S_IWGRP  # where the group may write
            umask = os.umask(0)  # all bits at once: a chmod afterwards could follow a link
            mode = 0o777 & ~umask | 0o050 | above
            try:
                # Where others may write, they may not rename or remove what is not theirs.
                part.mkdir(mode | (stat.S_ISVTX if mode & 0o022 else 0), exist_ok=True)
            finally:
                os.umask(umask)
            yield part


def _remove_if_empty(folder):
    with contextlib.suppress(OSError):  # somebody has put something there
        folder.rmdir()
