"""Weights that are written once and mapped: right, safe, and refused where they are neither."""

import hashlib
import json
import pickle
import random
import struct
import sys
import zipfile

import pytest
import torch
from crafted import Payload
from safetensors.torch import save_file

from common.errors import UserError
from common.storage import (
    MODEL_FILE,
    check_model,
    layout,
    map_weights,
)
from common.storage.writing import add_weights, without_weights
from common.training import MNISTCNN


def export(network, example, path):
    """What `save_model` does for an archive, with any number of rows."""
    rows = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=rows), path)
    return path


def save(network, example, folder):
    """The same at the place where `save_model` puts it."""
    path = folder / MODEL_FILE
    path.parent.mkdir(parents=True)
    return export(network, example, path)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return MNISTCNN().eval()


@pytest.fixture(scope="module")
def pt2(network, tmp_path_factory):
    """(the archive written by this project, the SHA-256 that it was said to have)."""
    folder = tmp_path_factory.mktemp("archive") / "folder"
    path = save(without_weights(network), torch.rand(2, 1, 28, 28), folder)
    return path, add_weights(path, network.state_dict())


def assert_same(one, other, count=3):
    x = torch.rand(count, 1, 28, 28)
    with torch.inference_mode():
        assert torch.equal(one(x), other(x))


def test_written_archive_is_one_of_pytorch(pt2, network):
    path, sha256 = pt2
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    with zipfile.ZipFile(path) as content:
        assert content.testzip() is None
    assert_same(torch.export.load(path).module(), network, count=1)
    assert_same(map_weights(MNISTCNN, path), network)


def test_archive_that_pytorch_wrote_is_mapped(network, tmp_path):
    path = export(network, torch.rand(2, 1, 28, 28), tmp_path / "model.pt2")
    loaded = map_weights(MNISTCNN, path)
    assert not loaded.training
    assert_same(loaded, network)


def test_weights_are_aligned_and_uncompressed(pt2):
    with zipfile.ZipFile(pt2[0]) as content, pt2[0].open("rb") as file:
        records = [i for i in content.infolist() if "/weights/weight_" in i.filename]
        assert len(records) == len(MNISTCNN().state_dict())
        for record in records:
            assert record.compress_type == zipfile.ZIP_STORED
            file.seek(record.header_offset)
            name, extra = struct.unpack_from("<26x2H", file.read(30))
            assert (record.header_offset + 30 + name + extra) % 64 == 0


