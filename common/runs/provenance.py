"""Where a run comes from: the git commit, the user, the batch job.

MLflow records its own `mlflow.source.git.commit`, but not whether the working tree had changes on
top of that commit, and nothing about a batch job. Copy `git_tags` if you only want that.
"""

import getpass
import os
import socket
import subprocess
from pathlib import Path

# What each scheduler tells its jobs: (scheduler, variable of the job's id, variable of its name).
SCHEDULERS = (
    ("slurm", "SLURM_JOB_ID", "SLURM_JOB_NAME"),
    ("pbs", "PBS_JOBID", "PBS_JOBNAME"),
    ("lsf", "LSB_JOBID", "LSB_JOBNAME"),
)


def user():
    """Return the user's login name, or "unknown" in a container without one for the user id."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # KeyError up to Python 3.12, OSError from 3.13
        return "unknown"


def git_tags(script):
    """Return the tags git.commit, git.branch and git.dirty of the checkout that `script` lies in.

    Outside a checkout, without git, or in a checkout that git does not trust (one that belongs to
    another user), the result is empty: that is no reason to stop. `git.dirty` is "true" if a
    tracked file differs from the commit; files that git does not track do not count.
    """
    folder = Path(script).resolve().parent

    def git(*arguments):
        # The time limit is for shared filesystems, where looking through a checkout can be slow.
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {
            "git.commit": git("rev-parse", "HEAD"),
            "git.branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "git.dirty": str(bool(git("status", "--porcelain", "--untracked-files=no"))).lower(),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def job_tags():
    """Return the tags host and, inside a batch job, job.scheduler, job.id and job.name."""
    tags = {"host": socket.gethostname()}
    for scheduler, id_variable, name_variable in SCHEDULERS:
        if job_id := os.environ.get(id_variable):
            tags |= {"job.scheduler": scheduler, "job.id": job_id}
            if job_name := os.environ.get(name_variable):
                tags["job.name"] = job_name
            break
    return tags
