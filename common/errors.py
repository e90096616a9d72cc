"""The one exception for what a user can fix, how it is printed, and checks that raise it."""

import errno
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

TRY_AGAIN = 75  # sysexits.h calls it EX_TEMPFAIL: the same command can work later
# What the scripts fail without, in ways that do not say so. Servers may be older.
NEEDED = {"mlflow": [3, 17], "torch": [2, 10]}
INSTALL = "pip install -r requirements.txt, in this Python's environment."
# What a terminal or a batch system ends a process with, or warns it by; Windows has two of them.
STOPPING = [f"SIG{name}" for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "XCPU")]
STOPPING = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
# What helps, by the reason that the system gives; PyTorch has words of its own for a full disk.
NO_SPACE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room there, or choose another folder.")
NOT_YOURS = "ask its owner for the permission (chmod g+rwX, in a group), or choose another folder."
CURES = NO_SPACE | dict.fromkeys((errno.EACCES, errno.EPERM), NOT_YOURS)
CURES |= {errno.EROFS: "choose another folder.", errno.ENAMETOOLONG: "give a shorter name."}
PYTORCH = re.compile(r"unexpected pos \d+ vs|failed writing file|ios::clear: iostream")


class UserError(Exception):
    """Something that the user, or somebody they can ask, has to change.

    As text it is the two lines that are printed on stderr. `what` happened and the `hint` are
    full sentences; `code` is the exit code: 1, or TRY_AGAIN.
    """

    def __init__(self, what, hint, code=1):
        super().__init__(what, hint, code)
        self.what, self.hint, self.code = what, hint, code

    def __str__(self):
        return f"error: {plain(self.what)}\nhint:  {plain(self.hint)}"


def plain(text, longest=2000):
    """Return `text` as one line without control characters, shortened to some `longest`."""
    text = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*)", "", text)  # colours, and worse
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= longest else f"{text[: longest - 400]} ... {text[-400:]}"


class Printed:
    """A stream without secrets and control characters, whichever package or thread prints.

    On stdout each text is one line, so that a line break in a name cannot fake another.
    """

    def __init__(self, stream, one_line=True):
        self.stream, self.one_line = stream, one_line

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def write(self, text):
        text = getattr(sys.modules.get("common.connection"), "without_secrets", str)(text)
        if self.one_line:
            shown = plain(text.removesuffix("\n"), len(text)) + "\n" * text.endswith("\n")
        else:  # a progress bar begins with \r
            bar = "\r" * text.startswith("\r")
            shown = bar + "\n".join(map(plain, text.removeprefix(bar).split("\n")))
        return self.stream.write(shown)


def print_and_exit(kind, error, trace):
    """The hook that `cli.run` sets: print what ended the script, and exit if it is a UserError."""
    if issubclass(kind, KeyboardInterrupt):  # Python exits as a shell expects of Ctrl-C
        print("error: stopped by Ctrl-C.", file=sys.stderr, flush=True)
        return
    text = "".join(traceback.format_exception(kind, error, trace))
    failure = error if isinstance(error, UserError) else of_system(error)
    if "mlflow" in sys.modules:  # else there has been no server to fail, and no secret to hide
        from common import connection

        failure, text = connection.diagnose(error) or failure, connection.without_secrets(text)
    if issubclass(kind, ModuleNotFoundError) and not str(error.name).startswith("common"):
        failure = UserError(f"a Python package is not installed: {error}.", INSTALL)
    kept = getattr(error, "kept", "")  # what `training.Checkpoint` says of the finished epochs
    if not failure:
        print(f"{text}{kept}", file=sys.stderr, flush=True)
        return
    print(f"{failure} {kept}".rstrip(), file=sys.stderr, flush=True)
    raise SystemExit(failure.code)  # Python takes the exit code from here, too


def check_packages():
    """Raise UserError if a package is missing or too old, or MLflow could not be imported."""
    level = (os.environ.get("MLFLOW_LOGGING_LEVEL") or "INFO").upper()
    switch = os.environ.get("MLFLOW_CONFIGURE_LOGGING", "1").lower()
    if type(logging.getLevelName(level)) is not int or switch not in ("0", "1", "false", "true"):
        what = "MLFLOW_LOGGING_LEVEL or MLFLOW_CONFIGURE_LOGGING has an impossible value."
        raise UserError(what, "unset MLFLOW_LOGGING_LEVEL MLFLOW_CONFIGURE_LOGGING")
    for name, needed in NEEDED.items():
        found = version(name)
        if found and [int(n) for n in re.findall(r"\d+", found)[:2]] < needed:
            what = f"{name} {needed[0]}.{needed[1]} or newer is needed, and {found} is installed."
            raise UserError(what, INSTALL)


def version(package):
    """Which version is installed; "none", or "" if the package is there by another name."""
    from importlib import metadata, util

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "" if util.find_spec(package) else "none"


def cure(error, otherwise):
    """Return what helps against an error of the system, or `otherwise`."""
    return CURES.get(getattr(error, "errno", None), otherwise)


def of_system(error):
    """Return the `UserError` if one of `CURES` is among the causes of `error`: by its text, because
    MLflow keeps no more of what fails in its threads."""
    # One of Python's own is a mistake in the code, whatever was being handled then.
    while error is not None and not isinstance(error, (AttributeError, NameError, TypeError)):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        text = str(full if PYTORCH.search(str(error)) else error)
        found = re.search(r"\[Errno (\d+)\] ([^\n]+)", text)
        if found and int(found[1]) in CURES:
            return UserError(f"{found[2][:300]}.", CURES[int(found[1])])
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def check_folder(folder, name, size=0, hint=None):
    """Raise UserError unless `size` bytes can be written to `folder`, or to where it will be made.

    The message calls it `name`; `hint` is what helps if it is not full.
    """
    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(2**16))
        if (free := shutil.disk_usage(there).free) < size:
            what = f"the model takes {size / 1e6:,.1f} MB, and {name} {folder} has space for "
            raise UserError(f"{what}{free / 1e6:,.1f} MB.", CURES[errno.ENOSPC])
    except OSError as error:
        hint = NO_SPACE.get(error.errno, hint) or cure(error, "choose a folder of your own.")
        raise UserError(f"{name} {folder} cannot be written: {error.strerror}.", hint) from error
