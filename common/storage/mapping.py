"""Weights mapped into memory: there at once, whatever their size, without being read.

The operating system can make a file part of a process's memory: a page is read when it is first
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
from .weights import differences, read_weights, refuse, without_wrappers


def map_weights(build, path):
    """Return the network that `build()` makes, in eval mode, its weights mapped from `path`.

    A .pt2 archive, or a file that `read_weights` reads. Changing a weight never changes the file.
    """
    path = Path(path)
    state_dict = _archive(path) if path.suffix == ".pt2" else read_weights(path, mapped=True)
    # On the device "meta" a network has shapes and no memory.
    with torch.device("meta"):
        network = build().eval()
    state_dict = without_wrappers(state_dict, network)
    problems = differences(network, state_dict, "dtype")  # mapping cannot convert
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
        what = f"the weights {path} cannot be opened: {error.strerror or error}."
        raise UserError(what, "is that filesystem mounted here, and may you read it?") from error
    except DAMAGED as error:
        what = f"the weights {path} cannot be mapped into memory: {reason(error)}."
        hint = "it is damaged; or, if you trust its author, mlflow.pytorch.load_model may read it."
        raise UserError(what, hint) from error


def _weights(file):
    private = {"access": mmap.ACCESS_COPY}
    if sys.platform == "linux":
        # Without NORESERVE, Linux refuses to map a file larger than the machine's memory, because a
        # process might want to change all of it. Python has the name since 3.13.
        private = {"flags": mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)}
    mapped = mmap.mmap(file.fileno(), 0, **private)
    with zipfile.ZipFile(file) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        for name, info in infos.items():
            stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
            require(stored, f"{name} is compressed or encrypted")
        root = archive.namelist()[0].partition("/")[0] + "/"
        config = root + layout.WEIGHTS_CONFIG
        require(config in infos, f"it has no {config}, as archives of PyTorch before 2.10")
        require(infos[config].file_size < layout.LARGEST, f"{config} is too large")
        order = archive.read(root + "byteorder").decode()
        require(order == sys.byteorder, f"its byte order is {order}")
        state_dict = {}
        for name, entry in json.loads(archive.read(config))["config"].items():
            require(entry["use_pickle"] is False, f"{name} is a pickle, which could run code")
            info = infos[root + layout.WEIGHTS + entry["path_name"]]
            state_dict[name] = _view(file, mapped, info, name, entry["tensor_meta"])
    return state_dict


def _view(file, mapped, info, name, meta):
    """Return a weight as a view of its record, or raise ValueError if it would leave that."""
    require(meta["layout"] == layout.STRIDED, f"{name} is not dense")
    require(meta["dtype"] in layout.PT2_TYPES, f"{name} is of an unknown type")
    dtype, offset = layout.PT2_TYPES[meta["dtype"]], meta["storage_offset"]["as_int"]
    sizes, strides = ([n["as_int"] for n in meta[field]] for field in ("sizes", "strides"))
    numbers = (*sizes, *strides, offset)
    possible = len(sizes) == len(strides) and all(type(n) is int and n >= 0 for n in numbers)
    require(possible, f"{name} has an impossible shape")
    if 0 in sizes:
        return torch.empty(sizes, dtype=dtype)
    count = 1 + offset + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    require(count * dtype.itemsize <= info.file_size, f"{name} is larger than its record")
    # The header before it is read and not looked up in the mapped file: the kernel would map up to
    # 2 MB around it, for each weight.
    file.seek(info.header_offset)
    signature, *lengths = struct.unpack(layout.HEADER, file.read(layout.HEADER_SIZE))
    start = info.header_offset + layout.HEADER_SIZE + sum(lengths)
    inside = signature == layout.SIGNATURE and start + info.file_size <= len(mapped)
    require(inside, f"{name} lies outside of the file")
    require(start % dtype.itemsize == 0, f"{name} is not aligned")
    flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start)
    return flat.as_strided(sizes, strides, offset)
