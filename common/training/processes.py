"""Several processes, one training: how they find each other, and what follows if one is lost."""

import contextlib
import os
import signal
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from common.errors import TRY_AGAIN, UserError

from .launchers import find, meeting_point

# How long a process waits for another: MLflow asks a server that is away for some four minutes.
PATIENCE = timedelta(minutes=10)
# For how many seconds the others go on after a signal: a launcher that saw one of them end first
# would stop process 0 while it ends the run.
GRACE = 20
# Gloo raises RuntimeError, and only its text tells why.
GLOO, GONE = "gloo", ("losed by peer", "reset by peer")


def join():
    """Return this process's `World`; with more than one process, connect it to the others.

    Whatever ends one of them then ends all within `PATIENCE`. Call `leave` after the last epoch.
    """
    world = find(os.environ)
    if world.size == 1:
        return world
    host, port = meeting_point(os.environ)
    backend = "cpu:gloo"
    for kind, library in (("cuda", "nccl"), ("xpu", "xccl")):
        if torch.get_device_module(kind).is_available():
            backend += f",{kind}:{library}"
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    if world.rank == 0:
        print(f"meet     {world.size} processes at {host} port {port}", flush=True)
    hook = sys.excepthook  # torch's own, which the next call sets, swallows short messages
    # While torch waits, Python's own handler would not run: Ctrl-C ends the process at once.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        dist.init_process_group(backend, timeout=PATIENCE, rank=world.rank, world_size=world.size)
    except dist.DistError as error:
        reason = " ".join(str(error).split())[:200]
        what = f"the {world.size} processes do not meet at {host} port {port}: {reason}"
        hint = "export MASTER_ADDR=<the node of process 0>, MASTER_PORT=<a free port there>."
        raise UserError(what, hint) from error
    sys.excepthook = hook
    # The others ask process 0 for addresses to the last: it must not end before all have met.
    _wait_for_all(world, times=1)
    signal.signal(signal.SIGTERM, _end_soon)
    signal.signal(signal.SIGINT, _end_soon if world.rank else interrupt)  # process 0 reports it
    return world


def another_ended():
    """Return whether another process has ended; called by process 0 when it is told to stop.

    The signal is that of the end of a job's time, after which all live on for `GRACE` seconds, and
    that by which a launcher stops the others when one has died.
    """
    others = range(1, dist.get_world_size() if dist.is_initialized() else 1)
    messages = [dist.irecv(torch.zeros(1), src=rank, tag=1) for rank in others]  # never sent
    time.sleep(0.2 if messages else 0)
    for message in messages:
        try:
            message.wait(timedelta(milliseconds=1))
        except RuntimeError as error:
            if any(text in str(error) for text in GONE):
                return True
    return False


def _end_soon(number, frame):
    ends = threading.Timer(GRACE, os._exit, (128 + number,))
    ends.daemon = True
    ends.start()


def follow(epochs):
    """Train in a process other than 0: go through `training.epochs`, and say nothing."""
    for _ in epochs:
        pass
    leave()


def leave():
    """Part from the other processes, which may have ended already: each now works for itself."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def in_turn(world):
    """Let process 0 through the block first, then one process per node: data is downloaded once."""
    turn = 0 if world.rank == 0 else 1 if world.local_rank == 0 else 2
    _wait_for_all(world, times=turn)
    yield
    _wait_for_all(world, times=2 - turn)


@contextlib.contextmanager
def loss_explained():
    """Raise UserError if another process is lost: the same command can succeed later.

    Processes other than 0 exit silently, with 1: srun reports the largest exit code of all, and 75
    of theirs would hide that process 0 ended for a reason that somebody has to correct.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or GLOO in str(error)
        if not (lost and dist.is_initialized()):
            raise
        if dist.get_rank():
            raise SystemExit(1) from error
        reason = str(error).rpartition("] ")[2].partition(". ")[0]
        what = f"another of the {dist.get_world_size()} processes has ended or hangs: {reason}"
        hint = "what it printed says why; then start all of them again."
        raise UserError(what, hint, TRY_AGAIN) from error


def _wait_for_all(world, times):
    with loss_explained():
        for _ in range(times if world.size > 1 else 0):
            dist.all_reduce(torch.zeros(1))  # a CPU tensor, so that NCCL needs no device for it
