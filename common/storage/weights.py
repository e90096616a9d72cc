"""Weights from a file that somebody else made, read without running any code from it.

`torch.load(weights_only=True)` and safetensors cannot run code; plain `torch.load` can.
"""

import torch
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from common.errors import UserError

from .damage import DAMAGED, reason

# Where training scripts put the state dict when they save more than it.
CHECKPOINT_KEYS = ("model_state_dict", "state_dict", "model")


def load_weights(network, path):
    """Load the weights in the file `path` into `network`, in place.

    Raises UserError if the file is missing, does not hold weights, or is of another network; then
    the message names the keys that are missing and unexpected, and the shapes that differ.
    """
    state_dict = read_weights(path)
    odd = [
        f"{name} is no dense tensor of finite real numbers"
        for name, tensor in state_dict.items()
        if not (tensor.is_floating_point() and tensor.layout == torch.strided)
        or tensor.is_meta
        or not tensor.isfinite().all()
    ]
    refuse(differences(network, state_dict) + odd, network, path)
    network.load_state_dict(state_dict)


def read_weights(path, mapped=False):
    """Return the state dict in a .pth, .pt or .safetensors file: a dict of name to CPU tensor.

    A checkpoint that holds the state dict beside an optimizer's is unpacked, and the `module.` that
    DataParallel puts before each name is removed. With `mapped`, nothing is read before it is
    used. Raises UserError if the file is none of these.
    """
    try:
        if str(path).endswith(".safetensors"):
            content = _read_safetensors(path)
        else:
            content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror or error}.", "check --model_path."
        ) from error
    except DAMAGED as error:
        raise UserError(
            f"{path} is no file of plain weights ({reason(error)}).",
            "save them with torch.save(model.state_dict(), path); a whole pickled model can run "
            "code when it is loaded, and is not read.",
        ) from error
    for key in CHECKPOINT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in content.items()
    ):
        found = type(content).__name__
        if isinstance(content, dict):
            found = f"a dict of {', '.join(map(str, content))}"
        raise UserError(
            f"{path} holds {found[:200]}, not a dict of tensors.",
            "save the weights alone: torch.save(model.state_dict(), path)",
        )
    state_dict = dict(content)
    consume_prefix_in_state_dict_if_present(state_dict, "module.")
    return state_dict


def differences(network, state_dict):
    """Return what keeps `network` from taking the weights in `state_dict`, as a list of texts."""
    expected = network.state_dict()
    problems = [f"missing {name}" for name in expected if name not in state_dict]
    problems += [f"unexpected {name}" for name in state_dict if name not in expected]
    return problems + [
        f"{name} has shape {tuple(state_dict[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]


def refuse(problems, network, path):
    """Raise UserError if there are any problems with the weights in the file `path`."""
    if problems:
        kind = type(network).__name__
        shown = "; ".join(problems[:12]) + ("; ..." if len(problems) > 12 else "")
        raise UserError(
            f"{path} does not hold the weights of a {kind}: {shown}.",
            f"the file is of another network: change the class {kind}, or the keys in the file.",
        )


def _read_safetensors(path):  # the package maps the file
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(
            f"{path} is a safetensors file, and the package safetensors is not installed.",
            "pip install safetensors",
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(error) from error
