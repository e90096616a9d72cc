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


def test_user_without_a_name(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 987654)
    assert runs.user() == "unknown"
