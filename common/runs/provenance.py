"""Where a run comes from: the user, the batch job, the git commit and the changes on top of it."""

import getpass
import os
import re
import socket
import subprocess
import sys

# The variables in which each scheduler tells its jobs their id and their name.
SCHEDULERS = {
    "slurm": ("SLURM_JOB_ID", "SLURM_JOB_NAME"),
    "pbs": ("PBS_JOBID", "PBS_JOBNAME"),
    "lsf": ("LSB_JOBID", "LSB_JOBNAME"),
}


def user():
    """Return the user's login name, or "unknown" in a container without one for the user id."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # KeyError up to Python 3.12, OSError from 3.13
        return "unknown"


def git_tags(script):
    """Return the tags git.commit, git.branch and git.dirty of the checkout that `script` lies in.

    The result is empty without git, and if no commit has the script. `git.dirty` is "true" if that
    or another tracked file differs from the commit.
    """
    script = os.path.realpath(script)
    # In a hook of git's, say, GIT_DIR names another repository.
    variables = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    how = {"env": variables | {"LC_ALL": "C"}, "capture_output": True, "check": True}
    # The time limit is for shared filesystems, where looking through a checkout can be slow.
    how |= {"encoding": "utf-8", "errors": "replace", "timeout": 10}

    def git(*arguments):
        command = ["git", "--no-optional-locks", "-C", os.path.dirname(script), *arguments]
        return subprocess.run(command, **how).stdout.strip()

    try:
        committed = git("rev-parse", f"HEAD:./{os.path.basename(script)}")  # fails if it is in none
        same = committed == git("hash-object", script)  # git can be told not to look at a file
        same = same and not git("status", "--porcelain", "--untracked-files=no")
        return {
            "git.commit": git("rev-parse", "HEAD"),
            "git.branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "git.dirty": str(not same).lower(),
        }
    except (OSError, subprocess.SubprocessError) as error:
        if found := re.search("git config .*safe.directory .*", getattr(error, "stderr", "") or ""):
            print(f"warning: git.commit is unknown until you type: {found[0]}", file=sys.stderr)
        return {}


def job_tags(earlier=None):
    """Return the tags host, jobs and, inside a batch job, job.scheduler, job.id and job.name.

    If this job goes on with the run `earlier`, `jobs` names both, and `continuations` counts.
    """
    tags = {"host": socket.gethostname()}
    job = tags["host"]
    for scheduler, variables in SCHEDULERS.items():
        job_id, job_name = (os.environ.get(name, "") for name in variables)
        job_name = job_name.encode(errors="replace").decode()  # in another encoding: with ?
        if job_id and "job.id" not in tags:
            tags |= {"job.scheduler": scheduler, "job.id": job_id}
            tags |= {"job.name": job_name} if job_name else {}
            job = f"{scheduler} {job_id}"
    if earlier:
        before = earlier.data.tags
        count, jobs = before.get("continuations", "0"), before.get("jobs", "unknown")
        tags["continuations"] = str(int(count) + 1) if count.isdecimal() else "1"
        # A job that starts again keeps its name; a tag has space for 8000 characters.
        job = jobs if job in jobs.split(", ") else f"{jobs}, {job}"[-5000:]
    return tags | {"jobs": job}
