"""The network that the scripts train, and what MLflow is told about it."""

from importlib.metadata import version

import torch.nn.functional as F
from torch import nn

PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081  # of the MNIST training set, pixels scaled to [0, 1]
INPUT = "float32 pixels in [0, 1], shape (N, 1, 28, 28); the model normalises them itself"
OTHER = "pixels normalised before: (x - {}) / {} of pixels x in [0, 1], shape (N, 1, 28, 28)"
# What other models take: {words: (mean, deviation) to apply to pixels in [0, 1] before}.
SCALINGS = {OTHER.format(*pair): pair for pair in ((PIXEL_MEAN, PIXEL_STD), (0.5, 0.5))}


class MNISTCNN(nn.Module):
    """Two convolutions, one pooling, two dense layers: the usual first network for MNIST.

    Input: float32 pixels in [0, 1], shape (N, 1, 28, 28). Output: logits, shape (N, 10).
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)
        self.dropout = nn.Dropout(0.5)  # while training only; `eval()` switches it off

    def forward(self, x):
        x = (x - PIXEL_MEAN) / PIXEL_STD  # here, so that scripts and REST clients cannot disagree
        x = F.relu(self.conv1(x))  # (N, 32, 26, 26)
        # Pooling before ReLU is the same function, and ReLU then has a quarter of the work.
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # (N, 64, 12, 12)
        x = self.dropout(F.relu(self.fc1(x.flatten(1))))
        return self.fc2(x)


def input_example(images):
    """Return two images, as pixels in [0, 1], for `log_model(input_example=...)`.

    A model exported with a batch of one takes no other, and one with a tensor is not served (REST).
    """
    return (images[:2].float() / 255).numpy()


def pip_requirements():
    """Return the packages that loading the model needs; MLflow would take 4 s to find them."""
    # Without the end of `2.15.0+cu130`: it names a build that another machine may not have.
    return [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "numpy")]
