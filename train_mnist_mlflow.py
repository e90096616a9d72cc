"""Train a small CNN on MNIST and track the run with MLflow; register and promote it on request.

    python train_mnist_mlflow.py --dataset digits --register
    python train_mnist_mlflow.py --epochs 5 --phase development
    python train_mnist_mlflow.py --epochs 5 --register --phase production --note "Baseline CNN"

You will see the tracking server in use, one line an epoch, and a JSON object as the last line. In
the MLflow UI the run stands in the experiment mnist_cnn_pytorch, with its parameters, curves,
confusion matrix and model; with --register, the model MNIST_CNN has a new version under the alias
production.
"""

from common import cli

EXPERIMENT = "mnist_cnn_pytorch"  # the group of runs that this one joins
MODEL_NAME = "MNIST_CNN"  # the entry in the registry that gets a new version
ALIAS = "production"  # the label that programs load the model by


def build_parser():
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--batch_size",
        type=cli.whole_number(1),
        default=64,
        help="pictures a step, of all processes together (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=cli.whole_number(1),
        default=1,
        help="passes over the training set (default: %(default)s)",
    )
    parser.add_argument(
        "--lr",
        type=cli.learning_rate,
        default=0.001,
        help="learning rate of Adam (default: %(default)s)",
    )
    parser.add_argument(
        "--phase",
        choices=("development", "tuning", "production"),
        default="development",
        help="value of the tag project.phase (default: %(default)s)",
    )
    parser.add_argument(
        "--register",
        action="store_true",
        help=f"register the model and point the alias {ALIAS} at it (default: only track)",
    )
    parser.add_argument(
        "--note", default="", help="description shown on the run's page (default: none)"
    )
    parser.add_argument("--owner", help="value of the tag owner (default: your user name)")
    parser.add_argument(
        "--model_name",
        type=cli.model_name,
        default=MODEL_NAME,
        help="name in the registry, with --register (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=cli.whole_number(0),
        default=0,
        help="seed of the weights and of the order of pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "xpu", "mps"),
        default="auto",
        help="where to train; auto: a GPU if there is one (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="numbers to multiply; auto: bf16 where it is faster (default: %(default)s)",
    )
    cli.add_data_arguments(parser)
    cli.add_server_arguments(parser, EXPERIMENT)
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.model_name != MODEL_NAME and not args.register:
        parser.error("--model_name needs --register")

    # Heavy imports wait until the arguments are known to be good, so --help answers at once.
    import importlib.util

    import mlflow
    import torch

    from common import (
        credentials,
        data,
        ending,
        failures,
        inspection,
        model,
        plots,
        predictions,
        processes,
        provenance,
        runs,
        tracking,
        training,
    )

    # 1. Connect, and load the data: whatever is wrong shows now, not after an epoch.
    failures.explain()  # a server that fails, now or later: two lines and an exit code
    world = processes.join()  # one process, unless torchrun, srun or mpiexec has started several
    if world.rank == 0:
        credentials.send_api_key()  # with every request to it, and with no other
        tracking.connect(args.tracking_uri, args.ca_bundle, args.experiment)
    with processes.in_turn(world):
        train = data.load(args.dataset, args.data_dir, train=True)
        test = data.load(args.dataset, args.data_dir, train=False)

    device = training.best_device(args.device, world.local_rank)
    precision = training.best_precision(args.precision, device)
    torch.manual_seed(args.seed)
    network = model.MNISTCNN().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr, fused=True)
    epochs = training.epochs(
        network, optimizer, train, test, args.epochs, args.batch_size, args.seed, precision
    )
    if world.rank > 0:
        return processes.follow(epochs)  # it trains along, and leaves MLflow to process 0

    # [MLflow 1] set_experiment: the run joins the others of this experiment, on the left in the UI.
    experiment = mlflow.set_experiment(args.experiment)
    tracking.check_artifact_location(experiment.artifact_location)
    owner = args.owner or provenance.user()

    # 2. Train and track. Leaving the `with` block ends the run: FINISHED, FAILED or KILLED.
    # [MLflow 2] start_run: one run is one execution of this script. It gets a page with this name;
    # the experiment is named again because two processes may be creating it at the same moment.
    with (
        mlflow.start_run(
            experiment_id=experiment.experiment_id,
            run_name=f"MNIST_{args.phase}_{owner}",
            description=args.note or None,
            log_system_metrics=importlib.util.find_spec("psutil") is not None,
        ) as run,
        ending.always_ended(processes.another_ended),
    ):
        run_id = run.info.run_id
        print(
            f"run      {run_id}  experiment {args.experiment}  {runs.run_address(run)}", flush=True
        )
        print(f"device   {device.type}  {precision}  processes {world.size}", flush=True)

        # [MLflow 3] set_tags: words to find the run by, in the search bar and on its page.
        mlflow.set_tags(
            {
                "owner": owner,
                "project.phase": args.phase,
                "model.type": "Computer Vision",
                "model.class": type(network).__name__,
                **provenance.git_tags(__file__),
                **provenance.job_tags(),
            }
        )
        # [MLflow 4] log_params: what was set before training; the columns to compare runs by.
        mlflow.log_params(
            {
                "batch_size": args.batch_size,
                "epochs": args.epochs,
                "learning_rate": args.lr,
                "optimizer": type(optimizer).__name__,
                "seed": args.seed,
                "dataset": args.dataset,
                "device": device.type,
                "precision": precision,
                "processes": world.size,
            }
        )
        # [MLflow 5] log_input: which data, by name and digest; under "Datasets" on the page.
        for split, context in ((train, "training"), (test, "validation")):
            dataset = mlflow.data.from_numpy(
                split.images.numpy(),
                targets=split.labels.numpy(),
                name=args.dataset,
                source=split.source,
                digest=split.digest,
            )
            mlflow.log_input(dataset, context=context)

        for epoch in epochs:
            # [MLflow 6] log_metrics: a point on each curve, in one request; tab "Model metrics".
            mlflow.log_metrics(
                {"train_loss": epoch.train_loss, "val_accuracy": epoch.val_accuracy},
                step=epoch.number,
            )
            print(
                f"epoch {epoch.number}/{args.epochs}  loss {epoch.train_loss:.4f}  "
                f"val_accuracy {epoch.val_accuracy:.4f}  {epoch.seconds:.1f} s",
                flush=True,
            )
        processes.leave()

        # Score once more from the CPU, where the model is stored from and where anyone can load it.
        network = network.to("cpu", memory_format=torch.contiguous_format).eval()
        scores = training.evaluate(network, test.images, test.labels)

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
        # [MLflow 9] log_model: weights, signature and requirements, linked from the run's page and
        # loadable without this code.
        logged = mlflow.pytorch.log_model(
            network,
            name="model",
            input_example=model.input_example(test.images),
            pip_requirements=model.pip_requirements(),
            step=args.epochs,
        )
    result = {
        "run_id": run_id,
        "model_uri": logged.model_uri,
        "train_loss": epoch.train_loss,
        "val_accuracy": scores.accuracy,
    }

    # 3. Check, register, promote.
    if args.register:
        with inspection.checked_copy(logged.model_uri) as folder:  # nothing in it runs
            loaded = mlflow.pytorch.load_model(folder)
        stored = training.evaluate(loaded, test.images, test.labels)
        predictions.check(mlflow.get_run(run_id), test, stored)

        # [MLflow 10] register_model: a new version under "Models", linked to the run.
        version = mlflow.register_model(logged.model_uri, args.model_name)
        # [MLflow 11] set_registered_model_alias: @production now means this version, for everyone.
        mlflow.MlflowClient().set_registered_model_alias(args.model_name, ALIAS, version.version)
        print(f"model    {args.model_name} version {version.version}  alias {ALIAS}", flush=True)

        # [MLflow 12] load_model: what a program does that knows no more than the alias.
        alias_uri = f"models:/{args.model_name}@{ALIAS}"
        with inspection.checked_copy(alias_uri) as folder:
            production = mlflow.pytorch.load_model(folder)
        loaded_scores = training.evaluate(production, test.images, test.labels)
        predictions.report(test, loaded_scores, alias_uri)
        result |= {
            "model_name": args.model_name,
            "model_version": str(version.version),
            "model_uri": f"models:/{args.model_name}/{version.version}",
            "alias": ALIAS,
        }
    cli.print_result(**result)


if __name__ == "__main__":
    main()
