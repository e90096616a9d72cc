"""MNIST, Fashion-MNIST and scikit-learn's digits, each as two tensors in memory.

torchvision downloads, checks and parses the files; its per-picture transforms are not used, because
a whole set fits into memory as uint8 (47 MB for MNIST). Copy `load` if you only want that.
"""

import hashlib
import http.client
import os
import queue
import threading
import urllib.error
import urllib.request
from typing import NamedTuple

import torch

# Seconds in which a download server has to answer at all. A compute node without a network often
# drops packets silently, and urllib by itself would wait for minutes at each address.
DOWNLOAD_PATIENCE = 10


class Split(NamedTuple):
    """The training or the test part of a data set: N pictures, their labels, their origin."""

    images: torch.Tensor  # uint8, shape (N, 1, 28, 28), 0 is background
    labels: torch.Tensor  # int64, shape (N,)
    class_names: list  # what label 0, 1, 2 ... is called
    source: str  # the address of the data, for MLflow's record
    digest: str  # 32 hexadecimal digits of the SHA-256 over pictures and labels


def load(dataset, data_dir, train):
    """Return the `Split` of "mnist", "fashion_mnist" or "digits"; `train` says which of the two.

    MNIST and Fashion-MNIST are read from `data_dir` in torchvision's layout (MNIST/raw,
    FashionMNIST/raw) and downloaded into it if they are not there. Raises SystemExit, with both
    ways out, if they cannot be downloaded within seconds, and if a file there is damaged.
    """
    if dataset == "digits":
        return _load_digits(train)

    from torchvision import datasets  # here, because it takes 1.5 s to import

    cls = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[dataset]
    folder = os.path.abspath(os.path.join(data_dir, cls.__name__, "raw"))
    files = [os.path.join(folder, name.removesuffix(".gz")) for name, _ in cls.resources]
    if not all(map(os.path.isfile, files)):
        _download(cls, dataset, data_dir)
    try:
        raw = cls(data_dir, train=train)
    except PermissionError as error:
        raise SystemExit(
            f"error: {error.filename} may not be read.\n"
            "hint:  ask its owner for read permission, or choose another --data_dir."
        ) from error
    # What torchvision's parser raises on a file that is cut short or something else.
    except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _damaged(folder, f"{type(error).__name__} {error}".strip()) from error

    class_names = [name.split(" - ")[0] for name in raw.classes]
    images, labels = raw.data.unsqueeze(1), raw.targets
    if images.shape[1:] != (1, 28, 28) or len(images) != len(labels) or len(images) == 0:
        raise _damaged(folder, f"pictures {tuple(raw.data.shape)}, labels {tuple(labels.shape)}")
    if labels.max() >= len(class_names):
        raise _damaged(folder, f"a label of {labels.max()}")
    return Split(images, labels, class_names, cls.mirrors[0], _digest(images, labels))


def hold_out(split, fraction=0.1, seed=0):
    """Return (what is left to train on, what is held out), two `Split`s in random order.

    For choosing by: the best epoch, the best settings. The test set is kept for the final score.
    """
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    count = round(fraction * len(order))
    parts = []
    for chosen in (order[count:], order[:count]):
        images, labels = split.images[chosen], split.labels[chosen]
        digest = _digest(images, labels)
        parts.append(split._replace(images=images, labels=labels, digest=digest))
    return tuple(parts)


def _load_digits(train):
    """The 1797 digits of scikit-learn, 8 x 8 pixels, scaled to 28 x 28; a fifth is for testing.

    Scaled by repeating pixels, in whole numbers, so that every machine gets the same pictures.
    """
    from sklearn.datasets import load_digits  # here, because it takes 1 s to import
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    nearest = torch.arange(28) * 8 // 28
    images = torch.tensor(bunch.images * 255 / 16).to(torch.uint8)[:, nearest][:, :, nearest]
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    parts = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    chosen = torch.tensor(parts[0] if train else parts[1])
    images, labels = images[chosen].unsqueeze(1), labels[chosen]
    class_names = [str(name) for name in bunch.target_names]
    source = "https://archive.ics.uci.edu/dataset/80"
    return Split(images, labels, class_names, source, _digest(images, labels))


def _download(cls, dataset, data_dir):
    """Let torchvision download; raise SystemExit within seconds if there is no network."""
    ways_out = (
        f"hint:  on a machine with a network, run\n"
        f'           python -c "from torchvision.datasets import {cls.__name__}; '
        f"{cls.__name__}('data', download=True)\"\n"
        f"       and copy data/{cls.__name__} into {os.path.abspath(data_dir)},\n"
        "       or use --dataset digits, which needs no download."
    )
    where = f"{dataset} is not in {os.path.abspath(data_dir)}"
    if not _any_answers(cls.mirrors):
        raise SystemExit(f"error: {where}, and no download server can be reached.\n{ways_out}")
    print(f"download {dataset} into {os.path.abspath(data_dir)}", flush=True)
    try:
        cls(data_dir, download=True)
    except (OSError, RuntimeError) as error:  # a folder that cannot be written; every mirror failed
        reason = " ".join(str(error).split())[:300]
        raise SystemExit(
            f"error: {where}, and the download failed: {reason}\n{ways_out}"
        ) from error


def _any_answers(urls):
    """Return whether one of the addresses answers an HTTP request, through a proxy if set."""
    answers = queue.Queue()

    def ask(url):
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_PATIENCE):
                answers.put(True)
        except urllib.error.HTTPError:  # an answer all the same: it may not list its folder
            answers.put(True)
        except (OSError, http.client.HTTPException):  # no network, no such name, refused, not HTTP
            answers.put(False)

    # In threads, to be left behind: urllib's time limit counts anew for each address of a name.
    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    try:
        return any(answers.get(timeout=DOWNLOAD_PATIENCE) for _ in urls)
    except queue.Empty:
        return False


def _digest(images, labels):
    sha256 = hashlib.sha256(images.numpy().tobytes())
    sha256.update(labels.numpy().tobytes())
    return sha256.hexdigest()[:32]  # MLflow takes 36 characters


def _damaged(folder, found):
    return SystemExit(
        f"error: the files in {folder} are damaged ({found}).\n"
        "hint:  delete that folder; the next run downloads it again, or copy the files anew."
    )
