"""Device and precision, epochs of training, one pass of evaluation: one process or many.

The data set stays on the device as uint8 and is never touched picture by picture: on a network this
small, a `DataLoader` that decodes single pictures takes longer than the arithmetic. Copy
`train_epoch` if you only want the loop. `network.to(memory_format=torch.channels_last)` and
`Adam(fused=True)`, in the scripts, belong to it.
"""

import contextlib
import ctypes
import sys
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

GPUS = ("cuda", "xpu")  # a node may have several of them


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


def best_device(name="auto", local_rank=0):
    """Return the device called `name`; "auto" is a GPU if torch sees one, else the CPU.

    ROCm goes by the name of CUDA, and Intel's GPUs by that of XPU. Process `local_rank` of a node
    takes the GPU of that number.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "xpu": torch.xpu.is_available(),
        # It takes no part in several processes.
        "mps": torch.backends.mps.is_available() and not dist.is_initialized(),
    }
    if name == "auto":
        name = next((kind for kind in there if there[kind]), "cpu")
    if not there.get(name, True):
        raise SystemExit(
            f"error: --device {name}: PyTorch {torch.__version__} sees none that it can use here.\n"
            "hint:  --device auto takes what there is."
        )
    if name not in GPUS:
        return torch.device(name)
    gpus = torch.get_device_module(name)
    device = torch.device(name, local_rank % gpus.device_count())
    gpus.set_device(device)
    return device


def best_precision(name, device):
    """Return "fp32" or "bf16": what `name` says, or for "auto" what `device` is faster at.

    On a CPU that takes AMX. Others compute bfloat16 as well, some of them 30 times slower.
    """
    if name != "auto":
        return name
    if device.type in GPUS:
        fast = torch.get_device_module(device).is_bf16_supported(including_emulation=False)
    else:
        known = getattr(torch.cpu, "get_capabilities", dict)()
        fast = device.type == "cpu" and known.get("amx_bf16", False)
    return "bf16" if fast else "fp32"


def epochs(model, optimizer, train, validation, count, batch_size, seed, precision="fp32"):
    """Train for `count` epochs, and yield an `Epoch` after each, the model then in eval mode.

    `train` and `validation` have `images` and `labels` as below, on any device (`data.Split`). The
    caller logs what is yielded, and may break off.

    With several processes (`torch.distributed`) each must call this, with the same arguments. They
    share each batch, DistributedDataParallel adds up their gradients, and all get the same scores.
    """
    _keep_memory()
    device = next(model.parameters()).device
    parts = [part.to(device) for part in (train.images, train.labels)]
    validation_parts = [part.to(device) for part in (validation.images, validation.labels)]
    generator = torch.Generator().manual_seed(seed)
    learner = model
    if dist.is_initialized():
        learner = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    for number in range(1, count + 1):
        loss, accuracy, seconds = train_epoch(
            learner, optimizer, *parts, batch_size, generator, precision
        )
        model.eval()
        scores = evaluate(model, *validation_parts)
        yield Epoch(number, loss, accuracy, scores.loss, scores.accuracy, seconds)


def train_epoch(model, optimizer, images, labels, batch_size, generator, precision="fp32"):
    """Train `model` once on every picture, in random order; return (mean loss, accuracy, seconds).

    `images` is uint8 of shape (N, 1, 28, 28) and `labels` int64 of shape (N,), both on the model's
    device; `generator` is a CPU generator, which makes the order the same on every device. The
    last batch may be smaller, and the loss is the mean over pictures, not over batches.

    Raises SystemExit if the loss is no longer a number: every later epoch would be wasted.
    """
    model.train()
    rank, size = _place()
    bf16 = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16")
    start = time.perf_counter()
    # Summed where the model is: reading a GPU's number at each step would make the CPU wait for it.
    sums = torch.zeros(2, device=images.device)  # loss, pictures recognised
    order = torch.randperm(len(images), generator=generator).to(images.device)
    for batch in tqdm(order.split(batch_size), leave=False, disable=True if rank else None):
        mine = _share(len(batch), rank, size)
        y = labels[batch[mine]]
        optimizer.zero_grad()
        with bf16, DropoutOfWholeBatch(mine, len(batch)) if size > 1 else contextlib.nullcontext():
            logits = model(_pixels(images.index_select(0, batch[mine])))
        loss = F.cross_entropy(logits.float(), y, reduction="sum")
        # Of the gradients of all processes, DistributedDataParallel takes the mean.
        (loss * (size / len(batch))).backward()
        optimizer.step()
        sums += torch.stack((loss.detach(), (logits.detach().argmax(dim=1) == y).sum()))
    if size > 1:
        dist.all_reduce(sums)
    mean_loss, accuracy = (sums / len(images)).tolist()
    if not torch.isfinite(sums[0]):
        message = (
            f"error: the training diverged: the mean loss of this epoch is {mean_loss}.\n"
            "hint:  use a smaller --lr."
        )
        raise SystemExit(1 if rank else message)
    return mean_loss, accuracy, time.perf_counter() - start


def _pixels(images):
    """uint8 pictures (N, 1, 28, 28) as float in [0, 1], in the layout that convolutions like.

    With one channel PyTorch cannot tell channels_last from the usual layout, and takes the usual:
    the strides have to say it. The first convolution learns 4 times faster for it, on a CPU.
    """
    height, width = images.shape[2:]
    return images.reshape(-1, height, width, 1).permute(0, 3, 1, 2).float() / 255


def _keep_memory():
    """Let the C library keep the memory that a step frees, for the next step.

    glibc hands large blocks back to the kernel, which zeroes them page by page when they are wanted
    again: 8000 pages a step, a fifth of the time on a CPU. Other C libraries are left alone.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl has no such call
            libc = ctypes.CDLL(None)
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
            for size in (2**25, 2**30):  # M_MMAP_THRESHOLD: older versions take the first at most
                libc.mallopt(-3, size)


