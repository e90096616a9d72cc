"""Find a run by its experiment, download its checkpoint, and infer a few pictures (guide 3).

    python scripts/download_and_infer.py
    python scripts/download_and_infer.py --run_id <RUN_ID> --seed 1

Without --run_id it takes the experiment's latest run. You will see which run that is, where the
checkpoint lies, five random pictures of the test set, true against predicted, and a JSON object as
the last line. Nothing is changed on the server.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common/ is

from common import cli

EXPERIMENT = "MNIST_experiment"  # where train_simple_mnist.py logs
SAMPLES = 5  # pictures that are shown


def build_parser():
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run_id", type=cli.not_empty, help="the run to take (default: the experiment's latest)"
    )
    parser.add_argument(
        "--download_dir",
        type=cli.not_empty,
        metavar="DIR",
        help="keep the checkpoint in this folder (default: a temporary one)",
    )
    parser.add_argument(
        "--seed", type=cli.whole_number(0), help="seed of the choice of pictures (default: random)"
    )
    cli.add_data_arguments(parser, dataset=None)
    cli.add_server_arguments(parser, EXPERIMENT)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)

    # Heavy imports wait until the arguments are known to be good, so --help answers at once.
    import contextlib
    import random
    import tempfile

    import mlflow

    from common import (
        credentials,
        data,
        failures,
        model,
        predictions,
        runs,
        tracking,
        training,
        weights,
    )

    sys.stdout.reconfigure(errors="replace")  # a terminal without the guide's dash shows "?"

    # 1. Connect, and find the run.
    failures.explain()  # a server that fails, now or later: two lines and an exit code
    credentials.send_api_key()  # with every request to it, and with no other
    tracking.connect(args.tracking_uri, args.ca_bundle)
    if args.run_id:
        run = runs.existing_run(args.run_id)
    else:
        run = runs.latest_run(args.experiment)
        experiment_id = run.info.experiment_id
        print(f"Found experiment '{args.experiment}' with ID: {experiment_id}")
    run_id = run.info.run_id
    print(f"Using run_id: {run_id}", flush=True)
    tracking.check_artifact_location(run.info.artifact_uri)
    test = data.load(predictions.recorded_dataset(run, args.dataset), args.data_dir, train=False)

    # 2. Download the checkpoint, and load it without running any code from it.
    if "model.pth" not in [file.path for file in mlflow.MlflowClient().list_artifacts(run_id)]:
        raise SystemExit(
            f"error: the run {run_id} has no model.pth.\n"
            "hint:  give the id of a run of train_simple_mnist.py that finished."
        )
    with contextlib.ExitStack() as stack:
        folder = args.download_dir or stack.enter_context(tempfile.TemporaryDirectory())
        # download_artifacts: a file or folder of the tab "Artifacts", by its path there.
        path = mlflow.artifacts.download_artifacts(
            run_id=run_id, artifact_path="model.pth", dst_path=folder
        )
        kept = "" if args.download_dir else "  (until the end; --download_dir keeps it)"
        print(f"Checkpoint downloaded to: {path}{kept}", flush=True)
        network = model.SimpleMNIST().eval()
        weights.load(network, path)

    # 3. Infer.
    indices = random.Random(args.seed).sample(range(len(test.labels)), SAMPLES)
    scores = training.evaluate(network, test.images[indices], test.labels[indices])
    samples = [
        {"index": index, "true": test.labels[index].item(), "predicted": predicted}
        for index, predicted in zip(indices, scores.predictions.tolist(), strict=True)
    ]
    for sample in samples:
        print(
            f"Sample {sample['index']:4d} — true label: {sample['true']}  |  "
            f"predicted: {sample['predicted']}"
        )
    cli.print_result(run_id=run_id, samples=samples)


if __name__ == "__main__":
    main()
