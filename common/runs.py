"""A run from outside: its end on a signal, its state, its model, its page.

If you only want one thing for your own training script, copy `killed_by_signal`.
"""

import contextlib
import signal
import sys

import mlflow
from mlflow.exceptions import MlflowException


def finished_run(run_id):
    """Return the run `run_id`. Raises SystemExit if there is none, or if it did not finish."""
    try:
        run = mlflow.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise SystemExit(
            f"error: there is no run {run_id} on the tracking server named above.\n"
            "hint:  the training script prints the id in its line 'run', and the server before it."
        ) from error
    status = run.info.status
    if status != "FINISHED":
        advice = {
            "RUNNING": "wait until it has finished; a job that was killed outright stays RUNNING, "
            "and is better trained again.",
            "SCHEDULED": "wait until it has finished.",
        }.get(status, "train again; only a finished run can be registered.")
        raise SystemExit(
            f"error: the run {run_id} has not finished: it is {status}.\nhint:  {advice}"
        )
    return run


def model_uri(run):
    """Return the address of the model that `run` logged under the name "model".

    That is `models:/m-...` since MLflow 3, and `runs:/RUN_ID/model` for a run of MLflow 2. With
    several, the one of the largest step. Raises SystemExit if there is none.
    """
    logged = mlflow.search_logged_models(
        experiment_ids=[run.info.experiment_id],
        filter_string=f"source_run_id = '{run.info.run_id}' AND name = 'model'",
        output_format="list",
    )
    if ready := [model for model in logged if model.status == "READY"]:
        steps = {output.model_id: output.step for output in run.outputs.model_outputs}
        latest = max(ready, key=lambda model: steps.get(model.model_id, 0))
        return f"models:/{latest.model_id}"
    if mlflow.MlflowClient().list_artifacts(run.info.run_id, "model"):
        return f"runs:/{run.info.run_id}/model"
    raise SystemExit(
        f"error: the run {run.info.run_id} has no model to register.\n"
        "hint:  give the id of a run of train_mnist_mlflow.py, Modify_artifact_location.py or "
        "upload_external_model.py."
    )


def run_address(run):
    """Return the address of the run's page on a server, or the command that opens a local store."""
    uri = mlflow.get_tracking_uri()
    if not uri.startswith("http"):
        return "mlflow ui --backend-store-uri " + (uri if uri.startswith("sqlite") else "URI")
    return f"{uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


@contextlib.contextmanager
def killed_by_signal():
    """Inside `with mlflow.start_run()`: end the run as KILLED on SIGTERM and on Ctrl-C.

    A batch system sends SIGTERM when the time is up or the job is preempted. Python would die at
    once, and the run would be RUNNING for ever. The process exits with 143 or 130, as shells
    expect.
    """
    received = []

    def stop(number, frame):
        received.append(number)
        for signal_number in previous:  # cleaning up is not to be interrupted by a second one
            signal.signal(signal_number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    previous = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if received:
            name = signal.Signals(received[0]).name
            print(
                f"error: stopped by {name}; the run is marked KILLED.", file=sys.stderr, flush=True
            )
            mlflow.end_run("KILLED")
        for number, handler in previous.items():
            signal.signal(number, handler)
