"""Train a small CNN on MNIST and track the run with MLflow; register and promote it on request.

    python train_mnist_mlflow.py --dataset digits --register
    python train_mnist_mlflow.py --epochs 5 --phase development
    python train_mnist_mlflow.py --epochs 5 --register --phase production --note "Baseline CNN"

You will see the tracking server in use, one line per epoch, and a JSON object as the last line. In
the MLflow UI the run stands in the experiment mnist_cnn_pytorch, with its parameters, curves,
confusion matrix and model; with --register, the model MNIST_CNN has a new version under the alias
production. Needs common/cli.py and the rooms connection, runs, storage and training of common/.
"""

from common import cli

EXPERIMENT = "mnist_cnn_pytorch"  # the group of runs that this one joins
MODEL_NAME = "MNIST_CNN"  # the entry in the registry that gets a new version
ALIAS = "production"  # the label that programs load the model by


def build_parser():
    parser = cli.parser(__doc__)
    cli.add_training_arguments(parser, MODEL_NAME, ALIAS)
    cli.add_data_arguments(parser)
    cli.add_server_arguments(parser, EXPERIMENT)
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.model_name != MODEL_NAME and not args.register:
        parser.error("--model_name needs --register")

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    import importlib.util

    import mlflow
    import torch

    from common import connection, runs, storage, training

    # 1. Connect, and load the data: whatever is wrong shows now, not after an epoch.
    world = training.join()  # one process, unless torchrun, srun or mpiexec has started several
    if world.rank == 0:  # the one that talks to MLflow
        connection.connect(args.tracking_uri, args.ca_bundle, args.experiment, args.workspace)
    with training.in_turn(world):
        train = training.load_data(args.dataset, args.data_dir, train=True)
        test = training.load_data(args.dataset, args.data_dir, train=False)
    torch.manual_seed(args.seed)
    network = training.MNISTCNN()
    if world.rank == 0:
        runs.check_export(network, training.input_example(test.images))  # can it be stored?
        # [MLflow 1] set_experiment: the run joins the others of this one, on the left in the UI.
        experiment = mlflow.set_experiment(args.experiment)
        runs.check_place(experiment, network)  # can files be written there?
        if args.register:
            runs.check_registrable(args.model_name)  # it may be somebody else's

    device = training.best_device(args.device, world.local_rank)
    precision = training.best_precision(args.precision, device)
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr, fused=True)
    params = {"batch_size": args.batch_size, "epochs": args.epochs, "learning_rate": args.lr}
    params |= {"optimizer": type(optimizer).__name__, "seed": args.seed, "dataset": args.dataset}
    params |= {"device": device.type, "precision": precision, "processes": world.size}
    # With --checkpoint, the next job goes on from here if its settings are the same.
    settings = vars(args) | params | {"data": train.digest + test.digest}
    settings["tracking_uri"] = connection.printable(mlflow.get_tracking_uri()).rstrip("/")
    checkpoint = training.Checkpoint(args.checkpoint, settings, network, optimizer)
    how = (args.epochs, args.batch_size, args.seed, precision, checkpoint)
    epochs = training.epochs(network, optimizer, train, test, *how)
    if world.rank > 0:
        training.follow(epochs)  # trains along, leaves MLflow to process 0, and ends
    ids = (experiment.experiment_id, checkpoint.launch)
    earlier = runs.one_run(*ids, needed=checkpoint.result is not None)
    if checkpoint.result:  # all was done
        return cli.print_result(**checkpoint.result)

    # 2. Train and track. Leaving the `with` block ends the run: FINISHED, FAILED or KILLED.
    # [MLflow 2] start_run: one run is one training, however many jobs it takes. It gets a page with
    # this name; with run_id, MLflow goes on with a run that is there.
    owner = args.owner or runs.user()
    with (
        mlflow.start_run(
            run_id=earlier.info.run_id if earlier else None,
            experiment_id=experiment.experiment_id,
            run_name=None if earlier else f"MNIST_{args.phase}_{owner}",
            description=args.note or None,
            tags={"launch": checkpoint.launch},
            log_system_metrics=importlib.util.find_spec("psutil") is not None,
        ) as run,
        runs.always_ended(),
        checkpoint,
    ):
        # If a response is lost, MLflow sends the request again, and the server makes a duplicate.
        run_id = runs.one_run(*ids, made=run).info.run_id
        print(f"run      {run_id}  {runs.run_address(run)}", flush=True)
        print(f"device   {device.type}  {precision}  processes {world.size}", flush=True)
        # [MLflow 3] set_tags: words to find the run by, in the search bar and on its page.
        tags = {"owner": owner, "project.phase": args.phase, "model.type": "Computer Vision"}
        what = f"{args.dataset}, {args.epochs} epochs, batch {args.batch_size}, lr {args.lr:g}"
        tags |= {"model.class": type(network).__name__, "settings": f"{what}, seed {args.seed}"}
        mlflow.set_tags(tags | runs.git_tags(__file__) | runs.job_tags(earlier))
        # [MLflow 4] log_params: what was set before training; the columns to compare runs by.
        mlflow.log_params(params)
        # [MLflow 5] log_input: which data, by name and digest; under "Datasets" on the page.
        for split, context in ((train, "training"), (test, "validation")):
            images, labels = split.images.numpy(), split.labels.numpy()
            dataset = mlflow.data.from_numpy(
                images, split.source, labels, name=args.dataset, digest=split.digest
            )
            runs.patiently(mlflow.log_input, dataset, context=context)

        for epoch in epochs:
            words = f"loss {epoch.train_loss:.4f}  val_accuracy {epoch.val_accuracy:.4f}"
            print(f"epoch {epoch.number}/{args.epochs}  {words}  {epoch.seconds:.1f} s", flush=True)
            # [MLflow 6] log_metrics: a point on each curve, in one request; tab "Model metrics".
            # With its own time, so that a point which is sent again stays one point.
            results = {"train_loss": epoch.train_loss, "train_accuracy": epoch.train_accuracy}
            results |= {"val_loss": epoch.val_loss, "val_accuracy": epoch.val_accuracy}
            mlflow.log_metrics(results, step=epoch.number, timestamp=epoch.ended)
        training.leave()

        print("score    once more, on the CPU; then the model is stored from there", flush=True)
        network = network.to("cpu", memory_format=torch.contiguous_format).eval()
        scores = training.evaluate(network, test.images, test.labels)

        # [MLflow 7] log_figure: an image in the tab "Artifacts", with no file left behind here.
        title = f"{args.dataset} test set, accuracy {scores.accuracy:.4f}"
        mlflow.log_figure(
            runs.confusion_matrix_figure(test.labels, scores.predictions, test.class_names, title),
            "plots/confusion_matrix.png",
        )
        # [MLflow 8] log_dict: what it predicts for each test image, to check a loaded model by.
        record = runs.record_predictions(args.dataset, test, scores.predictions)
        mlflow.log_dict(record, runs.PREDICTIONS)
        # [MLflow 9] log_model: weights, signature and requirements, linked from the run's page and
        # loadable without this code.
        if not runs.ready_model(run):  # else an earlier job has logged it
            mlflow.pytorch.log_model(
                network,
                name="model",
                input_example=training.input_example(test.images),
                pip_requirements=training.pip_requirements(),
                step=args.epochs,
                metadata={"input": training.INPUT},  # in the file MLmodel
                tags={"input": training.INPUT},  # on the model's page
            )
        model_uri = runs.ready_model(run)
    result = {"run_id": run_id, "model_uri": model_uri}
    result |= {"train_loss": epoch.train_loss, "val_accuracy": scores.accuracy}

    # 3. Check what was stored, register it, promote it.
    if args.register:
        # [MLflow 12] load_model: anywhere, without the code that made it. Programs name the model
        # by its alias, models:/MNIST_CNN@production. Nothing in the checked copy runs. It stays in
        # eval mode: call it as it is, for .eval() raises NotImplementedError.
        with storage.checked_copy(model_uri) as folder:
            loaded = mlflow.pytorch.load_model(folder)
        stored = training.evaluate(loaded, test.images, test.labels)
        runs.check_predictions(mlflow.get_run(run_id), test, stored, model_uri)

        # [MLflow 10] register_model: a new version under "Models", linked to the run.
        facts, words = runs.facts(run_id, args.dataset, test, scores.accuracy, training.INPUT)
        version = runs.one_version(args.model_name, checkpoint.launch)  # by an earlier job
        if not version:
            tags = {"launch": checkpoint.launch} | facts
            version = mlflow.register_model(model_uri, args.model_name, tags=tags)
            runs.one_version(args.model_name, checkpoint.launch, made=version)
        print(f"model    {args.model_name} version {version.version}", flush=True)
        # update_model_version: the description, on the version's page.
        client = mlflow.MlflowClient()
        client.update_model_version(args.model_name, version.version, description=words)
        before = runs.alias_version(args.model_name, ALIAS)
        # [MLflow 11] set_registered_model_alias: @production now means this version, for everyone.
        client.set_registered_model_alias(args.model_name, ALIAS, version.version)
        result |= runs.moved(version, ALIAS, before)
    cli.print_result(**result)
    checkpoint.finish(result)


if __name__ == "__main__":
    cli.run(main)
