"""A model written once, and hashed meanwhile; by PyTorch alone where its archives have changed."""

import hashlib
import json
import zipfile

import mlflow
import numpy as np
import pytest
import torch
from test_mapping import assert_same, save
from torch.export.pt2_archive import _package

from common.errors import UserError
from common.storage import (
    MODEL_FILE,
    check_model,
    layout,
    map_weights,
    staged,
    write_model,
    writing,
)
from common.training import MNISTCNN

EXAMPLE = np.zeros((2, 1, 28, 28), dtype="float32")


@pytest.fixture
def network():
    torch.manual_seed(0)
    return MNISTCNN().eval()


def written(network, path):
    """Write the model as the script does; return its SHA-256 and how often `save` was called."""
    description, calls = mlflow.models.Model(), []
    with staged(path) as folder:

        def save(traced):
            calls.append(traced)
            mlflow.pytorch.save_model(
                traced,
                path=folder,
                mlflow_model=description,
                input_example=EXAMPLE,
                signature=mlflow.models.infer_signature(EXAMPLE, np.zeros((2, 10), "float32")),
                pip_requirements=["torch"],
            )

        sha256, _ = write_model(folder, network, save)
    return sha256, calls


def assert_complete(path, sha256, network):
    assert hashlib.sha256((path / MODEL_FILE).read_bytes()).hexdigest() == sha256
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert_same(mlflow.pytorch.load_model(str(path)), network)


def test_model_is_written_once(network, tmp_path, capsys):
    sha256, calls = written(network, tmp_path / "model")
    assert len(calls) == 1 and calls[0] is not network
    assert_complete(tmp_path / "model", sha256, network)
    assert_same(map_weights(MNISTCNN, tmp_path / "model" / MODEL_FILE), network)
    check_model(tmp_path / "model")
    assert "write  " not in capsys.readouterr().out


def other_name_of_the_config(monkeypatch):
    name = "data/weights/{}_listing.json"
    monkeypatch.setattr(_package, "WEIGHTS_CONFIG_FILENAME_FORMAT", name)


def other_names_of_the_weights(monkeypatch):
    monkeypatch.setattr(_package, "WEIGHTS_DIR", "data/parameters/")


def other_names_in_the_same_folder(monkeypatch):
    monkeypatch.setattr(_package, "WEIGHT_FILENAME_PREFIX", "parameter_")


def other_version(monkeypatch):
    monkeypatch.setattr(_package, "ARCHIVE_VERSION_VALUE", "1")


def one_more_record(monkeypatch):
    original = torch.export.save
    monkeypatch.setattr(
        torch.export, "save", lambda *args: original(*args, extra_files={"index": "of weights"})
    )


def no_weights_without_content(monkeypatch):
    def without_weights(network):
        from torch._subclasses.fake_tensor import NameThatIsGone  # noqa: F401

    monkeypatch.setattr(writing, "without_weights", without_weights)


def no_saving_without_content(monkeypatch):
    """PyTorch refuses to save what has no content."""
    original = torch.export.save

    def refusing(program, path):
        if any(hasattr(weight, "fake_mode") for weight in program.state_dict.values()):
            raise NotImplementedError("there is nothing to save")
        original(program, path)

    monkeypatch.setattr(torch.export, "save", refusing)


