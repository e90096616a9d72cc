"""The run that was started last, for scripts that go on with it."""

import mlflow

from common import runs
from common.errors import UserError


def latest_run(experiment_name):
    """Return the run of the experiment that was started last; of a child run, its parent.

    Raises UserError if there is no such experiment, or no run in it.
    """
    experiment = mlflow.get_experiment_by_name(experiment_name)
    if experiment is None:
        raise UserError(
            f"there is no experiment {experiment_name!r} on the server named above.",
            "train first, or give the --experiment and the server that you trained with.",
        )
    found = mlflow.search_runs(
        experiment_ids=[experiment.experiment_id],
        order_by=["attributes.start_time DESC"],
        max_results=1,
        output_format="list",
    )
    if not found:
        raise UserError(
            f"the experiment {experiment_name!r} holds no run.",
            "train first, or give another --experiment.",
        )
    parent_run_id = found[0].data.tags.get("mlflow.parentRunId")
    return runs.existing_run(parent_run_id) if parent_run_id else found[0]
