"""A training that goes on in the next job: one file, replaced at the end of each epoch."""

import contextlib
import os
import pickle
import shlex
import shutil
import stat
import tempfile
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from common.errors import UserError, cure

from .processes import loss_explained

FILE = "training.pt"
# What torch.load and unpacking raise for a file that is cut short, overwritten or something else.
DAMAGED = (AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError)
DAMAGED += (pickle.UnpicklingError,)
MAY_DIFFER = ("checkpoint", "data_dir", "ca_bundle", "lr")  # lr is compared as learning_rate


class Checkpoint:
    """A training after its last full epoch: in a folder, or in memory without one.

    `launch` names the training, `epochs` holds the results of its finished epochs, `result` what
    its script printed at the end, or None. Within `with`, an error loses no finished epoch.
    """

    def __init__(self, folder, settings, network, optimizer):
        """Go on from what `folder` holds; of several processes, all from what process 0 reads.

        `settings` is a dict of texts and numbers. Raises UserError if the folder cannot be used, is
        in use, or holds a training with other settings; nothing in it is changed then.
        """
        self.settings, self.network, self.optimizer = settings, network, optimizer
        self.launch, self.epochs, self.result = uuid.uuid4().hex, [], None
        self.between_epochs, self.saved = True, 0  # epochs that the file holds
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.folder = Path(folder).absolute() if folder and not self.rank else None
        state = [self._open() if self.folder else None]
        if folder and dist.is_initialized():
            with loss_explained():
                dist.broadcast_object_list(state, device=torch.device("cpu"))
        if state[0]:
            self.launch, self.epochs, self.result, weights = state[0]
            self.saved = len(self.epochs)
            if self.folder:
                print(f"resume   {self.folder}  after epoch {self.saved}", flush=True)
            try:
                if weights:
                    network.load_state_dict(weights[0])
                    optimizer.load_state_dict(weights[1])
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                what = f"{folder} holds another network: {str(error).split(chr(10))[0]}"
                raise UserError(what, "give another --checkpoint.") from error
        elif self.folder:
            self._save()

    def add(self, epoch):
        """Keep the results of a finished epoch, before they are logged anywhere."""
        self.epochs.append(list(epoch))
        if self.folder:
            self._save()
        self.between_epochs = True

    def finish(self, result):
        """Keep what the script prints at its end; the weights are in the model by now."""
        self.result = result
        if self.folder:
            self._save()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """After an error, have its hint say how to go on; without a folder, make one first."""
        if kind is None or not issubclass(kind, Exception) or self.rank:
            return
        option = ""
        if not self.folder and self.epochs and self.between_epochs:
            for place in (os.getcwd, tempfile.gettempdir):  # one may be full, or gone
                with contextlib.suppress(OSError, UserError):  # the first error is the one to tell
                    self.folder = Path(place(), f"checkpoint-{self.launch[:8]}")
                    self._open()
                    self._save()
                    break
                shutil.rmtree(self.folder or "", ignore_errors=True)
            option = f" with --checkpoint {shlex.quote(str(self.folder))}"
        if self.saved:
            error.kept = f"The same command{option} goes on after epoch {self.saved}."

    def _open(self):
        """Return what `_save` wrote, None in a new folder; keep other jobs out until the end."""
        folder, file = self.folder, self.folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.name != "nt":
                _keep_out_others(folder)
            self.lock = _locked(folder)
            if not file.exists():
                return None
            content = torch.load(file, map_location="cpu", weights_only=True)
            settings, launch, epochs, result, weights = content
            state = launch, list(epochs), result, weights
            differing = [
                f"{name} was {settings.get(name)!r} and is {value!r}"
                for name, value in self.settings.items()
                if value != settings.get(name) and name not in MAY_DIFFER
            ]
        except OSError as error:
            what = f"--checkpoint {folder} cannot be used: {error.strerror}."
            raise UserError(what, cure(error, "give a folder where you may write.")) from error
        except DAMAGED as error:
            what = f"{file} is damaged, or not a checkpoint."
            raise UserError(what, "give another --checkpoint, to train from the start.") from error
        if differing:
            what = f"{file} belongs to another training: {'; '.join(differing)}."
            hint = "give the same flags as then, or another --checkpoint. On mixed nodes, "
            raise UserError(what, f"{hint}set --precision and --device: auto differs there.")
        return state

    def _save(self):
        """Write the file beside the old one, and rename it when it is on the disk."""
        weights = None
        if self.epochs and not self.result:
            weights = self.network.state_dict(), self.optimizer.state_dict()
        state = (self.settings, self.launch, self.epochs, self.result, weights)
        new = self.folder / f"{FILE}.new"
        try:
            torch.save(state, new)  # in C++: a signal waits until the file is written
            with open(new, "rb+") as file:
                os.fsync(file.fileno())
            new.replace(self.folder / FILE)
            self.saved = len(self.epochs)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch, if the disk is full
            new.unlink(missing_ok=True)
            what = f"no checkpoint can be written to {self.folder}: {error}".split("\n")[0]
            raise UserError(what, cure(error, "is the disk full, or your quota?")) from error


def _keep_out_others(folder):
    """Let nobody else write in the folder; raise UserError if somebody else's files are there."""
    hint, here = "give another --checkpoint.", folder.stat()
    if here.st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user.", hint)
    for path in folder.iterdir():
        state = path.lstat()
        if path.name not in ("lock", FILE, f"{FILE}.new"):
            if here.st_mode & 0o022:  # then it is not for this alone
                what = f"others may write in {folder}, which holds {path.name} as well."
                raise UserError(what, f"chmod go-w {shlex.quote(str(folder))}, or {hint}")
        elif not stat.S_ISREG(state.st_mode) or (state.st_uid, state.st_nlink) != (os.getuid(), 1):
            raise UserError(f"{path} is no file of your own.", hint)
    if here.st_mode & 0o022:
        folder.chmod(stat.S_IMODE(here.st_mode) & ~0o022)


def _locked(folder):
    """Return the file that is locked, or raise UserError if another job has locked it."""
    file = open(folder / "lock", "a")  # noqa: SIM115 (until this process ends, however it does)
    with contextlib.suppress(ImportError):  # Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = f"another job is already using {folder}."
            raise UserError(what, "wait for its end, or give another --checkpoint.") from error
        except OSError:  # a filesystem without locks
            pass
    return file
