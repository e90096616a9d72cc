"""Names that others gave are drawn as they are, and a value that cannot be drawn leaves a gap."""

import io
import math

import mlflow
import pytest
import torch

from common.training import Evaluation
from scripts import log_plot
from scripts.figures import curves_figure, difference_figure, search_figure

ODD = [r"a$\frac$b", "_hidden", "$", r"\$x\$"]


def drawn(figure):
    """Draw it, as `mlflow.log_figure` does, and return the texts that are in it."""
    figure.savefig(io.BytesIO())
    return [text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text"))]


@pytest.mark.parametrize("more", [0, 4])
def test_names_in_curves_are_literal(more):
    curves = {name: [(1, 0.5), (2, 0.7)] for name in [*ODD, *"wxyz"[:more]]}
    figure = curves_figure(curves, f"of {ODD[0]}", f"value of {ODD[0]}")
    texts = drawn(figure)
    assert {f"of {ODD[0]}", f"value of {ODD[0]}"} <= set(texts)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(curves)
    assert [line.get_color() for line in axes.get_legend().get_lines()] == [
        line.get_color() for line in axes.get_lines()
    ]


def test_names_in_a_search_are_literal():
    figure = search_figure([0, 1], [0.5, 0.7], {ODD[0]: [1, 2]}, f"study {ODD[0]}", ODD[0])
    assert drawn(figure).count(ODD[0]) == 2


def test_names_in_a_difference_are_literal():
    labels = torch.tensor([0, 1])
    one = Evaluation(0.5, 1.0, labels)
    drawn(difference_figure(labels, one, one, ODD[:2], f"{ODD[0]} minus {ODD[0]}"))


@pytest.mark.parametrize("value", [1e308, 1.7976931348623157e308, math.inf, math.nan])
@pytest.mark.parametrize("step", [2, 2**62])
def test_values_that_cannot_be_drawn(value, step):
    for points in ([(1, value), (step, -value)], [(1, value), (step, 0.5)], [(1, value)], []):
        figure = curves_figure({"val_loss": points}, "a run", "loss")
        drawn(figure)
        low, high = figure.axes[0].get_ylim()
        assert -1 < low < high < 2


def test_a_plot_of_a_run_with_odd_names(tmp_path, capsys, request):
    request.addfinalizer(lambda: mlflow.set_tracking_uri(None))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("odd", (tmp_path / "files").as_uri())
    ids = [client.create_run(experiment, run_name=name).info.run_id for name in ODD[:2]]
    for run_id in ids:
        for step, value in ((1, 1e308), (2, 0.5), (2**62, -math.inf)):
            client.log_metric(run_id, "val_loss", value, step=step)
    log_plot.main(["--run_id", *ids, "--metrics", "val_loss", "--tracking_uri", uri])
    said = capsys.readouterr().out
    assert f"curve    {ODD[0]}  3 points, 2 of them infinite or too large to be drawn" in said
    assert [file.path for file in client.list_artifacts(ids[0], "plots")] == ["plots/val_loss.png"]
