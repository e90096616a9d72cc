"""An Optuna study that several processes work on, one after another or at the same time.

The first process creates the study, the others join it, and each one finds the MLflow run that the
study belongs to.
"""

import contextlib
import os
import time

import mlflow
import optuna
import sqlalchemy
from mlflow.exceptions import MlflowException

from common.errors import UserError

FAILURES = (OSError, ImportError, sqlalchemy.exc.SQLAlchemyError, RuntimeError)


def join(storage, name, settings):
    """Return (the study, the id of its parent run, or None if this process has to start that run).

    Raises UserError if the study was begun with other `settings`, or cannot be opened.
    """
    # Of two processes that create the study at the same moment, one succeeds here.
    try:
        study = optuna.create_study(
            storage=open_storage(storage), study_name=name, direction="maximize"
        )
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(storage=open_storage(storage), study_name=name)
        deadline = time.monotonic() + 60
        while "parent_run_id" not in study.user_attrs and time.monotonic() < deadline:
            time.sleep(1)  # the other process is about to start the parent run
    begun_with = study.user_attrs.get("settings", settings)
    if begun_with != settings:
        raise UserError(
            f"the study {name!r} was begun with other settings, {begun_with}, and its trials could "
            "not be compared with new ones.",
            "give the same, or another --study.",
        )
    study.set_user_attr("settings", settings)
    return study, study.user_attrs.get("parent_run_id")


def check_parent(run, experiment, name):
    """Raise UserError unless `run`, the parent of the study `name`, is in this experiment."""
    if run.info.lifecycle_stage == "deleted":
        what = f"the run {run.info.run_id} of the study {name!r} was deleted."
        raise UserError(what, f"mlflow runs restore --run-id {run.info.run_id}, or another --study")
    if run.info.experiment_id != experiment.experiment_id:
        own = mlflow.get_experiment(run.info.experiment_id).name
        what = f"the study {name!r} belongs to the experiment {own!r}."
        raise UserError(what, "give it as --experiment; or another --study, or --storage.")


def open_storage(storage):
    """Return Optuna's storage: a database, or a log file, which a shared filesystem can hold."""
    shown = storage
    try:
        if "://" in storage:
            shown = f"{storage.partition('://')[0]}://..."
            url, own = map(sqlalchemy.engine.make_url, (storage, mlflow.get_tracking_uri()))
            shown = url.render_as_string()  # hides the password
            files = [os.path.realpath(of.database or "") for of in (url, own)]
            if files[0] == files[1] and url.host == own.host:
                # Optuna would add its tables, and take MLflow's version of them for its own.
                raise OSError("it is MLflow's own store")
            return optuna.storages.RDBStorage(storage)
        if os.path.lexists(storage):  # Optuna would append to any file
            with open(storage, "rb") as file:
                start = file.read(10)
            if start and not start.startswith(b'{"op_code"'):
                raise OSError("it is another file, and not a study's")
            _cut_off_half_a_line(storage)
        backend = optuna.storages.journal.JournalFileBackend(storage)
        return optuna.storages.JournalStorage(backend)
    except (AssertionError, LookupError, TypeError, ValueError, *FAILURES) as error:
        reason = "its address is impossible, or the file is damaged"
        if isinstance(error, FAILURES):
            reason = " ".join(str(error).split()).partition(" (Background")[0][:200]
        raise UserError(
            f"the study cannot be kept in {shown!r}: {reason}",
            "--storage takes sqlite:///FILE, the address of a database, or a path, all in a folder "
            "that exists.",
        ) from error


def _cut_off_half_a_line(path):
    """Remove what a full disk has left of the last line: Optuna would go on behind it."""
    lock = optuna.storages.journal.JournalFileSymlinkLock(path)
    lock.acquire()  # else another process may just be writing it
    try:
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    finally:
        lock.release()


def finished_trials(study):
    """Return the complete and the pruned trials; interrupted ones do not count."""
    return study.get_trials(
        deepcopy=False, states=(optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    )


def end_half_open_child(experiment_id, parent_run_id, run_name):
    """Mark a child run as KILLED that was being opened or closed when a signal arrived.

    The run is in the store then, but `always_ended` is not active yet, or no longer.
    """
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "5"
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    with contextlib.suppress(MlflowException):
        for run in mlflow.search_runs(
            experiment_ids=[experiment_id],
            filter_string=f"tags.mlflow.parentRunId = '{parent_run_id}' AND "
            f"attributes.run_name = '{run_name}' AND attributes.status = 'RUNNING'",
            output_format="list",
        ):
            mlflow.MlflowClient().set_terminated(run.info.run_id, "KILLED")
