"""Weights mapped into memory: there at once, whatever their size, without being read.

The weights in a `.pt2` archive and in a `.safetensors` file lie uncompressed and aligned. The
operating system can make such a file part of a process's memory: a page is read when it is first
used, and all processes on a machine share it. No code from the file is run.
"""

import json
import mmap
import struct
import sys
import zipfile
from pathlib import Path

import torch

from common.errors import UserError

from . import layout
from .damage import DAMAGED, reason, require
from .weights import differences, read_weights, refuse


def map_weights(build, path):
    """Return the network that `build()` makes, in eval mode, its weights mapped from `path`.

    A .pt2 archive, or a state dict that `read_weights` reads. The time this takes depends on the
    number of weights, not on their size. Changing a weight changes this process's copy of its page,
    never the file. Raises UserError if it cannot be mapped, or is of another network.
    """
    path = Path(path)
    state_dict = _archive(path) if path.suffix == ".pt2" else read_weights(path, mapped=True)
    # On the device "meta" a network has shapes and no memory.
    with torch.device("meta"):
        network = build().eval()
    problems = differences(network, state_dict)
    problems += [  # mapping cannot convert
        f"{name} is {state_dict[name].dtype} instead of {tensor.dtype}"
        for name, tensor in network.state_dict().items()
        if name in state_dict and state_dict[name].dtype != tensor.dtype
    ]
    if not problems:
        network.load_state_dict(state_dict, assign=True)
        tensors = [*network.named_parameters(), *network.named_buffers()]
        problems = [f"{name} is a buffer that no file holds" for name, t in tensors if t.is_meta]
    refuse(problems, network, path)
    return network


def _archive(path):
    """Return the state dict in a .pt2 archive, as views of the mapped file."""
    try:
        with path.open("rb") as file:
            return _weights(file)
    except OSError as error:
        raise UserError(
            f"the weights {path} cannot be opened: {error.strerror or error}.",
            "is that filesystem mounted on this machine, and may you read it?",
        ) from error
    except DAMAGED as error:
        raise UserError(
            f"the weights {path} cannot be mapped into memory: {reason(error)}.",
            "mlflow.pytorch.load_model reads what another PyTorch wrote, if you trust its author, "
            "and Modify_artifact_location.py writes models that can be mapped. Else the file is "
            "damaged.",
        ) from error


def _weights(file):
    if sys.platform == "linux":
        # Without NORESERVE, Linux refuses to map a file larger than the machine's memory, because a
        # process might want to change all of it. Python has the name since 3.13.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
        mapped = mmap.mmap(file.fileno(), 0, flags=flags)
    else:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    with zipfile.ZipFile(file) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        root = next(iter(infos)).split("/")[0] + "/"
        config = root + layout.WEIGHTS_CONFIG
        require(config in infos, f"it has no {config}, as archives of PyTorch before 2.10")

        def small(name):
            _record(file, len(mapped), infos[name])
            require(infos[name].file_size < layout.LARGEST, f"{name} is too large")
            return archive.read(name)

        same_order = small(root + "byteorder") == sys.byteorder.encode()
        require(same_order, "its byte order is another one")
        state_dict = {}
        for name, entry in json.loads(small(config))["config"].items():
            record, meta = entry["path_name"], entry["tensor_meta"]
            require(entry["use_pickle"] is False, f"{name} is a pickle, which could run code")
            require(meta["layout"] == layout.STRIDED, f"{name} is not dense")
            require(meta["dtype"] in layout.PT2_TYPES, f"{name} is of an unknown type")
            start, size = _record(file, len(mapped), infos[root + layout.WEIGHTS + record])
            state_dict[name] = _tensor(
                *(mapped, name, layout.PT2_TYPES[meta["dtype"]], start, size),
                [number["as_int"] for number in meta["sizes"]],
                [number["as_int"] for number in meta["strides"]],
                meta["storage_offset"]["as_int"],
            )
    return state_dict


def _record(file, length, info):
    """Return (start, size) of an uncompressed record of a zip: its content follows its header.

    The header is read and not looked up in the mapped file: the kernel would map up to 2 MB around
    it, for each weight.
    """
    require(
        info.compress_type == zipfile.ZIP_STORED
        and info.compress_size == info.file_size
        and not info.flag_bits & 1,
        f"{info.filename} is compressed or encrypted",
    )
    inside = 0 <= info.header_offset <= length - layout.HEADER_SIZE
    require(inside, f"{info.filename} lies outside of the file")
    file.seek(info.header_offset)
    signature, *sizes = struct.unpack(layout.HEADER, file.read(layout.HEADER_SIZE))
    start = info.header_offset + layout.HEADER_SIZE + sum(sizes)
    inside = signature == layout.SIGNATURE and start + info.file_size <= length
    require(inside, f"{info.filename} lies outside of the file")
    return start, info.file_size


def _tensor(mapped, name, dtype, start, size, sizes, strides, offset):
    """Return a view of `size` bytes of the file, or raise ValueError if it would leave them."""
    numbers = [*sizes, *strides, offset]
    require(
        len(sizes) == len(strides) and all(type(n) is int and n >= 0 for n in numbers),
        f"{name} has an impossible shape",
    )
    if 0 in sizes:
        return torch.empty(sizes, dtype=dtype)
    last = offset + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    require((last + 1) * dtype.itemsize <= size, f"{name} is larger than its record")
    require(start % dtype.itemsize == 0, f"{name} is not aligned")
    flat = torch.frombuffer(mapped, dtype=dtype, count=last + 1, offset=start)
    return flat.as_strided(sizes, strides, offset)
