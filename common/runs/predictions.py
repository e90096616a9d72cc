"""What a model predicted for each test image: stored with its run, compared after loading.

A model that was registered, uploaded, downloaded or moved is the same model if it still predicts
the same class for every image of the test set. One image, or the accuracy alone, would not show it.
"""

import mlflow

from common.errors import UserError

PREDICTIONS = "predictions/test.json"  # the artifact that holds them


def record_predictions(dataset, split, predicted):
    """Return what `mlflow.log_dict` stores: the data set, its digest, and N predicted classes."""
    return {"dataset": dataset, "digest": split.digest, "predictions": predicted.tolist()}


def recorded_dataset(run, dataset=None):
    """Return the name of the data set that `run` was scored on.

    `dataset` is the user's own word. Raises UserError if the run says something else, or if neither
    says anything.
    """
    recorded = run.data.params.get("dataset", dataset)
    if recorded is None:
        raise UserError(
            f"the run {run.info.run_id} does not say which data set it was trained on.",
            "say it: --dataset mnist",
        )
    if dataset not in (None, recorded):
        raise UserError(
            f"the run {run.info.run_id} was trained on {recorded}, not on {dataset}.",
            f"leave --dataset out, or give --dataset {recorded}",
        )
    return recorded


def check_predictions(run, split, evaluation, model_uri):
    """Compare the loaded model's `evaluation` with what `run` recorded, and print the line `check`.

    Every single prediction is compared. A run without recorded predictions (one of a script other
    than this project's) is compared by its last val_accuracy, to within half an image. Raises
    UserError if they differ, or if there is nothing to compare with.
    """
    count, accuracy = len(split.labels), evaluation.accuracy
    if _has_predictions(run):
        stored = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/{PREDICTIONS}")
        if stored["digest"] != split.digest:
            raise UserError(
                f"the test set at hand is not the one that run {run.info.run_id} was scored on "
                f"(digest {split.digest}, not {stored['digest']}).",
                "give the --data_dir that the run was trained with.",
            )
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
        raise UserError(
            f"the run {run.info.run_id} recorded neither predictions nor val_accuracy: there is "
            "nothing to check the loaded model against.",
            "train or upload the model with a script of this project.",
        )
    if different:
        raise UserError(
            f"the loaded model {problem}. Nothing was registered or promoted.",
            "is it a model of this network, for pixels in [0, 1]? Other code or another "
            "normalisation shows here.",
        )
    print(f"check    {model_uri}  {outcome}  accuracy {accuracy:.4f}", flush=True)


def print_samples(split, predicted, count=5):
    """Print what the loaded model says of the first images."""
    for i in range(min(count, len(split.labels))):
        print(f"sample   {i}  true {split.labels[i]}  predicted {predicted[i]}", flush=True)


def _has_predictions(run):
    files = mlflow.MlflowClient().list_artifacts(run.info.run_id, PREDICTIONS.split("/")[0])
    return PREDICTIONS in [file.path for file in files]
