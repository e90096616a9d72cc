"""The data sets as tensors, and what their files have to be."""

import gzip
import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from conftest import REAL_DATA, REAL_MNIST, write_mnist
from torchvision import datasets

from common import training
from common.errors import UserError
from scripts import networks


def digits(train):
    return training.load_data("digits", "unused", train=train)


def test_digits_are_the_same_everywhere_and_split_without_overlap():
    train, test = digits(True), digits(False)
    assert train.images.shape == (1437, 1, 28, 28) and test.images.shape == (360, 1, 28, 28)
    assert train.images.dtype == torch.uint8 and train.images.max() == 255
    assert test.digest == "8e2593d6e8ef3517862a034f68b3fa44"
    assert sorted(set(test.labels.tolist())) == list(range(10))
    images = [bytes(image) for split in (train, test) for image in split.images.numpy()]
    assert len(set(images)) == len(images)


def test_held_out_images_are_not_trained_on():
    everything = digits(True)
    rest, held_out = networks.hold_out(everything, fraction=0.2, seed=1)
    assert (len(rest.images), len(held_out.labels)) == (1150, 287)
    together = torch.cat([rest.images, held_out.images]).flatten(1).tolist()
    assert sorted(together) == sorted(everything.images.flatten(1).tolist())
    assert len({split.digest for split in (everything, rest, held_out)}) == 3
    assert networks.hold_out(everything, fraction=0.2, seed=1)[1].digest == held_out.digest
    assert networks.hold_out(everything, fraction=0.2, seed=2)[1].digest != held_out.digest


def test_files_of_mnist_are_read_and_a_damaged_one_is_found_out(tmp_path):
    folder = write_mnist(tmp_path)
    read = training.load_data("mnist", str(folder), train=False)
    assert read.digest == digits(False).digest and read.class_names[0] == "0"
    labels = folder / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    content = labels.read_bytes()
    for damage in (content[:100], content[:-1] + b"\x0b", b""):
        labels.write_bytes(damage)
        with pytest.raises(
            UserError, match=r"error: the files in .*raw are damaged .*\(.*\)\.\nhint: "
        ):
            training.load_data("mnist", str(folder), train=False)


def test_packed_files_are_unpacked(tmp_path, monkeypatch, capsys):
    """As they are copied to a node without a network: all of them, or some."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    raw = write_mnist(tmp_path) / "MNIST" / "raw"
    for count in (4, 3):
        for path in [path for path in raw.iterdir() if not path.suffix][:count]:
            Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        read = training.load_data("mnist", str(tmp_path), train=False)
        assert read.digest == digits(False).digest and capsys.readouterr().out == ""
    # What is left of a download that was cut off is no such file: it is downloaded again.
    packed = next(raw.glob("t10k-images*.gz"))
    for content in (packed.read_bytes()[:-100], b"<html>", gzip.compress(b"a key, say")):
        packed.write_bytes(content)
        packed.with_suffix("").unlink(missing_ok=True)
        with pytest.raises(UserError, match="is not in .* cannot be downloaded"):
            training.load_data("mnist", str(tmp_path), train=False)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_what_others_have_put_into_a_shared_folder_of_data(end, tmp_path):
    """A link to nothing would have the file unpacked where it leads; a pipe would be waited for."""
    raw = write_mnist(tmp_path) / "MNIST" / "raw"
    path, profile = raw / f"t10k-images-idx3-ubyte{end}", tmp_path / "profile"
    content = (raw / "t10k-images-idx3-ubyte").read_bytes()
    for make in (lambda: path.symlink_to(profile), lambda: os.mkfifo(path)):
        path.unlink(missing_ok=True)
        make()
        if not end:
            Path(f"{path}.gz").write_bytes(gzip.compress(content))
        with pytest.raises(UserError, match="is a pipe, a link to nothing, or much too large"):
            training.load_data("mnist", str(tmp_path), train=False)
        assert not profile.exists()


class Mirror(BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.files[self.path[1:]])

    def log_message(self, *arguments):
        pass


def test_a_download_follows_no_link(tmp_path, monkeypatch):
    """As torchvision does, which would write over a file of the user's own."""
    raw = write_mnist(tmp_path / "there") / "MNIST" / "raw"
    files = {f"{path.name}.gz": gzip.compress(path.read_bytes()) for path in raw.iterdir()}
    known = [(n, hashlib.md5(files[n]).hexdigest()) for n, _ in datasets.MNIST.resources]
    mirror = HTTPServer(("127.0.0.1", 0), Mirror)
    mirror.files = files
    threading.Thread(target=mirror.serve_forever, daemon=True).start()
    monkeypatch.setattr(datasets.MNIST, "resources", known)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{mirror.server_port}/"])
    thesis, here = tmp_path / "thesis", tmp_path / "here" / "MNIST" / "raw"
    here.mkdir(parents=True)
    thesis.write_text("thesis")
    (here / "train-images-idx3-ubyte").symlink_to(thesis)
    (here / "t10k-images-idx3-ubyte.gz").symlink_to(thesis)
    os.link(thesis, here / "t10k-labels-idx1-ubyte")
    read = training.load_data("mnist", str(tmp_path / "here"), train=False)
    mirror.shutdown()
    assert read.digest == digits(False).digest and thesis.read_text() == "thesis"
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["MNIST"]


def test_files_of_an_old_torchvision_do_not_come_first(tmp_path):
    processed = write_mnist(tmp_path) / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28), torch.full((3,), -7)), processed / name)
    read = training.load_data("mnist", str(tmp_path), train=False)
    assert read.digest == digits(False).digest


@pytest.mark.slow
@REAL_MNIST
def test_fashion_mnist_is_read():
    train = training.load_data("fashion_mnist", str(REAL_DATA), train=True)
    assert train.images.shape == (60000, 1, 28, 28)
    # The published mean and deviation of the training set.
    pixels = train.images.float() / 255
    assert round(pixels.mean().item(), 4) == 0.2860
    assert round(pixels.std().item(), 4) == 0.3530
    assert train.class_names[0] == "T-shirt/top" and len(train.class_names) == 10


@pytest.mark.slow
@REAL_MNIST
def test_normalisation_in_the_network_is_that_of_mnist():
    pixels = training.load_data("mnist", str(REAL_DATA), train=True).images.float() / 255
    assert round(pixels.mean().item(), 4) == training.networks.PIXEL_MEAN
    assert round(pixels.std().item(), 4) == training.networks.PIXEL_STD
