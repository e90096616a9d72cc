"""The loop in one process: the same science as a textbook loop."""

import subprocess
import sys

import pytest
import torch
from conftest import REAL_DATA, REAL_MNIST, ROOT, clean_environment, run

from benchmarks.train import textbook_epoch
from common import training
from common.errors import UserError


@pytest.fixture(scope="module")
def digits():
    """(300 images for training, 360 for testing), and one thread: other tests run beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train, test = (training.load_data("digits", "unused", train=part) for part in (True, False))
    yield train._replace(images=train.images[:300], labels=train.labels[:300]), test
    torch.set_num_threads(threads)


def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))


def textbook_loss(network, optimizer, split, batch_size, order):
    """Train by the textbook for an epoch; return the mean loss over the images."""
    rows = torch.randperm(len(split.labels), generator=order).split(batch_size)
    batches = [(split.images[part].float() / 255, split.labels[part]) for part in rows]
    losses = textbook_epoch(network, optimizer, batches)
    return sum(loss * len(y) for loss, (_, y) in zip(losses, batches, strict=True)) / len(
        split.labels
    )


def test_losses_are_those_of_a_textbook_loop(digits):
    """The guide's network, dropout included, in the usual layout; the last batch has 44 images."""
    train, test = digits
    torch.manual_seed(7)
    network = training.MNISTCNN()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
    expected = []
    for number in (1, 2):
        torch.manual_seed(training.loop.epoch_seed(3, number))  # dropout
        order = torch.Generator().manual_seed(training.loop.epoch_seed(3, number))
        expected.append(textbook_loss(network, optimizer, train, 64, order))

    torch.manual_seed(7)
    network = training.MNISTCNN().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001, fused=True)
    epochs = list(training.epochs(network, optimizer, train, test, 2, 64, 3))
    assert [epoch.number for epoch in epochs] == [1, 2]
    assert epochs[0].train_loss == pytest.approx(expected[0], rel=1e-6)
    assert epochs[1].train_loss == pytest.approx(expected[1], rel=1e-3)  # Adam amplifies rounding
    assert epochs[1].val_accuracy == training.evaluate(network, test.images, test.labels).accuracy
    assert 0.1 < epochs[0].train_accuracy < epochs[1].train_accuracy < 1


def test_weights_are_those_of_a_textbook_loop(digits):
    """Exactly, where no layout changes the order of additions."""
    train, losses, weights = digits[0], [], []
    for loop in ("textbook", "ours"):
        network, order = linear(), torch.Generator().manual_seed(5)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        if loop == "textbook":
            losses.append(textbook_loss(network, optimizer, train, 64, order))
        else:
            arguments = (network, optimizer, train.images, train.labels, 64, order)
            losses.append(training.train_epoch(*arguments)[0])
        weights.append(network[1].weight)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert torch.equal(*weights)


def test_loss_is_the_mean_over_images_not_over_batches(digits):
    """100 images in batches of 64 and 36; nothing is learnt, so that both losses are the same."""
    images, labels = digits[1].images[:100], digits[1].labels[:100]
    network = linear()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    loss, _, _ = training.train_epoch(network, optimizer, images, labels, 64, torch.Generator())
    assert loss == pytest.approx(training.evaluate(network, images, labels).loss, rel=1e-5)


def test_evaluate_counts_the_last_small_batch(digits):
    test, network = digits[1], linear()
    whole = training.evaluate(network, test.images, test.labels, batch_size=1000)
    parts = training.evaluate(network, test.images, test.labels, batch_size=7)
    assert torch.equal(whole.predictions, parts.predictions)
    assert whole.accuracy == parts.accuracy
    assert whole.loss == pytest.approx(parts.loss, rel=1e-5)


def test_images_in_colour_and_rows_of_floats_reach_the_network_as_they_are():
    class Seen(torch.nn.Module):
        def forward(self, x):
            self.x = x
            return x.flatten(1)[:, :2]

    network, labels = Seen(), torch.zeros(4, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for channels in (1, 3):
        images = torch.randint(256, (4, channels, 5, 7), dtype=torch.uint8, generator=generator)
        training.evaluate(network, images, labels)
        assert torch.equal(network.x, images.float() / 255)
        assert network.x.stride() == (35 * channels, 1, 7 * channels, channels)
    rows = torch.rand(4, 8, generator=generator)
    training.evaluate(network, rows, labels)
    assert torch.equal(network.x, rows)


def test_training_that_diverges_is_an_error(digits):
    train, network = digits[0], linear()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e38)
    arguments = (network, optimizer, train.images, train.labels, 64, torch.Generator())
    with pytest.raises(UserError, match="error: the training diverged: .*\nhint: .*--lr") as raised:
        training.train_epoch(*arguments)
    assert raised.value.code == 1


