"""Train as train_mnist_mlflow.py does, with the heavy files on a shared filesystem (large models).

    python Modify_artifact_location.py --epochs 5 --phase development --target_path <shared folder>

Metadata goes to the tracking server; the model and the plots are written once, straight to
--target_path (the model alone if the server has workspaces). You will see the path of the file,
what writing it took, and a JSON object as the last line. In the MLflow UI the model has its size
and SHA-256 as tags. Needs common/cli.py, and of common/ connection, runs, storage, training.
"""

from common import cli

EXPERIMENT = "mnist_cnn_pytorch_shared"  # its runs keep their files on --target_path
MODEL_NAME = "MNIST_CNN"  # the entry in the registry that gets a new version
ALIAS = "production"  # the label that programs load the model by


def build_parser():
    parser = cli.parser(__doc__)
    cli.add_training_arguments(parser, MODEL_NAME, ALIAS)
    use = "folder on the shared filesystem, fixed for the experiment by its first run"
    parser.add_argument("--target_path", type=cli.path, required=True, metavar="DIR", help=use)
    cli.add_data_arguments(parser)
    cli.add_server_arguments(parser, EXPERIMENT)
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.model_name != MODEL_NAME and not args.register:
        parser.error("--model_name needs --register")

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    import functools
    import importlib.util

    import mlflow
    import torch

    from common import connection, runs, storage, training

    # 1. Connect, check the folder, and load the data: whatever is wrong shows now.
    world = training.join()  # one process, unless torchrun, srun or mpiexec has started several
    if world.rank == 0:  # the one that talks to MLflow
        folder = storage.prepare(args.target_path)
        connection.connect(args.tracking_uri, args.ca_bundle, args.experiment, args.workspace)
    with training.in_turn(world):
        train = training.load_data(args.dataset, args.data_dir, train=True)
        test = training.load_data(args.dataset, args.data_dir, train=False)
    torch.manual_seed(args.seed)
    network = training.MNISTCNN()
    if world.rank == 0:
        storage.check_space(folder, network)
        runs.check_export(network, training.input_example(test.images))  # can it be stored?
        # [MLflow 13] create_experiment: the only place where an artifact location can be set, to
        # which MLflow writes from here. With workspaces none can be: the model's tags say it then.
        create = functools.partial(runs.patiently, mlflow.create_experiment)
        external = storage.place_experiment(args.experiment, folder, create)
        # [MLflow 1] set_experiment: the run joins the others of this one, on the left in the UI.
        experiment = mlflow.set_experiment(args.experiment)
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
    # [MLflow 2] start_run: a page of this name; with run_id, MLflow goes on with that run.
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
        own = storage.claim(run.info.artifact_uri)  # so nobody else can plant links there
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
        discard = functools.partial(storage.remove_unfinished, folder)
        if not runs.ready_model(run, discard):  # else an earlier job has saved it
            save_model_once(network, test.images, args.epochs, external)
        model_uri = runs.ready_model(run, discard)
        file = storage.of_model(model_uri)
        storage.open_to_group(own)
    result = {"run_id": run_id, "model_uri": model_uri, "model_path": str(file.path)}
    result |= {"train_loss": epoch.train_loss, "val_accuracy": scores.accuracy}

    # 3. Check what was stored, register it, promote it.
    if args.register:
        # Map it, as a program does that knows the alias: storage.of_alias(name, alias).path.
        loaded = storage.map_weights(training.MNISTCNN, file.path)
        stored = training.evaluate(loaded, test.images, test.labels)
        runs.check_predictions(mlflow.get_run(run_id), test, stored, model_uri)

        # [MLflow 10] register_model: a new version under "Models"; it points at the path.
        facts, words = runs.facts(run_id, args.dataset, test, scores.accuracy, training.INPUT)
        version = runs.one_version(args.model_name, checkpoint.launch)  # by an earlier job
        if not version:
            tags = {"launch": checkpoint.launch} | file.tags | facts
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


def save_model_once(network, images, step, external=None):
    """Write the model straight to its final folder: MLflow's, or one of the run's in `external`."""
    import mlflow
    import torch

    from common import storage, training

    example = training.input_example(images)
    answer = network(torch.from_numpy(example)).detach().numpy()
    run_id, tags = mlflow.active_run().info.run_id, {"input": training.INPUT}
    about = {"run_id": run_id, "metadata": tags}  # what stands in the file MLmodel
    if external:
        path = external / run_id / "artifacts"
        storage.remove_unfinished(external, path.as_uri())  # by an earlier job, unknown to MLflow
    else:
        # [MLflow 14] initialize_logged_model: its id, and so the folder, before a byte is written.
        logged = mlflow.initialize_logged_model(name="model")
        path = storage.path_of(logged.artifact_location)
        about |= {"model_id": logged.model_id, "model_uuid": logged.model_id}
    description = mlflow.models.Model(artifact_path=path.as_uri(), **about)

    def save(network):
        # [MLflow 15] save_model: what log_model does, without the upload, and without writing it
        # to TMPDIR first, which is memory on many compute nodes.
        mlflow.pytorch.save_model(
            network,
            path=folder,
            mlflow_model=description,
            input_example=example,
            signature=mlflow.models.infer_signature(example, answer),
            pip_requirements=training.pip_requirements(),
        )

    with storage.staged(path, own=True) as folder:  # whole, or not at all
        sha256, seconds = storage.write_model(folder, network, save)  # at the disk's speed
    file = storage.recorded(path / storage.MODEL_FILE, sha256)
    print(f"file     {file.path}", flush=True)
    if external:
        # [MLflow 17] create_external_model: MLflow keeps no file of it; the tags say where it is.
        logged = mlflow.create_external_model(name="model", tags=file.tags | tags)
        print(f"external load_model('{path}') works, 'models:/NAME' does not", flush=True)
    else:
        mlflow.set_logged_model_tags(logged.model_id, file.tags | tags)
    # [MLflow 16] finalize_logged_model: READY, and by log_outputs linked from the run's page.
    mlflow.log_outputs([mlflow.entities.LoggedModelOutput(logged.model_id, step=step)])
    if not external:  # else it is READY
        mlflow.finalize_logged_model(logged.model_id, "READY")
    mlflow.log_metrics(storage.throughput("write", file.size, seconds))


if __name__ == "__main__":
    cli.run(main)
