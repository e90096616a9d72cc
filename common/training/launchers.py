"""What a launcher says in environment variables: which process this is, and where all meet."""

import os
import pathlib
import re
from typing import NamedTuple

from common.errors import UserError

# Variables of each launcher: this process's number, how many there are, its number on this node.
# The first launcher that names both number and count is taken. SLURM_NTASKS is not among them: the
# batch script, which is one process, has it as well.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID"),  # Aurora, Polaris
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
    ("PMIX_RANK", "WORLD_SIZE", "LOCAL_RANK"),  # PMIx, which names no count
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # srun
)


class World(NamedTuple):
    """Where this process stands among those that train together."""

    rank: int = 0  # process 0 is the one that talks to MLflow
    size: int = 1
    local_rank: int = 0  # among those on this node: which GPU it takes


def find(variables):
    """Return the `World` that a launcher's environment variables describe."""
    found = [names for names in LAUNCHERS if names[0] in variables and names[1] in variables]
    # A number without a count is an error, but in Slurm's batch script.
    found += [names for names in LAUNCHERS[:-1] if names[0] in variables]
    if not found:
        return World()
    rank, size, local_rank = found[0]
    numbers = (variables[rank], variables.get(size, ""))
    here, count = (int(number) if number.isdecimal() else 0 for number in numbers)
    if here >= count:
        what = f"{rank} is {variables[rank]!r} and {size} is {variables.get(size, '')!r}"
        hint = f"unset {rank} and {size} if they are left over from a launcher."
        raise UserError(f"{what}: there is no such process.", hint)
    # With srun --mpi=pmi2, PMI_RANK comes first, and Slurm alone says who is on this node.
    local = variables.get(local_rank) or variables.get("SLURM_LOCALID") or str(here)
    return World(here, count, int(local) if local.isdecimal() else here)


def meeting_point(variables):
    """Return the (host, port) at which process 0 waits for the others."""
    job = variables.get("SLURM_JOB_ID") or variables.get("PBS_JOBID") or ""
    # Two jobs may share a node: each gets a port of its own, and so does each step of a job.
    digits = "".join(re.findall(r"\d+", job.split(".")[0] + variables.get("SLURM_STEP_ID", "")))
    port = variables.get("MASTER_PORT") or str(10000 + int(digits) % 20000 if digits else 29500)
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"MASTER_PORT is {port!r}, which is not a port number.", "unset it.")
    return variables.get("MASTER_ADDR") or _first_node(variables), int(port)


def _first_node(variables):
    """The node of process 0, which batch systems list first; without one, this machine."""
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "PBS_NODEFILE")
    if not (name := next(filter(variables.get, names), None)):
        return "127.0.0.1"
    nodes = variables[name]
    if name == "PBS_NODEFILE":  # a name per line
        is_file = os.path.isfile(nodes)
        nodes = pathlib.Path(nodes).read_text(errors="replace") if is_file else ""
    # Slurm: "nid[0012-0015,0020]", "node1,node2", "r[1-2]n3".
    host = re.match(r"([^,\[\s]|\[\w[^\]]*\])*", nodes)[0]
    if not host:
        what = f"{name} is {variables[name]!r}, which names no node."
        raise UserError(what, "export MASTER_ADDR=<the node of process 0>.")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", host)
