"""Which device to train on, and in which precision."""

import math
import time

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
    """Return "fp32" or "bf16": what `name` says, or for "auto" what `device` is faster at.

    PyTorch knows what GPUs and x86 CPUs support: a measurement could go the other way on a busy
    node, and the next job of a training must not change its precision. CPUs without instructions
    for bf16 emulate them, up to 30 times slower. PyTorch for Arm does not use them for all it does:
    there they are measured, and process 0 decides for all.
    """
    if name != "auto":
        return name
    if device.type in GPUS:
        fast = torch.get_device_module(device).is_bf16_supported(including_emulation=False)
        return "bf16" if fast else "fp32"
    known = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch cannot say
    fast = any(known.get(name) for name in ("amx_bf16", "avx512_bf16"))
    fast = torch.tensor(device.type == "cpu" and (fast or known.get("bf16", False) and _measured()))
    if dist.is_initialized():
        dist.broadcast(fast, src=0)
    return "bf16" if fast else "fp32"


def _measured():
    """Whether a convolution and its gradients are faster in bf16 than in fp32."""
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for kind in [*seconds] * 3:
        images, weights = (
            torch.ones(shape, dtype=kind, requires_grad=True)
            for shape in ((8, 32, 26, 26), (64, 32, 3, 3))
        )
        start = time.perf_counter()
        torch.nn.functional.conv2d(images, weights).sum().backward()
        seconds[kind] = min(seconds[kind], time.perf_counter() - start)
    return seconds[torch.bfloat16] < seconds[torch.float32]