CHANGES = [
    other_name_of_the_config,
    other_names_of_the_weights,
    other_names_in_the_same_folder,
    other_version,
    one_more_record,
    no_weights_without_content,
    no_saving_without_content,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_pytorch_writes_it_alone_if_its_archives_change(
    change, network, tmp_path, monkeypatch, capsys
):
    change(monkeypatch)
    sha256, calls = written(network, tmp_path / "model")
    assert calls[-1] is network
    assert_complete(tmp_path / "model", sha256, network)
    (line,) = [li for li in capsys.readouterr().out.splitlines() if li.startswith("write  ")]
    assert line.startswith("write    more slowly, by PyTorch alone: ")


def test_weights_that_are_described_in_another_way(network, tmp_path, monkeypatch):
    """As if the strides, the types or the fields of an entry came to mean something else."""
    with zipfile.ZipFile(save(network, torch.zeros(2, 1, 28, 28), tmp_path)) as archive:
        name = layout.ROOT + layout.WEIGHTS_CONFIG
        entry = json.loads(archive.read(name))["config"]["fc1.weight"]
    weight = network.fc1.weight
    writing._check_entry(entry, weight)
    meta = entry["tensor_meta"]
    for other in (
        entry | {"checksum": 1},
        entry | {"use_pickle": True},
        entry | {"tensor_meta": meta | {"dtype": 6}},
        entry | {"tensor_meta": meta | {"layout": 1}},
        entry | {"tensor_meta": meta | {"sizes": meta["sizes"][::-1]}},
        entry | {"tensor_meta": meta | {"strides": meta["strides"][::-1]}},
    ):
        with pytest.raises(ValueError, match="describe weights in another way"):
            writing._check_entry(other, weight)


def test_network_that_cannot_be_saved_says_why(tmp_path):
    class Branching(torch.nn.Linear):
        def forward(self, x):
            return x if x.mean() > 1e9 else super().forward(x)

    def save(traced):
        torch.export.export(traced, (torch.zeros(2, 2),))

    (tmp_path / "folder").mkdir()
    with pytest.raises(RuntimeError, match="data-dependent|Data-dependent|dynamic control flow"):
        write_model(tmp_path / "folder", Branching(2, 2), save)


def test_nothing_of_somebody_else_is_removed(network, tmp_path):
    """The folder has to be empty: when PyTorch writes alone, what was begun there is removed."""
    (tmp_path / "kept").touch()
    with pytest.raises(OSError, match="not empty"):
        write_model(tmp_path, network, lambda traced: None)
    assert (tmp_path / "kept").exists()


@pytest.mark.parametrize("way", ["direct", "no such thing"])
def test_file_of_several_chunks(way, tmp_path, monkeypatch):
    """Past the page cache, and without that (macOS)."""
    if way == "no such thing":
        monkeypatch.setattr(writing, "DIRECT", 0)
    network = torch.nn.Linear(3000, 3000).eval()
    pieces = [b"head", memoryview(network.weight.detach().reshape(-1).view(torch.uint8).numpy())]
    with writing.HashedFile(tmp_path / "file") as file:
        for piece in pieces * 2:
            file.write(piece)
    content = b"".join(bytes(piece) for piece in pieces * 2)
    assert len(content) > 4 * writing.CHUNK
    assert (tmp_path / "file").read_bytes() == content
    assert file.sha256.hexdigest() == hashlib.sha256(content).hexdigest()


def test_filesystem_that_refuses_direct_writing_late(tmp_path, monkeypatch, capsys):
    """It opens a file for it, and then does not take what is written, here from an odd address."""

    class Odd(writing.HashedFile):
        def __init__(self, path):
            super().__init__(path)
            self.chunk = memoryview(bytearray(writing.CHUNK + 1))[1:]

    monkeypatch.setattr(writing, "HashedFile", Odd)
    network = torch.nn.Linear(3000, 3000).eval()
    (tmp_path / "folder").mkdir()

    def save_at_last(traced):
        save(traced, torch.zeros(2, 3000), tmp_path / "folder")

    sha256, _ = write_model(tmp_path / "folder", network, save_at_last)
    path = tmp_path / "folder" / MODEL_FILE
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    assert torch.equal(map_weights(lambda: torch.nn.Linear(3000, 3000), path).bias, network.bias)


def test_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    """/dev/full takes no byte; PyTorch's own writer would abort the process here."""
    network = torch.nn.Linear(4000, 4000).eval()
    path = tmp_path / "models" / "m-1" / "artifacts"
    with (
        pytest.raises(UserError, match="could not be written .*No space left"),
        staged(path) as folder,
    ):

        def save_before_the_disk_is_full(traced):
            save(traced, torch.zeros(2, 4000), folder)
            (folder / MODEL_FILE).with_suffix(".whole").symlink_to("/dev/full")

        write_model(folder, network, save_before_the_disk_is_full)
    assert list(tmp_path.iterdir()) == []


def test_signal_while_the_weights_are_written(tmp_path, monkeypatch):
    """It is not held up by the gigabytes that were still to come."""
    network, writes = torch.nn.Sequential(*[torch.nn.Linear(10, 10) for _ in range(50)]), []
    original = writing._write_record

    def interrupted(*arguments):
        writes.append(original(*arguments))
        if len(writes) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_write_record", interrupted)
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "model") as folder:
        write_model(folder, network, lambda traced: save(traced, torch.zeros(2, 10), folder))
    assert len(writes) == 3
    assert list(tmp_path.iterdir()) == []
