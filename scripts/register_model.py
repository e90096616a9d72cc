"""Register the model of any finished run under any name; each time it is a new version (guide 4).

    python scripts/register_model.py
    python scripts/register_model.py --run_id <RUN_ID> --model_name iris

Without --run_id it takes the latest run of RandomForest_Training. You will see the run, the model
and its new version, and a JSON object as the last line. In the MLflow UI the version stands under
"Models", linked to its run. (register_and_inference.py is the careful way for the networks of this
project: it checks the model on the test set first, and moves an alias.) Needs common/cli.py, the
rooms connection and runs of common/, and scripts/latest.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common/ is

from common import cli

EXPERIMENT = "RandomForest_Training"  # where train_with_mlflow.py logs
MODEL_NAME = "New Registered Model"  # the entry in the registry that gets a new version


def build_parser():
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run_id", type=cli.not_empty, help="the run to take (default: the experiment's latest)"
    )
    parser.add_argument(
        "--model_name",
        type=cli.model_name,
        default=MODEL_NAME,
        help="name in the registry (default: %(default)s)",
    )
    cli.add_server_arguments(parser, EXPERIMENT)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    import mlflow

    from common import connection, runs
    from scripts import latest

    # 1. Connect, and find the run and its model.
    connection.connect(args.tracking_uri, args.ca_bundle, workspace=args.workspace)
    run_id = args.run_id or latest.latest_run(args.experiment).info.run_id
    run = runs.finished_run(run_id)
    model_uri = runs.model_uri(run, name=None)
    runs.check_registrable(args.model_name, model_uri)
    print(f"run      {run_id}  {runs.run_address(run)}", flush=True)

    # 2. Register. register_model: makes the name if it does not exist, and adds a version to it.
    version = mlflow.register_model(model_uri, args.model_name, tags={"registered_by": runs.user()})
    # update_model_version: the description, on the version's page: its scores, and on which data.
    scores = ", ".join(f"{name} {value:.4f}" for name, value in sorted(run.data.metrics.items()))
    data = ", ".join(f"{d.dataset.name} ({d.dataset.digest})" for d in run.inputs.dataset_inputs)
    mlflow.MlflowClient().update_model_version(
        args.model_name,
        version.version,
        description=f"{scores or 'No score'}; data: {data or 'not recorded'}; run {run_id}",
    )
    print(f"model    {args.model_name} version {version.version}", flush=True)
    cli.print_result(
        run_id=run_id,
        model_name=args.model_name,
        model_version=str(version.version),
        model_uri=f"models:/{args.model_name}/{version.version}",
    )


if __name__ == "__main__":
    cli.run(main)
