"""The parts of common/ by themselves, where a whole script would not show the difference."""

import os
import socket
import subprocess
import time

import pytest
import torch

from common import cost, data, model, provenance, training


def test_digits_are_the_same_everywhere_and_split_without_overlap():
    train, test = (data.load("digits", "unused", train=part) for part in (True, False))
    assert train.images.shape == (1437, 1, 28, 28) and test.images.shape == (360, 1, 28, 28)
    assert train.images.dtype == torch.uint8 and train.images.max() == 255
    assert test.digest == "8e2593d6e8ef3517862a034f68b3fa44"
    assert sorted(set(test.labels.tolist())) == list(range(10))
    pictures = [bytes(image) for split in (train, test) for image in split.images.numpy()]
    assert len(set(pictures)) == len(pictures)


def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))


def test_loss_is_the_mean_over_pictures_not_over_batches():
    """100 pictures in batches of 64 and 36; nothing is learnt, so that both losses are the same."""
    test = data.load("digits", "unused", train=False)
    images, labels = test.images[:100], test.labels[:100]
    network = linear()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    loss, _, _ = training.train_epoch(network, optimizer, images, labels, 64, torch.Generator())
    assert loss == pytest.approx(training.evaluate(network, images, labels).loss, rel=1e-5)


def test_training_is_that_of_a_textbook_loop():
    """The same losses and weights as a plain loop over shuffled batches gives."""
    test = data.load("digits", "unused", train=False)
    losses, weights = [], []
    for textbook in (True, False):
        network = linear()
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        order = torch.Generator().manual_seed(5)
        if textbook:
            total = 0.0
            for batch in torch.randperm(360, generator=order).split(64):
                optimizer.zero_grad()
                x = test.images[batch].float() / 255
                loss = torch.nn.functional.cross_entropy(network(x), test.labels[batch])
                loss.backward()
                optimizer.step()
                total += loss.item() * len(batch)
            losses.append(total / 360)
        else:
            arguments = (network, optimizer, test.images, test.labels, 64, order)
            losses.append(training.train_epoch(*arguments)[0])
        weights.append(network[1].weight)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert torch.equal(*weights)


def test_evaluate_counts_the_last_small_batch():
    test = data.load("digits", "unused", train=False)
    network = linear()
    whole = training.evaluate(network, test.images, test.labels, batch_size=1000)
    parts = training.evaluate(network, test.images, test.labels, batch_size=7)
    assert torch.equal(whole.predictions, parts.predictions)
    assert whole.accuracy == parts.accuracy
    assert whole.loss == pytest.approx(parts.loss, rel=1e-5)


def test_network_is_the_guides():
    shapes = {key: tuple(value.shape) for key, value in model.MNISTCNN().state_dict().items()}
    assert shapes == {
        "conv1.weight": (32, 1, 3, 3),
        "conv1.bias": (32,),
        "conv2.weight": (64, 32, 3, 3),
        "conv2.bias": (64,),
        "fc1.weight": (128, 9216),
        "fc1.bias": (128,),
        "fc2.weight": (10, 128),
        "fc2.bias": (10,),
    }


# What a step cost


def test_connection_that_closes_meanwhile_does_not_count():
    """Those of several processes do, when the first of them leaves."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        old, new = (socket.create_connection(server.getsockname()) for _ in range(2))
        for connection in (old, new):
            connection.sendall(b"x" * 1000)
        time.sleep(0.2)  # until they are acknowledged
        with cost.measured() as measured:
            old.close()
            new.sendall(b"x" * 500)
            time.sleep(0.2)
        new.close()
    assert measured.network == 500


# Where artifacts may lie


@pytest.mark.parametrize(
    ("location", "accepted"),
    [
        ("mlflow-artifacts:/1", True),
        ("file:///lustre/models", True),
        ("s3://bucket/1", True),
        ("https://own.example/api/1", True),
        ("mlflow-artifacts://own.example/1", True),
        ("http://own.example/api/1", False),  # the key would go unencrypted
        ("https://far.example/api/1", False),
        ("mlflow-artifacts://far.example/1", False),
        ("https://own.example:8443/api/1", False),
    ],
)
def test_artifacts_may_lie_on_the_tracking_server_or_where_no_key_goes(location, accepted):
    import mlflow

    from common import tracking

    mlflow.set_tracking_uri("https://own.example")
    try:
        if accepted:
            tracking.check_artifact_location(location)
        else:
            with pytest.raises(SystemExit, match="the key must not go there"):
                tracking.check_artifact_location(location)
    finally:
        mlflow.set_tracking_uri(None)


# Provenance


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
    assert provenance.git_tags(script) == clean
    (script.parent / "mlflow.db").write_text("not tracked, so no change of the code")
    assert provenance.git_tags(script) == clean
    script.write_text("print(1)\n")
    assert provenance.git_tags(script) == clean | {"git.dirty": "true"}


def test_git_tags_of_a_detached_head(checkout):
    script, git = checkout
    git("checkout", "-q", "--detach")
    assert provenance.git_tags(script)["git.branch"] == "HEAD"


def test_no_git_tags_without_a_commit_a_checkout_or_git(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    assert provenance.git_tags(script) == {}
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert provenance.git_tags(script) == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_tags(script) == {}


def test_user_without_a_name(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 987654)
    assert provenance.user() == "unknown"
