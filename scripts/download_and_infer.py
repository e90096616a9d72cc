"""Find a run by its experiment, download its checkpoint, and predict a few images (guide 3).

    python scripts/download_and_infer.py
    python scripts/download_and_infer.py --run_id <RUN_ID> --seed 1

Without --run_id it takes the experiment's latest run. You will see which run that is, where the
checkpoint lies, the true and the predicted label of five random test images, and a JSON object as
the last line. Nothing is changed on the server. Needs common/cli.py, the rooms connection, runs,
storage and training of common/, and scripts/latest.py and networks.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common/ is

from common import cli
from common.errors import UserError, check_folder, of_system

EXPERIMENT = "MNIST_experiment"  # where train_simple_mnist.py logs
SAMPLES = 5  # images that are shown


def build_parser():
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run_id", type=cli.not_empty, help="the run to take (default: the experiment's latest)"
    )
    parser.add_argument(
        "--download_dir",
        type=cli.path,
        metavar="DIR",
        help="keep the checkpoint in this folder (default: a temporary one)",
    )
    parser.add_argument(
        "--seed", type=cli.whole_number(0), help="seed of the choice of images (default: random)"
    )
    cli.add_data_arguments(parser, dataset=None)
    cli.add_server_arguments(parser, EXPERIMENT)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.download_dir:
        check_folder(args.download_dir, "--download_dir")

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    import os
    import random
    import tempfile

    import mlflow
    from mlflow.exceptions import MlflowException

    from common import connection, runs, storage, training
    from scripts import latest, networks

    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks the guide's dash shows "?"

    # 1. Connect, and find the run.
    connection.connect(args.tracking_uri, args.ca_bundle, workspace=args.workspace)
    if args.run_id:
        run = runs.existing_run(args.run_id)
    else:
        run = latest.latest_run(args.experiment)
        experiment_id = run.info.experiment_id
        print(f"Found experiment '{args.experiment}' with ID: {experiment_id}", flush=True)
    run_id = run.info.run_id
    print(f"Using run_id: {run_id}", flush=True)
    test = training.load_data(runs.recorded_dataset(run, args.dataset), args.data_dir, train=False)

    # 2. Download the checkpoint, and load it without running any code from it.
    if args.download_dir:
        os.makedirs(args.download_dir, exist_ok=True)
    # Into a new folder: where others may write, model.pth can be a link or a pipe of theirs.
    with tempfile.TemporaryDirectory(dir=args.download_dir) as folder:
        hint = "give the id of a run of train_simple_mnist.py that finished."
        try:
            files = mlflow.MlflowClient().list_artifacts(run_id)
            # A folder has no size, nor has a pipe, at which a server would wait without end.
            if "model.pth" not in [file.path for file in files if file.file_size]:
                raise UserError(f"the run {run_id} has no model.pth, or an empty one.", hint)
            # download_artifacts: a file or folder of the tab "Artifacts", by its path there. By
            # run_id and artifact_path it would not say what fails.
            path = mlflow.artifacts.download_artifacts(
                f"{run.info.artifact_uri}/model.pth", dst_path=folder
            )
        except (MlflowException, OSError) as error:
            if connection.diagnose(error) or of_system(error):
                raise
            what = f"model.pth of the run {run_id} cannot be downloaded: {str(error)[-300:]}"
            raise UserError(what, f"if it is a link, or no file, {hint}") from error
        network = networks.SimpleMNIST().eval()
        storage.load_weights(network, path)
        kept = keep(path, args.download_dir) if args.download_dir else path
        more = "" if args.download_dir else "  (until the end; --download_dir keeps it)"
        print(f"Checkpoint downloaded to: {kept}{more}", flush=True)

    # 3. Infer.
    indices = random.Random(args.seed).sample(
        range(len(test.labels)), min(SAMPLES, len(test.labels))
    )
    scores = training.evaluate(network, test.images[indices], test.labels[indices])
    samples = [
        {"index": index, "true": test.labels[index].item(), "predicted": predicted}
        for index, predicted in zip(indices, scores.predictions.tolist(), strict=True)
    ]
    for sample in samples:
        print(
            f"Sample {sample['index']:4d} — true label: {sample['true']}  |  "
            f"predicted: {sample['predicted']}",
            flush=True,
        )
    cli.print_result(run_id=run_id, samples=samples)


def keep(path, folder):
    """Move the file into `folder`, and return its path there; UserError if another one is there."""
    import filecmp
    import os

    kept = Path(folder).absolute() / "model.pth"
    if not os.path.lexists(kept):
        return Path(path).replace(kept)
    if kept.is_symlink() or not filecmp.cmp(path, kept, shallow=False):
        raise UserError(
            f"{kept} is there already, and is not this run's checkpoint.",
            "move it away, or give another --download_dir.",
        )
    return kept


if __name__ == "__main__":
    cli.run(main)
