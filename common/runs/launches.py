"""What earlier jobs of the same training have made on the server, found by its tag `launch`.

MLflow sends a request again whose answer was lost, and the server may then have acted twice: there
are two runs, or two versions, with the same tag.
"""

import functools
import random
import re
import time

import mlflow
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException

from common.errors import UserError

TWICE = re.compile(r"(?i)unique|duplicate entry")  # what databases say of a row that is there


def one_run(experiment_id, launch, made=None, needed=False):
    """Return the run of this training, or None; `made` is the one that `start_run` has just made.

    Duplicates are deleted. Raises UserError if the run was deleted, or is gone though `needed`.
    """
    search = functools.partial(mlflow.search_runs, [experiment_id], output_format="list")
    found = search(f"tags.launch = '{launch}'")
    run = made or next(iter(found), None)
    for other in found:
        if other.info.run_id != run.info.run_id:
            mlflow.delete_run(other.info.run_id)
    if run is None:
        deleted = search(f"tags.launch = '{launch}'", run_view_type=ViewType.DELETED_ONLY)
        if deleted or needed:
            what = "the run of this training was deleted, or is in another store."
            hint = "give another --checkpoint, to train from the start."
            if deleted:
                hint = f"mlflow runs restore --run-id {deleted[0].info.run_id}, or {hint}"
            raise UserError(what, hint)
    return run


def one_version(model_name, launch, made=None):
    """Return this training's version, or None; `made` is a new one. Duplicates are deleted."""
    client = mlflow.MlflowClient()
    wanted = f"name = '{model_name}' AND tags.launch = '{launch}'"
    found = client.search_model_versions(wanted)
    version = made or next(iter(found), None)
    for other in found:
        if other.version != version.version:
            client.delete_model_version(model_name, other.version)
    return version


def ready_model(run, discard=lambda location: None):
    """Return the address of the model "model" that `run` has logged, or None.

    One whose writing was cut off stays as FAILED, after a call of `discard` with its location. One
    that the run does not name is deleted: an answer was lost, say, or the job ended in between.
    """
    client, run_id = mlflow.MlflowClient(), run.info.run_id
    linked = {output.model_id for output in client.get_run(run_id).outputs.model_outputs}
    ready = None
    for model in client.search_logged_models(
        [run.info.experiment_id], f"source_run_id = '{run_id}' AND name = 'model'"
    ):
        if model.status == "READY" and model.model_id in linked:
            ready = f"models:/{model.model_id}"
            continue
        discard(model.artifact_location)
        if model.model_id not in linked:
            client.delete_logged_model(model.model_id)
        elif model.status == "PENDING":
            client.finalize_logged_model(model.model_id, "FAILED")
    return ready


def patiently(call, *arguments, **options):
    """Call a function of MLflow again if another job is making the same row; None if it is made."""
    for _ in range(9):
        try:
            return call(*arguments, **options)
        except MlflowException as error:
            if error.error_code == "RESOURCE_ALREADY_EXISTS":
                return None
            if not TWICE.search(str(error)):
                raise
        time.sleep(random.random())
    return call(*arguments, **options)
