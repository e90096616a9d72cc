"""A run from its start to its end, and after: what every training script needs beside MLflow.

For your own training loop, copy this folder, common/errors.py and an empty common/__init__.py:

    from common import runs

    runs.check_export(network, input_example)  # before training: can MLflow store it,
    runs.check_place(experiment, network)  # and files be written where they will go?
    with mlflow.start_run(), runs.always_ended():  # FINISHED, FAILED or KILLED; never a zombie
        mlflow.set_tags({**runs.git_tags(__file__), **runs.job_tags()})

`ending.py`, `export.py` and `provenance.py` stand alone. `launches.py` finds what an earlier job of
the same training has made, `lookup.py` any run and its model; `predictions.py` compares a loaded
classifier with the trained one, `figures.py` draws a confusion matrix. Leave out what you do not
need, and its line below.
"""

from .ending import always_ended
from .export import check_export, check_place
from .figures import confusion_matrix_figure
from .launches import one_run, one_version, patiently, ready_model
from .lookup import (
    alias_version,
    check_registrable,
    existing_run,
    finished_run,
    model_uri,
    moved,
    run_address,
)
from .predictions import (
    PREDICTIONS,
    check_predictions,
    facts,
    print_samples,
    record_predictions,
    recorded_dataset,
)
from .provenance import git_tags, job_tags, user
