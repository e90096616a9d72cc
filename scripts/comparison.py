"""Two models on the same images: how well each does, and where they differ (for promote.py)."""

import math

import mlflow
import torch

from common import runs, training
from common.errors import UserError
from scripts.figures import difference_figure

# What a network raises that was made for something else, wherever in it that shows.
RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError)
RAISED += (RuntimeError, TypeError, ValueError)


def score(network, test, name, pixels=training.INPUT):
    """Return the `Evaluation` of `network`; UserError if it does not classify these images."""
    classes, example = len(test.class_names), training.input_example(test.images)
    mean, std = training.SCALINGS.get(pixels, (0, 1))
    try:
        with torch.inference_mode():
            outputs = network((torch.from_numpy(example) - mean) / std)
        if (found := tuple(outputs.shape)) != (2, classes):
            raise ValueError(f"for 2 images it returns {found} in place of (2, {classes})")
        scores = training.evaluate(lambda x: network((x - mean) / std), test.images, test.labels)
        if not math.isfinite(scores.loss):
            raise ValueError(f"its loss is {scores.loss}")
    except RAISED as error:
        words = "".join(filter(str.isprintable, " ".join(str(error).split())))[:200]
        reason = f"{type(error).__name__}: {words}".rstrip(". ")
        what = f"{name} is no model for these images, {classes} classes of them: {reason}."
        hint = "is it the right model? --dataset names other images, of shape (N, 1, 28, 28)."
        raise UserError(what, hint) from error
    return scores


class Comparison:
    """What two models, or the first one alone, say to the same images."""

    def __init__(self, dataset, test, scores):
        """`scores` is {name: Evaluation}, that of the candidate last."""
        self.dataset, self.test = dataset, test
        self.names, self.evaluations = list(scores), list(scores.values())
        self.current, self.candidate = [None, *self.evaluations][-2:]
        self.right = [scores.predictions == test.labels for scores in self.evaluations]
        # How many images only the version in place, and only the candidate recognises.
        self.alone = [(a & ~b).sum().item() for a in self.right for b in self.right if a is not b]
        # McNemar's exact test: if both were equally good, each of these images would have gone to
        # either of them by the toss of a coin.
        n, k = sum(self.alone), min(self.alone, default=0)
        self.p = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)

    def rows(self):
        """Return the table: a row each for accuracy, loss, images recognised, and by one alone."""
        rows = [["score", *self.names]]
        rows.append(["accuracy", *(f"{scores.accuracy:.4f}" for scores in self.evaluations)])
        rows.append(["loss", *(f"{scores.loss:.4f}" for scores in self.evaluations)])
        rows.append(["right", *(str(right.sum().item()) for right in self.right)])
        if self.current:
            rows.append(["alone", *map(str, self.alone)])
            last = [
                "difference",
                f"{self.gain('accuracy'):+.4f}",
                f"{-self.gain('loss') or 0:+.4f}",
            ]
            last += [
                f"{self.alone[1] - self.alone[0]:+d}",
                f"McNemar p = {self.p:.2g}",
            ]
            rows = [[*row, text] for row, text in zip(rows, last, strict=True)]
        return rows

    def __str__(self):
        rows = [[f"{row[0]:<9}", *(f"{cell:<11}" for cell in row[1:])] for row in self.rows()]
        return "\n".join("".join(row).rstrip() for row in rows)

    def markdown(self):
        head, *rows = self.rows()
        lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
        count = len(self.test.labels)
        words = f"Of {count} images: *right*, recognised; *alone*, recognised by this version only."
        return "\n".join(lines) + f"\n\n{words}"

    def data(self):
        """Return the images as MLflow's data set, for `mlflow.log_input`."""
        images, labels = self.test.images.numpy(), self.test.labels.numpy()
        name, digest = self.dataset, self.test.digest
        return mlflow.data.from_numpy(images, self.test.source, labels, name=name, digest=digest)

    def gain(self, metric):
        """Return by how much the candidate is better: more accuracy, less loss."""
        one, other = getattr(self.current, metric), getattr(self.candidate, metric)
        return one - other if metric == "loss" else other - one

    def verdict(self, metric, by, at_least):
        """Return (whether the candidate may take the place, why or why not)."""
        value, better, reasons = getattr(self.candidate, metric), True, []
        if self.current:
            gain, current = self.gain(metric), getattr(self.current, metric)
            better = gain >= by - 1e-9  # 0.991 - 0.99 is a little less than 0.001
            words = f"better by {gain:.4f}" if gain > 0 else f"worse by {-gain:.4f}"
            words = f"{metric} {value:.4f} against {current:.4f}, {words if gain else 'the same'}"
            reasons.append(f"{words} (needed: better by {by:g})")
        if at_least is not None:
            better &= value <= at_least if metric == "loss" else value >= at_least
            limit = "most" if metric == "loss" else "least"
            reasons.append(f"{metric} {value:.4f} (needed: at {limit} {at_least:g})")
        if not reasons:
            return False, f"{metric} {value:.4f}, and nothing to compare it with"
        return better, "; ".join(reasons)

    def metrics(self):
        """Return {name: number} for `mlflow.log_metrics`."""
        metrics = {}
        for role, scores in (("current", self.current), ("candidate", self.candidate)):
            if scores:
                metrics |= {f"{role}_accuracy": scores.accuracy, f"{role}_loss": scores.loss}
        if self.current:
            both = (self.right[0] & self.right[1]).sum().item()
            metrics |= {"only_current_right": self.alone[0], "only_candidate_right": self.alone[1]}
            neither = len(self.test.labels) - both - sum(self.alone)
            metrics |= {"both_right": both, "neither_right": neither, "mcnemar_p": self.p}
        return metrics

    def figures(self):
        """Return {path: figure}: the confusion matrices, and the difference of the two."""
        test, figures = self.test, {}
        for role, name, scores in zip(
            ("candidate", "current"), self.names[::-1], self.evaluations[::-1], strict=False
        ):
            title = f"{name}, accuracy {scores.accuracy:.4f}"
            figures[f"plots/{role}.png"] = runs.confusion_matrix_figure(
                test.labels, scores.predictions, test.class_names, title
            )
        if self.current:
            title = f"{self.names[1]} minus {self.names[0]}: blue is better, red is worse"
            figures["plots/difference.png"] = difference_figure(
                test.labels, *self.evaluations, test.class_names, title
            )
        return figures
