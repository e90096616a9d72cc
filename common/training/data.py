"""MNIST, Fashion-MNIST and the digits of scikit-learn, as tensors in memory (47 MB for MNIST)."""

import gzip
import hashlib
import os
import socket
import tempfile
import zlib
from typing import NamedTuple

import torch

from common.errors import UserError, cure

LARGEST = 2**26  # bytes of a file, unpacked; the largest has 47 MB


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
    raw, and downloads them if they are not there: UserError if it cannot, or if one is damaged.
    """
    if dataset == "digits":
        return _load_digits(train)

    from torchvision import datasets  # here, because it takes 1.5 s to import

    cls = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}.get(dataset)
    if cls is None:  # a run's own word for what it was trained on
        raise UserError(f"there is no data set {dataset!r} here.", "--dataset says another.")
    folder = os.path.abspath(os.path.join(data_dir, cls.__name__, "raw"))
    files = [os.path.join(folder, name.removesuffix(".gz")) for name, _ in cls.resources]
    try:
        for file in (path + end for path in files for end in ("", ".gz")):
            good = os.path.isfile(file) and os.path.getsize(file) < LARGEST
            if os.path.lexists(file) and not good:  # others may have put it there
                raise OSError(f"{file} is a pipe, a link to nothing, or much too large")
        for file in files:
            if os.path.isfile(f"{file}.gz") and not os.path.isfile(file):
                _unpack(file)
        if not all(map(os.path.isfile, files)):
            _download(cls, dataset, os.path.abspath(data_dir), folder)
        # The first two files are for training. `cls` would prefer what an old torchvision has left.
        image_file, label_file = files[:2] if train else files[2:]
        images = datasets.mnist.read_image_file(image_file).unsqueeze(1)
        labels = datasets.mnist.read_label_file(label_file)
        if images.shape != (len(labels), 1, 28, 28) or labels.max() >= len(cls.classes):
            raise ValueError(f"{tuple(images.shape)}, {len(labels)} labels up to {labels.max()}")
    # What torchvision's parser raises on a file that is cut short, something else, or not readable.
    except (AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__} {error}"
        what = f"the files in {folder} are damaged or may not be read ({reason})."
        hint = "delete that folder, to download it again, or choose another --data_dir."
        raise UserError(what, cure(error, hint)) from error
    class_names = [name.split(" - ")[0] for name in cls.classes]
    return Split(images, labels, class_names, cls.mirrors[0]).part(slice(None))


def _unpack(file):
    """Make `file` of the packed one that somebody has copied: whole, also if two jobs do it."""
    try:
        with gzip.open(f"{file}.gz") as packed:
            content = packed.read(LARGEST)
    except (EOFError, gzip.BadGzipFile, zlib.error):  # its download was cut off
        return
    if content.startswith(b"\0\0\x08"):  # and is nothing else, to be shown here
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(file), delete=False) as unpacked:
            unpacked.write(content)
        os.chmod(unpacked.name, 0o644)
        os.replace(unpacked.name, file)


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


def _download(cls, dataset, folder, raw):
    """Let torchvision download; raise UserError with both ways out if it cannot.

    It writes through links that others may have planted; so the files are moved to `raw` from a new
    folder, which replaces such a link.
    """
    name, patience = cls.__name__, socket.getdefaulttimeout()
    # Where packets are dropped, urllib by itself would wait for minutes at each address.
    socket.setdefaulttimeout(5)
    print(f"download {dataset} into {folder}", flush=True)
    try:
        os.makedirs(raw, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:
            cls(new, download=True)
            for file in os.scandir(os.path.join(new, name, "raw")):
                os.replace(file.path, os.path.join(raw, file.name))
    except (OSError, RuntimeError) as error:  # RuntimeError: torchvision has tried every server
        reason = " ".join(str(error).split())[:300]
        fetch = f"from torchvision.datasets import {name}; {name}('data', download=True)"
        hint = f'on a machine with a network, python -c "{fetch}"; copy data/{name} into {folder}; '
        hint += "or use --dataset digits, which needs no download."
        what = f"{dataset} is not in {folder}, and it cannot be downloaded: {reason}"
        raise UserError(what, cure(error, hint)) from error
    finally:
        socket.setdefaulttimeout(patience)
