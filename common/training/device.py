"""Which device to train on, and in which precision."""

import torch
import torch.distributed as dist

from common.errors import UserError

GPUS = ("cuda", "xpu")  # a node may have several of them


def best_device(name="auto", local_rank=0):
    """Return the device called `name`, on several GPUs the one of number `local_rank`.

    "auto" is a GPU if PyTorch sees one, else the CPU. AMD's GPUs are "cuda", Intel's are "xpu".
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "xpu": torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available() and not dist.is_initialized(),  # one process only
    }
    if name == "auto":
        name = next((kind for kind in available if available[kind]), "cpu")
    if not available.get(name, True):
        what = f"--device {name}: PyTorch {torch.__version__} sees none that it can use here."
        raise UserError(what, "--device auto takes what there is.")
    if name not in GPUS:
        return torch.device(name)
    gpus = torch.get_device_module(name)
    device = torch.device(name, local_rank % gpus.device_count())
    gpus.set_device(device)
    return device


def best_precision(name, device):
    """Return "fp32" or "bf16": what `name` says, or for "auto" what `device` is faster at."""
    if name != "auto":
        return name
    if device.type in GPUS:
        fast = torch.get_device_module(device).is_bf16_supported(including_emulation=False)
    else:  # without AMX some CPUs are 30 times slower in bf16; older PyTorch cannot say
        known = getattr(torch.cpu, "get_capabilities", dict)()
        fast = device.type == "cpu" and known.get("amx_bf16", False)
    return "bf16" if fast else "fp32"
