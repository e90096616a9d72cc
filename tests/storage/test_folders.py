"""Folders on a shared filesystem: a model appears whole or not at all, and nothing else goes."""

import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import other_user

from common.errors import UserError, of_system
from common.storage import check_space, claim, path_of, prepare, remove_unfinished, staged


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
    fsync = os.fsync

    def failing(descriptor):
        if os.path.samestat(os.fstat(descriptor), tmp_path.stat()):
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match="Input/output error"), staged(tmp_path / "mine") as folder:
        (folder / "weights").touch()
    assert names(tmp_path) == []


def test_model_larger_than_the_free_space(tmp_path):
    with torch.device("meta"):
        network = torch.nn.Linear(2**24, 2**24, bias=False)
    what = "error: the model takes 1,125,899,906.8 MB, and .* has space for .*\nhint:  make room"
    with pytest.raises(UserError, match=what):
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


def test_folder_where_others_may_rename(public, capsys):
    """Its owner keeps them from it by the sticky bit; who is not its owner is told."""
    for owner, bits, words in ((os.getuid(), 0o3775, ""), (11111, 0o2775, "owner should chmod +t")):
        target = public / f"of {owner}"
        target.mkdir()
        os.chown(target, owner, 500)
        target.chmod(0o2775)
        with other_user(22222, [500]) if owner else contextlib.nullcontext():
            prepare(str(target))
        assert target.stat().st_mode & 0o7777 == bits
        said = capsys.readouterr().err
        assert (words in said) and bool(said) == bool(words)


def test_second_member_of_a_group(public):
    """Folders that are made in the group's folder are as group-writable as that one is."""
    target, mask = public / "models of a group", os.umask(0o022)
    target.mkdir()
    os.chown(target, -1, 500)
    target.chmod(0o2770)
    try:
        for number in (11111, 22222):
            with other_user(number, [500]):
                folder = prepare(str(target))
                with staged(folder / "models" / f"m-{number}" / "artifacts") as staging:
                    (staging / "weights").touch()
        assert len(names(target)) == 7  # models, and of each: its folder, artifacts, weights
        # Made before this was so, or by another program: said before the training, and what helps.
        (target / "models").chmod(0o755)
        with (
            other_user(33333, [500]),
            pytest.raises(UserError, match="models cannot be written: Permission .*\n.*chmod g"),
        ):
            prepare(str(target))
        with (
            other_user(44444),
            pytest.raises(UserError, match="group cannot be written: Permission denied.\n.*owner"),
        ):
            prepare(str(target))
    finally:
        os.umask(mask)


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "make room there"),
        (errno.EDQUOT, "make room there"),
        (errno.EACCES, "ask its owner"),
        (errno.EROFS, "choose another folder"),
        (errno.EIO, "nothing of it is left"),
    ],
)
def test_hint_follows_the_reason(number, hint, tmp_path):
    with (
        pytest.raises(UserError, match=f"{os.strerror(number)}.\nhint:  {hint}"),
        staged(tmp_path / "m"),
    ):
        raise OSError(number, os.strerror(number))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_what_pytorch_says_of_a_full_disk():
    for size in (9, 10**6):
        with pytest.raises(RuntimeError) as raised:
            torch.save(torch.zeros(size), "/dev/full")
        assert of_system(raised.value).what == "No space left on device."


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


# Two users of one group, in a folder where both may write: only root can be both.

TWO_USERS = pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")


def as_colleague(act):
    """Do it in a process of another user of the group; return whether it was allowed."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setgid(os.getgid())
            os.setuid(65534)
            act()
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


@pytest.fixture
def shared():
    """(a folder that the group may write to, a key file beside it that is nobody's business)."""
    umask = os.umask(0o002)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        home.chmod(0o755)
        (home / "key").write_text("secret")
        (home / "key").chmod(0o600)
        (home / "shared").mkdir()
        (home / "shared").chmod(0o775)
        yield home / "shared", home / "key"
        assert (home / "key").read_text() == "secret"
        assert stat.S_IMODE((home / "key").stat().st_mode) == 0o600
    os.umask(umask)


def linked_folder(run, key):
    run.symlink_to(key.parent / "home")


def folder_with_a_link(run, key):
    (run / "artifacts").mkdir(parents=True)
    (run / "artifacts" / "plot.png").symlink_to(key)


def file_in_place(run, key):
    run.write_text("")


@TWO_USERS
@pytest.mark.parametrize("plant", [linked_folder, folder_with_a_link, file_in_place])
def test_folder_that_somebody_else_made_is_refused(plant, shared):
    folder, key = shared
    (key.parent / "home").mkdir(0o700)
    assert as_colleague(lambda: plant(folder / "run", key))
    with pytest.raises(UserError, match=f"the folder {folder}/run cannot be used"):
        claim((folder / "run" / "artifacts").as_uri())
    assert stat.S_IMODE((key.parent / "home").stat().st_mode) == 0o700


@TWO_USERS
def test_own_folder_that_others_may_write_to_is_refused(shared):
    """As MLflow makes it under the umask 002: links may lie in it already."""
    folder, key = shared
    (folder / "run").mkdir()
    assert as_colleague(lambda: (folder / "run" / "plot.png").symlink_to(key))
    with pytest.raises(UserError, match="or may write there"):
        claim((folder / "run" / "artifacts").as_uri())


@TWO_USERS
def test_nobody_enters_before_the_end_and_then_the_group_reads(shared):
    folder, _ = shared
    path = folder / "models" / "m-1" / "artifacts"
    with staged(path, own=True) as staging:
        (staging / "data").mkdir()
        (staging / "data" / "weights").write_text("x")
        assert not as_colleague(lambda: os.listdir(folder / "models" / "m-1"))
        assert not as_colleague(lambda: (folder / "models" / "m-1").rename(folder / "elsewhere"))
        assert as_colleague(lambda: (folder / "models" / "m-2").mkdir())
    assert as_colleague(lambda: (path / "data" / "weights").read_text())
    for here in (path, path / "data", path.parent):
        assert not as_colleague(lambda here=here: (here / "planted").touch()), here
    for here in (path.parent, path, path / "data" / "weights"):
        assert stat.S_IMODE(here.stat().st_mode) & 0o022 == 0


@TWO_USERS
def test_model_is_written_to_the_folder_that_was_made_even_if_its_name_is_taken(shared):
    """In a folder without the sticky bit others may rename what is not theirs."""
    folder, key = shared
    (key.parent / "artifacts.unfinished").mkdir(0o700)

    def plant():
        (folder / "m-1").rename(folder / "away")
        (folder / "m-1").symlink_to(key.parent)

    with staged(folder / "m-1" / "artifacts", own=True) as staging:
        assert as_colleague(plant)
        (staging / "weights").write_text("x")
    assert names(key.parent / "artifacts.unfinished") == []
    assert names(folder / "away") == ["artifacts", "artifacts/weights"]


@TWO_USERS
def test_nothing_is_removed_through_a_link(shared):
    folder, key = shared
    (key.parent / "artifacts").mkdir(0o700)
    assert as_colleague(lambda: (folder / "m-1").symlink_to(key.parent))
    with pytest.raises(UserError, match="cannot be used"):
        remove_unfinished(folder, (folder / "m-1" / "artifacts").as_uri())
    assert (key.parent / "artifacts").is_dir()
