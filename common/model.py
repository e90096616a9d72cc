"""The networks that the scripts train, and what MLflow is told about them.

If you only want the idea: normalise inside `forward`, and no training script, inference script or
REST client can disagree about it.
"""

from importlib.metadata import version

import torch.nn.functional as F
from torch import nn

PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081  # of the MNIST training set, pixels scaled to [0, 1]


class MNISTCNN(nn.Module):
    """Two 3x3 convolutions (32, 64 channels), one pooling, two dense layers (9216 -> 128 -> 10).

    Input: float32 pixels in [0, 1], shape (N, 1, 28, 28). Output: logits, shape (N, 10).
    The state-dict keys are conv1, conv2, fc1 and fc2, each with weight and bias, so that weights of
    this architecture from elsewhere load: normalisation and dropout add none.
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)
        self.dropout = nn.Dropout(0.5)  # while training only; `eval()` switches it off

    def forward(self, x):
        x = (x - PIXEL_MEAN) / PIXEL_STD
        x = F.relu(self.conv1(x))  # (N, 32, 26, 26)
        # Pooling before ReLU is the same function, and ReLU then has a quarter of the work.
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # (N, 64, 12, 12)
        x = self.dropout(F.relu(self.fc1(x.flatten(1))))
        return self.fc2(x)


class SimpleCNN(nn.Module):
    """Three 5x5 convolutions (16, 32, 64 channels), each pooled, then three dense layers.

    Input and output as above. 95,050 numbers to learn: it can be trained many times over
    on a CPU.
    """

    def __init__(self, dropout=0.25):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 5, padding=2)
        self.conv3 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(576, 48)
        self.fc2 = nn.Linear(48, 48)
        self.fc3 = nn.Linear(48, 10)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = (x - PIXEL_MEAN) / PIXEL_STD
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # (N, 16, 14, 14)
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # (N, 32, 7, 7)
        x = F.relu(F.max_pool2d(self.conv3(x), 2))  # (N, 64, 3, 3)
        x = self.dropout(F.relu(self.fc1(x.flatten(1))))
        return self.fc3(F.relu(self.fc2(x)))


class SimpleMNIST(nn.Module):
    """A perceptron of one hidden layer (784 -> 128 -> 10). Input and output as above."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(28 * 28, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def forward(self, x):
        return self.net((x - 0.5) / 0.5)


def summary(network):
    """Return a table of the layers that learn, as text: name, kind, shape of weights, numbers.

    The last line is their total.
    """
    rows = [
        (name, type(layer).__name__, tuple(layer.weight.shape), count_parameters(layer))
        for name, layer in network.named_modules()
        if getattr(layer, "weight", None) is not None
    ]
    lines = [
        f"{name:<10} {kind:<10} {shape!s:<18} {count:>9,}" for name, kind, shape, count in rows
    ]
    total = count_parameters(network)
    return "\n".join([type(network).__name__, *lines, f"{'total':<40} {total:>9,}", ""])


def count_parameters(network):
    """Return how many numbers the network learns."""
    return sum(parameter.numel() for parameter in network.parameters())


def input_example(images):
    """Return two pictures, as pixels in [0, 1], for `log_model(input_example=...)`.

    MLflow derives the signature from it and exports the model with it. Two traps: with a batch of
    one the exported model takes batches of one for ever, and with a torch tensor in place of a
    numpy array it cannot be served over REST.
    """
    return (images[:2].float() / 255).numpy()


def pip_requirements():
    """Return what a machine needs to load the model, in the versions at hand.

    Named, because MLflow would otherwise find out by importing everything again in a second process
    (some 4 s for each model). MLflow adds itself. `2.15.0+cu130` and the like name a build that
    another machine may not have: the release is enough.
    """
    return [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "numpy")]
