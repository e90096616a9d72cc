"""The confusion matrix, as a figure without pyplot: no screen is needed, and no window opens."""


def confusion_matrix_figure(labels, predictions, class_names, title):
    """Return the confusion matrix of N `labels` and N `predictions`, both class numbers."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix  # 1 s to import

    counts = confusion_matrix(labels, predictions, labels=range(len(class_names)))
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    display = ConfusionMatrixDisplay(counts, display_labels=class_names)
    turned = 45 if max(map(len, class_names)) > 2 else "horizontal"
    style = {"cmap": "Blues", "values_format": "d", "colorbar": False, "xticks_rotation": turned}
    display.plot(ax=figure.add_subplot(), **style)
    display.ax_.set_title(title)
    return figure
