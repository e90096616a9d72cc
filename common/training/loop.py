"""Epochs of training and one pass of evaluation, in one process or many."""

import contextlib
import ctypes
import math
import random
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from common.errors import UserError

from .processes import end, loss_explained

MINUTE = 60  # seconds between two lines within an epoch


class Evaluation(NamedTuple):
    """What `evaluate` found on N images."""

    loss: float  # mean cross-entropy
    accuracy: float  # fraction of the images that were recognised
    predictions: torch.Tensor  # int64, shape (N,), on the CPU


class Epoch(NamedTuple):
    """The results of one epoch."""

    number: int  # from 1
    train_loss: float  # mean over the images, with dropout and the weights as they change
    train_accuracy: float
    val_loss: float  # after the epoch
    val_accuracy: float
    seconds: float  # of training
    ended: int  # when, in milliseconds since 1970, as MLflow writes it


def epochs(
    model, optimizer, train, validation, count, batch_size, seed, precision="fp32", checkpoint=None
):
    """Train for `count` epochs, and yield an `Epoch` after each, the model then in eval mode.

    `train` and `validation` have `images` and `labels` as below, on any device (`Split`). Several
    processes (`join`) each call this, with the same arguments, and get the same scores. The epochs
    that a `Checkpoint` holds are yielded first, as they were; each further one is kept there.
    """
    _keep_freed_memory()
    # The images stay on the device as uint8: a `DataLoader` takes longer than this network.
    device = next(model.parameters()).device
    parts = [part.to(device) for part in (train.images, train.labels)]
    validation_parts = [part.to(device) for part in (validation.images, validation.labels)]
    learner, finished = model, list(checkpoint.epochs) if checkpoint else []
    with loss_explained():
        if dist.is_initialized() and len(finished) < count:
            learner = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    yield from (Epoch(*epoch) for epoch in finished)
    with loss_explained():
        for number in range(len(finished) + 1, count + 1):
            torch.manual_seed(epoch_seed(seed, number))  # dropout
            order = torch.Generator().manual_seed(epoch_seed(seed, number))
            if checkpoint:
                checkpoint.between_epochs = False
            *scores, seconds = train_epoch(learner, optimizer, *parts, batch_size, order, precision)
            loss, accuracy, _ = evaluate(model.eval(), *validation_parts)
            epoch = Epoch(number, *scores, loss, accuracy, seconds, time.time_ns() // 10**6)
            if checkpoint:
                checkpoint.add(epoch)
            yield epoch


def epoch_seed(seed, number):
    """Return the seed of an epoch's order and dropout, whether the training was interrupted or not.

    Hashed, because PyTorch's generator on the CPU takes the lowest 32 bits only.
    """
    return random.Random(f"{seed} {number}").getrandbits(32)


def train_epoch(model, optimizer, images, labels, batch_size, generator, precision="fp32"):
    """Train `model` once on every image, in random order; return (mean loss, accuracy, seconds).

    `images` is uint8 of shape (N, channels, height, width), or any rows of floats, and `labels`
    int64 of shape (N,), both on the model's device; `generator` is on the CPU: one order for all.
    """
    model.train()
    rank, size = _place()
    bf16 = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16")
    start = time.perf_counter()
    # Summed where the model is: reading a GPU's number at each step would make the CPU wait for it.
    sums = torch.zeros(2, device=images.device)  # loss, images recognised
    order = torch.randperm(len(images), generator=generator).to(images.device)
    batches, said = order.split(batch_size), start
    bar = tqdm(batches, desc="training", leave=False, disable=True if rank else None)
    for step, batch in enumerate(bar):
        mine = _share(len(batch), rank, size)
        y = labels[batch[mine]]
        optimizer.zero_grad()
        with bf16, DropoutOfWholeBatch(mine, len(batch)) if size > 1 else contextlib.nullcontext():
            logits = model(_inputs(images.index_select(0, batch[mine])))
        loss = F.cross_entropy(logits.float(), y, reduction="sum")
        # Of the gradients of all processes, DistributedDataParallel takes the mean.
        (loss * (size / len(batch))).backward()
        optimizer.step()
        sums += torch.stack((loss.detach(), (logits.detach().argmax(dim=1) == y).sum()))
        if time.perf_counter() > said + MINUTE and bar.disable and not rank:  # into a job's log
            said = time.perf_counter()
            print(f"step     {step + 1}/{len(batches)}", flush=True)
    if size > 1:
        dist.all_reduce(sums)
    mean_loss, accuracy = (sums / len(images)).tolist()
    if not math.isfinite(mean_loss):
        if rank:
            end(1)  # process 0 says why
        what = f"the training diverged: the mean loss of this epoch is {mean_loss}."
        raise UserError(what, "use a smaller --lr.")
    return mean_loss, accuracy, time.perf_counter() - start


@torch.inference_mode()
def evaluate(model, images, labels, batch_size=125):
    """Return the `Evaluation` of `model` on `images` and `labels`, both as for `train_epoch`.

    Put a model that you trained into `eval()` first. Several processes share the images. A batch
    of 1000 takes twice as long on a CPU: its activations pass the 32 MB that glibc keeps.
    """
    rank, size = _place()
    total = torch.zeros((), device=images.device)
    predictions = torch.zeros_like(labels)
    rows = _share(len(images), rank, size)
    parts = (part[rows].split(batch_size) for part in (images, labels, predictions))
    for x, y, predicted in zip(*parts, strict=True):
        logits = model(_inputs(x))
        total += F.cross_entropy(logits, y, reduction="sum")
        predicted.copy_(logits.argmax(dim=1))
    if size > 1:
        dist.all_reduce(total)
        dist.all_reduce(predictions)  # zero where another process has them
    accuracy = (predictions == labels).sum().item() / len(images)
    return Evaluation(total.item() / len(images), accuracy, predictions.cpu())


def _inputs(images):
    """uint8 images as floats in [0, 1], in the layout that suits convolutions; floats unchanged."""
    if images.dtype != torch.uint8:
        return images
    # With one channel, `contiguous` alone changes nothing; the convolution is then 4 times slower.
    if images.shape[1] == 1:
        images = images.reshape(-1, *images.shape[2:], 1).movedim(3, 1)
    return images.contiguous(memory_format=torch.channels_last).float() / 255


def _keep_freed_memory():
    """Have glibc keep what a step frees for the next one: on a CPU, 6,000 page faults a step less.

    It costs up to 1 GB of memory that stays with the process.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library: as it is
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, whose maximum this is
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def _place():
    """(number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _share(count, rank, size):
    """Which of `count` rows belong to this process: parts that differ by one row at most."""
    return slice(count * rank // size, count * (rank + 1) // size)


class DropoutOfWholeBatch(TorchFunctionMode):
    """Processes draw the mask of the whole batch, from the same seed, and use their `rows`."""

    def __init__(self, rows, count):
        super().__init__()
        self.rows, self.count = rows, count

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (self.dropout if function is F.dropout else function)(*args, **(kwargs or {}))

    def dropout(self, x, p=0.5, training=True, inplace=False):
        if not training:
            return x
        mask = x.new_empty(self.count, *x.shape[1:]).bernoulli_(1 - p).div_(1 - p)
        return x * mask[self.rows]
