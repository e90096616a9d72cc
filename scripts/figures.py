"""Figures, returned and never written: the caller hands them to `mlflow.log_figure`.

They are built without pyplot, so no screen is needed, no window opens, and nothing stays in memory.
"""

import math

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

# Larger values matplotlib cannot scale; MLflow's databases keep 1.8e308 for an infinite one.
LARGEST = 1e307
LITERAL = {"parse_math": False}  # a "$" in a name that somebody gave begins no formula


def curves_figure(curves, title, ylabel):
    """Return a figure of curves over the epochs: `curves` is {label: [(epoch, value), ...]}.

    Where a value is not below `LARGEST`, its curve has a gap.
    """
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    lines, legend_style = [], {}
    for i, points in enumerate(curves.values()):
        style = ("-", "--", ":", "-.")[i // 10 % 4]  # the colours repeat after ten curves
        epochs = [epoch for epoch, _ in points]
        values = [value if abs(value) < LARGEST else math.nan for _, value in points]
        lines += axes.plot(epochs, values, style, marker="o", markersize=4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(title, **LITERAL)
    axes.set_xlabel("epoch")
    axes.set_ylabel(ylabel, **LITERAL)
    axes.grid(alpha=0.3)
    if len(curves) > 4:  # beside the axes, where it covers no curve
        figure.set_size_inches(11, 6)
        legend_style = {"fontsize": "small", "loc": "center left", "bbox_to_anchor": (1, 0.5)}
        legend_style["ncols"] = -(-len(curves) // 24)
    # Given here, matplotlib would leave out a label that begins with "_".
    legend = axes.legend(lines, ["label"] * len(lines), **legend_style)
    for text, label in zip(legend.get_texts(), curves, strict=True):
        text.set(text=label, **LITERAL)
    return figure


def search_figure(trials, scores, parameters, title, ylabel):
    """Return a figure of a hyperparameter search: the scores by trial, then against each setting.

    `trials` are the numbers of the N trials, `scores` their N scores (more is better), `parameters`
    is {name: N values}. Settings that span a factor of 20 or more get a logarithmic axis.
    """
    columns = len(parameters) + 1
    figure = Figure(figsize=(3.6 * columns, 4), layout="constrained")
    panels = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    best = [max(scores[: i + 1]) for i in range(len(scores))]
    panels[0].step(trials, best, where="post", color="tab:orange", label="best so far")
    panels[0].xaxis.get_major_locator().set_params(integer=True)
    panels[0].legend()
    for axes, (name, values) in zip(panels, {"trial": trials, **parameters}.items(), strict=True):
        axes.scatter(values, scores, color="tab:blue")
        axes.set_xlabel(name, **LITERAL)
        axes.grid(alpha=0.3)
        if name == "trial":
            continue
        if min(values) > 0 and max(values) / min(values) >= 20:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())  # or their labels overlap
        elif all(isinstance(value, int) for value in values) and len(set(values)) <= 6:
            axes.set_xticks(sorted(set(values)))  # few values: a tick for each
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
    panels[0].set_ylabel(ylabel, **LITERAL)
    figure.suptitle(title, **LITERAL)
    return figure


def difference_figure(labels, current, candidate, class_names, title):
    """Return the confusion matrix of one `Evaluation` minus that of another, of the same images."""
    size = len(class_names)
    counts = torch.zeros(size, size, dtype=torch.int64)
    for scores, sign in ((candidate, 1), (current, -1)):
        places, signs = (labels, scores.predictions), torch.full_like(labels, sign)
        counts.index_put_(places, signs, accumulate=True)
    better = torch.where(torch.eye(size, dtype=torch.bool), counts, -counts)
    limit = better.abs().max().clamp(min=1).item()
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(better, cmap="RdBu", vmin=-limit, vmax=limit)
    for row in range(size):
        for column, count in enumerate(counts[row].tolist()):
            text = f"{count:+d}".replace("-", "\N{MINUS SIGN}") if count else "0"
            colour = "white" if abs(count) > 0.6 * limit else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour)
    rotation = 45 if max(map(len, class_names)) > 2 else 0
    axes.set_xticks(range(size), class_names, rotation=rotation, **LITERAL)
    axes.set_yticks(range(size), class_names, **LITERAL)
    axes.set_title(title, **LITERAL)
    axes.set(xlabel="Predicted label", ylabel="True label")
    return figure
