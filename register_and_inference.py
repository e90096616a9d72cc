"""Register the model of a finished run, point an alias at it, and load it back through that alias.

    python register_and_inference.py --run_id <RUN_ID>

You will see the model checked on the whole test set before anything is registered, then the
version, a few images with their predictions, and a JSON object as the last line. In the MLflow UI
the model has a new version under "Models", linked to its run, with the alias beside it. Needs
common/cli.py and the rooms connection, runs, storage and training of common/.
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
    cli.add_data_arguments(parser, dataset=None)
    cli.add_server_arguments(parser)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)

    # Heavy imports wait until the arguments are known to be good, so --help answers at once.
    import mlflow

    from common import connection, runs, storage, training

    # 1. Connect, and find the run, its model and the test set that it was scored on.
    connection.connect(args.tracking_uri, args.ca_bundle, workspace=args.workspace)
    run = runs.finished_run(args.run_id)
    model_uri = runs.model_uri(run)
    runs.check_registrable(args.model_name, model_uri)  # either may be somebody else's
    test = training.load_data(runs.recorded_dataset(run, args.dataset), args.data_dir, train=False)
    print(f"run      {args.run_id}  {run.info.run_name}  {model_uri}", flush=True)

    # 2. Check the stored model on the whole test set, before anything in the registry changes.
    with storage.checked_copy(model_uri) as folder:  # nothing that its author put there runs
        stored = mlflow.pytorch.load_model(folder)
    scores = training.evaluate(stored, test.images, test.labels)
    runs.check_predictions(run, test, scores, model_uri)

    # 3. Register and promote.
    # [MLflow 10] register_model: a new version under "Models", linked to the run.
    version = mlflow.register_model(model_uri, args.model_name, tags={"registered_by": runs.user()})
    print(f"model    {args.model_name} version {version.version}", flush=True)
    before = runs.alias_version(args.model_name, args.alias)
    # [MLflow 11] set_registered_model_alias: the alias now means this version, for everyone.
    mlflow.MlflowClient().set_registered_model_alias(args.model_name, args.alias, version.version)
    print(f"alias    {args.alias}  version {before or 'none'} -> {version.version}", flush=True)

    # 4. Infer through the alias.
    # [MLflow 12] load_model: what a program does that knows no more than the alias.
    with storage.checked_copy(f"models:/{args.model_name}@{args.alias}") as folder:
        network = mlflow.pytorch.load_model(folder)
    first = training.evaluate(network, test.images[:5], test.labels[:5])
    runs.print_samples(test, first.predictions)

    cli.print_result(
        run_id=args.run_id,
        model_name=args.model_name,
        model_version=str(version.version),
        model_uri=f"models:/{args.model_name}/{version.version}",
        alias=args.alias,
        previous_version=before,
        val_accuracy=scores.accuracy,
    )


if __name__ == "__main__":
    cli.run(main)
