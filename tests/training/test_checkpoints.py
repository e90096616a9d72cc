"""A training that goes on: bit for bit the same, and never with what does not belong to it."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from common import training
from common.errors import UserError

SETTINGS = {"lr": 0.01, "epochs": 4, "dataset": "rows"}


def rows():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (100, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (100,), generator=generator)
    return training.Split(images, labels, list("0123456789"), "here").part(slice(None))


def start(folder, settings=SETTINGS):
    torch.manual_seed(0)
    network = training.MNISTCNN().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01, fused=True)
    checkpoint = training.Checkpoint(folder, settings, network, optimizer)
    data = rows()
    epochs = training.epochs(network, optimizer, data, data, 4, 32, 7, checkpoint=checkpoint)
    return network, checkpoint, epochs


def release(checkpoint):
    """As if its process had ended."""
    checkpoint.lock.close()


def scores(epochs):
    return [epoch._replace(seconds=0, ended=0) for epoch in epochs]


@pytest.mark.parametrize("done", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 3, 4))])
def test_continued_is_bit_for_bit_the_same(done, tmp_path):
    whole, _, epochs = start(None)
    expected = scores(epochs)
    _, first, epochs = start(tmp_path / "kept")
    began = [next(epochs) for _ in range(done)]
    release(first)
    torch.manual_seed(99)  # another process has drawn other numbers by then
    network, checkpoint, epochs = start(tmp_path / "kept")
    assert checkpoint.launch == first.launch
    epochs = list(epochs)
    assert epochs[:done] == began  # seconds and times as they were
    assert scores(epochs) == expected
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name]), name
    assert sorted(os.listdir(tmp_path / "kept")) == ["lock", "training.pt"]


def test_times_are_those_of_the_epochs_ends(tmp_path):
    _, _, epochs = start(tmp_path)
    ended = [epoch.ended for epoch in epochs]
    assert ended == sorted(ended) and ended[0] > 1.7e12


def test_the_end_is_kept_and_the_weights_are_not(tmp_path):
    _, checkpoint, epochs = start(tmp_path)
    list(epochs)
    large = (tmp_path / "training.pt").stat().st_size
    checkpoint.finish({"run_id": "abc", "train_loss": 0.5})
    release(checkpoint)
    assert (tmp_path / "training.pt").stat().st_size < large / 100
    _, checkpoint, epochs = start(tmp_path)
    assert checkpoint.result == {"run_id": "abc", "train_loss": 0.5}
    assert len(list(epochs)) == 4


def refused(folder, message, settings=SETTINGS):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=message) as raised:
        start(folder, settings)
    assert str(raised.value).count("\n") == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    error = raised.value.with_traceback(None)
    del raised
    gc.collect()  # the frames, and with them the lock
    return error


@pytest.mark.slow
def test_other_settings_are_named(tmp_path):
    _, checkpoint, epochs = start(tmp_path)
    next(epochs)
    release(checkpoint)
    refused(
        tmp_path,
        "epochs was 4 and is 8; dataset was 'rows' and is None",
        {"epochs": 8, "dataset": None},
    )
    refused(tmp_path, "note was None and is 'new'", {**SETTINGS, "note": "new"})
    _, checkpoint, _ = start(
        tmp_path, {**SETTINGS, "data_dir": "elsewhere"}
    )  # the data is the same
    assert len(checkpoint.epochs) == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other", "pickle", "bits"])
@pytest.mark.slow
def test_damaged_file(damage, tmp_path):
    _, checkpoint, epochs = start(tmp_path)
    next(epochs)
    release(checkpoint)
    file = tmp_path / "training.pt"
    content = file.read_bytes()
    if damage == "other":
        torch.save({"state_dict": {}}, file)
    elif damage == "pickle":
        file.write_bytes(b"\x80\x04cos\nsystem\n.")
    else:
        middle = len(content) // 2
        content = {
            "cut": content[:middle],
            "empty": b"",
            "text": b"epoch 3",
            "bits": content[:100] + b"\xff" * 3000 + content[3100:],
        }[damage]
        file.write_bytes(content)
    assert "is damaged, or not a checkpoint" in str(refused(tmp_path, "training.pt"))


def test_one_job_at_a_time(tmp_path):
    _, checkpoint, epochs = start(tmp_path)
    next(epochs)
    refused(tmp_path, "another job is already using")
    release(checkpoint)
    start(tmp_path)


def test_folder_of_another_user(tmp_path):
    if os.getuid():
        pytest.skip("only root can give a folder away")
    os.chown(tmp_path, 12345, 12345)
    refused(tmp_path, "belongs to another user")


@pytest.mark.parametrize("name", ["lock", "training.pt", "training.pt.new"])
def test_files_that_others_have_put_there(name, tmp_path):
    """A link would be written through, a pipe waited for; and nobody can put one there later."""
    precious, path = tmp_path / "precious", tmp_path / "kept" / name
    precious.write_text("precious")
    path.parent.mkdir()
    path.parent.chmod(0o2775)
    links = (lambda: path.symlink_to(precious), lambda: os.link(precious, path))
    for make in (*links, lambda: os.mkfifo(path)):
        make()
        with pytest.raises(UserError, match=f"{name} is no file of your own"):
            start(path.parent)
        path.unlink()
    path.parent.chmod(0o2775)
    _, checkpoint, _ = start(path.parent)
    assert path.parent.stat().st_mode & 0o7777 == 0o2755 and precious.read_text() == "precious"
    release(checkpoint)


@pytest.mark.parametrize("mode", [0o2775, 0o1777])
def test_folder_that_is_for_others_as_well(mode, tmp_path):
    (tmp_path / "notes").touch()
    tmp_path.chmod(mode)
    with pytest.raises(UserError, match="others may write in .*, which holds notes as well"):
        start(tmp_path)
    assert tmp_path.stat().st_mode & 0o7777 == mode and len(list(tmp_path.iterdir())) == 1
    tmp_path.chmod(0o2755)
    release(start(tmp_path)[1])


def test_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be used: (Not a directory|File exists)"):
        start(tmp_path / "file" / "inside")
    with pytest.raises(UserError, match="cannot be used: File exists"):
        start(tmp_path / "file")


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 20 MB: one checkpoint, and not the next beside it."""
    if (
        os.getuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", tmp_path]).returncode
    ):
        pytest.skip("no tmpfs can be mounted here")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_full_disk_leaves_the_old_checkpoint(small_disk):
    _, checkpoint, epochs = start(small_disk)
    next(epochs)
    with pytest.raises(UserError, match="no checkpoint can be written to .*\nhint: .* disk full"):
        next(epochs)
    release(checkpoint)
    assert sorted(os.listdir(small_disk)) == ["lock", "training.pt"]
    _, checkpoint, _ = start(small_disk)
    assert len(checkpoint.epochs) == 1


