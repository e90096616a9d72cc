"""Real MNIST, where a machine has it."""

import mlflow
import pytest
from conftest import REAL_DATA, REAL_MNIST, run

pytestmark = [pytest.mark.slow, REAL_MNIST]


@pytest.mark.timeout(2700)
def test_five_epochs_at_the_defaults(tmp_path):
    """The guide's second command, word for word but for the folder of the data."""
    finished = run(
        "train_mnist_mlflow.py",
        *("--epochs", 5, "--register", "--phase", "production", "--note", "Baseline CNN model"),
        *("--data_dir", REAL_DATA),
        cwd=tmp_path,
        timeout=2400,
    )
    assert finished.result["val_accuracy"] >= 0.988
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    logged = client.get_run(finished.result["run_id"])
    assert logged.data.metrics["train_loss"] < 0.1
    assert "on 10000 pictures" in finished.out


def test_fashion_mnist_is_read(tmp_path):
    from common import data

    train = data.load("fashion_mnist", str(REAL_DATA), train=True)
    assert train.images.shape == (60000, 1, 28, 28)
    # The published mean and deviation of the training set.
    pixels = train.images.float() / 255
    assert round(pixels.mean().item(), 4) == 0.2860
    assert round(pixels.std().item(), 4) == 0.3530
    assert train.class_names[0] == "T-shirt/top" and len(train.class_names) == 10


def test_normalisation_in_the_model_is_that_of_mnist():
    from common import data, model

    pixels = data.load("mnist", str(REAL_DATA), train=True).images.float() / 255
    assert round(pixels.mean().item(), 4) == model.PIXEL_MEAN
    assert round(pixels.std().item(), 4) == model.PIXEL_STD
