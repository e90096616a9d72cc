"""What a model predicted for each test image: stored with its run, compared after loading."""

import itertools
import json
import tempfile
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException

from common.errors import UserError

PREDICTIONS = "predictions/test.json"  # the artifact that holds them
LARGEST = 2**24  # bytes of it; 60,000 predictions take 0.2 MB


def record_predictions(dataset, split, predicted):
    """Return what `mlflow.log_dict` stores: the data set, its digest, and N predicted classes."""
    return {"dataset": dataset, "digest": split.digest, "predictions": predicted.tolist()}


def recorded_dataset(run, dataset=None):
    """Return the data set that `run` was scored on; UserError if the user's `dataset` differs."""
    recorded = run.data.params.get("dataset", dataset)
    if recorded is None:
        what = f"the run {run.info.run_id} does not say which data set it was trained on."
        raise UserError(what, "say it: --dataset mnist")
    if dataset not in (None, recorded):
        what = f"the run {run.info.run_id} was trained on {recorded}, not on {dataset}."
        raise UserError(what, f"leave --dataset out, or give --dataset {recorded}")
    return recorded


def facts(run_id, dataset, split, accuracy, pixels):
    """Return what the page of a registered version says: (tags to search by, a description)."""
    tags = {"dataset": dataset, "dataset.digest": split.digest, "input": pixels}
    words = f"val_accuracy {accuracy:.4f} on the {len(split.labels)} test images of {dataset}"
    words += f" (digest {split.digest}), by run {run_id}. Input: {pixels}"
    return tags | {"val_accuracy": f"{accuracy:.4f}", "run_id": run_id}, words


def check_predictions(run, split, evaluation, model_uri):
    """Compare the loaded model's `evaluation` with what `run` recorded, and print the line `check`.

    Every single prediction is compared; a run of another project's script by its last val_accuracy,
    to within 5 images of 10000: devices differ. UserError if it differs, or nothing was recorded.
    """
    count, accuracy = len(split.labels), evaluation.accuracy
    if recorded := _recorded(run):
        digest, stored = recorded
        if digest != split.digest:
            digests = f"digest {split.digest}, not {digest}"
            what = f"the test set at hand is not the one that the run was scored on ({digests})."
            raise UserError(what, "give the --data_dir that the run was trained with.")
        pairs = itertools.zip_longest(evaluation.predictions.tolist(), stored)
        different = sum(predicted != expected for predicted, expected in pairs)
        problem = f"predicts {different} of {count} test images differently than the trained one"
        outcome = f"{count} of {count} predictions as recorded"
    elif "val_accuracy" in run.data.metrics:
        expected = run.data.metrics["val_accuracy"]
        expected = expected / 100 if expected > 1 else expected  # some scripts log a percentage
        different = not abs(accuracy - expected) * count <= max(0.5, count / 2000)  # true of nan
        problem = f"has an accuracy of {accuracy:.4f}, and the trained one had {expected:.4f}"
        outcome = f"val_accuracy {expected:.4f} as recorded"
    else:
        what = f"the run {run.info.run_id} recorded neither predictions nor val_accuracy."
        raise UserError(what, "train or upload the model with a script of this project.")
    if different:
        hint = "is it this network? If your code normalises the pixels before it: --pixels "
        hint += "normalised, of register_and_inference.py. Or is --dataset another one?"
        what = f"the loaded model {problem}. Nothing was registered or promoted."
        raise UserError(what, hint)
    print(f"check    {model_uri}  {outcome}  accuracy {accuracy:.4f}", flush=True)


def print_samples(split, predicted, count=5):
    """Print what the loaded model says of the first images."""
    for i in range(min(count, len(split.labels))):
        print(f"sample   {i}  true {split.labels[i]}  predicted {predicted[i]}", flush=True)


def _recorded(run):
    """Return the (digest, predictions) that anybody may have put there, or None without any."""
    found = mlflow.MlflowClient().list_artifacts(run.info.run_id, PREDICTIONS.split("/")[0])
    sizes = [file.file_size or 0 for file in found if file.path == PREDICTIONS]
    if not sizes:
        return None
    try:
        if not 0 < sizes[0] < LARGEST:  # a pipe or a device has no size
            raise ValueError(sizes)
        with tempfile.TemporaryDirectory() as folder:
            uri = f"{run.info.artifact_uri}/{PREDICTIONS}"
            path = mlflow.artifacts.download_artifacts(uri, dst_path=folder)
            stored = json.loads(Path(path).read_bytes())
        return stored["digest"], list(stored["predictions"])
    except (LookupError, MlflowException, RecursionError, TypeError, ValueError) as error:
        if getattr(error, "error_code", None) not in (None, "INVALID_PARAMETER_VALUE"):  # a link
            raise
        what = f"{PREDICTIONS} of the run {run.info.run_id} is not what a script here writes."
        raise UserError(what, "have the model trained again.") from error
