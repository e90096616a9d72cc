"""Weights that are written once and mapped: right, safe, and refused where they are neither."""

import hashlib
import json
import pickle
import random
import struct
import threading
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from common import archive, mapped, model


def export(network, example, path):
    """What `save_model` does for an archive, with any number of rows."""
    rows = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=rows), path)
    return path


def save(network, example, folder):
    """The same at the place where `save_model` puts it."""
    path = folder / archive.MODEL_FILE
    path.parent.mkdir(parents=True)
    return export(network, example, path)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return model.MNISTCNN().eval()


@pytest.fixture(scope="module")
def pt2(network, tmp_path_factory):
    """(the archive written by this project, the SHA-256 that it was said to have)."""
    folder = tmp_path_factory.mktemp("archive") / "folder"
    with archive.weights_written(folder, network.state_dict()) as weights:
        path = save(archive.without_weights(network), torch.rand(2, 1, 28, 28), folder)
    return path, weights.sha256.hexdigest()


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
    assert_same(mapped.load(model.MNISTCNN, path), network)


def test_archive_that_pytorch_wrote_is_mapped(network, tmp_path):
    path = export(network, torch.rand(2, 1, 28, 28), tmp_path / "model.pt2")
    loaded = mapped.load(model.MNISTCNN, path)
    assert not loaded.training
    assert_same(loaded, network)


def test_weights_are_aligned_and_uncompressed(pt2):
    with zipfile.ZipFile(pt2[0]) as content, pt2[0].open("rb") as file:
        records = [i for i in content.infolist() if "/weights/weight_" in i.filename]
        assert len(records) == 8
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
    with archive.weights_written(tmp_path / "folder", network.state_dict()):
        path = save(archive.without_weights(network), torch.rand(2, 8), tmp_path / "folder")
    x = torch.rand(5, 8)
    with torch.inference_mode():
        expected = network(x)
        assert torch.equal(mapped.load(Odd, path)(x), expected)
        assert torch.equal(torch.export.load(path).module()(x), expected)


def test_changed_weights_do_not_reach_the_file(pt2):
    before = pt2[0].read_bytes()
    loaded = mapped.load(model.MNISTCNN, pt2[0])
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert pt2[0].read_bytes() == before


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_other_formats_are_mapped(suffix, network, tmp_path):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network.state_dict(), path)
    assert_same(mapped.load(model.MNISTCNN, path), network)


def test_file_larger_than_memory(tmp_path):
    """A sparse file of 256 GB: nothing of it is read before it is used."""
    path = tmp_path / "large.safetensors"
    shape = [2**15, 2**21]
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}
    header = json.dumps({"weight": entry}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + entry["data_offsets"][1])

    loaded = mapped.load(lambda: torch.nn.Linear(*reversed(shape), bias=False), path)
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
    "other shape": (rewritten(meta("fc1.bias", sizes=integers(64))), "fc1.bias is (64,)"),
    "other dtype": (rewritten(meta("fc1.bias", dtype=5, sizes=integers(64))), "int64 instead"),
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
    with pytest.raises(SystemExit, match=r"^error: .*\nhint:  ") as refusal:
        mapped.load(model.MNISTCNN, path)
    assert message in str(refusal.value) and str(path) in str(refusal.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_other_file_that_is_refused(name, tmp_path):
    path = tmp_path / name
    header = json.dumps(OFFSETS).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    with pytest.raises(SystemExit, match="cannot be mapped into memory"):
        mapped.load(model.MNISTCNN, path)


class RunsCode:
    """A pickle that makes a file when it is loaded."""

    def __reduce__(self):
        return open, ("code-was-run", "w")


@pytest.mark.parametrize("planted", [".pt", "constants_config.json", "models/model.json"])
def test_no_code_from_the_file_is_run(planted, pt2, network, tmp_path):
    """A pickle in each place of the archive where PyTorch would load one.

    The example inputs are one by design, and are refused; of the others nothing is looked at.
    """
    path, replaced = tmp_path / "model.pt2", 0
    with zipfile.ZipFile(pt2[0]) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith(planted):
                content, replaced = pickle.dumps(RunsCode(), protocol=2), replaced + 1
            write_aligned(new, name, content)
    assert replaced
    if planted == ".pt":
        with pytest.raises(SystemExit, match="a pickle that could run code"):
            mapped.load(model.MNISTCNN, path)
    else:
        assert_same(mapped.load(model.MNISTCNN, path), network)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


def test_no_code_from_a_state_dict_is_run(tmp_path):
    torch.save(RunsCode(), tmp_path / "w.pth")
    with pytest.raises(SystemExit, match="cannot be mapped"):
        mapped.load(model.MNISTCNN, tmp_path / "w.pth")
    assert [file.name for file in tmp_path.iterdir()] == ["w.pth"]


def test_buffer_that_no_file_holds(tmp_path):
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(2, 2)
            self.register_buffer("mask", torch.ones(2), persistent=False)

    torch.save(Masked().state_dict(), tmp_path / "w.pth")
    with pytest.raises(SystemExit, match="mask is a buffer that no file holds"):
        mapped.load(Masked, tmp_path / "w.pth")


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
            mapped.load(model.MNISTCNN, path)
        except SystemExit:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("way", ["direct", "no such thing", "refused at the first chunk"])
def test_file_of_several_chunks(way, tmp_path, monkeypatch):
    """Past the page cache, without that (macOS), and where it is allowed and then refused."""
    if way == "no such thing":
        monkeypatch.setattr(archive, "DIRECT", 0)
    network = torch.nn.Linear(3000, 3000).eval()
    pieces = [b"head", memoryview(network.weight.detach().reshape(-1).view(torch.uint8).numpy())]
    with archive._HashedFile(tmp_path / "file", threading.Event()) as file:
        if way.startswith("refused"):
            file.chunk = memoryview(bytearray(archive.CHUNK + 1))[1:]  # from an odd address
        for piece in pieces * 2:
            file.write(piece)
    content = b"".join(bytes(piece) for piece in pieces * 2)
    assert len(content) > 4 * archive.CHUNK
    assert (tmp_path / "file").read_bytes() == content
    assert file.sha256.hexdigest() == hashlib.sha256(content).hexdigest()


def test_full_disk_does_not_hide_what_went_wrong_before(tmp_path):
    network = torch.nn.Linear(4000, 4000)
    (tmp_path / "folder.weights").symlink_to("/dev/full")
    with (
        pytest.raises(ValueError, match="before"),
        archive.weights_written(tmp_path / "folder", network.state_dict()),
    ):
        raise ValueError("before")


def test_full_disk_is_an_error_and_leaves_nothing(network, tmp_path):
    """/dev/full takes no byte; PyTorch's own writer would abort the process here."""
    from common import shared_storage

    path = tmp_path / "models" / "m-1" / "artifacts"
    with (
        pytest.raises(SystemExit, match="could not be written .*No space left"),
        shared_storage.staged(path) as folder,
    ):
        path.with_name("artifacts.unfinished.weights").symlink_to("/dev/full")
        with archive.weights_written(folder, network.state_dict()):
            save(archive.without_weights(network), torch.rand(2, 1, 28, 28), folder)
    assert list(tmp_path.rglob("*")) == [tmp_path / "models"]


def test_model_larger_than_the_free_space(tmp_path):
    from common import shared_storage

    with torch.device("meta"):
        network = torch.nn.Linear(2**24, 2**24, bias=False)
    with pytest.raises(SystemExit, match="error: the model takes 1125899.91 GB, and .* has space"):
        shared_storage.check_space(tmp_path, network)
