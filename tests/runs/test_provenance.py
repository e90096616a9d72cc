"""Where a run comes from: git and the user."""

import os
import subprocess

import pytest

from common import runs


@pytest.fixture
def checkout(tmp_path):
    """A git checkout with one commit; returns (path of a script in it, function that runs git)."""
    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org"}
    identity |= {name.replace("AUTHOR", "COMMITTER"): value for name, value in identity.items()}

    def git(*arguments):
        command = ["git", "-C", str(tmp_path), *arguments]
        environment = os.environ | identity | {"GIT_CONFIG_GLOBAL": os.devnull}
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return process.stdout.strip()

    git("init", "-q", "-b", "main")
    (tmp_path / "script.py").write_text("print()\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    return tmp_path / "script.py", git


def test_git_tags_of_a_clean_and_a_dirty_checkout(checkout):
    script, git = checkout
    commit = git("rev-parse", "HEAD")
    clean = {"git.commit": commit, "git.branch": "main", "git.dirty": "false"}
    assert runs.git_tags(script) == clean
    (script.parent / "mlflow.db").write_text("not tracked, so no change of the code")
    assert runs.git_tags(script) == clean
    script.write_text("print(1)\n")
    assert runs.git_tags(script) == clean | {"git.dirty": "true"}


def test_git_tags_of_a_detached_head(checkout):
    script, git = checkout
    git("checkout", "-q", "--detach")
    assert runs.git_tags(script)["git.branch"] == "HEAD"


def test_no_git_tags_without_a_commit_a_checkout_or_git(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    assert runs.git_tags(script) == {}
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert runs.git_tags(script) == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.git_tags(script) == {}


def test_no_commit_of_a_repository_that_does_not_know_the_script(checkout):
    """The scripts were copied into a repository of something else; or are not committed yet."""
    script, git = checkout
    copied = script.parent / "tools" / "train.py"
    copied.parent.mkdir()
    copied.write_text("print()\n")
    assert runs.git_tags(copied) == {}
    git("add", str(copied))
    assert runs.git_tags(copied) == {}
    (script.parent / ".gitignore").write_text("ignored.py\n")
    (script.parent / "ignored.py").touch()
    assert runs.git_tags(script.parent / "ignored.py") == {}


def test_script_that_git_was_told_not_to_look_at(checkout):
    script, git = checkout
    git("update-index", "--assume-unchanged", "script.py")
    script.write_text("print(2)\n")
    assert git("status", "--porcelain") == ""
    assert runs.git_tags(script)["git.dirty"] == "true"


def test_repository_that_the_environment_names_is_not_asked(
    checkout, tmp_path_factory, monkeypatch
):
    """As in a hook of git's. And no lock is taken, which would fail somebody's commit just then."""
    script, git = checkout
    other = tmp_path_factory.mktemp("other")
    subprocess.run(["git", "init", "-q", str(other)], check=True)
    clean = runs.git_tags(script)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert runs.git_tags(script) == clean and len(clean) == 3
    index = script.parent / ".git" / "index"
    os.utime(script, (1, 1))  # the index is out of date: without the option, git writes it anew
    before = index.stat()
    runs.git_tags(script)
    assert index.stat().st_mtime_ns == before.st_mtime_ns and index.stat().st_ino == before.st_ino


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give files away")
def test_checkout_that_git_does_not_trust(checkout, monkeypatch, capsys):
    script, _ = checkout
    for path in (script.parent, *script.parent.rglob("*")):
        os.chown(path, 12345, 12345)
    monkeypatch.setenv("HOME", str(script.parent / "no home"))
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    assert runs.git_tags(script) == {}
    said = capsys.readouterr().err
    assert f"git config --global --add safe.directory {script.parent}\n" in said
    assert said.count("\n") == 1


def test_name_of_a_job_in_another_encoding(monkeypatch):
    for variable, value in (("SLURM_JOB_ID", "7"), ("SLURM_JOB_NAME", "gr\udcf6\udcdfe")):
        monkeypatch.setenv(variable, value)
    tags = runs.job_tags()
    assert (tags["job.id"], tags["job.name"], tags["jobs"]) == ("7", "gr??e", "slurm 7")


def test_user_without_a_name(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 987654)
    assert runs.user() == "unknown"
