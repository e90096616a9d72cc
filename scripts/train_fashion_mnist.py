"""Train a CNN on Fashion-MNIST as one tracked run, from flags or a settings file (guide 5).

    python scripts/train_fashion_mnist.py
    python scripts/train_fashion_mnist.py --config scripts/cfg/quick.yaml --epochs 2

A tenth of the training set is held out for the curves; the test set is for the final score.
You will see one line per epoch, and a JSON object as the last line. In the MLflow UI the run stands
in the experiment "Image classification", with its parameters, its curves and its model. Needs
common/cli.py, the rooms connection, runs and training of common/, and scripts/networks.py and
settings.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common/ is

from common import cli
from scripts import settings

EXPERIMENT = "Image classification"  # the group of runs that this one joins


def build_parser():
    parser = cli.parser(__doc__)
    settings.add_config_argument(parser)
    parser.add_argument(
        "--epochs",
        type=cli.whole_number(1),
        default=5,
        help="passes over the training set (default: %(default)s)",
    )
    parser.add_argument(
        "--batch_size",
        type=cli.whole_number(1),
        default=32,
        help="images per step (default: %(default)s)",
    )
    parser.add_argument(
        "--lr",
        type=cli.learning_rate,
        default=0.001,
        help="learning rate of Adam (default: %(default)s)",
    )
    parser.add_argument(
        "--dropout",
        type=settings.fraction,
        default=0.25,
        help="fraction of the hidden units that are left out at each step (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=cli.whole_number(0),
        default=0,
        help="seed of the weights, the split and the order of the images (default: %(default)s)",
    )
    cli.add_data_arguments(parser, dataset="fashion_mnist")
    cli.add_server_arguments(parser, EXPERIMENT)
    return parser


def main(argv=None):
    args = settings.parse_with_config(build_parser(), argv)

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    import mlflow
    import torch

    from common import connection, runs, training
    from scripts import networks

    # 1. Connect, and load the data: whatever is wrong shows now, not after an epoch.
    connection.connect(args.tracking_uri, args.ca_bundle, args.experiment, args.workspace)
    everything = training.load_data(args.dataset, args.data_dir, train=True)
    train, validation = networks.hold_out(everything, seed=args.seed)
    test = training.load_data(args.dataset, args.data_dir, train=False)

    torch.manual_seed(args.seed)
    network = networks.SimpleCNN(args.dropout).to(training.best_device())
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)

    # set_experiment: like a project folder; on the left in the UI.
    experiment = mlflow.set_experiment(args.experiment)
    runs.check_place(experiment, network)  # can files be written there?

    # 2. Train and log. start_run: one training attempt, with a page of its own.
    with mlflow.start_run(experiment_id=experiment.experiment_id) as run, runs.always_ended():
        run_id = run.info.run_id
        print(f"run      {run_id}  {runs.run_address(run)}", flush=True)
        # set_tags: who, from which commit, in which batch job.
        mlflow.set_tags(
            {
                "owner": runs.user(),
                **runs.git_tags(__file__),
                **runs.job_tags(),
            }
        )
        # log_params: what was set before training; the columns to compare runs by.
        mlflow.log_params(
            {
                "learning_rate": args.lr,
                "batch_size": args.batch_size,
                "epochs": args.epochs,
                "dropout": args.dropout,
                "seed": args.seed,
                "dataset": args.dataset,
            }
        )
        # log_input: which data, by name and digest; under "Datasets" on the page.
        for split, context in ((train, "training"), (test, "test")):
            images, labels = split.images.numpy(), split.labels.numpy()
            dataset = mlflow.data.from_numpy(
                images, split.source, labels, name=args.dataset, digest=split.digest
            )
            runs.patiently(mlflow.log_input, dataset, context=context)
        for epoch in training.epochs(
            network, optimizer, train, validation, args.epochs, args.batch_size, args.seed
        ):
            # log_metrics: a point on each curve, in one request; tab "Model metrics".
            mlflow.log_metrics(
                {
                    "train_loss": epoch.train_loss,
                    "train_accuracy": epoch.train_accuracy,
                    "val_loss": epoch.val_loss,
                    "val_accuracy": epoch.val_accuracy,
                },
                step=epoch.number,
            )
            print(
                f"epoch {epoch.number}/{args.epochs}  train_loss {epoch.train_loss:.4f}  "
                f"val_loss {epoch.val_loss:.4f}  val_accuracy {epoch.val_accuracy:.4f}  "
                f"{epoch.seconds:.1f} s",
                flush=True,
            )

        # 3. Score on data that was used neither to train nor to choose, and store.
        network = network.cpu().eval()
        scores = training.evaluate(network, test.images, test.labels)
        mlflow.log_metric("test_accuracy", scores.accuracy)
        # log_figure: an image in the tab "Artifacts", with no file left behind here.
        mlflow.log_figure(
            runs.confusion_matrix_figure(
                test.labels,
                scores.predictions,
                test.class_names,
                f"{args.dataset} test set, accuracy {scores.accuracy:.4f}",
            ),
            "plots/confusion_matrix.png",
        )
        # log_dict: the predictions for the test images, to check a loaded model against.
        mlflow.log_dict(
            runs.record_predictions(args.dataset, test, scores.predictions), runs.PREDICTIONS
        )
        # log_model: weights, signature and requirements, loadable without this code.
        logged = mlflow.pytorch.log_model(
            network,
            name="model",
            input_example=training.input_example(test.images),
            pip_requirements=training.pip_requirements(),
            step=args.epochs,
            metadata={"input": training.INPUT},  # in the file MLmodel
            tags={"input": training.INPUT},  # on the model's page
        )
    cli.print_result(
        run_id=run_id,
        model_uri=logged.model_uri,
        val_accuracy=epoch.val_accuracy,
        test_accuracy=scores.accuracy,
    )


if __name__ == "__main__":
    cli.run(main)