# Without a folder


def test_an_error_between_epochs_keeps_what_was_trained(tmp_path):
    _, checkpoint, epochs = start(None)
    error = ConnectionError("the server is away")
    with pytest.raises(ConnectionError), checkpoint:
        next(epochs)
        next(epochs)
        raise error
    folder = tmp_path / f"checkpoint-{checkpoint.launch[:8]}"  # the working directory
    assert error.kept == f"The same command with --checkpoint {folder} goes on after epoch 2."
    release(checkpoint)
    _, checkpoint, epochs = start(folder)
    whole = scores(start(None)[2])
    assert scores(epochs) == whole and checkpoint.launch in checkpoint.launch


@pytest.mark.parametrize("wrong", ["full", "gone"])
def test_a_working_directory_that_takes_no_file(wrong, small_disk, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("tmp")
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    monkeypatch.chdir(small_disk)
    if wrong == "full":
        Path("filler").write_bytes(bytes(18_000_000))
    else:
        Path("work").mkdir()
        monkeypatch.chdir("work")
        Path(small_disk, "work").rmdir()
    _, checkpoint, epochs = start(None)
    error = ConnectionError("the server is away")
    with pytest.raises(ConnectionError), checkpoint:
        next(epochs)
        raise error
    assert str(elsewhere / "checkpoint-") in error.kept
    assert set(os.listdir(small_disk)) <= {"filler"}
    assert len(list(elsewhere.glob("*/training.pt"))) == 1
    monkeypatch.chdir("/")  # so that it can be unmounted


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_who_stops_it_gets_no_files(kind, tmp_path):
    _, checkpoint, epochs = start(None)
    with pytest.raises(kind), checkpoint:
        next(epochs)
        raise kind
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_kept_of_half_an_epoch(tmp_path, monkeypatch):
    _, checkpoint, epochs = start(None)
    with pytest.raises(RuntimeError) as raised, checkpoint:
        next(epochs)

        def fail(*arguments):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(training.loop, "evaluate", fail)
        next(epochs)
    assert not hasattr(raised.value, "kept") and list(tmp_path.iterdir()) == []


TWO = """
import sys
sys.path.insert(0, sys.argv[1])
sys.path.insert(0, sys.argv[1] + "/tests/training")
sys.path.insert(0, sys.argv[1] + "/tests")
import torch
torch.set_num_threads(1)
from common import training
training.join()
from test_checkpoints import start  # conftest forgets the launcher's variables
network, checkpoint, epochs = start(sys.argv[2] if sys.argv[2] != "-" else None)
for epoch in epochs:
    if epoch.number == int(sys.argv[3]):
        break
else:
    total = sum(weight.double().sum().item() for weight in network.state_dict().values())
    print(epoch.train_loss, epoch.val_loss, total)
training.leave()
training.processes.end(0)  # as scripts do: Python's own exit may abort amid PyTorch's threads
"""


@pytest.mark.slow
def test_two_processes_go_on_from_the_file_of_process_0(tmp_path):
    from test_processes import launch, two_places

    def train(folder, stop):
        command = [sys.executable, "-c", TWO, str(ROOT), str(folder), str(stop)]
        started = launch(two_places(), command, tmp_path)
        outputs = [process.communicate(timeout=300) for process in started]
        assert [process.returncode for process in started] == [0, 0], outputs
        return [out.splitlines()[-1] for out, _ in outputs if out.splitlines()]

    expected = train("-", 9)
    train(tmp_path / "kept", 2)
    assert train(tmp_path / "kept", 9) == expected and expected[0] == expected[1]
