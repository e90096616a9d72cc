"""Several processes, one training: how they find each other, and what follows if one is lost."""

import contextlib
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from common.errors import STOPPING, UserError

from .launchers import find, meeting_point

PATIENCE = timedelta(minutes=10)  # MLflow asks a server that is away for some four minutes


def join():
    """Return this process's `World`; if there are others, connect it to them, until `leave`."""
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
    for number in STOPPING if world.rank else [signal.SIGTERM]:
        if signal.getsignal(number) == signal.SIG_DFL:  # and not ignored, as by `nohup`
            signal.signal(number, _end_soon)
    signal.signal(signal.SIGINT, _end_soon if world.rank else interrupt)  # process 0 reports it
    return world


def _end_soon(number, frame):
    # Not now: a launcher that saw this process end would stop process 0 while it ends the run.
    signal.alarm(20)


def follow(epochs):
    """Train in a process other than 0: go through `training.epochs`, say nothing, and exit."""
    for _ in epochs:
        pass
    leave()
    end(0)


def end(code):
    """End a process other than 0; Python's own exit now and then aborts amid PyTorch's threads."""
    sys.stdout.flush()
    os._exit(code)


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
    """Raise UserError if another process is lost; other processes than 0 end without a word."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not (lost and dist.is_initialized()):
            raise
        if dist.get_rank():
            end(1)
        reason = str(error).rpartition("] ")[2].partition(". ")[0]
        what = f"another of the {dist.get_world_size()} processes has ended or hangs: {reason}"
        raise UserError(what, "what it printed says why; then start all of them again.") from error


def _wait_for_all(world, times):
    with loss_explained():
        for _ in range(times if world.size > 1 else 0):
            dist.all_reduce(torch.zeros(1))  # a CPU tensor, so that NCCL needs no device for it
