"""Bring a model that was trained elsewhere to MLflow: check its weights, log it, register it.

    python upload_external_model.py --model_path my_local_mnist_model.pth
    python upload_external_model.py --model_path model.pth --model_name MNIST_CNN --alias candidate
    python upload_external_model.py --model_path <weights on a shared filesystem> --in_place

The file holds a state dict (`torch.save(model.state_dict(), path)`, or safetensors) of the network
in common/model.py; no code in it is run. With --in_place it stays where it is, and only its path,
size and SHA-256 are logged. You will see its accuracy on the test set,
the model's address, and a JSON object as the last line. In the MLflow UI it is a run of the
experiment mnist_cnn_pytorch.
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

    import mlflow

    from common import (
        archive,
        cost,
        credentials,
        data,
        ending,
        failures,
        inspection,
        mapped,
        model,
        model_file,
        plots,
        predictions,
        provenance,
        runs,
        tracking,
        training,
        weights,
    )

    # 1. Read the weights, connect, score: whatever is wrong shows before anything is logged.
    failures.explain()  # a server that fails, now or later: two lines and an exit code
    credentials.send_api_key()  # with every request to it, and with no other
    path = Path(args.model_path)
    if args.in_place:
        path = Path(os.path.abspath(path))
        with cost.measured() as loading:
            network = mapped.load(model.MNISTCNN, path)
    else:
        network = model.MNISTCNN().eval()
        weights.load(network, path)
    tracking.connect(args.tracking_uri, args.ca_bundle, args.experiment)
    test = data.load(args.dataset, args.data_dir, train=False)
    scores = training.evaluate(network, test.images, test.labels)
    file = model_file.recorded(path, model_file.sha256(path))
    print(f"weights  {path}  val_accuracy {scores.accuracy:.4f} on {args.dataset}", flush=True)

    # 2. Log the model, in a run of its own. [MLflow 1] set_experiment: the run joins the others of
    # this experiment, in the UI's left column.
    experiment = mlflow.set_experiment(args.experiment)
    tracking.check_artifact_location(experiment.artifact_location)
    owner = provenance.user()
    # [MLflow 2] start_run: one run is one execution of this script. It gets a page with this name.
    with (
        mlflow.start_run(
            experiment_id=experiment.experiment_id,
            run_name=f"MNIST_external_{owner}",
            description=args.note or None,
        ) as run,
        ending.always_ended(),
    ):
        run_id = run.info.run_id
        print(
            f"run      {run_id}  experiment {args.experiment}  {runs.run_address(run)}", flush=True
        )
        # [MLflow 3] set_tags: words to find the run by; here also which file the weights came from.
        mlflow.set_tags(
            {
                "owner": owner,
                "model.type": "Computer Vision",
                "model.class": type(network).__name__,
                "source.file": path.name,
                "source.sha256": file.sha256,
                **provenance.git_tags(__file__),
                **provenance.job_tags(),
            }
        )
        # [MLflow 4] log_params: the data set that the score is from.
        mlflow.log_param("dataset", args.dataset)
        # [MLflow 6] log_metrics: comparable with the runs that were trained here.
        mlflow.log_metrics({"val_loss": scores.loss, "val_accuracy": scores.accuracy})
        # [MLflow 7] log_figure: a picture in the tab "Artifacts", with no file left behind here.
        mlflow.log_figure(
            plots.confusion_matrix_figure(
                test.labels,
                scores.predictions,
                test.class_names,
                f"{args.dataset} test set, accuracy {scores.accuracy:.4f}",
            ),
            "plots/confusion_matrix.png",
        )
        # [MLflow 8] log_dict: what it predicts for each test picture, to check a loaded model by.
        mlflow.log_dict(
            predictions.record(args.dataset, test, scores.predictions), predictions.ARTIFACT
        )
        if args.in_place:
            # [MLflow 17] create_external_model: a model whose files MLflow does not keep. It is
            # listed, compared and registered as any other; the tags say where its file is.
            logged = mlflow.create_external_model(name="model", tags=file.tags)
            mlflow.log_outputs([mlflow.entities.LoggedModelOutput(logged.model_id, step=0)])
            mlflow.log_metrics(loading.report("load", file.size))
        else:
            # [MLflow 9] log_model: from here on it is a model like any that was trained here.
            logged = mlflow.pytorch.log_model(
                network,
                name="model",
                input_example=model.input_example(test.images),
                pip_requirements=model.pip_requirements(),
            )
    model_uri = f"models:/{logged.model_id}"

    # 3. Check what is stored, on the whole test set.
    if args.in_place:
        stored = model_file.of_model(model_uri, archive.MODEL_FILE)
        loaded = mapped.load(model.MNISTCNN, stored.path)
    else:
        with inspection.checked_copy(model_uri) as folder:  # nothing in it runs
            loaded = mlflow.pytorch.load_model(folder)
    loaded_scores = training.evaluate(loaded, test.images, test.labels)
    predictions.check(mlflow.get_run(run_id), test, loaded_scores)
    predictions.report(test, loaded_scores, model_uri)
    result = {"run_id": run_id, "model_uri": model_uri, "val_accuracy": scores.accuracy}

    # 4. Register and promote, on request.
    if args.model_name:
        # [MLflow 10] register_model: a new version under "Models", linked to the run.
        version = mlflow.register_model(
            model_uri, args.model_name, tags=file.tags if args.in_place else None
        )
        result |= {
            "model_name": args.model_name,
            "model_version": str(version.version),
            "model_uri": f"models:/{args.model_name}/{version.version}",
        }
        if args.alias:
            # [MLflow 11] set_registered_model_alias: the alias means this version, for everyone.
            mlflow.MlflowClient().set_registered_model_alias(
                args.model_name, args.alias, version.version
            )
            result["alias"] = args.alias
        print(f"model    {args.model_name} version {version.version}  alias {args.alias or '-'}")
    cli.print_result(**result)


if __name__ == "__main__":
    main()
