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


class Epoch(NamedTuple):
    """What came out of one epoch. The training scores are those of the weights as they change."""

    number: int  # from 1
    train_loss: float  # mean over the pictures, with dropout
    train_accuracy: float
    val_loss: float  # after the epoch, on the pictures held out
    val_accuracy: float
    seconds: float  # of training


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
    loss, _, seconds = _train_and_count(model, optimizer, images, labels, batch_size, generator)
    return loss, seconds


def epochs(model, optimizer, train, validation, count, batch_size, seed):
    """Train for `count` epochs, and yield an `Epoch` after each, the model then in eval mode.

    `train` and `validation` have `images` and `labels` as above, on any device (`data.Split`). The
    caller logs what is yielded, and may break off.
    """
    device = next(model.parameters()).device
    parts = [part.to(device) for part in (train.images, train.labels)]
    validation_parts = [part.to(device) for part in (validation.images, validation.labels)]
    generator = torch.Generator().manual_seed(seed)
    for number in range(1, count + 1):
        loss, accuracy, seconds = _train_and_count(model, optimizer, *parts, batch_size, generator)
        model.eval()
        scores = evaluate(model, *validation_parts)
        yield Epoch(number, loss, accuracy, scores.loss, scores.accuracy, seconds)


def _train_and_count(model, optimizer, images, labels, batch_size, generator):
    """`train_epoch`, which also counts what was recognised: (mean loss, accuracy, seconds)."""
    model.train()
    start = time.perf_counter()
    # Summed where the model is: reading a GPU's number at each step would make the CPU wait for it.
    total = torch.zeros((), device=images.device)
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    for batch in tqdm(order.split(batch_size), leave=False, disable=None):  # terminals only
        optimizer.zero_grad()
        logits = model(images[batch].float() / 255)
        loss = F.cross_entropy(logits, labels[batch])
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(batch)
        correct += (logits.detach().argmax(dim=1) == labels[batch]).sum()
    mean_loss = total.item() / len(images)
    if not torch.isfinite(total):
        raise SystemExit(
            f"error: the training diverged: the mean loss of this epoch is {mean_loss}.\n"
            "hint:  use a smaller --lr."
        )
    return mean_loss, correct.item() / len(images), time.perf_counter() - start


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
