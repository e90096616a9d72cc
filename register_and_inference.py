"""Register the model of a finished run, point an alias at it, and load it back through that alias.

    python register_and_inference.py --run_id <RUN_ID>
    python register_and_inference.py --run_id <RUN_ID> --dataset mnist --pixels normalised

You will see the model checked on the whole test set before anything is registered, then the
version, a few images with their predictions, and a JSON object as the last line. In the MLflow UI
the model has a new version under "Models", linked to its run, with the alias beside it, and with
its score, its data and what it takes in its description. The second command is for a run of code
that normalises pixels before the network. Needs common/cli.py and the rooms connection, runs,
storage and training of common/.
"""

from common import cli

MODEL_NAME = "MNIST_CNN"  # the entry in the registry that gets a new version
ALIAS = "production"  # the label that programs load the model by


def build_parser():
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run_id", type=cli.not_empty, required=True, help="the run whose model is registered"
    )
    parser.add_argument(
        "--model_name",
        type=cli.model_name,
        default=MODEL_NAME,
        help="name in the registry (default: %(default)s)",
    )
    parser.add_argument(
        "--alias",
        type=cli.alias,
        default=ALIAS,
        help="alias to point at the new version (default: %(default)s)",
    )
    parser.add_argument(
        "--pixels",
        choices=("unit", "normalised"),
        default="unit",
        help="what the network takes: unit, pixels in [0, 1], or normalised, as (x - 0.1307) / "
        "0.3081 or (x - 0.5) / 0.5, whichever gives the run's val_accuracy (default: %(default)s)",
    )
    cli.add_data_arguments(parser, dataset=None)
    cli.add_server_arguments(parser)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    import mlflow

    from common import connection, runs, storage, training

    # 1. Connect, and find the run, its model and the test set that it was scored on.
    connection.connect(args.tracking_uri, args.ca_bundle, workspace=args.workspace)
    run = runs.finished_run(args.run_id)
    model_uri = runs.model_uri(run)
    runs.check_registrable(args.model_name, model_uri)  # either may be somebody else's
    dataset = runs.recorded_dataset(run, args.dataset)
    test = training.load_data(dataset, args.data_dir, train=False)
    print(f"run      {args.run_id}  {runs.run_address(run)}", flush=True)

    # 2. Check the stored model on the whole test set, before anything in the registry changes.
    with storage.checked_copy(model_uri) as folder:  # nothing that its author put there runs
        stored = mlflow.pytorch.load_model(folder, map_location="cpu")
        ways = [training.INPUT] if args.pixels == "unit" else training.SCALINGS
        pixels, scores = score(stored, test, ways, run.data.metrics.get("val_accuracy", 1))
    runs.check_predictions(run, test, scores, model_uri)

    # 3. Register and promote.
    # [MLflow 10] register_model: a new version under "Models", linked to the run.
    facts, words = runs.facts(args.run_id, dataset, test, scores.accuracy, pixels)
    tags = facts | {"registered_by": runs.user()}
    version = mlflow.register_model(model_uri, args.model_name, tags=tags)
    print(f"model    {args.model_name} version {version.version}", flush=True)
    # update_model_version: the description, on the version's page.
    client = mlflow.MlflowClient()
    client.update_model_version(args.model_name, version.version, description=words)
    before = runs.alias_version(args.model_name, args.alias)
    # [MLflow 11] set_registered_model_alias: the alias now means this version, for everyone.
    client.set_registered_model_alias(args.model_name, args.alias, version.version)
    result = runs.moved(version, args.alias, before)

    # 4. Infer through the alias.
    # [MLflow 12] load_model: what a program does that knows no more than the alias. The network is
    # an exported program, in eval mode for good: call it; .eval() raises NotImplementedError.
    with storage.checked_copy(f"models:/{args.model_name}@{args.alias}") as folder:
        network = mlflow.pytorch.load_model(folder, map_location="cpu")
        _, first = score(network, test.part(slice(5)), [pixels])
    runs.print_samples(test, first.predictions)
    cli.print_result(run_id=args.run_id, **result, val_accuracy=scores.accuracy)


def score(network, test, ways, recorded=1):
    """Return what the network takes, of several ways, and its scores: those closest to `recorded`.

    A way is a text of `training.INPUT` and `training.SCALINGS`.
    """
    from common import training

    def score_one(mean, std):
        return training.evaluate(lambda x: network((x - mean) / std), test.images, test.labels)

    tried = {way: score_one(*training.SCALINGS.get(way, (0, 1))) for way in ways}
    recorded = recorded / 100 if recorded > 1 else recorded  # some scripts log a percentage
    return min(tried.items(), key=lambda item: abs(item[1].accuracy - recorded))


if __name__ == "__main__":
    cli.run(main)
