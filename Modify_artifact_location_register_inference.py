"""Register a model that lies on a shared filesystem, moving nothing, and map it into memory.

    python Modify_artifact_location_register_inference.py --run_id <RUN_ID> --model_name MNIST_CNN

For a run of Modify_artifact_location.py, or of upload_external_model.py --in_place. You will see
the path of the model's file, what it took to load it, the model checked on the whole test set
before anything is registered, then the version, and a JSON object as the last line. In the MLflow
UI the model has a new version under "Models", with the alias, and with path, size and SHA-256 as
tags. Needs common/cli.py and the rooms connection, runs, storage and training of common/.
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
        "--verify",
        action="store_true",
        help="read the whole file and compare its SHA-256 (default: only whether it is there, in "
        "the size recorded)",
    )
    cli.add_data_arguments(parser, dataset=None)
    cli.add_server_arguments(parser)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    import time

    import mlflow

    from common import connection, runs, storage, training

    # 1. Connect, and find the run, the file of its model and the test set that it was scored on.
    connection.connect(args.tracking_uri, args.ca_bundle, workspace=args.workspace)
    run = runs.finished_run(args.run_id)
    model_uri = runs.model_uri(run)
    runs.check_registrable(args.model_name, model_uri)  # either may be somebody else's
    dataset = runs.recorded_dataset(run, args.dataset)
    test = training.load_data(dataset, args.data_dir, train=False)
    file = storage.of_model(model_uri)
    print(f"run      {args.run_id}  {runs.run_address(run)}", flush=True)
    print(f"file     {file.path}", flush=True)
    folder = file.path.parent.parent  # who loads that with MLflow alone runs all of it
    if str(file.path).endswith(storage.MODEL_FILE) and (folder / "MLmodel").is_file():
        storage.check_model(folder)

    # 2. Map it into memory, and check it on the whole test set, before the registry changes.
    start = time.perf_counter()
    network = storage.map_weights(training.MNISTCNN, file.path)
    load_metrics = storage.throughput("load", file.size, time.perf_counter() - start)
    if args.verify:  # only now: what was mapped is what is hashed
        storage.verify(file)
        print(f"verify   SHA-256 {file.sha256}, as written on {file.host}", flush=True)
    scores = training.evaluate(network, test.images, test.labels)
    runs.check_predictions(run, test, scores, model_uri)

    # 3. Register and promote.
    # [MLflow 10] register_model: a new version under "Models"; its tags say which file it is.
    facts, words = runs.facts(args.run_id, dataset, test, scores.accuracy, training.INPUT)
    tags = facts | file.tags | {"registered_by": runs.user()}
    version = mlflow.register_model(model_uri, args.model_name, tags=tags)
    print(f"model    {args.model_name} version {version.version}", flush=True)
    # update_model_version: the description, on the version's page.
    client = mlflow.MlflowClient()
    client.update_model_version(args.model_name, version.version, description=words)
    before = runs.alias_version(args.model_name, args.alias)
    # [MLflow 11] set_registered_model_alias: the alias now means this version, for everyone.
    client.set_registered_model_alias(args.model_name, args.alias, version.version)
    result = runs.moved(version, args.alias, before)
    # [MLflow 6] log_metrics: what loading took, beside what writing took on the run's page.
    mlflow.log_metrics(load_metrics, run_id=args.run_id)

    # 4. Infer as a program does that knows no more than the alias: from the path, into memory.
    alias_file = storage.of_alias(args.model_name, args.alias)
    network = storage.map_weights(training.MNISTCNN, alias_file.path)
    first = training.evaluate(network, test.images[:5], test.labels[:5])
    runs.print_samples(test, first.predictions)
    result |= {"model_path": str(alias_file.path), "val_accuracy": scores.accuracy}
    cli.print_result(run_id=args.run_id, **result)


if __name__ == "__main__":
    cli.run(main)
