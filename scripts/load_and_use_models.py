"""List, load, try and promote models: from a run, or from the registry (guide 2).

    python scripts/load_and_use_models.py list
    python scripts/load_and_use_models.py versions simple-cnn-classifier
    python scripts/load_and_use_models.py from-run <RUN_ID> --predict
    python scripts/load_and_use_models.py from-registry simple-cnn-classifier --predict
    python scripts/load_and_use_models.py transition simple-cnn-classifier 1 Production
    python scripts/load_and_use_models.py from-registry simple-cnn-classifier --alias production

You will see what is asked for, and a JSON object as the last line. MLflow has replaced stages by
aliases: `transition` sets both, the alias being the stage in lower case, and every line that shows
a stage shows the alias. In the MLflow UI both stand beside the version, under "Models". What is
loaded is called as it is: model(pixels), without .eval(). Each command takes --tracking_uri and
--ca_bundle; COMMAND --help shows all flags. Needs common/cli.py, the rooms connection, runs,
storage and training of common/, and scripts/comparison.py and figures.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common/ is

from common import cli
from common.errors import UserError

STAGES = ("None", "Staging", "Production", "Archived")


def build_parser():
    parser = cli.parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text):
        one = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        cli.add_server_arguments(one)
        return one

    def load(name, text):
        one = command(name, text)
        one.add_argument(
            "--predict", action="store_true", help="predict the test images (default: only load)"
        )
        cli.add_data_arguments(one, dataset=None)
        return one

    command("list", "list all registered models")
    load("from-run", "load the model that a run logged").add_argument("run_id")
    registry = load("from-registry", "load a registered model, its latest version by default")
    registry.add_argument("model_name", type=cli.model_name)
    which = registry.add_mutually_exclusive_group()
    which.add_argument("--version", type=cli.whole_number(0), help="this version")
    which.add_argument("--alias", type=cli.alias, help="the version that the alias points at")
    which.add_argument("--stage", choices=STAGES[1:], help="the latest version in this stage")
    command("versions", "list the versions of a model").add_argument(
        "model_name", type=cli.model_name
    )
    transition = command("transition", "move a version to a stage, and the stage's alias with it")
    transition.add_argument("model_name", type=cli.model_name)
    transition.add_argument("version", type=cli.whole_number(0))
    transition.add_argument("stage", choices=STAGES)
    transition.add_argument(
        "--archive_existing",
        action="store_true",
        help="take the other versions out of this stage, to Archived; models:/NAME/STAGE then "
        "loads this one (default: the newest in the stage)",
    )
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if getattr(args, "archive_existing", False) and args.stage not in ("Staging", "Production"):
        parser.error("--archive_existing is for Staging and Production")

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    from common import connection

    connection.connect(args.tracking_uri, args.ca_bundle, workspace=args.workspace)
    command = {
        "list": list_models,
        "from-run": load_from_run,
        "from-registry": load_from_registry,
        "versions": list_versions,
        "transition": transition,
    }[args.command]
    cli.print_result(**command(args))


def list_models(args):
    import mlflow

    print("Registered Models in MLflow Model Registry", flush=True)
    print("=" * 45, flush=True)
    # search_registered_models: what stands under "Models" in the UI, page by page.
    models = mlflow.search_registered_models()
    for model in models:
        latest = list(versions_of(model.name).values())[-1:]
        print(flush=True)
        print(f"Model: {model.name}", flush=True)
        description = model.description or (latest[0].description if latest else "")
        print(f"   Description: {description or '-'}", flush=True)
        print(f"   Latest Version: {latest[0].version if latest else '-'}", flush=True)
        print(f"   Latest Stage: {stage_of(latest[0]) if latest else '-'}", flush=True)
        aliases = [f"@{alias} is version {version}" for alias, version in model.aliases.items()]
        print(f"   Aliases: {', '.join(aliases) or '-'}", flush=True)
    return {"models": [model.name for model in models]}


def list_versions(args):
    import mlflow

    versions = versions_of(args.model_name)
    # get_registered_model: the aliases stand with the model, not with its versions.
    aliases = mlflow.MlflowClient().get_registered_model(args.model_name).aliases
    title = f"Versions of Model: {args.model_name}"
    print(title, flush=True)
    print("=" * len(title), flush=True)
    for number, version in versions.items():
        names = [f"@{name}" for name, target in aliases.items() if str(target) == number]
        print(flush=True)
        print(f"Version {number}:", flush=True)
        print(f"  Stage: {stage_of(version)}", flush=True)
        print(f"  Aliases: {', '.join(names) or '-'}", flush=True)
        print(f"  Status: {version.status}", flush=True)
        print(f"  Description: {version.description or '-'}", flush=True)
        print(f"  Run ID: {version.run_id or '-'}", flush=True)
    return {
        "model_name": args.model_name,
        "versions": list(versions),
        "aliases": {name: str(number) for name, number in aliases.items()},
    }


def load_from_run(args):
    from common import runs

    run = runs.existing_run(args.run_id)
    return load(args, runs.model_uri(run, name=None), run)


def load_from_registry(args):
    import mlflow

    from common import runs

    name, client = args.model_name, mlflow.MlflowClient()
    versions = versions_of(name)
    aliases = client.get_registered_model(name).aliases
    # The address says which version: models:/NAME/latest, /1, /Production or @production.
    numbers = list(versions)
    if args.alias:
        uri, numbers = f"models:/{name}@{args.alias}", [str(aliases.get(args.alias))]
    elif args.stage:
        uri = f"models:/{name}/{args.stage}"
        numbers = [number for number, v in versions.items() if stage_of(v) == args.stage]
        alias = args.stage.lower()
        print(
            f"stage    stages are deprecated in MLflow; --alias {alias} (models:/{name}@{alias}) "
            f"replaces this, and is version {aliases.get(alias, '-')}",
            flush=True,
        )
    elif args.version is not None:
        uri, numbers = f"models:/{name}/{args.version}", [str(args.version)]
    else:
        uri = f"models:/{name}/latest"
    number = numbers[-1] if numbers else None
    version = version_of(versions, number, uri)
    print(f"model    {name} version {number}  run {version.run_id or '-'}", flush=True)
    run = runs.existing_run(version.run_id) if version.run_id else None
    result = load(args, uri, run, version.tags.get("input"))
    return result | {"model_name": name, "model_version": number}


def transition(args):
    import warnings

    import mlflow

    name, alias, number = args.model_name, args.stage.lower(), str(args.version)
    version = version_of(versions_of(name), number, f"models:/{name}/{number}")
    client = mlflow.MlflowClient()
    # A later MLflow will have no stages; the alias then does all the work.
    if hasattr(client, "transition_model_version_stage"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the line `note` says it
            # transition_model_version_stage: the word in the column "Stage" of the model's page.
            client.transition_model_version_stage(name, number, args.stage, args.archive_existing)
        print(f"stage    {name} version {number}: {stage_of(version)} -> {args.stage}", flush=True)
        # models:/NAME/STAGE is the newest version in a stage, whichever came there last.
        staged = [n for n, v in versions_of(name).items() if stage_of(v) == args.stage]
        if alias in ("staging", "production"):
            why = f", the newest of {', '.join(staged)}: --archive_existing takes out the others"
            why = why if staged[-1] != number else ""
            loads = f"models:/{name}/{args.stage} loads version {staged[-1]}{why}"
            print(f"stage    {loads}", flush=True)

    # An alias points at one version: this one, if the stage is one that programs load from.
    aliases = client.get_registered_model(name).aliases
    for other in {"staging", "production"} - {alias}:
        if str(aliases.get(other)) == number:
            # delete_registered_model_alias: the version has left that stage.
            client.delete_registered_model_alias(name, other)
            print(f"alias    {other}  version {number} -> none", flush=True)
    result = {"model_name": name, "model_version": number, "stage": args.stage}
    if alias in ("staging", "production"):
        # set_registered_model_alias: models:/NAME@production now means this version, for everyone.
        client.set_registered_model_alias(name, alias, number)
        before = str(aliases[alias]) if alias in aliases else None
        print(f"alias    {alias}  version {before or 'none'} -> {number}", flush=True)
        result |= {"alias": alias, "previous_version": before}
    print("note     stages are deprecated in MLflow; aliases replace them", flush=True)
    aliases = client.get_registered_model(name).aliases
    return result | {"aliases": {alias: str(target) for alias, target in aliases.items()}}


def load(args, uri, run, pixels=None):
    """Load the model at `uri`, which `run` logged, and try it on request.

    `pixels` says what it takes, if its version does.
    """
    import mlflow

    from common import runs, storage, training
    from scripts import comparison

    with storage.checked_copy(uri) as folder:  # checked: nothing in it runs
        # load_model: the network, ready to be called, without the code that defined it. It is in
        # eval mode already; .eval() and .train() raise NotImplementedError, so leave them out.
        network = mlflow.pytorch.load_model(folder)
    count = sum(parameter.numel() for parameter in network.parameters())
    print(f"load     {uri}  {count} parameters", flush=True)
    result = {"run_id": run.info.run_id if run else None, "model_uri": uri, "parameters": count}
    if not args.predict:
        return result
    dataset = runs.recorded_dataset(run, args.dataset) if run else args.dataset
    test = training.load_data(dataset or "mnist", args.data_dir, train=False)
    scores = comparison.score(network, test, uri, pixels)
    runs.print_samples(test, scores.predictions)
    accuracy, count = scores.accuracy, len(test.labels)
    print(f"score    {uri}  test_accuracy {accuracy:.4f} on {count} images", flush=True)
    return result | {"test_accuracy": scores.accuracy}


def versions_of(name):
    """Return {number: version} of a model, oldest first. The numbers are text, as in addresses."""
    import mlflow

    found = mlflow.search_model_versions(filter_string=f"name = '{name}'")
    if not found and name not in [model.name for model in mlflow.search_registered_models()]:
        raise UserError(
            f"there is no registered model {name!r} on the tracking server named above.",
            "scripts/load_and_use_models.py list shows those that there are.",
        )
    return {str(v.version): v for v in sorted(found, key=lambda version: int(version.version))}


def version_of(versions, number, uri):
    """Return the version of this number; raise UserError if there is none."""
    if number not in versions:
        raise UserError(
            f"{uri} is no version of the model; it has {', '.join(versions) or 'none'}.",
            "scripts/load_and_use_models.py versions NAME shows stages and aliases, too.",
        )
    return versions[number]


def stage_of(version):
    """Return the version's stage as text; "None" also where MLflow has no stages any more."""
    return str(getattr(version, "current_stage", None))


if __name__ == "__main__":
    cli.run(main)
