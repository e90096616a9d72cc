"""Train SimpleCNN, keep the best epoch's weights, log and register the model (guide 2).

    python scripts/train_and_register_model.py
    python scripts/train_and_register_model.py --dataset digits --epochs 10 --batch-size 32

The best epoch is chosen on a tenth of the training set that is held out from training; the test set
is for the final score. You will see the scores of each epoch, the run's id, the registered version,
and a JSON object as the last line. In the MLflow UI the run has curves, best_model.pt,
model_metadata.json and model_summary.txt; "Models" has a new version with a description. Needs
common/cli.py, the rooms connection, runs and training of common/, and scripts/networks.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common/ is

from common import cli

EXPERIMENT = "model-registry-demo"  # the group of runs that this one joins
MODEL_NAME = "simple-cnn-classifier"  # the entry in the registry that gets a new version


def build_parser():
    parser = cli.parser(__doc__)
    # Spelt with dashes, as the guide has them.
    parser.add_argument(
        "--run-name",
        type=cli.not_empty,
        metavar="NAME",
        help="name of the run (default: a random one)",
    )
    parser.add_argument(
        "--model-name",
        type=cli.model_name,
        default=MODEL_NAME,
        metavar="NAME",
        help="name in the registry; one that exists gets a new version (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=cli.whole_number(1),
        default=5,
        help="passes over the training set (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
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
        "--seed",
        type=cli.whole_number(0),
        default=0,
        help="seed of the weights, the split and the order of the images (default: %(default)s)",
    )
    cli.add_data_arguments(parser)
    cli.add_server_arguments(parser, EXPERIMENT, "--experiment-name")  # as the guide has it
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    import copy
    import tempfile

    import mlflow
    import torch

    from common import connection, runs, training
    from scripts import networks

    # 1. Connect, and load the data: whatever is wrong shows now, not after an epoch.
    connection.connect(args.tracking_uri, args.ca_bundle, args.experiment_name, args.workspace)
    runs.check_registrable(args.model_name)
    everything = training.load_data(args.dataset, args.data_dir, train=True)
    train, validation = networks.hold_out(everything, seed=args.seed)
    test = training.load_data(args.dataset, args.data_dir, train=False)

    torch.manual_seed(args.seed)
    network = networks.SimpleCNN().to(training.best_device())
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)

    # set_experiment: the run joins the others of this experiment, on the left in the UI.
    experiment = mlflow.set_experiment(args.experiment_name)
    runs.check_place(experiment, network)  # can files be written there?

    # 2. Train and track. start_run: the run's page; leaving the `with` block ends it.
    with (
        mlflow.start_run(experiment_id=experiment.experiment_id, run_name=args.run_name) as run,
        runs.always_ended(),
    ):
        run_id = run.info.run_id
        print(f"run      {run_id}  {runs.run_address(run)}", flush=True)
        # log_params: what was set before training; the columns to compare runs by.
        mlflow.log_params(
            {
                "model": type(network).__name__,
                "epochs": args.epochs,
                "batch_size": args.batch_size,
                "learning_rate": args.lr,
                "total_parameters": networks.count_parameters(network),
                "seed": args.seed,
                "dataset": args.dataset,
            }
        )
        # set_tags: words to find the run by, in the search bar and on its page.
        mlflow.set_tags(
            {
                "owner": runs.user(),
                **runs.git_tags(__file__),
                **runs.job_tags(),
            }
        )
        # log_input: which data, by name and digest; under "Datasets" on the page.
        for split, context in ((train, "training"), (test, "test")):
            images, labels = split.images.numpy(), split.labels.numpy()
            dataset = mlflow.data.from_numpy(
                images, split.source, labels, name=args.dataset, digest=split.digest
            )
            runs.patiently(mlflow.log_input, dataset, context=context)
        best = None
        for epoch in training.epochs(
            network, optimizer, train, validation, args.epochs, args.batch_size, args.seed
        ):
            # log_metrics: a point on each of four curves, in one request; tab "Model metrics".
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
                f"train_accuracy {epoch.train_accuracy:.4f}  val_loss {epoch.val_loss:.4f}  "
                f"val_accuracy {epoch.val_accuracy:.4f}  {epoch.seconds:.1f} s",
                flush=True,
            )
            if best is None or epoch.val_accuracy > best.val_accuracy:
                best, best_weights = epoch, copy.deepcopy(network.state_dict())

        # Go back to the best epoch: that is the model that is scored, stored and registered.
        network.load_state_dict(best_weights)
        network = network.cpu().eval()
        scores = training.evaluate(network, test.images, test.labels)
        # MLflow searches by the last value of a metric, so the best one gets a name of its own.
        result = {
            "best_epoch": best.number,
            "best_val_accuracy": best.val_accuracy,
            "test_accuracy": scores.accuracy,
        }
        mlflow.log_metrics(result)
        print(
            f"best     epoch {best.number}  val_accuracy {best.val_accuracy:.4f}  "
            f"test_accuracy {scores.accuracy:.4f}",
            flush=True,
        )

        # 3. Store. log_artifact: a file, in the tab "Artifacts". A checkpoint of weights alone is
        # what `torch.load` reads anywhere, without MLflow.
        with tempfile.TemporaryDirectory() as folder:
            torch.save(network.state_dict(), f"{folder}/best_model.pt")
            mlflow.log_artifact(f"{folder}/best_model.pt")
        # log_dict and log_text: the same for content that needs no file here.
        mlflow.log_dict(
            {
                "model": type(network).__name__,
                "total_parameters": networks.count_parameters(network),
                "input": training.INPUT,
                "class_names": test.class_names,
                "dataset": args.dataset,
                "dataset_digest": everything.digest,
                "checkpoint": "best_model.pt",
                **result,
            },
            "model_metadata.json",
        )
        mlflow.log_text(networks.summary(network), "model_summary.txt")
        # The predictions for the test images: a loaded model is checked against them.
        mlflow.log_dict(
            runs.record_predictions(args.dataset, test, scores.predictions), runs.PREDICTIONS
        )
        # log_model: weights, signature and requirements, loadable without this code. It appears on
        # the run's page under "Logged models"; runs:/RUN_ID/pytorch_model is its address.
        logged = mlflow.pytorch.log_model(
            network,
            name="pytorch_model",
            input_example=training.input_example(test.images),
            pip_requirements=training.pip_requirements(),
            step=best.number,
            metadata={"input": training.INPUT},  # in the file MLmodel
            tags={"input": training.INPUT},  # on the model's page
        )

    # 4. Register. register_model: a new version under "Models", linked to the run. A name that
    # exists already is no error, it gets the next version. (runs:/RUN_ID/pytorch_model would work,
    # too: MLflow resolves it to models:/m-...)
    tags, _ = runs.facts(run_id, args.dataset, test, best.val_accuracy, training.INPUT)
    version = mlflow.register_model(logged.model_uri, args.model_name, tags=tags)
    # update_model_version: the description, on the version's page.
    description = f"SimpleCNN trained with lr={args.lr}, batch_size={args.batch_size}"
    mlflow.MlflowClient().update_model_version(
        args.model_name, version.version, description=description
    )
    print(f"Run ID: {run_id}", flush=True)
    print(f"Model Name: {args.model_name}", flush=True)
    print(f"Model Version: {version.version}", flush=True)
    cli.print_result(
        run_id=run_id,
        model_uri=f"models:/{args.model_name}/{version.version}",
        model_name=args.model_name,
        model_version=str(version.version),
        **result,
    )


if __name__ == "__main__":
    cli.run(main)
