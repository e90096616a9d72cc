"""Weights from a file that somebody else made, read without running any code from it."""

import torch
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from common.errors import UserError

from .damage import DAMAGED, reason

# Where training scripts put the state dict when they save more than it.
CHECKPOINT_KEYS = ("model_state_dict", "state_dict", "model")
SAVE = "save the weights alone: torch.save(model.state_dict(), path)"


def load_weights(network, path):
    """Load the weights in the file `path` into `network`; the UserError names what differs."""
    state_dict = read_weights(path)
    problems = differences(network, state_dict)
    for name, tensor in state_dict.items():
        plain = tensor.is_floating_point() and tensor.layout == torch.strided
        if not plain or tensor.is_meta or not tensor.isfinite().all():
            problems.append(f"{name} is no dense tensor of finite real numbers")
    refuse(problems, network, path)
    network.load_state_dict(state_dict)


def read_weights(path, mapped=False):
    """Return the state dict in a .pth, .pt or .safetensors file: a dict of name to CPU tensor.

    It is taken out of a checkpoint, and `module.` out of its names. `mapped` reads nothing yet.
    """
    try:
        if str(path).endswith(".safetensors"):
            content = _read_safetensors(path)  # the package maps the file
        else:
            content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except (OSError, ImportError) as error:
        what = f"{path} cannot be read: {getattr(error, 'strerror', None) or error}."
        hint = "check --model_path. If the package safetensors is not installed, install it."
        raise UserError(what, hint) from error
    except DAMAGED as error:
        what = f"{path} is no file of plain weights ({reason(error)})."
        raise UserError(what, f"{SAVE}; a pickled model may run code.") from error
    for key in CHECKPOINT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    found = type(content).__name__
    if isinstance(content, dict):
        state_dict, found = dict(content), f"a dict of {', '.join(map(str, content))}"[:200]
        names = all(isinstance(name, str) for name in state_dict)
        if names and all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values()):
            consume_prefix_in_state_dict_if_present(state_dict, "module.")
            return state_dict
    raise UserError(f"{path} holds {found}, not a dict of tensors.", SAVE)


def _read_safetensors(path):
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(error) from error


def differences(network, state_dict, *attributes):
    """Return what keeps `network` from taking the weights in `state_dict`, as a list of texts."""
    expected = network.state_dict()
    problems = [f"missing {name}" for name in expected if name not in state_dict]
    problems += [f"unexpected {name}" for name in state_dict if name not in expected]
    for name in [name for name in expected if name in state_dict]:
        for attribute in ("shape", *attributes):
            found, needed = (str(getattr(t[name], attribute)) for t in (state_dict, expected))
            if found != needed:
                problems.append(f"{name} has {attribute} {found} instead of {needed}")
    return problems


def refuse(problems, network, path):
    """Raise UserError if there are any problems with the weights in the file `path`."""
    if problems:
        kind, more = type(network).__name__, "; ..." if len(problems) > 12 else ""
        what = f"{path} does not hold the weights of a {kind}: {'; '.join(problems[:12])}{more}."
        raise UserError(what, f"change the class {kind}, or the keys in the file.")
