"""An Optuna study that several processes work on, one after another or at the same time.

If you only want this for your own search, copy `join`: whoever comes first makes the study, all
others go on with it, and everyone knows the MLflow run that it belongs to.
"""

import time

import optuna
import sqlalchemy


def join(storage, name, settings):
    """Return (the study, the id of its parent run or None if this process is to make it).

    Raises SystemExit if it was begun with other `settings`, or cannot be opened.
    """
    # Of two processes that begin a study at the same moment, one succeeds here.
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
        raise SystemExit(
            f"error: the study {name!r} was begun with other settings, {begun_with}, and its "
            "trials could not be compared with new ones.\n"
            "hint:  give the same, or another --study."
        )
    study.set_user_attr("settings", settings)
    return study, study.user_attrs.get("parent_run_id")


def open_storage(storage):
    """Return Optuna's storage: a database, or a log file, which a shared filesystem can hold."""
    shown = storage
    try:
        if "://" in storage:
            shown = sqlalchemy.engine.make_url(storage).render_as_string()  # hides the password
            return optuna.storages.RDBStorage(storage)
        backend = optuna.storages.journal.JournalFileBackend(storage)
        return optuna.storages.JournalStorage(backend)
    except (OSError, ImportError, sqlalchemy.exc.SQLAlchemyError, RuntimeError) as error:
        reason = " ".join(str(error).split()).partition(" (Background")[0][:200]
        raise SystemExit(
            f"error: the study cannot be kept in {shown!r}: {reason}\n"
            "hint:  --storage takes sqlite:///FILE, the address of a database, or a path, all in "
            "a folder that exists."
        ) from error


def finished_trials(study):
    """Return the trials that count: those that an interruption broke off do not."""
    return study.get_trials(
        deepcopy=False, states=(optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    )
