"""Bring the runs of a local store to a tracking server: for jobs on nodes without a network.

    python scripts/publish.py --tracking_uri https://mlflow.example.org
    python scripts/publish.py --source sqlite:///job.db --follow
    python scripts/publish.py --run_id <RUN_ID> --register --alias production

Takes all runs that have ended and are not on the server yet, with parameters, tags, every point of
every metric, data sets, files, models, status and times. The local store is only read. Give the
same command again when it was cut off, or when there are more runs: nothing gets there twice.
You will see each run with its new id, its models, what was sent, and a JSON object as the last
line. In the MLflow UI the runs look as if they had been logged there; the tag published.run_id is
the local id. Needs common/cli.py, the rooms connection, runs and storage of common/, and
local_store.py, publishing.py and publishing_models.py of scripts/.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common/ is

from common import cli
from common.errors import STOPPING, TRY_AGAIN, UserError

SOURCE = "sqlite:///mlflow.db"  # where the scripts log to without a server
INTERVAL = 10  # seconds between two looks at the local store with --follow


def build_parser():
    source = "the local store, an SQLite file (default: %(default)s)"
    run_id = "only this run and its children, running or not; may be given several times"
    experiment = "only the runs of this experiment (default: of all)"
    there = "experiment on the server, created if missing (default: the same name)"
    follow = f"publish runs while they train, every {INTERVAL} s, until none is running any more"
    register = "register the models under the names that they have in the local store"
    alias = "with --register: move this alias to the version that has it in the local store"
    parser = cli.parser(__doc__)
    parser.add_argument("--source", type=cli.path, default=SOURCE, metavar="URI", help=source)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run_id", type=cli.not_empty, action="append", default=[], help=run_id)
    which.add_argument("--experiment", type=cli.not_empty, metavar="NAME", help=experiment)
    parser.add_argument("--to_experiment", type=cli.not_empty, metavar="NAME", help=there)
    parser.add_argument("--follow", action="store_true", help=follow)
    parser.add_argument("--register", action="store_true", help=register)
    parser.add_argument("--alias", type=cli.alias, help=alias)
    cli.add_server_arguments(parser)
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.alias and not args.register:
        parser.error("--alias needs --register: an alias belongs to a registered model")

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    import signal
    import tempfile
    import time

    import mlflow
    import requests

    from common import connection
    from scripts import local_store

    for stop in STOPPING:
        if signal.getsignal(stop) == signal.SIG_DFL:  # else the copy in TMPDIR would stay
            signal.signal(stop, lambda number, _: sys.exit(128 + number))
    sent = dict.fromkeys(("runs", "points", "files", "models", "versions"), 0)
    ids = {}  # {id of a run in the local store: its id on the server}
    with tempfile.TemporaryDirectory() as folder:
        # 1. Look at the local store, then connect. Each of the two has a client of its own.
        local = local_store.LocalStore(args.source, folder)
        local.check_destination(connection.address(args.tracking_uri)[0])
        chosen = local.choose_runs(args)
        left_out = f"  left out, still running {local.left_out}" if local.left_out else ""
        print(f"source   {local.path}  runs {len(chosen)}{left_out}", flush=True)
        connection.connect(args.tracking_uri, args.ca_bundle, workspace=args.workspace)
        server = mlflow.MlflowClient()
        local.check_server(server, chosen)

        # 2. Publish what is new, one process at a time; with --follow again and again. A training
        # registers its model after the run has ended, so there is a last look after that.
        with local.locked():
            running = True
            while True:
                before = running
                try:
                    running = publish_all(local, server, args, ids, sent)
                except (mlflow.MlflowException, requests.RequestException) as error:
                    failure = connection.diagnose(error)
                    if not (args.follow and failure and failure.code == TRY_AGAIN):
                        raise
                    print(f"wait     {failure.what}", flush=True)
                if not (args.follow and (running or before)):
                    break
                time.sleep(INTERVAL)
    cli.print_result(run_id=next(reversed(ids.values()), None), **sent)


def publish_all(local, server, args, ids, sent):
    """Publish what is new; return whether a run is still running. Adds to `ids` and `sent`."""
    from scripts import local_store, publishing, publishing_models

    chosen = local.choose_runs(args)
    numbers = {run.info.experiment_id for run in chosen}
    experiments = {n: experiment_for(local.experiments[n], server, args) for n in numbers}
    for run in chosen:
        experiment = experiments[run.info.experiment_id]
        there = publishing.find_run(server, experiment.experiment_id, run.info.run_id)
        if there and there.info.lifecycle_stage == "deleted":
            print(f"skip     {run.info.run_id}  was deleted on the server", flush=True)
            continue
        if args.run_id or not there or not publishing.is_complete(run, there):
            there = publish_run(local, server, run, there, experiment, ids, sent)
        ids[run.info.run_id] = there.info.run_id
        if args.register:
            sent["versions"] += publishing_models.register(local, server, run, there, args.alias)
    return not all(map(local_store.has_ended, chosen))


def experiment_for(experiment, server, args):
    """Return the experiment on the server that takes the runs of `experiment`."""
    import mlflow

    from scripts import publishing

    name, location = args.to_experiment or experiment.name, publishing.own_location(experiment)
    there = server.get_experiment_by_name(name)
    if there is None:
        try:
            # create_experiment: files that have a place of their own (--target_path) stay there.
            server.create_experiment(name, location, experiment.tags)
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # somebody else has just made it
                raise
        there = server.get_experiment_by_name(name)
    if there.lifecycle_stage == "deleted":
        what = f"the experiment {name!r} was deleted on the server, and its name is taken."
        raise UserError(what, "give another name: --to_experiment NAME")
    if location not in (None, there.artifact_location):
        what = f"the files at {location} are to stay, and the experiment {name!r} on the server "
        what += f"has its files at {there.artifact_location}."
        raise UserError(what, "give another name: --to_experiment NAME")
    return there


def publish_run(local, server, run, there, experiment, ids, sent):
    """Bring `run` to the server, as far as it is not `there`; return the run on the server."""
    from mlflow.entities import Param, RunTag

    from common import runs
    from scripts import local_store, publishing, publishing_models

    info, before = run.info, dict(sent)
    if there is None:
        # create_run: it began when it began, and has its local id from the first moment on.
        tags = {publishing.RUN_TAG: info.run_id}
        new = server.create_run(experiment.experiment_id, info.start_time, tags, info.run_name)
        there = publishing.find_run(server, experiment.experiment_id, info.run_id) or new
        sent["runs"] += 1
    run_id = there.info.run_id
    if info.run_id not in ids:
        print(f"run      {info.run_id} -> {run_id}  {runs.run_address(there)}", flush=True)

    # log_batch: parameters, tags, and the points of all metrics. The client splits what is more
    # than a request may hold; a point that is sent twice is stored once.
    parent = ids.get(run.data.tags.get(local_store.PARENT_TAG))
    tags = publishing.tags_of(run, there, parent).items() - there.data.tags.items()
    params = run.data.params.items() - there.data.params.items()
    points = publishing.missing_points(local.client, server, run, there)
    server.log_batch(run_id, tags=[RunTag(*tag) for tag in tags])
    server.log_batch(run_id, params=[Param(*param) for param in params])
    server.log_batch(run_id, points)
    sent["points"] += len(points)
    # log_inputs: the data sets, by name and digest, and the models that it was given.
    inputs = publishing.missing_inputs(run, there)
    given = publishing_models.missing_inputs(server, run, there)
    if inputs or given:
        server.log_inputs(run_id, inputs, given)

    if local_store.has_ended(run):  # until then, files and models may still be changing
        sent["files"] += publishing.send_files(local, server, run, there)
        for model in publishing_models.models_of(local.client, run):
            sent["models"] += publishing_models.send_model(local, server, model, run, there)
        # set_terminated: status and end come last, so a run that has them is complete.
        if not publishing.is_complete(run, there):
            end = publishing.end_of(run)
            if there.data.tags.get(publishing.END_TAG, str(end)) != str(end):
                server.set_tag(run_id, publishing.END_TAG, end)  # it was continued
            server.set_terminated(run_id, info.status, end)
    elif there.info.status != info.status:
        server.update_run(run_id, info.status)  # it was continued
    if sent != before:
        counts = [f"{name} {sent[name] - before[name]}" for name in ("points", "files", "models")]
        print(f"sent     {'  '.join(counts)}  {info.status}", flush=True)
    return there


if __name__ == "__main__":
    cli.run(main)
