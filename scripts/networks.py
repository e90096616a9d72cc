"""The networks of the guides, a table of a network's layers, and images held out to choose by.

Input of both: float32 pixels in [0, 1], shape (N, 1, 28, 28). Output: logits, shape (N, 10).
"""

import torch
import torch.nn.functional as F
from torch import nn

from common.training.networks import PIXEL_MEAN, PIXEL_STD


class SimpleCNN(nn.Module):
    """Three 5x5 convolutions (16, 32, 64 channels), each pooled, then three dense layers.

    It has 95,050 parameters, few enough to be trained many times over on a CPU.
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
    """A perceptron with one hidden layer (784 -> 128 -> 10)."""

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


def hold_out(split, fraction=0.1, seed=0):
    """Return (what is left to train on, what is held out to choose by): two shuffled `Split`s."""
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    count = round(fraction * len(order))
    return split.part(order[count:]), split.part(order[:count])


def count_parameters(network):
    """Return how many parameters the network has."""
    return sum(parameter.numel() for parameter in network.parameters())


def summary(network):
    """Return a table of the layers that learn, as text: name, kind, shape of weights, parameters.

    The last line is the total number of parameters.
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
