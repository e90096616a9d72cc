"""What a model predicted for each test image: stored with its run, compared after loading."""

import mlflow

from common.errors import UserError

PREDICTIONS = "predictions/test.json"  # the artifact that holds them


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


def check_predictions(run, split, evaluation, model_uri):
    """Compare the loaded model's `evaluation` with what `run` recorded, and print the line `check`.

    Every single prediction is compared; a run of another project's script by its last val_accuracy,
    to within half an image. Raises UserError if they differ, or if there is nothing to compare.
    """
    count, accuracy = len(split.labels), evaluation.accuracy
    if _has_predictions(run):
        stored = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/{PREDICTIONS}")
        if stored["digest"] != split.digest:
            digests = f"digest {split.digest}, not {stored['digest']}"
            what = f"the test set at hand is not the one that the run was scored on ({digests})."
            raise UserError(what, "give the --data_dir that the run was trained with.")
        pairs = zip(evaluation.predictions.tolist(), stored["predictions"], strict=True)
        different = sum(predicted != expected for predicted, expected in pairs)
        problem = f"predicts {different} of {count} test images differently than the trained one"
        outcome = f"{count} of {count} predictions as recorded"
    elif "val_accuracy" in run.data.metrics:
        expected = run.data.metrics["val_accuracy"]
        expected = expected / 100 if expected > 1 else expected  # some scripts log a percentage
        different = abs(accuracy - expected) * count > 0.5
        problem = f"has an accuracy of {accuracy:.4f}, and the trained one had {expected:.4f}"
        outcome = "val_accuracy as recorded"
    else:
        what = f"the run {run.info.run_id} recorded neither predictions nor val_accuracy."
        raise UserError(what, "train or upload the model with a script of this project.")
    if different:
        hint = "is it this network, for pixels in [0, 1]? Another normalisation shows here."
        what = f"the loaded model {problem}. Nothing was registered or promoted."
        raise UserError(what, hint)
    print(f"check    {model_uri}  {outcome}  accuracy {accuracy:.4f}", flush=True)


def print_samples(split, predicted, count=5):
    """Print what the loaded model says of the first images."""
    for i in range(min(count, len(split.labels))):
        print(f"sample   {i}  true {split.labels[i]}  predicted {predicted[i]}", flush=True)


def _has_predictions(run):
    found = mlflow.MlflowClient().list_artifacts(run.info.run_id, PREDICTIONS.split("/")[0])
    return PREDICTIONS in [file.path for file in found]
