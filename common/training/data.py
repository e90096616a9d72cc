"""MNIST, Fashion-MNIST and the digits of scikit-learn, as tensors in memory (47 MB for MNIST)."""

import hashlib
import http.client
import os
import threading
import urllib.error
import urllib.request
from typing import NamedTuple

import torch

from common.errors import UserError


class Split(NamedTuple):
    """The training or the test part of a data set: N images, their labels, their origin."""

    images: torch.Tensor  # uint8, shape (N, 1, 28, 28), 0 is background
    labels: torch.Tensor  # int64, shape (N,)
    class_names: list  # what label 0, 1, 2 ... is called
    source: str  # the address of the data, for MLflow's record
    digest: str = ""  # 32 hexadecimal digits of the SHA-256 over images and labels

    def part(self, rows):
        """Return the images `rows`, a slice or a tensor of row numbers, with their own digest."""
        images, labels = self.images[rows], self.labels[rows]
        digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        return self._replace(images=images, labels=labels, digest=digest[:32])  # MLflow takes 36


def load_data(dataset, data_dir, train):
    """Return the `Split` of "mnist", "fashion_mnist" or "digits"; `train` says which of the two.

    torchvision reads MNIST and Fashion-MNIST from `data_dir`/MNIST/raw and `data_dir`/FashionMNIST/
    raw, and downloads them if they are not there. Raises UserError, with both ways out, if no
    server answers within seconds, and if a file there is damaged.
    """
    if dataset == "digits":
        return _load_digits(train)

    from torchvision import datasets  # here, because it takes 1.5 s to import

    cls = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[dataset]
    folder = os.path.abspath(os.path.join(data_dir, cls.__name__, "raw"))
    files = [os.path.join(folder, name.removesuffix(".gz")) for name, _ in cls.resources]
    if not all(map(os.path.isfile, files)):
        _download(cls, dataset, os.path.abspath(data_dir))
    try:
        raw = cls(data_dir, train=train)
        images, labels = raw.data.unsqueeze(1), raw.targets
        if images.shape != (len(labels), 1, 28, 28) or labels.max() >= len(raw.classes):
            raise ValueError(f"{tuple(images.shape)}, {len(labels)} labels up to {labels.max()}")
    except PermissionError as error:
        hint = "ask its owner for read permission, or choose another --data_dir."
        raise UserError(f"{error.filename} may not be read.", hint) from error
    # What torchvision's parser raises on a file that is cut short or something else.
    except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        what = f"the files in {folder} are damaged ({type(error).__name__} {error})."
        hint = "delete that folder; the next run downloads it again, or copy the files anew."
        raise UserError(what, hint) from error
    class_names = [name.split(" - ")[0] for name in raw.classes]
    return Split(images, labels, class_names, cls.mirrors[0]).part(slice(None))


def _load_digits(train):
    """The 1797 digits of scikit-learn, 8 x 8 pixels, scaled to 28 x 28; a fifth is for testing."""
    from sklearn.datasets import load_digits  # here, because it takes 1 s to import
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    nearest = torch.arange(28) * 8 // 28  # in integers: every machine gets the same images
    images = torch.tensor(bunch.images * 255 / 16).to(torch.uint8)[:, nearest][:, :, nearest]
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    parts = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    names, source = list(map(str, bunch.target_names)), "https://archive.ics.uci.edu/dataset/80"
    everything = Split(images.unsqueeze(1), labels, names, source)
    return everything.part(torch.tensor(parts[0] if train else parts[1]))


def _download(cls, dataset, folder):
    """Let torchvision download; raise UserError within seconds if there is no network."""
    name, missing = cls.__name__, f"{dataset} is not in {folder}"
    ways_out = f"""on a machine with a network, run
           python -c "from torchvision.datasets import {name}; {name}('data', download=True)"
       and copy data/{name} into {folder},
       or use --dataset digits, which needs no download."""
    if not _any_answers(cls.mirrors):
        raise UserError(f"{missing}, and no download server can be reached.", ways_out)
    print(f"download {dataset} into {folder}", flush=True)
    try:
        cls(folder, download=True)
    except (OSError, RuntimeError) as error:  # a folder that cannot be written; every mirror failed
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{missing}, and the download failed: {reason}", ways_out) from error


def _any_answers(urls, seconds=10):
    """Return whether one of the addresses answers an HTTP request, through a proxy if set."""
    answered = threading.Event()

    def ask():
        for url in urls:
            try:
                urllib.request.urlopen(url, timeout=seconds / len(urls)).close()
            except (OSError, http.client.HTTPException) as error:
                if not isinstance(error, urllib.error.HTTPError):  # "forbidden" is an answer, too
                    continue
            answered.set()
