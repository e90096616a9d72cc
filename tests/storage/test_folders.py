"""Folders on a shared filesystem: a model appears whole or not at all, and nothing else goes."""

import os
import stat

import pytest
import torch

from common.errors import UserError
from common.storage import check_space, path_of, prepare, remove_unfinished, staged


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_folder_appears_when_all_is_written(tmp_path):
    umask = os.umask(0o077)
    try:
        with staged(tmp_path / "models" / "mine") as folder:
            (folder / "data").mkdir()
            (folder / "data" / "weights").write_bytes(b"x" * 100)
            assert not (tmp_path / "models" / "mine").exists()
    finally:
        os.umask(umask)
    assert names(tmp_path) == [
        "models",
        "models/mine",
        "models/mine/data",
        "models/mine/data/weights",
    ]
    assert (tmp_path / "models" / "mine" / "data" / "weights").stat().st_size == 100
    for path in tmp_path.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o750 if path.is_dir() else 0o640), path


class Stopped(BaseException):
    """As a signal raises it."""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError(), Stopped()])
def test_failure_removes_what_it_made_and_nothing_else(error, tmp_path):
    sibling = tmp_path / "models" / "yours" / "model.pt2"
    sibling.parent.mkdir(parents=True)
    sibling.write_text("weights")
    before = names(tmp_path)
    for path in ("models/mine", "models/new/deeper/mine"):
        kind = UserError if isinstance(error, OSError) else type(error)
        with pytest.raises(kind), staged(tmp_path / path) as folder:
            (folder / "half").write_text("of it")
            raise error
        assert names(tmp_path) == before
    assert sibling.read_text() == "weights"


def test_folder_that_somebody_else_uses_meanwhile_stays(tmp_path):
    with pytest.raises(ValueError), staged(tmp_path / "models" / "mine"):
        (tmp_path / "models" / "yours").mkdir()
        raise ValueError
    assert names(tmp_path) == ["models", "models/yours"]


@pytest.mark.parametrize("name", ["mine", "mine.unfinished"])
def test_model_that_is_there_already_stays(name, tmp_path):
    """The second is what a job that was killed has left, or one that is writing it now."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "weights").touch()
    with pytest.raises(UserError, match="File exists"), staged(tmp_path / "mine"):
        raise AssertionError("it must not come to this")
    assert names(tmp_path) == [name, f"{name}/weights"]


def test_failure_at_the_very_end(tmp_path, monkeypatch):
    """The folder has its name already, and then the disk does not take it."""
    from common.storage import folders

    to_disk = folders._to_disk

    def failing(path):
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        to_disk(path)

    monkeypatch.setattr(folders, "_to_disk", failing)
    with pytest.raises(UserError, match="Input/output error"), staged(tmp_path / "mine") as folder:
        (folder / "weights").touch()
    assert names(tmp_path) == []


def test_model_larger_than_the_free_space(tmp_path):
    with torch.device("meta"):
        network = torch.nn.Linear(2**24, 2**24, bias=False)
    with pytest.raises(UserError, match="error: the model takes 1125899.91 GB, and .* has space"):
        check_space(tmp_path, network)


def test_folder_is_made_and_checked(tmp_path):
    assert prepare(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) & 0o050 == 0o050
    (tmp_path / "file").touch()
    for path, message in (
        ("s3://bucket/models", "is an address"),
        (f"{tmp_path}/100%", "holds a %"),
        ("/no-such-filesystem/models", "there is no /no-such-filesystem on this machine"),
        (f"{tmp_path}/file", "cannot be written: Not a directory"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(path)


def test_path_of_an_address(tmp_path):
    folder = tmp_path / "with a blank"
    assert path_of(folder.as_uri()) == path_of(str(folder)) == folder


def test_nothing_outside_the_folder_is_removed(tmp_path):
    """The location comes from the server."""
    own, other = tmp_path / "models" / "m-1", tmp_path / "other"
    for folder in (own, other):
        folder.mkdir(parents=True)
        remove_unfinished(tmp_path / "models", f"{tmp_path.as_uri()}/models/../other")
    remove_unfinished(tmp_path / "models", own.as_uri())
    assert other.is_dir() and not own.exists()
