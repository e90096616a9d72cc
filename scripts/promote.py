"""Move an alias to a version of a model only if it does better than the version in place.

    python scripts/promote.py MNIST_CNN --from_alias staging
    python scripts/promote.py MNIST_CNN --version 4 --metric loss --by 0.01
    python scripts/promote.py MNIST_CNN --version 4 --force "version 3 was trained on wrong labels"
    python scripts/promote.py MNIST_CNN --history
    python scripts/promote.py MNIST_CNN --undo

Both versions are loaded, without running anything that their authors put there, and scored now, on
the same test set. You will see both scores, how many images only the one or only the other gets
right, where the alias points now and where it pointed before, and a JSON object as the last line.
The exit code is 1 if the version is not better: then nothing is moved. It is 75 if somebody else
moved the alias meanwhile: the same command again compares with what is there then. If the alias
points at that version already, there is nothing to do, and the exit code is 0.

In the MLflow UI each promotion, also one that was refused, is a run of the experiment promotions;
the version has its id as a tag. Needs common/cli.py, the rooms connection, runs, storage and
training of common/, and of scripts/ comparison.py, figures.py and promotions.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common/ is

from common import cli
from common.errors import TRY_AGAIN, UserError

EXPERIMENT = "promotions"  # one for the whole team: it is the history of what was promoted
ALIAS = "production"  # the label that programs load the model by


def build_parser():
    parser = cli.parser(__doc__)
    parser.add_argument("model_name", type=cli.model_name, help="name in the registry")
    what = parser.add_mutually_exclusive_group(required=True)
    add = what.add_argument
    add("--version", type=cli.whole_number(1), metavar="N", help="promote this version")
    add("--from_alias", type=cli.alias, metavar="ALIAS", help="promote what this alias points at")
    add("--history", action="store_true", help="list the promotions of this model, newest last")
    add("--undo", action="store_true", help="move the alias back to where it was before")
    add = parser.add_argument
    add("--alias", type=cli.alias, default=ALIAS, help="alias to move (default: %(default)s)")
    metric = "what is compared (default: %(default)s)"
    add("--metric", choices=("accuracy", "loss"), default="accuracy", help=metric)
    by = "how much better it has to be, 0 if as good will do (default: %(default)s)"
    add("--by", type=score, default=0.001, metavar="SCORE", help=by)
    least = "accuracy that it has to have, or loss at most; needed if the alias does not exist yet"
    add("--at_least", type=score, metavar="SCORE", help=least)
    force = "move the alias all the same, and record why"
    add("--force", type=cli.not_empty, metavar="REASON", help=force)
    cli.add_data_arguments(parser, dataset=None)
    cli.add_server_arguments(parser)
    # Not MLFLOW_EXPERIMENT_NAME: the history of a model stands in one experiment, for everyone.
    where = "experiment of the promotions (default: %(default)s)"
    add("--experiment", type=cli.not_empty, default=EXPERIMENT, metavar="NAME", help=where)
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    name, alias = args.model_name, args.alias
    if args.from_alias == alias:
        parser.error(f"--from_alias and --alias are both {alias}")

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    import mlflow

    from common import connection, runs
    from scripts import promotions

    # 1. Connect, and see where the alias points now and is to point.
    connection.connect(args.tracking_uri, args.ca_bundle, args.experiment, args.workspace)
    recorded = promotions.records(args.experiment, name)
    if args.history:
        for record in recorded or [f"note     no promotion of {name} is recorded"]:
            print(record, flush=True)
        return cli.print_result(model_name=name, promotions=[r._asdict() for r in recorded])
    before = runs.alias_version(name, alias)
    if args.undo:
        last = promotions.last_move(recorded, name, alias, before, bool(args.force))
        after = last.before
    else:
        after = str(args.version or promotions.version_behind(name, args.from_alias))
    candidate = promotions.existing_version(name, after) if after else None
    result = {"model_name": name, "alias": alias}
    result |= {"model_version": after, "previous_version": before}
    if after == before:
        print(f"alias    {alias}  version {before or 'none'} already", flush=True)
        return cli.print_result(**result, outcome="unchanged")

    # 2. Score both versions on the same images, and decide.
    comparison = None
    if args.undo:
        outcome, reason = "undone", args.force or f"undo of {last.run_id}"
    else:
        comparison = compare(args, before, candidate)
        for line in str(comparison).split("\n"):
            print(line, flush=True)
        better, reason = comparison.verdict(args.metric, args.by, args.at_least)
        better &= before is None or comparison.current is not None  # not compared, as forced
        outcome = "promoted" if better else "forced" if args.force else "refused"
        reason = f"{args.force} ({reason})" if args.force else reason

    # 3. Record it, and move the alias. Whatever happens on the way, the record claims no more than
    # was done. set_experiment, start_run: each promotion gets a page of its own.
    experiment = mlflow.set_experiment(args.experiment)
    title = f"{name}@{alias} {before or 'none'} -> {after or 'none'}"
    with (
        mlflow.start_run(experiment_id=experiment.experiment_id, run_name=title) as run,
        runs.always_ended(),
    ):
        run_id = run.info.run_id
        print(f"run      {run_id}  {runs.run_address(run)}", flush=True)
        # set_tags: who, from where and why (when is the start of the run); to be searched for.
        tags = {"model": name, "alias": alias, "from": before or "none", "to": after or "none"}
        tags |= {"reason": reason, "outcome": "pending", "number": promotions.next_number(recorded)}
        tags = {f"promotion.{key}": value for key, value in tags.items()}
        tags |= {"owner": runs.user(), **runs.git_tags(__file__), **runs.job_tags()}
        mlflow.set_tags(tags)  # all at once: others may be reading the record already
        if comparison:
            # log_params: what was compared, and how.
            settings = {"current": before, "candidate": after, "dataset": comparison.dataset}
            settings |= {"metric": args.metric, "by": args.by, "at_least": args.at_least}
            mlflow.log_params(settings)
            # log_input: on which data, by name and digest; under "Datasets" on the page.
            runs.patiently(mlflow.log_input, comparison.data(), context="promotion")
            # log_metrics: both scores, and on how many images the two differ.
            mlflow.log_metrics(comparison.metrics())
            # log_figure: both confusion matrices and their difference, in the tab "Artifacts".
            for path, figure in comparison.figures().items():
                mlflow.log_figure(figure, path)
        if outcome != "refused":
            number = promotions.take_turn(run_id, args.experiment, name)
            # MLflow cannot compare and swap, so the alias is read again right before it moves.
            found = runs.alias_version(name, alias)
            mlflow.set_tags({"promotion.number": number, "promotion.found": found or "none"})
            if found != before:
                outcome = "conflict"
            elif after:
                # set_registered_model_alias: programs that load by the alias get this version now.
                mlflow.MlflowClient().set_registered_model_alias(name, alias, after)
            else:
                # delete_registered_model_alias: back to before the first move, when there was none.
                mlflow.MlflowClient().delete_registered_model_alias(name, alias)
        moved = outcome in promotions.MOVED
        if moved and (found := runs.alias_version(name, alias)) != after:
            outcome = "replaced"  # by something that does not wait for its turn
        # mlflow.note.content: the description at the top of the run's page, in Markdown.
        page = f"**{title.replace('->', '→')}: {outcome}.** {reason}"
        page += f"\n\n{comparison.markdown()}" if comparison else ""
        mlflow.set_tags({"promotion.outcome": outcome, "mlflow.note.content": page})
    if after:
        # set_model_version_tag: the way from the version's page to this record.
        tag = "promotion.run_id" if moved else "promotion.refused_run_id"
        mlflow.MlflowClient().set_model_version_tag(name, after, tag, run_id)
    if moved:
        print(f"alias    {alias}  version {before or 'none'} -> {after or 'none'}", flush=True)
    result = {"run_id": run_id, **result, "outcome": outcome, "reason": reason}
    cli.print_result(**result, **(comparison.metrics() if comparison else {}))
    if outcome == "refused":
        what = f"version {after} of {name} was not promoted: {reason}."
        raise UserError(what, '--force "reason" moves the alias all the same, and records why.')
    if outcome == "conflict":
        what = f"{name}@{alias} was moved from version {before or 'none'} to {found or 'none'} by "
        what += "somebody else meanwhile. Nothing was changed."
        raise UserError(what, "the same command again starts from there.", TRY_AGAIN)
    if outcome == "replaced":
        what = f"{name}@{alias} was moved on to version {found or 'none'} by somebody else at once."
        raise UserError(what, "ask who did: programs that move it without waiting overtake others.")


def compare(args, before, candidate):
    """Return the `Comparison` of two versions; of one, if there is none in place."""
    from common import training
    from scripts import comparison, promotions

    if before is None and args.at_least is None and not args.force:
        what = f"{args.model_name} has no alias {args.alias} yet: there is nothing to compare with."
        raise UserError(what, "say what will do for the first one, such as --at_least 0.9")
    dataset = args.dataset or promotions.trained_on(candidate)
    if dataset not in cli.DATASETS:
        known = dataset or "data that nobody recorded"
        what = f"version {candidate.version} of {args.model_name} was trained on {known}."
        raise UserError(what, f"name the images to compare on: --dataset {cli.DATASETS[0]}")
    test = training.load_data(dataset, args.data_dir, train=False)
    print(f"data     {dataset}  {len(test.labels)} images  digest {test.digest}", flush=True)
    versions = [candidate]
    if before:
        versions.insert(0, promotions.existing_version(args.model_name, before))
    scores = {}
    for version in versions:
        name = f"version {version.version}"
        if (other := promotions.trained_on(version)) not in (None, dataset):
            if not (args.dataset or args.force):  # what serves one purpose is no better at another
                what = f"{name}, in place, was trained on {other}, and the new one on {dataset}."
                hint = f"--dataset {dataset} compares the two on these images all the same."
                raise UserError(what, hint)
            print(f"note     {name} comes from a run on {other}", flush=True)
        try:
            # As the version says, `input`: pixels in [0, 1], or normalised ones.
            pixels = version.tags.get("input")
            scores[name] = comparison.score(load(version), test, name, pixels)
        except UserError as error:
            if version is candidate or not args.force:
                raise
            print(f"note     {error.what}", flush=True)  # its file is gone, say
    return comparison.Comparison(dataset, test, scores)


def load(version):
    """Return the network of a version. Nothing that its author put there runs."""
    import mlflow

    from common import storage, training

    # get_logged_model: its tags say where its file is, if that is on a shared filesystem.
    source = f"models:/{version.model_id}" if version.model_id else version.source
    logged = source.startswith("models:/m-") and mlflow.get_logged_model(source[len("models:/") :])
    if logged and "file.path" in logged.tags:
        file = storage.of_model(source)
        if file.path.name.endswith(".pt2"):  # who loads it with MLflow alone runs all of it
            whole = str(file.path).endswith(storage.MODEL_FILE)
            storage.check_model(file.path.parents[1] if whole else file.path)
        return storage.map_weights(training.MNISTCNN, file.path)
    with storage.checked_copy(f"models:/{version.name}/{version.version}") as folder:
        # load_model: the network, ready to be called, without the code that defined it.
        return mlflow.pytorch.load_model(folder)


def score(text):
    """Argument type: a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError(text)  # argparse says: invalid score value
    return value


if __name__ == "__main__":
    cli.run(main)
