"""One epoch of training and one pass of evaluation, on CUDA or CPU.

The data set stays in memory as uint8 and is never touched picture by picture: on a network this
small, a `DataLoader` that decodes single pictures takes longer than the arithmetic. Copy
`train_epoch` if you only want the loop.
"""

import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm


class Evaluation(NamedTuple):
    """What `evaluate` found on N pictures."""

    loss: float  # mean cross-entropy over the N pictures
    accuracy: float  # fraction of the N pictures that were recognised
    predictions: torch.Tensor  # int64, shape (N,), on the CPU


def best_device():
    """Return the GPU that torch sees (CUDA, and ROCm under the same name), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_epoch(model, optimizer, images, labels, batch_size, generator):
    """Train `model` once on every picture, in random order, and return (mean loss, seconds).

    `images` is uint8 of shape (N, 1, 28, 28) and `labels` int64 of shape (N,), both on the model's
    device; `generator` is a CPU generator, which makes the order the same on every device. The
    last batch may be smaller, and the loss is the mean over pictures, not over batches.

    Raises SystemExit if the loss is no longer a number: every later epoch would be wasted.
    """
    model.train()
    start = time.perf_counter()
    # Summed where the model is: reading a GPU's number at each step would make the CPU wait for it.
    total = torch.zeros((), device=images.device)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    for batch in tqdm(order.split(batch_size), leave=False, disable=None):  # terminals only
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch].float() / 255), labels[batch])
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(batch)
    mean_loss = total.item() / len(images)
    if not torch.isfinite(total):
        raise SystemExit(
            f"error: the training diverged: the mean loss of this epoch is {mean_loss}.\n"
            "hint:  use a smaller --lr."
        )
    return mean_loss, time.perf_counter() - start


@torch.inference_mode()
def evaluate(model, images, labels, batch_size=1000):
    """Return the `Evaluation` of `model` on uint8 `images` (N, 1, 28, 28) and `labels` (N,).

    Put a model that you trained into `eval()` first. A model loaded from MLflow is in that mode for
    good, and an exported program has no `eval()` to call, which is why this function does not.
    """
    total, predictions = 0.0, []
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        logits = model(x.float() / 255)
        total += F.cross_entropy(logits, y, reduction="sum").item()
        predictions.append(logits.argmax(dim=1).cpu())
    predictions = torch.cat(predictions)
    correct = (predictions == labels.cpu()).sum().item()
    return Evaluation(total / len(images), correct / len(images), predictions)
