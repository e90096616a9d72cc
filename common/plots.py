"""Figures, returned and never written: the caller hands them to `mlflow.log_figure`.

They are built without pyplot, so no screen is needed, no window opens and nothing is left in
memory.
"""

from matplotlib.figure import Figure


def curves_figure(curves, title, ylabel):
    """Return a figure of curves over the epochs: `curves` is {label: [(epoch, value), ...]}."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    for label, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=title, xlabel="epoch", ylabel=ylabel)
    axes.grid(alpha=0.3)
    if len(curves) <= 10:
        axes.legend()
    else:  # beside the axes, as many as there are
        figure.set_size_inches(11, 6)
        columns = -(-len(curves) // 24)
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5), ncols=columns)
    return figure


def confusion_matrix_figure(labels, predictions, class_names, title):
    """Return a figure of the confusion matrix with counts: one row a true class, one column a
    predicted class.

    `labels` and `predictions` are sequences of N class numbers; classes that do not occur keep
    their row and column.
    """
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix  # 1 s to import

    counts = confusion_matrix(labels, predictions, labels=range(len(class_names)))
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    axes = figure.add_subplot()
    display = ConfusionMatrixDisplay(counts, display_labels=class_names)
    display.plot(
        ax=axes,
        cmap="Blues",
        values_format="d",
        colorbar=False,
        xticks_rotation=45 if max(map(len, class_names)) > 2 else "horizontal",
    )
    axes.set_title(title)
    return figure
