"""Weights mapped into memory: there at once, whatever their size, without being read.

The weights in a `.pt2` archive, MLflow's format for PyTorch models, and in a `.safetensors` file
lie uncompressed and aligned. The operating system can make such a file part of a process's memory:
a page is read when it is first used, and all processes on a machine share it. Copy `load` if you
want that; no code from the file is run.
"""

import io
import json
import math
import mmap
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import torch

WEIGHTS = "data/weights/"  # within a .pt2 archive, under the name of the archive
CONFIG = WEIGHTS + "model_weights_config.json"
EXAMPLES = "data/sample_inputs/"

# PyTorch's numbers for element types in a .pt2 archive, and safetensors' names.
PT2_TYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
SAFETENSORS_TYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "BF16": torch.bfloat16,
}
STRIDED = 7  # PyTorch's number for the layout of a dense tensor

# Without it, Linux refuses to map a file larger than the machine's memory, because a process might
# want to change all of it. Python has the name since 3.13.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

# What a file that is something else, is damaged or was made to do harm has been seen to raise.
NOT_MAPPABLE = (
    AttributeError,
    LookupError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


def load(build, path):
    """Return the network that `build()` makes, in eval mode, its weights mapped from `path`.

    A .pt2 archive, .safetensors, or the state dict that torch.save wrote. The time this takes
    depends on the number of weights, not on their size. Changing a weight changes this process's
    copy of its page, never the file. Raises SystemExit if it cannot be mapped, or is of another
    network.
    """
    path = Path(path)
    try:
        state_dict = _map(path)
    except OSError as error:
        raise SystemExit(
            f"error: the weights {path} cannot be opened: {error.strerror or error}.\n"
            "hint:  is that filesystem mounted on this machine, and may you read it?"
        ) from error
    except NOT_MAPPABLE as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        reason = reason.strip().split("\n")[0].rstrip(".")[:200] or type(error).__name__
        advice = (
            "mlflow.pytorch.load_model reads what another PyTorch wrote, if you trust its author, "
            "and Modify_artifact_location.py writes models that can be mapped."
            if path.suffix == ".pt2"
            else "save the weights alone: torch.save(model.state_dict(), path), or as safetensors."
        )
        raise SystemExit(
            f"error: the weights {path} cannot be mapped into memory: {reason}.\n"
            f"hint:  {advice} Else the file is damaged."
        ) from error
    # On the device "meta" a network has shapes and no memory.
    with torch.device("meta"):
        network = build().eval()
    expected = network.state_dict()
    problems = [f"missing {name}" for name in expected if name not in state_dict]
    problems += [f"unexpected {name}" for name in state_dict if name not in expected]
    problems += [
        f"{name} is {tuple(state_dict[name].shape)} {state_dict[name].dtype} instead of "
        f"{tuple(tensor.shape)} {tensor.dtype}"
        for name, tensor in expected.items()
        if name in state_dict
        and (state_dict[name].shape, state_dict[name].dtype) != (tensor.shape, tensor.dtype)
    ]
    if not problems:
        network.load_state_dict(state_dict, assign=True)
        tensors = [*network.named_parameters(), *network.named_buffers()]
        problems = [f"{name} is a buffer that no file holds" for name, t in tensors if t.is_meta]
    if problems:
        shown = "; ".join(problems[:12]) + ("; ..." if len(problems) > 12 else "")
        raise SystemExit(
            f"error: the weights {path} are not those of a {type(network).__name__}: {shown}.\n"
            "hint:  common/model.py shows the network; the file is of another one."
        )
    return network


def _map(path):
    """Return the state dict in the file `path`, as views of the mapped file."""
    if path.suffix not in (".pt2", ".safetensors"):
        with path.open("rb"):  # so that a missing file is an OSError, as for the others
            pass
        state_dict = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(state_dict, dict) or not all(
            isinstance(tensor, torch.Tensor) for tensor in state_dict.values()
        ):
            raise ValueError("it holds something else than a dict of tensors")
        return state_dict
    with path.open("rb") as file:
        if sys.platform == "win32":
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        else:
            mapped = mmap.mmap(
                file.fileno(),
                0,
                flags=mmap.MAP_PRIVATE | NO_RESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        if path.suffix == ".safetensors":
            return _safetensors(mapped)
        return _pt2(file, mapped)


def _pt2(file, mapped):
    with zipfile.ZipFile(file) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        root = next(iter(infos)).split("/")[0] + "/"
        _require(root + CONFIG in infos, f"it has no {CONFIG}, as archives of PyTorch before 2.10")

        def small(name):
            _record(file, len(mapped), infos[root + name])
            _require(infos[root + name].file_size < 2**28, f"{name} is too large")
            return archive.read(root + name)

        _require(small("byteorder") == sys.byteorder.encode(), "its byte order is another one")
        # Not needed here, but this is the pickle that plain MLflow, and PyTorch, would run.
        for name in infos:
            if name.startswith(root + EXAMPLES):
                _refuse_code(small(name.removeprefix(root)))
        state_dict = {}
        for name, entry in json.loads(small(CONFIG))["config"].items():
            record, meta = entry["path_name"], entry["tensor_meta"]
            _require(entry["use_pickle"] is False, f"{name} is a pickle, which could run code")
            _require(meta["layout"] == STRIDED, f"{name} is not dense")
            _require(meta["dtype"] in PT2_TYPES, f"{name} is of an unknown type")
            start, size = _record(file, len(mapped), infos[root + WEIGHTS + record])
            state_dict[name] = _tensor(
                *(mapped, name, PT2_TYPES[meta["dtype"]], start, size),
                [number["as_int"] for number in meta["sizes"]],
                [number["as_int"] for number in meta["strides"]],
                meta["storage_offset"]["as_int"],
            )
    return state_dict


def _refuse_code(content):
    """Raise ValueError if a pickle holds more than tensors and plain containers."""
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("its example inputs are a pickle that could run code") from error


def _record(file, length, info):
    """Return (start, size) of an uncompressed record of a zip: its content follows its header.

    The header is read and not looked up in the mapped file: the kernel would map up to 2 MB around
    it, for each weight.
    """
    _require(
        info.compress_type == zipfile.ZIP_STORED
        and info.compress_size == info.file_size
        and not info.flag_bits & 1,
        f"{info.filename} is compressed or encrypted",
    )
    _require(0 <= info.header_offset <= length - 30, f"{info.filename} lies outside of the file")
    file.seek(info.header_offset)
    signature, name_size, extra_size = struct.unpack("<4s22xHH", file.read(30))
    start = info.header_offset + 30 + name_size + extra_size
    _require(
        signature == b"PK\x03\x04" and start + info.file_size <= length,
        f"{info.filename} lies outside of the file",
    )
    return start, info.file_size


def _safetensors(mapped):
    """A length in 8 bytes, that much JSON, and then the weights, at offsets that the JSON holds."""
    (length,) = struct.unpack_from("<Q", mapped)
    _require(length < min(len(mapped), 2**28), "its header is cut short")
    _require(sys.byteorder == "little", "its byte order is another one")
    state_dict = {}
    for name, entry in json.loads(mapped[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        _require(entry["dtype"] in SAFETENSORS_TYPES, f"{name} is of an unknown type")
        dtype, (start, end), sizes = (
            SAFETENSORS_TYPES[entry["dtype"]],
            entry["data_offsets"],
            entry["shape"],
        )
        _require(0 <= start <= end <= len(mapped) - 8 - length, f"{name} lies outside of the file")
        strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
        state_dict[name] = _tensor(
            mapped, name, dtype, 8 + length + start, end - start, sizes, strides, 0
        )
    return state_dict


def _tensor(mapped, name, dtype, start, size, sizes, strides, offset):
    """Return a view of `size` bytes of the file, or raise ValueError if it would leave them."""
    numbers = [*sizes, *strides, offset]
    _require(
        len(sizes) == len(strides) and all(type(n) is int and n >= 0 for n in numbers),
        f"{name} has an impossible shape",
    )
    if 0 in sizes:
        return torch.empty(sizes, dtype=dtype)
    last = offset + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    _require((last + 1) * dtype.itemsize <= size, f"{name} is larger than its record")
    _require(start % dtype.itemsize == 0, f"{name} is not aligned")
    flat = torch.frombuffer(mapped, dtype=dtype, count=last + 1, offset=start)
    return flat.as_strided(sizes, strides, offset)


def _require(condition, problem):
    if not condition:
        raise ValueError(problem)
