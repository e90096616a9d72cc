"""Weights from a file that somebody else made, read without running any code from it."""

import torch

from common.errors import UserError

from .damage import DAMAGED, reason
from .layout import PT2_TYPES

# Where training scripts put the state dict when they save more than it.
CHECKPOINT_KEYS = ("model_state_dict", "state_dict", "model")
SAVE = "save the weights alone: torch.save(model.state_dict(), path)"


def load_weights(network, path):
    """Load the weights in the file `path` into `network`; the UserError names what differs."""
    state_dict = without_wrappers(read_weights(path), network)
    refuse(differences(network, state_dict), network, path)
    own = {name: weight.dtype for name, weight in network.state_dict().items()}
    types = {f"{t.dtype} to {own[name]}" for name, t in state_dict.items() if t.dtype != own[name]}
    if types:
        print(f"convert  {path}  {', '.join(sorted(types))}", flush=True)
    network.load_state_dict(state_dict)
    check_numbers(network, path)


def check_numbers(network, path):
    """Raise UserError unless the weights, which come from `path`, are finite. It reads them all."""
    weights = network.state_dict().items()
    if bad := [name for name, weight in weights if not weight.isfinite().all()]:
        what = f"{path} holds numbers that are not finite: {', '.join(bad[:12])}."
        raise UserError(what, "its training diverged, or it is damaged: bring another file.")


def read_weights(path, mapped=False):
    """Return the state dict in a .pth, .pt or .safetensors file: a dict of name to CPU tensor.

    It is taken out of a checkpoint. `mapped` reads nothing yet.
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
        bad = [k for k, v in content.items() if not (isinstance(k, str) and _is_plain(v))]
        if not bad:
            return dict(content)
        words = (k if isinstance(k, str) else type(k).__name__ for k in bad)
        found = f"a dict of {', '.join(words)}"[:200]
    raise UserError(f"{path} holds {found}, not a dict of tensors of plain numbers.", SAVE)


def _is_plain(value):
    dense = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta
    return dense and not value.is_nested and value.dtype in PT2_TYPES.values()


def _read_safetensors(path):
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(error) from error


def without_wrappers(state_dict, network):
    """Return the weights without the prefix that torch.compile or Lightning gave, if they fit."""
    expected = network.state_dict().keys()
    if len(state_dict) != len(expected):
        return state_dict
    first = next(iter(expected), "")
    names = [name.replace("_orig_mod.", "") for name in state_dict]  # of compiled layers, within
    for prefix in [name.removesuffix(first) for name in names if name.endswith(first)]:
        stripped = [name.removeprefix(prefix) for name in names]
        if sorted(stripped) == sorted(expected):
            return dict(zip(stripped, state_dict.values(), strict=True))
    return state_dict


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
