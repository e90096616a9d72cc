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
from common.errors import UserError

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

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    import contextlib
    import random
    import tempfile

    import mlflow

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
    if "model.pth" not in [file.path for file in mlflow.MlflowClient().list_artifacts(run_id)]:
        raise UserError(
            f"the run {run_id} has no model.pth.",
            "give the id of a run of train_simple_mnist.py that finished.",
        )
    with contextlib.ExitStack() as stack:
        folder = args.download_dir or stack.enter_context(tempfile.TemporaryDirectory())
        # download_artifacts: a file or folder of the tab "Artifacts", by its path there.
        path = mlflow.artifacts.download_artifacts(
            run_id=run_id, artifact_path="model.pth", dst_path=folder
        )
        kept = "" if args.download_dir else "  (until the end; --download_dir keeps it)"
        print(f"Checkpoint downloaded to: {path}{kept}", flush=True)
        network = networks.SimpleMNIST().eval()
        storage.load_weights(network, path)

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


if __name__ == "__main__":
    cli.run(main)