def _place():
    """(number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _share(count, rank, size):
    """Which of `count` rows belong to this process: parts that differ by one row at most."""
    return slice(count * rank // size, count * (rank + 1) // size)


class DropoutOfWholeBatch(TorchFunctionMode):
    """Within it, dropout takes its rows out of a mask for the whole batch.

    Each process draws the whole mask, from the same seed: what is dropped does not depend on how
    many processes share the batch, and the losses of two are those of one.
    """

    def __init__(self, rows, count):
        super().__init__()
        self.rows, self.count = rows, count

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = self.dropout if function is F.dropout else function
        return function(*args, **(kwargs or {}))

    def dropout(self, x, p=0.5, training=True, inplace=False):
        if not training:
            return x
        mask = x.new_empty(self.count, *x.shape[1:]).bernoulli_(1 - p).div_(1 - p)
        return x * mask[self.rows]


@torch.inference_mode()
def evaluate(model, images, labels, batch_size=1000):
    """Return the `Evaluation` of `model` on uint8 `images` (N, 1, 28, 28) and `labels` (N,).

    Put a model that you trained into `eval()` first. A model loaded from MLflow is in that mode for
    good, and an exported program has no `eval()` to call, which is why this function does not.
    Several processes share the pictures, and each gets the result of all.
    """
    rank, size = _place()
    total = torch.zeros((), device=images.device)
    predictions = torch.zeros_like(labels)
    rows = _share(len(images), rank, size)
    parts = (part[rows].split(batch_size) for part in (images, labels, predictions))
    for x, y, predicted in zip(*parts, strict=True):
        logits = model(_pixels(x))
        total += F.cross_entropy(logits, y, reduction="sum")
        predicted.copy_(logits.argmax(dim=1))
    if size > 1:
        dist.all_reduce(total)
        dist.all_reduce(predictions)  # zero where another process has them
    accuracy = (predictions == labels).sum().item() / len(images)
    return Evaluation(total.item() / len(images), accuracy, predictions.cpu())
