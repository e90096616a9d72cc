"""Weights from a file that somebody else made, read without running any code from it.

Copy `read` if you only want that: `torch.load(weights_only=True)` and safetensors cannot run code,
plain `torch.load` can.
"""

import pickle
import struct

import torch
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

# Where training scripts put the state dict when they save more than it.
CHECKPOINT_KEYS = ("model_state_dict", "state_dict", "model")

# What torch's restricted unpickler has been seen to raise: on a pickle that wants to run code, on
# text, on an archive of something else, on a file that is cut short, on random bytes.
NOT_WEIGHTS = (
    pickle.UnpicklingError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


def load(network, path):
    """Load the weights in the file `path` into `network`, in place.

    Raises SystemExit if the file is missing, is none of weights, or is of another network; then the
    message names the keys that are missing and unexpected, and the shapes that differ.
    """
    state_dict = read(path)
    expected = network.state_dict()
    problems = [f"missing {key}" for key in expected if key not in state_dict]
    problems += [f"unexpected {key}" for key in state_dict if key not in expected]
    problems += [
        f"{key} is no dense tensor of finite real numbers"
        for key, value in state_dict.items()
        if not (value.is_floating_point() and value.layout == torch.strided)
        or value.is_meta
        or not value.isfinite().all()
    ]
    problems += [
        f"{key} has shape {tuple(state_dict[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in state_dict and state_dict[key].shape != expected[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:12]) + ("; ..." if len(problems) > 12 else "")
        raise SystemExit(
            f"error: {path} does not hold the weights of a {type(network).__name__}: "
            f"{shown}.\n"
            "hint:  common/model.py shows the network; change it there, or the keys in the file."
        )
    network.load_state_dict(state_dict)


def read(path):
    """Return the state dict in a .pth, .pt or .safetensors file: a dict of name to CPU tensor.

    A checkpoint that holds the state dict beside an optimizer's is unpacked, and the `module.` that
    DataParallel puts before each name is removed. Raises SystemExit if it is none of these.
    """
    try:
        if str(path).endswith(".safetensors"):
            content = _read_safetensors(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise SystemExit(
            f"error: {path} cannot be read: {error.strerror or error}.\nhint:  check --model_path."
        ) from error
    except NOT_WEIGHTS as error:
        reason = (
            str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        )
        raise SystemExit(
            f"error: {path} is no file of plain weights ({reason}).\n"
            "hint:  save them with torch.save(model.state_dict(), path); a whole pickled model can "
            "run code when it is loaded, and is not read."
        ) from error
    for key in CHECKPOINT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()
    ):
        found = (
            f"a dict of {', '.join(map(str, content))}"
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise SystemExit(
            f"error: {path} holds {found[:200]}, not a dict of tensors.\n"
            "hint:  save the weights alone: torch.save(model.state_dict(), path)"
        )
    state_dict = dict(content)
    consume_prefix_in_state_dict_if_present(state_dict, "module.")
    return state_dict


def _read_safetensors(path):
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise SystemExit(
            f"error: {path} is a safetensors file, and the package safetensors is not installed.\n"
            "hint:  pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(error) from error
