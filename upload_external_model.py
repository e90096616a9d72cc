"""Bring a model that was trained elsewhere to MLflow: check its weights, log it, register it.

    python upload_external_model.py --model_path my_local_mnist_model.pth
    python upload_external_model.py --model_path model.pth --model_name MNIST_CNN --alias staging
    python upload_external_model.py --model_path <weights on a shared filesystem> --in_place

The file holds a state dict (`torch.save(model.state_dict(), path)`, or safetensors) of the network
in common/training/networks.py; no code in it is run. With --in_place it stays where it is, and only
its path, size and SHA-256 are logged. You will see its accuracy on the test set, the stored model
checked, and a JSON object as the last line. In the MLflow UI it is a run of the experiment
mnist_cnn_pytorch. Needs common/cli.py and the rooms connection, runs, storage and training of
common/.
"""

from pathlib import Path

from common import cli

EXPERIMENT = "mnist_cnn_pytorch"  # the group of runs that this one joins


def build_parser():
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--model_path",
        type=cli.not_empty,
        required=True,
        help="the weights: a .pth, .pt or .safetensors file; with --in_place, .pt2 as well",
    )
    parser.add_argument(
        "--in_place",
        action="store_true",
        help="leave the file where it is, on a shared filesystem, and log where that is (default: "
        "log a copy)",
    )
    parser.add_argument(
        "--model_name",
        type=cli.model_name,
        help="register the model under this name (default: only log it)",
    )
    parser.add_argument(
        "--alias", type=cli.alias, help="alias to point at the new version (default: none)"
    )
    parser.add_argument(
        "--note", default="", help="description shown on the run's page (default: none)"
    )
    cli.add_data_arguments(parser)
    cli.add_server_arguments(parser, EXPERIMENT)
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.alias and not args.model_name:
        parser.error("--alias needs --model_name: an alias belongs to a registered model")

    # Heavy imports wait until the arguments are known to be good, so --help answers at once.
    import os
    import time

    import mlflow

    from common import connection, runs, storage, training

    # 1. Read the weights, connect, score: whatever is wrong shows before anything is logged.
    path = Path(args.model_path)
    if args.in_place:
        path = Path(os.path.abspath(path))
        if path.suffix == ".pt2":  # mapping runs nothing in it, but torch.export.load would
            storage.check_model(path)
        start = time.perf_counter()
        network = storage.map_weights(training.MNISTCNN, path)
        seconds = time.perf_counter() - start
    else:
        network = training.MNISTCNN().eval()
        storage.load_weights(network, path)
    connection.connect(args.tracking_uri, args.ca_bundle, args.experiment, args.workspace)
    if args.model_name:
        runs.check_registrable(args.model_name)  # it may be somebody else's
    test = training.load_data(args.dataset, args.data_dir, train=False)
    scores = training.evaluate(network, test.images, test.labels)
    file = storage.recorded(path, storage.sha256(path))
    print(f"weights  {path}  val_accuracy {scores.accuracy:.4f} on {args.dataset}", flush=True)

    # 2. Log the model, in a run of its own. [MLflow 1] set_experiment: the run joins the others of
    # this experiment, in the UI's left column.
    experiment = mlflow.set_experiment(args.experiment)
    owner = runs.user()
    # [MLflow 2] start_run: one run is one execution of this script. It gets a page with this name.
    with (
        mlflow.start_run(
            experiment_id=experiment.experiment_id,
            run_name=f"MNIST_external_{owner}",
            description=args.note or None,
        ) as run,
        runs.always_ended(),
    ):
        run_id = run.info.run_id
        where = runs.run_address(run)
        print(f"run      {run_id}  experiment {args.experiment}  {where}", flush=True)
        # [MLflow 3] set_tags: words to find the run by; here also which file the weights came from.
        mlflow.set_tags(
            {
                "owner": owner,
                "model.type": "Computer Vision",
                "model.class": type(network).__name__,
                "source.file": path.name,
                "source.sha256": file.sha256,
                **runs.git_tags(__file__),
                **runs.job_tags(),
            }
        )
        # [MLflow 4] log_params: the data set that the score is from.
        mlflow.log_param("dataset", args.dataset)
        # [MLflow 6] log_metrics: comparable with the runs that were trained here.
        mlflow.log_metrics({"val_loss": scores.loss, "val_accuracy": scores.accuracy})
        # [MLflow 7] log_figure: an image in the tab "Artifacts", with no file left behind here.
        title = f"{args.dataset} test set, accuracy {scores.accuracy:.4f}"
        mlflow.log_figure(
            runs.confusion_matrix_figure(test.labels, scores.predictions, test.class_names, title),
            "plots/confusion_matrix.png",
        )
        # [MLflow 8] log_dict: what it predicts for each test image, to check a loaded model by.
        record = runs.record_predictions(args.dataset, test, scores.predictions)
        mlflow.log_dict(record, runs.PREDICTIONS)
        if args.in_place:
            # [MLflow 17] create_external_model: a model whose files MLflow does not keep. It is
            # listed, compared and registered as any other; the tags say where its file is.
            logged = mlflow.create_external_model(name="model", tags=file.tags)
            mlflow.log_outputs([mlflow.entities.LoggedModelOutput(logged.model_id, step=0)])
            mlflow.log_metrics(storage.throughput("load", file.size, seconds))
        else:
            # [MLflow 9] log_model: from here on it is a model like any that was trained here.
            logged = mlflow.pytorch.log_model(
                network,
                name="model",
                input_example=training.input_example(test.images),
                pip_requirements=training.pip_requirements(),
            )
    model_uri = f"models:/{logged.model_id}"

    # 3. Check what is stored, on the whole test set.
    if args.in_place:
        loaded = storage.map_weights(training.MNISTCNN, storage.of_model(model_uri).path)
    else:
        # [MLflow 12] load_model: without the code that made it; nothing in the checked copy runs.
        with storage.checked_copy(model_uri) as folder:
            loaded = mlflow.pytorch.load_model(folder)
    stored = training.evaluate(loaded, test.images, test.labels)
    runs.check_predictions(mlflow.get_run(run_id), test, stored, model_uri)
    result = {"run_id": run_id, "model_uri": model_uri, "val_accuracy": scores.accuracy}

    # 4. Register and promote, on request.
    if args.model_name:
        # [MLflow 10] register_model: a new version under "Models", linked to the run.
        version = mlflow.register_model(
            model_uri, args.model_name, tags=file.tags if args.in_place else None
        )
        print(f"model    {args.model_name} version {version.version}", flush=True)
        result |= {
            "model_name": args.model_name,
            "model_version": str(version.version),
            "model_uri": f"models:/{args.model_name}/{version.version}",
        }
        if args.alias:
            before = runs.alias_version(args.model_name, args.alias)
            # [MLflow 11] set_registered_model_alias: the alias means this version, for everyone.
            mlflow.MlflowClient().set_registered_model_alias(
                args.model_name, args.alias, version.version
            )
            print(
                f"alias    {args.alias}  version {before or 'none'} -> {version.version}",
                flush=True,
            )
            result |= {"alias": args.alias, "previous_version": before}
    cli.print_result(**result)


if __name__ == "__main__":
    cli.run(main)
