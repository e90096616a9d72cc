"""Several processes, one training: which of them this is, and how they find each other.

`torchrun`, `srun` and `mpiexec` start the same script many times and say so in variables. If you
only want that for your own script, copy this file and call `join` first thing.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

# How long a process waits for another, at the start and at each step. MLflow tries again for some
# four minutes while a server is away, and the others wait for the process that does so.
PATIENCE = timedelta(minutes=10)
# For how many seconds the others go on after a signal, while process 0 ends the run. A launcher
# that saw one of them end first would stop process 0 in the middle of that.
GRACE = 20

# Variables of each launcher: this process's number, how many there are, its number on this node,
# how many there are on this node. The first launcher that names both number and count is taken.
# SLURM_NTASKS is not among them: the batch script, which is one process, has it as well.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun
    (
        *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
        *("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    ("PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),  # Aurora, Polaris
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),  # srun
    ("PMIX_RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
)


class World(NamedTuple):
    """Where this process stands among those that train together."""

    rank: int = 0  # process 0 is the one that talks to MLflow
    size: int = 1
    local_rank: int = 0  # among those on this node: which GPU it takes
    local_size: int = 1


def find(variables):
    """Return the `World` that a launcher's environment variables describe."""

    def number(name, default):
        match = re.match(r"\d+", variables.get(name, ""))  # "4(x2)": Slurm, for 2 nodes of 4
        return int(match[0]) if match else default

    by_slurm = [variables.get(name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")]
    for rank, size, local_rank, local_size in LAUNCHERS:
        if rank not in variables or size not in variables:
            continue
        if rank == "PMI_RANK" and [variables[rank], variables[size]] == by_slurm:
            continue  # srun --mpi=pmi2: Slurm's own variables also say who is on this node
        here, count = number(rank, 0), number(size, 0)
        if here >= count:
            raise SystemExit(
                f"error: {rank} is {variables[rank]!r} and {size} is {variables[size]!r}: there is "
                "no such process.\n"
                f"hint:  unset {rank} and {size}, if they are left over from a launcher."
            )
        return World(here, count, number(local_rank, here), number(local_size, 1))
    for rank in ("RANK", "PMI_RANK", "PMIX_RANK"):
        if rank in variables:
            raise SystemExit(
                f"error: {rank} is set, and no variable says how many processes there are.\n"
                f"hint:  unset {rank}, or export WORLD_SIZE as well."
            )
    return World()


def meeting_point(variables):
    """Return the (host, port) at which process 0 waits for the others."""
    job = variables.get("SLURM_JOB_ID") or variables.get("PBS_JOBID") or ""
    # Two jobs may share a node: each gets a port of its own, and so does each step of a job.
    digits = "".join(re.findall(r"\d+", job.split(".")[0] + variables.get("SLURM_STEP_ID", "")))
    port = variables.get("MASTER_PORT") or str(10000 + int(digits) % 20000 if digits else 29500)
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise SystemExit(
            f"error: MASTER_PORT is {port!r}, which is no port.\nhint:  unset it, or give 29500."
        )
    host = variables.get("MASTER_ADDR")
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST")
    if not host and nodes:  # "nid[0012-0015,0020]", "node1,node2", "r[1-2]n3"
        host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)[0])
    if not host and (file := variables.get("PBS_NODEFILE")):
        with open(file) as lines:
            host = lines.readline().strip()
    return host or "127.0.0.1", int(port)


def join():
    """Return this process's `World`; with more than one process, connect it to the others.

    Whatever ends one of them then ends all of them within `PATIENCE`, mostly at once: process 0
    says so in two lines, and the others leave silently. Call `leave` when the last one is through.
    """
    world = find(os.environ)
    if world.size == 1:
        return world
    host, port = meeting_point(os.environ)
    # Processes that are not bound to cores would all use all of them, and slow each other down.
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() == os.cpu_count():
        torch.set_num_threads(max(1, os.cpu_count() // world.local_size))
    backend = "cpu:gloo"
    for kind, library in (("cuda", "nccl"), ("xpu", "xccl")):
        if torch.get_device_module(kind).is_available():
            backend += f",{kind}:{library}"
    hook = sys.excepthook  # torch's own, which the next call sets, swallows short messages
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    if world.rank == 0:
        print(f"meet     {world.size} processes at {host} port {port}", flush=True)
    # While torch waits, Python's own handler would not run: Ctrl-C ends the process at once.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        dist.init_process_group(backend, timeout=PATIENCE, rank=world.rank, world_size=world.size)
    except dist.DistError as error:
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(
            f"error: the {world.size} processes do not meet at {host} port {port}: {reason}\n"
            "hint:  export MASTER_ADDR=<the node of process 0>, MASTER_PORT=<a free port there>."
        ) from error
    sys.excepthook = _explain_loss(world, hook)
    # The others ask process 0 for addresses to the last: it must not end before all are through.
    _wait_for_all(world, times=1)
    signal.signal(signal.SIGTERM, _end_soon)
    # Process 0 says what there is to say.
    signal.signal(signal.SIGINT, _end_soon if world.rank else interrupt)
    return world


def another_ended():
    """Return whether another process has ended; called by process 0 when it is told to stop.

    A launcher stops all processes when one dies, with the same signal as at the end of a job's
    time. All live on for some seconds after it (`_end_soon`), unless they were dead before.
    """
    if not dist.is_initialized():
        return False
    world = range(1, dist.get_world_size())
    messages = [dist.irecv(torch.zeros(1), src=rank, tag=1) for rank in world]  # never sent
    time.sleep(0.2)
    for message in messages:
        try:
            message.wait(timedelta(milliseconds=1))
        except RuntimeError as error:
            if "losed by peer" in str(error) or "reset by peer" in str(error):
                return True
    return False


def _end_soon(number, frame):
    timer = threading.Timer(GRACE, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()


def follow(epochs):
    """Train along, in a process other than 0: go through `training.epochs`, and say nothing."""
    for _ in epochs:
        pass
    leave()


def leave():
    """Part from the other processes, which may have ended already. Does nothing if there are none.

    From here on each works for itself.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def in_turn(world):
    """Let process 0 through the block first, then the first one of each node, then the others.

    So data is downloaded once, or once a node where the nodes do not share the folder.
    """
    turn = 0 if world.rank == 0 else 1 if world.local_rank == 0 else 2
    _wait_for_all(world, times=turn)
    yield
    _wait_for_all(world, times=2 - turn)


def _wait_for_all(world, times):
    for _ in range(times if world.size > 1 else 0):
        dist.all_reduce(torch.zeros(1))  # a CPU tensor, so that NCCL needs no device for it


def _explain_loss(world, otherwise):
    """An excepthook that says in two lines that another process has ended."""

    def explain(kind, error, trace):
        # Gloo has no error class of its own.
        if not isinstance(error, dist.DistError) and not (
            isinstance(error, RuntimeError) and "gloo" in str(error)
        ):
            return otherwise(kind, error, trace)
        if world.rank == 0:
            reason = str(error).rpartition("] ")[2].partition(". ")[0]
            print(
                f"error: another of the {world.size} processes has ended or hangs: {reason}\n"
                "hint:  what it printed says why; then start all of them again.",
                file=sys.stderr,
                flush=True,
            )
        raise SystemExit(1)

    return explain