# Precision and device


def test_bf16_multiplies_in_bfloat16_and_learns_the_same(digits):
    losses = {}
    for precision in ("fp32", "bf16"):
        network = linear()
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        epochs = training.epochs(network, optimizer, *digits, 1, 64, 0, precision)
        losses[precision] = [epoch.train_loss for epoch in epochs]
        assert all(weight.dtype == torch.float32 for weight in network.parameters())
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


@pytest.mark.parametrize(
    ("capabilities", "taken"),
    [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({"avx512_f": True}, "fp32")],
)
def test_auto_takes_bf16_where_an_x86_cpu_multiplies_it(capabilities, taken, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities, raising=False)
    assert training.best_precision("auto", cpu) == taken
    assert training.best_precision("bf16", cpu) == "bf16"
    assert training.best_precision("fp32", cpu) == "fp32"


def test_auto_measures_on_arm():
    """A CPU that has the instructions, and a PyTorch that does without them: bf16 is emulated."""
    code = (
        "import torch; from common import training\n"
        "torch.cpu.get_capabilities = lambda: {'bf16': True}\n"
        "print(training.best_precision('auto', torch.device('cpu')))"
    )
    environment = clean_environment() | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "fp32\n", done.stderr


def test_a_line_within_a_long_epoch_where_nobody_sees_the_bar(digits, monkeypatch, capsys):
    monkeypatch.setattr("common.training.loop.MINUTE", 0)
    network = linear()
    optimizer = torch.optim.Adam(network.parameters())
    list(training.epochs(network, optimizer, *digits, 1, 100, 0))
    assert capsys.readouterr().out == "step     1/3\nstep     2/3\nstep     3/3\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts what Linux counts")
@pytest.mark.slow
def test_a_step_takes_no_memory_from_the_kernel():
    """Without glibc's two settings, each step of 64 images has some thousand page faults."""
    code = (
        "import resource, torch; from common import training\n"
        "faults = lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
        "n = training.MNISTCNN(); adam = torch.optim.Adam(n.parameters())\n"
        "x, y = torch.zeros(6400, 1, 28, 28, dtype=torch.uint8), torch.zeros(6400).long()\n"
        "part, few = training.Split(x, y, (), '', ''), training.Split(x[:9], y[:9], (), '', '')\n"
        "faults()\n"
        "for epoch in training.epochs(n, adam, part, few, 1, 64, 0):\n"
        "    faults()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, text=True
    )
    print(done.stdout)
    before, after = map(int, done.stdout.split())
    assert (after - before) / 100 < 1500


def test_device_that_is_not_there():
    missing = "cuda" if not torch.cuda.is_available() else "mps"
    with pytest.raises(UserError, match=f"error: --device {missing}.*\nhint: "):
        training.best_device(missing)
    assert training.best_device("cpu") == torch.device("cpu")


# The network


def test_network_is_the_guides():
    state = training.MNISTCNN().state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "conv1.weight": (32, 1, 3, 3),
        "conv1.bias": (32,),
        "conv2.weight": (64, 32, 3, 3),
        "conv2.bias": (64,),
        "fc1.weight": (128, 9216),
        "fc1.bias": (128,),
        "fc2.weight": (10, 128),
        "fc2.bias": (10,),
    }


@pytest.mark.slow
@pytest.mark.timeout(2700)
@REAL_MNIST
def test_one_epoch_at_the_defaults(tmp_path):
    """The guide's second command, but for the folder of the data, and one epoch of five."""
    import mlflow

    finished = run(
        "train_mnist_mlflow.py",
        *("--epochs", 1, "--register", "--phase", "production", "--note", "Baseline CNN model"),
        *("--data_dir", REAL_DATA),
        cwd=tmp_path,
        timeout=2400,
    )
    assert finished.result["val_accuracy"] >= 0.97
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    logged = client.get_run(finished.result["run_id"])
    assert logged.data.metrics["train_loss"] < 0.25
    assert "10000 of 10000 predictions as recorded" in finished.out
