"""What a model predicted for each test picture: stored with its run, compared after loading.

A model that was registered, uploaded, downloaded or moved is the same model if it still predicts
the same class for every picture of the test set. One picture, or the accuracy alone, would not show
it.
"""

import mlflow

ARTIFACT = "predictions/test.json"


def record(dataset, split, predicted):
    """Return what `mlflow.log_dict` stores: the data set, its digest, and N predicted classes."""
    return {"dataset": dataset, "digest": split.digest, "predictions": predicted.tolist()}


def recorded_dataset(run, dataset=None):
    """Return the name of the data set that `run` was scored on.

    `dataset` is the user's own word. Raises SystemExit if the run says something else, or if
    neither says anything.
    """
    recorded = run.data.params.get("dataset", dataset)
    if recorded is None:
        raise SystemExit(
            f"error: the run {run.info.run_id} does not say which data set it was trained on.\n"
            "hint:  say it: --dataset mnist"
        )
    if dataset not in (None, recorded):
        raise SystemExit(
            f"error: the run {run.info.run_id} was trained on {recorded}, not on {dataset}.\n"
            f"hint:  leave --dataset out, or give --dataset {recorded}"
        )
    return recorded


def check(run, split, evaluation):
    """Raise SystemExit unless `evaluation`, of the loaded model, is what `run` recorded.

    Every single prediction is compared. A run without recorded predictions (one of a script older
    than this project) is compared by its last val_accuracy, to within half a picture.
    """
    count = len(split.labels)
    if _has_predictions(run):
        stored = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/{ARTIFACT}")
        if stored["digest"] != split.digest:
            raise SystemExit(
                f"error: the test set at hand is not the one that run {run.info.run_id} was scored "
                f"on (digest {split.digest}, not {stored['digest']}).\n"
                "hint:  give the --data_dir that the run was trained with."
            )
        pairs = zip(evaluation.predictions.tolist(), stored["predictions"], strict=True)
        different = sum(predicted != expected for predicted, expected in pairs)
        what = f"predicts {different} of {count} test pictures differently than the trained one did"
    elif "val_accuracy" in run.data.metrics:
        expected = run.data.metrics["val_accuracy"]
        # Some scripts log a percentage.
        expected = expected / 100 if expected > 1 else expected
        different = abs(evaluation.accuracy - expected) * count > 0.5
        what = (
            f"recognises {evaluation.accuracy:.4f} of the test set, the trained one {expected:.4f}"
        )
    else:
        raise SystemExit(
            f"error: the run {run.info.run_id} recorded neither predictions nor val_accuracy: "
            "there is nothing to check the loaded model against.\n"
            "hint:  train or upload the model with a script of this project."
        )
    if different:
        raise SystemExit(
            f"error: the loaded model {what}. Nothing was registered or promoted.\n"
            "hint:  is it a model of this network, for pixels in [0, 1]? Other code or another "
            "normalisation shows here."
        )


def report(split, evaluation, model_uri, samples=5):
    """Print what the loaded model says of the first pictures, and its score on all of them."""
    for i in range(samples):
        print(f"sample   {i}  true {split.labels[i]}  predicted {evaluation.predictions[i]}")
    print(
        f"check    {model_uri}  accuracy {evaluation.accuracy:.4f} on {len(split.labels)} pictures"
    )


def _has_predictions(run):
    files = mlflow.MlflowClient().list_artifacts(run.info.run_id, ARTIFACT.split("/")[0])
    return ARTIFACT in [file.path for file in files]
