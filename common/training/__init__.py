"""Training a classifier in PyTorch, on one device or in several processes; MNIST as its example.

To use it in a project of your own, copy this folder, common/errors.py and an empty
common/__init__.py. A network and tensors of your own then take these calls:

    import torch
    from common import training

    x, y = torch.rand(500, 8), torch.randint(3, (500,))  # rows of a table, or images as uint8
    network = torch.nn.Linear(8, 3)
    optimizer = torch.optim.Adam(network.parameters())
    training.train_epoch(network, optimizer, x, y, 64, torch.Generator())
    print(training.evaluate(network.eval(), x, y).accuracy)

`epochs` does both for a number of epochs; with a `Checkpoint`, it goes on in the next job. For
several processes, call `join` first.
data.py, networks.py (both for MNIST), device.py and checkpoints.py may be left out, each with its
line below.
"""

from .checkpoints import Checkpoint
from .data import Split, load_data
from .device import best_device, best_precision
from .launchers import World
from .loop import Epoch, Evaluation, epochs, evaluate, train_epoch
from .networks import INPUT, MNISTCNN, SCALINGS, input_example, pip_requirements
from .processes import follow, in_turn, join, leave
