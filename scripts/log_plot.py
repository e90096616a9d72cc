"""Draw the loss curves that the server has of some runs, and attach the image to them (guide 5).

    python scripts/log_plot.py
    python scripts/log_plot.py --run_id <RUN_ID>
    python scripts/log_plot.py --run_id <RUN_ID> <RUN_ID> --metrics val_accuracy

Without --run_id it takes the latest run of "Image classification", or the study, if that run is one
of its trials. Of a study (a parent run of tune_fashion_mnist.py) it draws the children.
You will see how many points each curve has, and a JSON object as the last line. In the MLflow UI
the image stands in the tab "Artifacts" of each run that was named, under plots/. Needs
common/cli.py, the rooms connection and runs of common/, and scripts/figures.py and latest.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common/ is

from common import cli
from common.errors import UserError

EXPERIMENT = "Image classification"  # where train_fashion_mnist.py logs
METRICS = ("train_loss", "val_loss")


def build_parser():
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run_id",
        nargs="+",
        type=cli.not_empty,
        metavar="ID",
        help="the runs to draw, in one image (default: the experiment's latest)",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        type=cli.not_empty,
        default=METRICS,
        metavar="NAME",
        help=f"what to draw (default: {' '.join(METRICS)})",
    )
    cli.add_server_arguments(parser, EXPERIMENT)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    import re

    import mlflow

    from common import connection, runs
    from scripts import figures, latest

    # 1. Connect, and find the runs; of a parent run, its children.
    connection.connect(args.tracking_uri, args.ca_bundle, workspace=args.workspace)
    if args.run_id:
        named = [runs.existing_run(run_id) for run_id in dict.fromkeys(args.run_id)]
    else:
        named = [latest.latest_run(args.experiment)]
    for run in named:
        print(f"run      {run.info.run_id}  {runs.run_address(run)}", flush=True)
    found = [one for run in named for one in [run, *children(run)]]
    drawn = list({run.info.run_id: run for run in found}.values())  # each once

    # 2. Fetch the curves. A run keeps every point of a metric; search and tables show the last one.
    client, curves = mlflow.MlflowClient(), {}
    for run in drawn:
        for metric in args.metrics:
            if metric not in run.data.metrics:
                continue
            # get_metric_history: all points of one metric of one run.
            history = client.get_metric_history(run.info.run_id, metric)
            words = [run.info.run_name] if len(drawn) > 1 else []
            words += [metric] if len(args.metrics) > 1 or not words else []
            label = " ".join(words)
            if label in curves:  # trial 0 of two studies, say
                label += f" ({run.info.run_id[:8]})"
            curves[label] = sorted((point.step, point.value) for point in history)
            large = sum(abs(point.value) >= figures.LARGEST for point in history)
            more = f", {large} of them infinite or too large to be drawn" if large else ""
            print(f"curve    {label}  {len(history)} points{more}", flush=True)
    if not curves:
        raise UserError(
            f"none of these runs has a metric {' or '.join(args.metrics)}.",
            "give the id of a run that has trained for an epoch, or other --metrics; the "
            "run's page lists those it has.",
        )

    # 3. Draw, and attach to each run. log_figure with a run's id needs no run to be open.
    losses = all("loss" in metric for metric in args.metrics)
    ylabel = args.metrics[0] if len(args.metrics) == 1 else "loss" if losses else "value"
    names = ", ".join(run.info.run_name for run in named)
    title = names if len(named) < 4 else f"{len(drawn)} runs"
    name = "loss_curves" if set(args.metrics) == set(METRICS) else "_".join(args.metrics)
    path = f"plots/{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.png"
    figure = figures.curves_figure(curves, title, ylabel)
    for run in named:
        client.log_figure(run.info.run_id, figure, path)
        print(f"plot     {path}  run {run.info.run_id}", flush=True)
    cli.print_result(run_ids=[run.info.run_id for run in named], plot=path, curves=len(curves))


def children(run):
    """Return the runs that `run` is the parent of, oldest first."""
    import mlflow

    return mlflow.search_runs(
        experiment_ids=[run.info.experiment_id],
        filter_string=f"tags.mlflow.parentRunId = '{run.info.run_id}'",
        order_by=["attributes.start_time ASC"],
        output_format="list",
    )


if __name__ == "__main__":
    cli.run(main)
