"""Register a model that lies on a shared filesystem, moving nothing, and map it into memory.

    python Modify_artifact_location_register_inference.py --run_id <RUN_ID> --model_name MNIST_CNN

For a run of Modify_artifact_location.py, or of upload_external_model.py --in_place. You will see
the model's path, what it took to load it, the model checked on the whole test set before anything
is registered, then the version, and a JSON object as the last line. In the MLflow UI the model has
a new version under "Models", with the alias, and with path, size and SHA-256 as tags.
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

    # Heavy imports wait until the arguments are known to be good, so --help answers at once.
    import mlflow

    from common import (
        archive,
        cost,
        credentials,
        data,
        failures,
        inspection,
        mapped,
        model,
        model_file,
        predictions,
        provenance,
        runs,
        tracking,
        training,
    )

    # 1. Connect, and find the run, the file of its model and the test set that it was scored on.
    failures.explain()  # a server that fails, now or later: two lines and an exit code
    credentials.send_api_key()  # with every request to it, and with no other
    tracking.connect(args.tracking_uri, args.ca_bundle)
    run = runs.finished_run(args.run_id)
    tracking.check_artifact_location(run.info.artifact_uri)
    model_uri = runs.model_uri(run)
    test = data.load(predictions.recorded_dataset(run, args.dataset), args.data_dir, train=False)
    file = model_file.of_model(model_uri, archive.MODEL_FILE)
    if file.path.name == "model.pt2":  # who loads it with MLflow alone would run what is in it
        inspection.check(file.path.parents[1])
    print(f"run      {args.run_id}  {run.info.run_name}  {file.path}", flush=True)
    if args.verify:
        model_file.verify(file)
        print(f"verify   SHA-256 {file.sha256}, as written on {file.host}", flush=True)

    # 2. Map it into memory, and check it on the whole test set, before the registry changes.
    with cost.measured() as loading:
        network = mapped.load(model.MNISTCNN, file.path)
    load_metrics = loading.report("load", file.size)
    predictions.check(run, test, training.evaluate(network, test.images, test.labels))

    # 3. Register and promote.
    # [MLflow 10] register_model: a new version under "Models"; its tags say which file it is.
    version = mlflow.register_model(
        model_uri, args.model_name, tags={"registered_by": provenance.user(), **file.tags}
    )
    # [MLflow 11] set_registered_model_alias: the alias now means this version, for everyone.
    mlflow.MlflowClient().set_registered_model_alias(args.model_name, args.alias, version.version)
    print(f"model    {args.model_name} version {version.version}  alias {args.alias}", flush=True)
    # [MLflow 6] log_metrics: what loading took, beside what writing took on the run's page.
    mlflow.log_metrics(load_metrics, run_id=args.run_id)

    # 4. Infer as a program does that knows no more than the alias: from the path, into memory.
    alias_file = model_file.of_alias(args.model_name, args.alias, archive.MODEL_FILE)
    network = mapped.load(model.MNISTCNN, alias_file.path)
    scores = training.evaluate(network, test.images, test.labels)
    predictions.report(test, scores, f"models:/{args.model_name}@{args.alias}")
    cli.print_result(
        run_id=args.run_id,
        model_name=args.model_name,
        model_version=str(version.version),
        model_uri=f"models:/{args.model_name}/{version.version}",
        alias=args.alias,
        model_path=str(alias_file.path),
        val_accuracy=scores.accuracy,
    )


if __name__ == "__main__":
    main()
