"""Bring a model that was trained elsewhere to MLflow: check its weights, log it, register it.

    python upload_external_model.py --model_path my_local_mnist_model.pth
    python upload_external_model.py --model_path model.pth --model_name MNIST_CNN --alias staging
    python upload_external_model.py --model_path <weights on a shared filesystem> --in_place
    python upload_external_model.py --model_path model.pth --dataset none

The file holds a state dict (`torch.save(model.state_dict(), path)`, or safetensors) of the network
in common/training/networks.py; no code in it is run. With --in_place it stays where it is, and only
its path, size and SHA-256 are logged. You will see its accuracy on the test set, the stored model
checked, and a JSON object as the last line; with --dataset none, where no data can be had, there is
no score. In the MLflow UI it is a run of the experiment mnist_cnn_pytorch. Needs common/cli.py and
the rooms connection, runs, storage and training of common/.
"""

from pathlib import Path

from common import cli
from common.errors import UserError

EXPERIMENT = "mnist_cnn_pytorch"  # the group of runs that this one joins


def build_parser():
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--model_path",
        type=cli.path,
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
    cli.add_data_arguments(parser, more=("none",))
    cli.add_server_arguments(parser, EXPERIMENT)
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.alias and not args.model_name:
        parser.error("--alias needs --model_name: an alias belongs to a registered model")

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
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
        storage.check_numbers(network, path)
    else:
        network = training.MNISTCNN().eval()
        storage.load_weights(network, path)
    connection.connect(args.tracking_uri, args.ca_bundle, args.experiment, args.workspace)
    if args.model_name:
        runs.check_registrable(args.model_name)  # it may be somebody else's
    scored = args.dataset != "none"
    test = training.load_data(args.dataset, args.data_dir, train=False) if scored else noise()
    scores = training.evaluate(network, test.images, test.labels)
    file = storage.recorded(path, storage.sha256(path))
    score = f"val_accuracy {scores.accuracy:.4f} on {args.dataset}" if scored else "not scored"
    print(f"weights  {path}  {score}", flush=True)

    # 2. Log the model, in a run of its own. [MLflow 1] set_experiment: the run joins the others of
    # this experiment, in the UI's left column.
    experiment = mlflow.set_experiment(args.experiment)
    runs.check_place(experiment, None if args.in_place else network)  # can files be written there?
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
        print(f"run      {run_id}  {runs.run_address(run)}", flush=True)
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
        if scored:
            # [MLflow 4] log_params: the data set that the score is from.
            mlflow.log_param("dataset", args.dataset)
            # [MLflow 6] log_metrics: comparable with the runs that were trained here.
            mlflow.log_metrics({"val_loss": scores.loss, "val_accuracy": scores.accuracy})
            # [MLflow 7] log_figure: an image in the tab "Artifacts", with no file left behind here.
            title = f"{args.dataset} test set, accuracy {scores.accuracy:.4f}"
            shown = (test.labels, scores.predictions, test.class_names, title)
            figure = runs.confusion_matrix_figure(*shown)
            mlflow.log_figure(figure, "plots/confusion_matrix.png")
            # [MLflow 8] log_dict: what it predicts for each test image, to check a loaded model by.
            record = runs.record_predictions(args.dataset, test, scores.predictions)
            mlflow.log_dict(record, runs.PREDICTIONS)
        tags = {"input": training.INPUT}  # on the model's page
        if args.in_place:
            # [MLflow 17] create_external_model: a model whose files MLflow does not keep. It is
            # listed, compared and registered as any other; the tags say where its file is.
            logged = mlflow.create_external_model(name="model", tags=file.tags | tags)
            mlflow.log_outputs([mlflow.entities.LoggedModelOutput(logged.model_id, step=0)])
            mlflow.log_metrics(storage.throughput("load", file.size, seconds))
        else:
            # [MLflow 9] log_model: from here on it is a model like any that was trained here.
            logged = mlflow.pytorch.log_model(
                network,
                name="model",
                input_example=training.input_example(test.images),
                pip_requirements=training.pip_requirements(),
                metadata=tags,  # in the file MLmodel
                tags=tags,
            )
    model_uri = f"models:/{logged.model_id}"

    # 3. Check what is stored, on the whole test set, or on random images.
    if args.in_place:
        loaded = storage.map_weights(training.MNISTCNN, storage.of_model(model_uri).path)
    else:
        # [MLflow 12] load_model: without the code that made it; nothing in the checked copy runs.
        # It is in eval mode for good: call it; .eval() raises NotImplementedError.
        with storage.checked_copy(model_uri) as folder:
            loaded = mlflow.pytorch.load_model(folder)
    stored = training.evaluate(loaded, test.images, test.labels)
    result = {"run_id": run_id, "model_uri": model_uri, "val_accuracy": None}
    if scored:
        runs.check_predictions(mlflow.get_run(run_id), test, stored, model_uri)
        result["val_accuracy"] = scores.accuracy
        facts, words = runs.facts(run_id, args.dataset, test, scores.accuracy, training.INPUT)
    else:
        if not stored.predictions.equal(scores.predictions):
            what = "the stored model predicts something else than the weights for random images."
            raise UserError(what, "was the file changed meanwhile? Nothing was registered.")
        print(f"check    {model_uri}  as the weights on {len(test.labels)} random images  no score")
        facts = tags | {"run_id": run_id}
        words = f"Uploaded without a score, by run {run_id}. Input: {training.INPUT}"

    # 4. Register and promote, on request.
    if args.model_name:
        # [MLflow 10] register_model: a new version under "Models", linked to the run.
        tags = facts | (file.tags if args.in_place else {})
        version = mlflow.register_model(model_uri, args.model_name, tags=tags)
        print(f"model    {args.model_name} version {version.version}", flush=True)
        # update_model_version: the description, on the version's page.
        client = mlflow.MlflowClient()
        client.update_model_version(args.model_name, version.version, description=words)
        result |= {
            "model_name": args.model_name,
            "model_version": str(version.version),
            "model_uri": f"models:/{args.model_name}/{version.version}",
        }
        if args.alias:
            before = runs.alias_version(args.model_name, args.alias)
            # [MLflow 11] set_registered_model_alias: the alias means this version, for everyone.
            client.set_registered_model_alias(args.model_name, args.alias, version.version)
            result |= runs.moved(version, args.alias, before)
    cli.print_result(**result)


def noise():
    """Return random images in place of a data set: two networks can be compared on them."""
    import torch

    from common import training

    size, random = (1000, 1, 28, 28), torch.Generator().manual_seed(0)
    images = torch.randint(256, size, generator=random, dtype=torch.uint8)
    return training.Split(images, torch.zeros(1000, dtype=torch.int64), [], "none")


if __name__ == "__main__":
    cli.run(main)
