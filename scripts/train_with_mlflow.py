"""Train a random forest on iris and log the run: parameters, metrics, four artifacts (guide 4).

    python scripts/train_with_mlflow.py
    python scripts/train_with_mlflow.py --n_estimators 200 --max_depth 5

Nothing is downloaded: scikit-learn carries the data with it. You will see the scores on the test
set, and a JSON object as the last line. In the MLflow UI there is an experiment
RandomForest_Training with a new run, its parameters and metrics, and four artifacts: the model, the
confusion matrix, a report by class, and the importance of each column. Needs common/cli.py and the
rooms connection and runs of common/.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common/ is

from common import cli

EXPERIMENT = "RandomForest_Training"  # the group of runs that this one joins


def build_parser():
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--n_estimators",
        type=cli.whole_number(1),
        default=100,
        help="number of trees (default: %(default)s)",
    )
    parser.add_argument(
        "--max_depth",
        type=cli.whole_number(1),
        default=3,
        help="how deep a tree may grow (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=cli.whole_number(0),
        default=0,
        help="seed of the split and of the trees (default: %(default)s)",
    )
    cli.add_server_arguments(parser, EXPERIMENT)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    from importlib.metadata import version

    import mlflow
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import classification_report, precision_recall_fscore_support
    from sklearn.model_selection import train_test_split

    from common import connection, runs

    # 1. Connect, and load the data.
    connection.connect(args.tracking_uri, args.ca_bundle, args.experiment, args.workspace)
    iris = load_iris(as_frame=True)
    # "sepal length (cm)" becomes sepal_length: the names that a request to the served model has.
    table = iris.data.rename(columns=lambda name: name.removesuffix(" (cm)").replace(" ", "_"))
    names = list(iris.target_names)
    species = iris.target.map(dict(enumerate(names)))  # the served model answers "setosa", not 0
    seed = args.seed % 2**32  # scikit-learn takes no larger one
    x_train, x_test, y_train, y_test = train_test_split(
        table, species, test_size=0.3, random_state=seed, stratify=species
    )

    # set_experiment: makes it if it does not exist; on the left in the UI.
    experiment = mlflow.set_experiment(args.experiment)

    # 2. Train and log. start_run: one run is one execution of this script.
    with mlflow.start_run(experiment_id=experiment.experiment_id) as run, runs.always_ended():
        run_id = run.info.run_id
        print(f"run      {run_id}  {runs.run_address(run)}", flush=True)
        forest = RandomForestClassifier(
            n_estimators=args.n_estimators, max_depth=args.max_depth, random_state=seed
        )
        forest.fit(x_train, y_train)
        predicted = forest.predict(x_test)
        precision, recall, f1, _ = precision_recall_fscore_support(
            y_test, predicted, average="macro", zero_division=0
        )
        metrics = {
            "accuracy": forest.score(x_test, y_test),
            "precision": float(precision),
            "recall": float(recall),
            "f1_score": float(f1),
        }
        # log_params: what was set before training; the table "Parameters".
        mlflow.log_params(
            {"n_estimators": args.n_estimators, "max_depth": args.max_depth, "seed": args.seed}
        )
        # log_input: which data, by name, digest and schema; under "Datasets" on the page.
        flowers = mlflow.data.from_pandas(
            x_train.assign(species=y_train),
            source="https://archive.ics.uci.edu/dataset/53",
            targets="species",
            name="iris",
        )
        runs.patiently(mlflow.log_input, flowers, context="training")
        # log_metrics: what came out; the table "Metrics". Precision, recall and F1 are means over
        # the three classes.
        mlflow.log_metrics(metrics)
        print("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()), flush=True)

        # log_figure, log_text, log_dict: three files in the tab "Artifacts".
        mlflow.log_figure(
            runs.confusion_matrix_figure(
                [names.index(name) for name in y_test],
                [names.index(name) for name in predicted],
                names,
                f"iris, {len(y_test)} flowers held out",
            ),
            "confusion_matrix.png",
        )
        mlflow.log_text(
            classification_report(y_test, predicted, zero_division=0),
            "classification_report.txt",
        )
        mlflow.log_dict(
            dict(zip(table.columns, forest.feature_importances_.tolist(), strict=True)),
            "feature_importances.json",
        )
        # log_model: the fourth artifact, linked from the run's page. The signature names the
        # columns that a request must have. skops stores the forest without pickle. It cannot check
        # the node indices inside a tree, so that type has to be trusted by name.
        logged = mlflow.sklearn.log_model(
            forest,
            name="model",
            signature=mlflow.models.infer_signature(x_test, predicted),
            serialization_format="skops",
            skops_trusted_types=["sklearn.tree._tree.Tree"],
            pip_requirements=[f"{name}=={version(name)}" for name in ("scikit-learn", "skops")],
        )
    cli.print_result(run_id=run_id, model_uri=logged.model_uri, **metrics)


if __name__ == "__main__":
    cli.run(main)
