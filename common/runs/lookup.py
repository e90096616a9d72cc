"""A run looked up: its state, its model, its page. And the version that an alias points at."""

import os
import time
from shlex import quote

import mlflow
from mlflow.exceptions import MlflowException

from common.errors import UserError

from .launches import patiently

NO_TAG = "there.is.no.such.tag"


def existing_run(run_id):
    """Return the run `run_id`. Raises UserError if there is none."""
    try:
        return mlflow.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        hint = "the training script prints the id in its line 'run', and the server before it."
        what = f"there is no run {run_id} on the tracking server named above."
        raise UserError(what, hint) from error


def finished_run(run_id):
    """Return the run `run_id`. Raises UserError if there is none, or if it did not finish."""
    run = existing_run(run_id)
    status = "DELETED" if run.info.lifecycle_stage == "deleted" else run.info.status
    hint = "train again; only a finished run can be registered."
    if status in ("RUNNING", "SCHEDULED"):
        hint = "wait until it has finished; or train again: a job killed outright stays RUNNING."
    elif status == "DELETED":
        hint = f"mlflow runs restore --run-id {run_id} brings it back."
    if status != "FINISHED":
        raise UserError(f"the run {run_id} cannot be registered: it is {status}.", hint)
    return run


def model_uri(run, name="model"):
    """Return the address of the model that `run` logged under `name`, of any if that is None.

    That is `models:/m-...` since MLflow 3, and `runs:/RUN_ID/NAME` for a run of MLflow 2. If there
    are several, the one with the largest step. Raises UserError if there is none.
    """
    wanted = f"source_run_id = '{run.info.run_id}'" + (f" AND name = '{name}'" if name else "")
    logged = mlflow.search_logged_models(
        [run.info.experiment_id], filter_string=wanted, output_format="list"
    )
    if ready := [model for model in logged if model.status == "READY"]:
        steps = {output.model_id: output.step for output in run.outputs.model_outputs}
        latest = max(ready, key=lambda model: steps.get(model.model_id, 0))
        return f"models:/{latest.model_id}"
    for folder in [name] if name else ["model", "pytorch_model"]:
        if mlflow.MlflowClient().list_artifacts(run.info.run_id, folder):
            return f"runs:/{run.info.run_id}/{folder}"
    hint = "give the id of a run of a training script, or of upload_external_model.py."
    raise UserError(f"the run {run.info.run_id} has no model to register.", hint)


def check_registrable(model_name, model_uri=""):
    """Raise UserError if the registered model, or the one to register, is somebody else's.

    Asked by writing what is there already. MLflow would say so when all is trained; or when there
    is a version, which it notes in the tags of the model that was registered. Where it keeps from
    people what there is, a new name is made, and stays: to delete it could hit another job's model.
    """
    client, model_id = mlflow.MlflowClient(), model_uri.removeprefix("models:/")
    whose = f"the registered model {model_name}"
    hint = f"--model_name {quote(model_name)}_$USER, or ask its owner for the permission EDIT."
    try:
        try:
            client.delete_registered_model_tag(model_name, NO_TAG)
        except MlflowException as error:
            if error.error_code == "PERMISSION_DENIED":  # or there is none: only making it tells
                if not patiently(client.create_registered_model, model_name):
                    time.sleep(1)  # made by another job of ours just now? Then it is ours by now
                    client.delete_registered_model_tag(model_name, NO_TAG)
            elif error.error_code != "RESOURCE_DOES_NOT_EXIST":  # a new name is anybody's
                raise
        if model_id.startswith("m-"):
            whose, hint = "the run", "ask its owner to register it, or for the permission EDIT."
            client.set_logged_model_tags(model_id, client.get_logged_model(model_id).tags)
    except MlflowException as error:
        if error.error_code != "PERMISSION_DENIED":
            raise
        what = f"{whose} is somebody else's, and you may not write there."
        raise UserError(what, hint) from error


def alias_version(model_name, alias):
    """Return the number of the version that the alias points at, as text; None if there is none."""
    try:
        return str(mlflow.MlflowClient().get_model_version_by_alias(model_name, alias).version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def moved(version, alias, before):
    """Print the line `alias`, which says if version `before` was of other data; return a dict."""
    name, number, new = version.name, str(version.version), version.tags.get("dataset")
    old = before and mlflow.MlflowClient().get_model_version(name, before).tags.get("dataset")
    other = f"  (trained on other data: {old} -> {new})" if old and new not in (None, old) else ""
    print(f"alias    {alias}  version {before or 'none'} -> {number}{other}", flush=True)
    result = {"model_name": name, "model_version": number, "model_uri": f"models:/{name}/{number}"}
    return result | {"alias": alias, "previous_version": before}


def run_address(run):
    """Return the experiment's name and the run's page; of a local store, with what opens it."""
    name = mlflow.get_experiment(run.info.experiment_id).name
    server, where = mlflow.get_tracking_uri().rstrip("/"), os.environ.get("MLFLOW_WORKSPACE")
    if not server.startswith("http"):
        store = quote(server) if server.startswith("sqlite") else "URI"
        server = f"mlflow ui --backend-store-uri {store}  # http://127.0.0.1:5000"
    page = f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    return f"experiment {name}  {page}" + (f"?workspace={where}" if where else "")
