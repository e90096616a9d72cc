"""Are the example inputs in a `.pt2` archive, which are a pickle, nothing but tensors?"""

import collections
import io
import pickletools
import re

import torch
from torch._C import PyTorchFileReader  # see inspection.py

from .damage import require
from .layout import SIGNATURE
from .program import NAME

# What the pickle may look up: how to rebuild a tensor. `weights_only=True` alone also takes what
# other packages have declared safe, some of which opens files.
GLOBALS = re.compile(
    r"torch \w+Storage|torch\._utils _rebuild_tensor_v2|collections OrderedDict"
)
LOOKUPS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "BUILD"}
LEAVES = (torch.Tensor, bool, int, float, complex, str, type(None))


def check_examples(content):
    """Raise unless the file `content` holds tensors in plain containers with plain keys.

    PyTorch loads it as here, and without the restriction to tensors if that fails. It also writes
    the keys into Python source.
    """
    require(content.startswith(SIGNATURE), "its example inputs are in an older format")
    record = PyTorchFileReader(io.BytesIO(content)).get_record("data.pkl")
    for operation, argument, _ in pickletools.genops(record):
        allowed = operation.name not in LOOKUPS
        if operation.name == "GLOBAL":
            allowed = GLOBALS.fullmatch(argument)
        require(allowed, "its example inputs are a pickle that could run code")
    _check(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))


def _check(value):
    if type(value) in (tuple, list):
        inner = value
    elif type(value) in (dict, collections.OrderedDict):
        for key in value:
            plain = type(key) is int or (type(key) is str and NAME.fullmatch(key))
            require(plain, f"its example inputs have a key {key!r}")
        inner = value.values()
    else:
        require(type(value) in LEAVES, f"its example inputs hold {type(value).__name__}")
        return
    for one in inner:
        _check(one)
