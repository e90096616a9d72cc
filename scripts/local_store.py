"""The local store that publish.py reads: a copy of its file, its lock, and the runs to publish."""

import contextlib
import functools
import os
import re
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
from mlflow.exceptions import MlflowException

from common import connection, storage
from common.errors import UserError

PARENT_TAG = "mlflow.parentRunId"  # how MLflow links a child run to its parent


class LocalStore:
    """A store in an SQLite file. It is only read: MLflow opens a copy, made in `folder`."""

    def __init__(self, uri, folder):
        if not uri.startswith("sqlite:///"):
            what = f"--source {connection.printable(uri)} is no local store."
            raise UserError(what, "give the file that was logged to: sqlite:///PATH/mlflow.db")
        self.path, self.copy = path_in(uri), Path(folder, "copy.db")
        self.client, self.experiments, self.left_out = None, {}, 0

    def check_destination(self, uri):
        """Raise UserError if `uri`, where the runs are to go, is this store."""
        if uri.startswith("sqlite") and path_in(uri).resolve() == self.path.resolve():
            raise self.same()

    def check_server(self, server, runs):
        """Raise UserError if `server` knows the `runs`: it is the server of this very file."""
        try:
            known = runs and server.get_run(runs[0].info.run_id)
        except MlflowException as error:
            # With users, a server forbids to see what is somebody else's, or nowhere.
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"):
                raise
            known = None
        if known:
            raise self.same()

    def same(self):
        what = f"the runs of {self.path} would be published in the store that they are in."
        return UserError(what, "name the server: --tracking_uri, or export MLFLOW_TRACKING_URI")

    def read(self):
        """Set `client` and `experiments` to what is stored now. UserError if nothing can be read.

        SQLite copies a consistent state, also while a training writes to the file.
        """
        uri, address = f"{self.path.as_uri()}?mode=rw", f"sqlite:///{self.copy}"
        hint = "is it the right --source? If it is of an older MLflow: mlflow db upgrade URI"
        try:
            with (
                contextlib.closing(sqlite3.connect(uri, timeout=60, uri=True)) as store,
                contextlib.closing(sqlite3.connect(self.copy)) as copy,
            ):
                tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master")}
                if not {"experiments", "runs"} <= tables:
                    raise UserError(f"{self.path} is no store of MLflow's.", hint)
                store.backup(copy)
            self.client = mlflow.MlflowClient(address, address)
            found = all_pages(self.client.search_experiments)
        except (sqlite3.Error, ImportError, MlflowException) as error:
            text = " ".join(str(error).split())[:300]
            if re.search("full|disk I/O", text):
                hint = f"is there room in TMPDIR? It was being copied to {self.copy.parent}."
            raise UserError(f"the source {self.path} cannot be read: {text}.", hint) from error
        self.experiments = {experiment.experiment_id: experiment for experiment in found}

    @contextlib.contextmanager
    def locked(self):
        """Let one process at a time publish from this store; the lock goes with the process.

        Where a folder has no such locks, two processes may create the same run at the same moment:
        `find_run` deletes one of the two, and the process that writes to it fails. The same command
        given again completes the other.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                how = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # others may plant one
                lock = os.open(f"{self.path}.publishing", how, 0o666)
                stack.callback(os.close, lock)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print(f"wait     another process publishes from {self.path}", flush=True)
                    fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def choose_runs(self, args):
        """Read the store, and return the runs to publish, each after its parent.

        A run brings its parents along, and one named by --run_id its children. Without that, all
        that have ended are taken; with --follow, all.
        """
        self.read()
        names = {number: experiment.name for number, experiment in self.experiments.items()}
        if args.experiment and args.experiment not in names.values():
            what = f"there is no experiment {args.experiment!r} in {self.path}."
            raise UserError(what, f"it has {', '.join(sorted(names.values()))}.")
        order = ["attributes.start_time ASC"]
        search = functools.partial(self.client.search_runs, list(names), order_by=order)
        runs = {run.info.run_id: run for run in all_pages(search)}
        if unknown := set(args.run_id) - set(runs):
            what = f"there is no run {min(unknown)} in {self.path}, or it was deleted."
            raise UserError(what, "mlflow runs restore --run-id ID brings a deleted one back.")
        chosen = {}
        for run in runs.values():
            line = [run]  # with its parents, the topmost first
            while (parent := runs.get(line[0].data.tags.get(PARENT_TAG))) and parent not in line:
                line.insert(0, parent)
            ids = [one.info.run_id for one in line]
            wanted = has_ended(run) or args.follow
            if args.experiment:
                wanted = wanted and names[run.info.experiment_id] == args.experiment
            if args.run_id:
                wanted = not set(ids).isdisjoint(args.run_id)
            if wanted:
                chosen |= dict(zip(ids, line, strict=True))
        ignored = [run for run_id, run in runs.items() if run_id not in chosen]
        self.left_out = sum(not has_ended(run) for run in ignored)
        return list(chosen.values())

    def folder(self, location):
        """Return the folder that files lie in; beside the store if it was moved with `mlruns`."""
        if urlsplit(location).scheme not in ("", "file"):
            what = f"the files at {location} are not in a folder that this machine could read."
            raise UserError(what, "publish.py takes files from folders, not from other servers.")
        folder = storage.path_of(location)
        moved = Path(self.path.parent, "mlruns", str(folder).rpartition("/mlruns/")[2].lstrip("/"))
        return folder if folder.exists() or not moved.exists() else moved


def path_in(uri):
    """Return the path in an address sqlite:///PATH."""
    return Path(unquote(urlsplit(uri).path[1:])).absolute()


def all_pages(search):
    """Return all that `search(page_token=...)` finds, page after page."""
    page = search(page_token=None)
    found = list(page)
    while page.token:
        page = search(page_token=page.token)
        found += page
    return found


def has_ended(run):
    return run.info.status in ("FINISHED", "FAILED", "KILLED")