class Odd(torch.nn.Module):
    """What other networks have: buffers, tied and transposed weights, half precision, nothing."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(8)
        self.first = torch.nn.Linear(8, 8, bias=False)
        self.tied = torch.nn.Linear(8, 8, bias=False)
        self.tied.weight = self.first.weight
        self.turned = torch.nn.Parameter(torch.rand(8, 4).T)
        self.low = torch.nn.Parameter(torch.rand(4).bfloat16())
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("scalar", torch.tensor(2.5))

    def forward(self, x):
        x = self.tied(self.first(self.norm(x)))
        return x @ self.turned.T * self.scalar + self.low + self.empty.sum()


def test_odd_weights_survive(tmp_path):
    network = Odd()
    network.norm(torch.rand(16, 8))  # running statistics
    network.eval()
    path = save(without_weights(network), torch.rand(2, 8), tmp_path / "folder")
    add_weights(path, network.state_dict())
    x = torch.rand(5, 8)
    with torch.inference_mode():
        expected = network(x)
        assert torch.equal(map_weights(Odd, path)(x), expected)
        assert torch.equal(torch.export.load(path).module()(x), expected)


def test_changed_weights_do_not_reach_the_file(pt2):
    before = pt2[0].read_bytes()
    loaded = map_weights(MNISTCNN, pt2[0])
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert pt2[0].read_bytes() == before


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_other_formats_are_mapped(suffix, network, tmp_path):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network.state_dict(), path)
    assert_same(map_weights(MNISTCNN, path), network)


def test_file_larger_than_memory(tmp_path):
    """A sparse file of 256 GB: nothing of it is read before it is used."""
    size, path = 4 * 2**36, tmp_path / "model.pt2"
    meta = {"layout": 7, "dtype": 7, "storage_offset": {"as_int": 0}}
    meta |= {"sizes": integers(2**15, 2**21), "strides": integers(2**21, 1)}
    config = {"weight": {"path_name": "weight_0", "use_pickle": False, "tensor_meta": meta}}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/byteorder", sys.byteorder)
        archive.writestr(f"model/{layout.WEIGHTS_CONFIG}", json.dumps({"config": config}))
        write_aligned(archive, "model/data/weights/weight_0", b"")
        archive.fp.seek(size, 1)  # as if so much had been written
        archive.start_dir = archive.fp.tell()
        archive.filelist[-1].file_size = archive.filelist[-1].compress_size = size

    loaded = map_weights(lambda: torch.nn.Linear(2**21, 2**15, bias=False), path)
    assert loaded.weight[-1, -1] == 0


def rewritten(change, compression=zipfile.ZIP_STORED):
    """Return a function that writes the archive again, with its JSON changed by `change`."""

    def make(source, path):
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compression) as new:
            for name in old.namelist():
                content = old.read(name)
                if name.endswith("model_weights_config.json"):
                    config = json.loads(content)
                    change(config["config"])
                    content = json.dumps(config)
                write_aligned(new, name, content, compression)

    return make


def write_aligned(target, name, content, compression=zipfile.ZIP_STORED):
    record = zipfile.ZipInfo(name)
    padding = -(target.fp.tell() + 30 + len(name) + 4) % 64
    record.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    target.writestr(record, content, compression)


def entry(name, **changes):
    return lambda config: config[name].update(changes)


def meta(name, **changes):
    return lambda config: config[name]["tensor_meta"].update(changes)


def integers(*values):
    return [{"as_int": value} for value in values]


OFFSETS = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}}
REFUSED = {
    "compressed": (rewritten(lambda config: None, zipfile.ZIP_DEFLATED), "compressed"),
    "pickle": (rewritten(entry("fc1.weight", use_pickle=True)), "is a pickle"),
    "no record": (rewritten(entry("fc1.weight", path_name="../../x")), "cannot be mapped"),
    "too large": (rewritten(meta("fc1.bias", sizes=integers(1 << 50))), "larger than its"),
    "beyond": (rewritten(meta("fc1.bias", storage_offset={"as_int": 1})), "larger than its"),
    "negative": (rewritten(meta("fc1.bias", strides=integers(-1))), "impossible shape"),
    "symbolic": (rewritten(meta("fc1.bias", sizes=[{"as_expr": "x"}])), "cannot be mapped"),
    "type": (rewritten(meta("fc1.bias", dtype=99)), "unknown type"),
    "layout": (rewritten(meta("fc1.bias", layout=1)), "not dense"),
    "other shape": (
        rewritten(meta("fc1.bias", sizes=integers(64))),
        "fc1.bias has shape torch.Size([64]) instead",
    ),
    "other dtype": (
        rewritten(meta("fc1.bias", dtype=5, sizes=integers(64))),
        "torch.int64 instead",
    ),
    "missing": (rewritten(lambda config: config.pop("fc1.bias")), "missing fc1.bias"),
    "nonsense": (rewritten(lambda config: config.update({"fc1.bias": [1]})), "cannot be mapped"),
    "truncated": (lambda s, p: p.write_bytes(s.read_bytes()[:-5000]), "cannot be mapped"),
    "text": (lambda s, p: p.write_text("loss 0.3"), "cannot be mapped"),
    "empty": (lambda s, p: p.write_bytes(b""), "cannot be mapped"),
    "not there": (lambda s, p: None, "cannot be opened"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_archive_that_is_refused(kind, pt2, tmp_path):
    make, message = REFUSED[kind]
    path = tmp_path / "model.pt2"
    make(pt2[0], path)
    with pytest.raises(UserError, match=r"^error: .*\nhint:  \w") as refusal:
        map_weights(MNISTCNN, path)
    assert message in str(refusal.value) and str(path) in str(refusal.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_other_file_that_is_refused(name, tmp_path):
    path = tmp_path / name
    header = json.dumps(OFFSETS).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    with pytest.raises(UserError, match="is no file of plain weights"):
        map_weights(MNISTCNN, path)


RUNS_CODE = Payload("open('code-was-run', 'w')")


@pytest.mark.parametrize("planted", [".pt", "constants_config.json", "models/model.json"])
def test_no_code_from_the_file_is_run(planted, pt2, network, tmp_path):
    """A pickle in each place of the archive where PyTorch would load one.

    Mapping looks at none of these records; the check, for those who load it otherwise, refuses it.
    """
    path, replaced = tmp_path / "model.pt2", 0
    with zipfile.ZipFile(pt2[0]) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith(planted):
                content, replaced = pickle.dumps(RUNS_CODE, protocol=2), replaced + 1
            write_aligned(new, name, content)
    assert replaced
    assert_same(map_weights(MNISTCNN, path), network)
    with pytest.raises(UserError, match="may run code when it is loaded"):
        check_model(path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


def test_no_code_from_a_state_dict_is_run(tmp_path):
    torch.save(RUNS_CODE, tmp_path / "w.pth")
    with pytest.raises(UserError, match="is no file of plain weights"):
        map_weights(MNISTCNN, tmp_path / "w.pth")
    assert [file.name for file in tmp_path.iterdir()] == ["w.pth"]


def test_buffer_that_no_file_holds(tmp_path):
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(2, 2)
            self.register_buffer("mask", torch.ones(2), persistent=False)

    torch.save(Masked().state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="mask is a buffer that no file holds"):
        map_weights(Masked, tmp_path / "w.pth")


def test_damaged_archives_are_refused_or_loaded(pt2, network, tmp_path):
    """Any byte outside of the weights may be wrong: the outcome is a message or a network."""
    content, choose = pt2[0].read_bytes(), random.Random(0)
    start = content.index(b"model_weights_config.json")
    path, refused = tmp_path / "model.pt2", 0
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(choose.randint(1, 4)):
            damaged[choose.randrange(start, len(content))] = choose.randrange(256)
        path.write_bytes(damaged)
        try:
            map_weights(MNISTCNN, path)
        except UserError:
            refused += 1
    assert refused > 20
