"""Search for the best settings with Optuna: one parent run, one child run per trial (guide 5).

    python scripts/tune_fashion_mnist.py --dataset digits --trials 6 --epochs 3
    python scripts/tune_fashion_mnist.py --trials 40 --jobs 4 --storage sqlite:///study.db
    python scripts/tune_fashion_mnist.py --config scripts/cfg/search.yaml

Trials that do worse than most before them are stopped early ("pruned"). With --storage, a study
that was interrupted goes on where it was, and the same command on several nodes works on one study;
between nodes, name a file on the shared filesystem instead of SQLite: --storage /shared/study.log.
You will see one line per trial, and a JSON object as the last line. In the MLflow UI the study is a
run in "Image classification" with its trials folded below it, two figures of the study, and the
best settings; the best trial has the tag best. Its model is registered like any other's. Needs
common/cli.py, the rooms connection, runs, storage and training of common/, and scripts/figures.py,
networks.py, settings.py and studies.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common/ is

from common import cli
from common.errors import UserError
from scripts import settings

EXPERIMENT = "Image classification"  # the group of runs that this one joins
STUDY = "fashion_mnist"  # a study of this name in the same storage goes on


def build_parser():
    parser = cli.parser(__doc__)
    settings.add_config_argument(parser)
    parser.add_argument(
        "--trials",
        type=cli.whole_number(1),
        default=10,
        help="how many trials the study shall have, pruned ones included (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=cli.whole_number(1),
        default=5,
        help="passes over the training set in each trial (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs",
        type=cli.whole_number(1),
        default=1,
        help="how many trials run at a time, each in its own process (default: %(default)s)",
    )
    parser.add_argument(
        "--storage",
        type=cli.path,
        help="where the study is kept: sqlite:///FILE, another database, or the path of a log file "
        "(default: it is not kept)",
    )
    parser.add_argument(
        "--study",
        type=cli.not_empty,
        default=STUDY,
        help="name of the study (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=cli.whole_number(0),
        default=0,
        help="seed of the search, the weights and the split (default: %(default)s)",
    )
    cli.add_data_arguments(parser, dataset="fashion_mnist")
    cli.add_server_arguments(parser, EXPERIMENT)
    return parser


def main(argv=None):
    args = settings.parse_with_config(build_parser(), argv)

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    import contextlib
    import tempfile

    import mlflow
    import optuna

    from common import connection, runs, training
    from scripts import networks, studies

    # 1. Connect, load the data, open the study: whatever is wrong shows now.
    connection.connect(args.tracking_uri, args.ca_bundle, args.experiment, args.workspace)
    splits = networks.hold_out(
        training.load_data(args.dataset, args.data_dir, train=True), seed=args.seed
    )
    test = training.load_data(args.dataset, args.data_dir, train=False)
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would print each trial a second time

    # set_experiment: like a project folder; on the left in the UI.
    experiment = mlflow.set_experiment(args.experiment)
    runs.check_place(experiment)  # can files be written there?
    with contextlib.ExitStack() as stack:
        if not args.storage:  # a temporary log file, which the processes of --jobs share
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            args.storage = f"{folder}/study.log"
        fixed = {name: getattr(args, name) for name in ("dataset", "epochs", "seed")}
        study, parent_run_id = studies.join(args.storage, args.study, fixed)

        if parent_run_id:
            parent = runs.existing_run(parent_run_id)  # it may have been begun on another server
            studies.check_parent(parent, experiment, args.study)

        # 2. The parent run. With run_id, start_run opens the run of a study that goes on again.
        stack.enter_context(
            mlflow.start_run(
                run_id=parent_run_id,
                experiment_id=None if parent_run_id else experiment.experiment_id,
                run_name=None if parent_run_id else f"study {args.study}",
            )
        )
        stack.enter_context(runs.always_ended())
        parent = mlflow.active_run()
        print(f"run      {parent.info.run_id}  {runs.run_address(parent)}", flush=True)
        print(f"study    {args.study}", flush=True)
        if not parent_run_id:
            # set_tags, log_params: what holds for all trials stands with the parent.
            mlflow.set_tags(
                {
                    "optuna.study": args.study,
                    "owner": runs.user(),
                    **runs.git_tags(__file__),
                    **runs.job_tags(),
                }
            )
            mlflow.log_params(fixed)
            # Whoever joins the study from now on finds the parent run here.
            study.set_user_attr("parent_run_id", parent.info.run_id)

        # 3. The trials: in this process, or in several.
        missing = args.trials - len(studies.finished_trials(study))
        if args.jobs == 1:
            work(args, splits, parent.info.run_id, missing)
        else:
            work_in_processes(args, splits, parent.info.run_id, missing)

        # 4. Log the outcome to the parent run.
        result = conclude(study, test)
    cli.print_result(run_id=parent.info.run_id, **result)


def work(args, splits, parent_run_id, count, worker=0):
    """Run up to `count` trials, as long as the study has fewer than --trials."""
    import mlflow
    import optuna
    import torch

    from common import runs, training
    from scripts import networks, studies

    train, validation = splits
    study = optuna.load_study(
        storage=studies.open_storage(args.storage),
        study_name=args.study,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3),
    )
    # A study that goes on, or another process, must not try the same settings again.
    seed = args.seed + 1000 * len(study.get_trials(deepcopy=False)) + worker
    study.sampler = optuna.samplers.TPESampler(seed=seed % 2**32)
    experiment_id = mlflow.get_run(parent_run_id).info.experiment_id
    for _ in range(count):
        if len(studies.finished_trials(study)) >= args.trials:
            break
        trial = study.ask()
        lr = trial.suggest_float("learning_rate", 1e-4, 3e-2, log=True)
        batch_size = trial.suggest_categorical("batch_size", [32, 64, 128])
        dropout = trial.suggest_float("dropout", 0.0, 0.5)
        torch.manual_seed(args.seed + trial.number)
        network = networks.SimpleCNN(dropout).to(training.best_device())
        optimizer = torch.optim.Adam(network.parameters(), lr=lr)
        try:
            # start_run with parent_run_id: a child run, folded below the study in the UI.
            with (
                mlflow.start_run(
                    experiment_id=experiment_id,
                    run_name=f"trial {trial.number}",
                    nested=True,
                    parent_run_id=parent_run_id,
                ) as run,
                runs.always_ended(),
            ):
                trial.set_user_attr("run_id", run.info.run_id)
                # log_params: the columns to compare trials by, in the UI's chart view too.
                mlflow.log_params({**trial.params, "epochs": args.epochs, "dataset": args.dataset})
                for epoch in training.epochs(
                    network, optimizer, train, validation, args.epochs, batch_size, args.seed
                ):
                    # log_metrics: a point on each curve; in the child run, which is the open one.
                    mlflow.log_metrics(
                        {
                            "train_loss": epoch.train_loss,
                            "train_accuracy": epoch.train_accuracy,
                            "val_loss": epoch.val_loss,
                            "val_accuracy": epoch.val_accuracy,
                        },
                        step=epoch.number,
                    )
                    trial.report(epoch.val_accuracy, epoch.number)
                    pruned = trial.should_prune() and epoch.number < args.epochs
                    if pruned:
                        break
                state = "pruned" if pruned else "complete"
                # set_tags: a pruned trial is no failure, its run ends as FINISHED; this tells them
                # apart. Search for tags.optuna.state = 'complete'.
                mlflow.set_tags({"optuna.trial": trial.number, "optuna.state": state})
                if not pruned:
                    # log_model: any trial may turn out to be the best one.
                    mlflow.pytorch.log_model(
                        network.cpu().eval(),
                        name="model",
                        input_example=training.input_example(validation.images),
                        pip_requirements=training.pip_requirements(),
                        step=epoch.number,
                    )
        except BaseException:  # a signal, too: the study must not wait for this trial
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            studies.end_half_open_child(experiment_id, parent_run_id, f"trial {trial.number}")
            raise
        if pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, epoch.val_accuracy)
        print(
            f"trial    {trial.number}  val_accuracy {epoch.val_accuracy:.4f}  {state} after epoch "
            f"{epoch.number}  learning_rate {lr:.5f}  batch_size {batch_size}  "
            f"dropout {dropout:.2f}",
            flush=True,
        )


def work_in_processes(args, splits, parent_run_id, count):
    """Divide the trials among processes: torch's seed and MLflow's open run are per process."""
    import multiprocessing
    import time

    context = multiprocessing.get_context("spawn")  # a forked process could not use the GPU
    processes = []
    print(
        f"trials   {count}  in {args.jobs} processes; a line at the end of each",
        flush=True,
    )
    try:
        for worker in range(min(args.jobs, count)):
            share = len(range(worker, count, args.jobs))
            arguments = (args, splits, parent_run_id, share, worker)
            processes.append(context.Process(target=work_alone, args=arguments))
            processes[-1].start()
        for process in processes:
            process.join()
    finally:
        # Ctrl-C, and a batch system's signal, reach them as well. They end their runs as KILLED; a
        # second signal would kill them before that is done, so they get a moment first.
        deadline = time.monotonic() + 3
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        for process in processes:
            process.terminate()  # SIGTERM, for those that no signal has reached
        for process in processes:
            process.join()
    if codes := [process.exitcode for process in processes if process.exitcode]:
        raise UserError(
            "a process of the study ended early; its message stands above.",
            "with --storage, the same command goes on with the study.",
            max(*codes, 1),  # a negative code: killed, for lack of memory, say
        )


def work_alone(args, splits, parent_run_id, count, worker):
    """`work` in a process of its own: the address and TLS are in variables that it inherits."""
    import mlflow
    import optuna
    import torch

    from common import connection

    cli.guard()
    connection.settle()
    if mlflow.get_tracking_uri().startswith("http"):
        connection.trust()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(max(1, torch.get_num_threads() // args.jobs))
    try:
        work(args, splits, parent_run_id, count, worker)
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 (said as in the main process, which also exits)
        # Otherwise multiprocessing prints a traceback, with whatever a server put into it.
        cli.print_and_exit(type(error), error, error.__traceback__)
        raise SystemExit(1) from None


def conclude(study, test):
    """Mark the best trial, score its model on the test set, and log all that to the parent run."""
    import mlflow
    from optuna.trial import TrialState

    from common import runs, storage, training
    from scripts import figures, studies

    client, parent, best = mlflow.MlflowClient(), mlflow.active_run(), study.best_trial
    trials = studies.finished_trials(study)
    pruned = sum(trial.state == TrialState.PRUNED for trial in trials)
    best_run = runs.finished_run(best.user_attrs["run_id"])
    marked = mlflow.search_runs(
        experiment_ids=[parent.info.experiment_id],
        filter_string=f"tags.mlflow.parentRunId = '{parent.info.run_id}' AND tags.best = 'true'",
        output_format="list",
    )
    for run in marked:  # from before the study was continued
        if run.info.run_id != best_run.info.run_id:
            client.set_tag(run.info.run_id, "best", "false")
    # set_tag with a run's id: the best child, found by tags.best = 'true'.
    client.set_tag(best_run.info.run_id, "best", "true")

    with storage.checked_copy(runs.model_uri(best_run)) as folder:  # nothing in it runs
        network = mlflow.pytorch.load_model(folder)
    scores = training.evaluate(network, test.images, test.labels)
    # log_metrics: of the best trial, and only of that one on the test set.
    mlflow.log_metrics(
        {
            "best_val_accuracy": best.value,
            "test_accuracy": scores.accuracy,
            "trials": len(trials),
            "trials_pruned": pruned,
        }
    )
    # The best settings. Parameters are written once: if the study goes on and finds a better trial,
    # only the tags change.
    settings = {f"best_{name}": value for name, value in best.params.items()}
    mlflow.set_tags({"best_run_id": best_run.info.run_id, **settings})
    if not settings.keys() & mlflow.get_run(parent.info.run_id).data.params.keys():
        mlflow.log_params(settings)

    # log_figure: two figures of the study, under "Artifacts".
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    mlflow.log_figure(
        figures.search_figure(
            [trial.number for trial in complete],
            [trial.value for trial in complete],
            {name: [trial.params[name] for trial in complete] for name in best.params},
            f"study {study.study_name}: {len(complete)} complete trials",
            "val_accuracy",
        ),
        "study/trials.png",
    )
    curves = {f"trial {trial.number}": trial.intermediate_values.items() for trial in trials}
    mlflow.log_figure(
        figures.curves_figure(
            curves,
            f"study {study.study_name}: {len(trials) - len(complete)} of {len(trials)} pruned",
            "val_accuracy",
        ),
        "study/val_accuracy.png",
    )
    print(
        f"best     trial {best.number}  val_accuracy {best.value:.4f}  "
        f"test_accuracy {scores.accuracy:.4f}  run {best_run.info.run_id}",
        flush=True,
    )
    return {
        "study": study.study_name,
        "trials": len(trials),
        "pruned": pruned,
        "best_trial": best.number,
        "best_run_id": best_run.info.run_id,
        "best_params": best.params,
        "best_val_accuracy": best.value,
        "test_accuracy": scores.accuracy,
    }


if __name__ == "__main__":
    cli.run(main)
