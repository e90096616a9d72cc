"""Train a perceptron on MNIST and log the run: parameters, curves, the weights as a file (guide 3).

    python scripts/train_simple_mnist.py
    python scripts/train_simple_mnist.py --dataset digits --epochs 10

You will see one line per epoch in the guide's words, and a JSON object as the last line. In the
MLflow UI the run stands in MNIST_experiment under a random name, with its parameters, four curves
under "Model metrics", and model.pth under "Artifacts". `val` is the test set, as in the guide;
nothing is chosen by it. Needs common/cli.py, the rooms connection, runs and training of common/,
and scripts/networks.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common/ is

from common import cli

EXPERIMENT = "MNIST_experiment"  # the group of runs that this one joins


def build_parser():
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--lr",
        type=cli.learning_rate,
        default=0.001,
        help="learning rate of Adam (default: %(default)s)",
    )
    parser.add_argument(
        "--batch_size",
        type=cli.whole_number(1),
        default=64,
        help="images per step (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=cli.whole_number(1),
        default=5,
        help="passes over the training set (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=cli.whole_number(0),
        default=0,
        help="seed of the weights and of the order of the images (default: %(default)s)",
    )
    cli.add_data_arguments(parser)
    cli.add_server_arguments(parser, EXPERIMENT)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    import tempfile

    import mlflow
    import torch

    from common import connection, runs, training
    from scripts import networks

    # 1. Connect, and load the data: whatever is wrong shows now, not after an epoch.
    connection.connect(args.tracking_uri, args.ca_bundle, args.experiment, args.workspace)
    train = training.load_data(args.dataset, args.data_dir, train=True)
    test = training.load_data(args.dataset, args.data_dir, train=False)

    torch.manual_seed(args.seed)
    network = networks.SimpleMNIST().to(training.best_device())
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)

    # set_experiment: makes it if it does not exist; on the left in the UI.
    experiment = mlflow.set_experiment(args.experiment)
    runs.check_place(experiment, network)  # can files be written there?

    # 2. Train and log. start_run: everything logged in this block belongs to this run.
    with mlflow.start_run(experiment_id=experiment.experiment_id) as run, runs.always_ended():
        run_id = run.info.run_id
        print(f"run      {run_id}  {runs.run_address(run)}", flush=True)
        # log_params: once per run; the table "Parameters" on its page.
        mlflow.log_params(
            {
                "lr": args.lr,
                "batch_size": args.batch_size,
                "epochs": args.epochs,
                "seed": args.seed,
                "dataset": args.dataset,
            }
        )
        # set_tags: words to find the run by; what it is, who trained it, from which commit.
        tags = {"model.type": "Computer Vision", "dataset": args.dataset, "owner": runs.user()}
        mlflow.set_tags({**tags, **runs.git_tags(__file__), **runs.job_tags()})
        # log_input: which data, by name and digest; under "Datasets" on the page.
        for split, context in ((train, "training"), (test, "validation")):
            images, labels = split.images.numpy(), split.labels.numpy()
            dataset = mlflow.data.from_numpy(
                images, split.source, labels, name=args.dataset, digest=split.digest
            )
            runs.patiently(mlflow.log_input, dataset, context=context)
        for epoch in training.epochs(
            network, optimizer, train, test, args.epochs, args.batch_size, args.seed
        ):
            # log_metrics: four log_metric calls in one request; `step` is the curves' x axis.
            mlflow.log_metrics(
                {
                    "train_loss": epoch.train_loss,
                    "train_acc": epoch.train_accuracy,
                    "val_loss": epoch.val_loss,
                    "val_acc": epoch.val_accuracy,
                },
                step=epoch.number,
            )
            print(
                f"Epoch {epoch.number}: train_loss={epoch.train_loss:.4f}, "
                f"train_acc={epoch.train_accuracy:.4f}, val_loss={epoch.val_loss:.4f}, "
                f"val_acc={epoch.val_accuracy:.4f}",
                flush=True,
            )

        # 3. Log the weights. log_artifact: copies the file to the run, tab "Artifacts"; the local
        # one is deleted with its folder.
        with tempfile.TemporaryDirectory() as folder:
            torch.save(network.cpu().state_dict(), f"{folder}/model.pth")
            mlflow.log_artifact(f"{folder}/model.pth")
    cli.print_result(
        run_id=run_id,
        train_loss=epoch.train_loss,
        train_acc=epoch.train_accuracy,
        val_loss=epoch.val_loss,
        val_acc=epoch.val_accuracy,
    )


if __name__ == "__main__":
    cli.run(main)
