"""A model written once, at the speed of the disk, and hashed meanwhile.

PyTorch writes an archive through one core, with a copy of each weight: 0.4 GB/s where this was
measured. Here PyTorch writes all but the weights, and they follow from where they lie in memory. If
PyTorch's archives come to look different, PyTorch does it all.
"""

import copy
import errno
import json
import os
import shutil
import struct
import zipfile

import torch

from . import layout
from .damage import DAMAGED, reason, require
from .files import sha256
from .hashed import CHUNK, HashedFile


def write_model(folder, network, save):
    """Have `save(network)` write the model into the empty `folder`; return its file's SHA-256.

    `save` is called with a copy of `network` that has no weights, and they are written after it. If
    the outcome is not the archive that is known here, `save` is called with `network` itself, one
    line says so, and the file is read for its SHA-256.
    """
    if any(folder.iterdir()):  # because what is in it may be removed below
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))
    try:
        save(without_weights(network))
        return add_weights(folder / layout.MODEL_FILE, network.state_dict())
    except (ImportError, OSError, *DAMAGED) as error:  # `save` says again what `network` lacks
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # no direct writing here
            raise
        print(f"write    more slowly, by PyTorch alone: {reason(error)}", flush=True)
    shutil.rmtree(folder)
    folder.mkdir()
    save(network)
    return sha256(folder / layout.MODEL_FILE)


def without_weights(network):
    """Return a copy of `network` whose weights have a shape and no content, to be traced as it."""
    # Private to PyTorch: if it goes, `write_model` does without.
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = network.state_dict(keep_vars=True).values()
    # What deepcopy finds in its memo it takes for copied.
    return copy.deepcopy(network, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})


def add_weights(path, state_dict):
    """Give the archive at `path` of a network without weights its weights; return its SHA-256.

    Each byte goes to the disk once. Tied weights are written once. Raises ValueError, LookupError
    or another of DAMAGED if the archive is not as known, OSError if the disk is full.
    """
    whole = path.with_suffix(".whole")
    with (
        zipfile.ZipFile(path) as empty,
        HashedFile(whole) as file,
        zipfile.ZipFile(file, "w") as archive,
    ):
        names = {name.removeprefix(layout.ROOT): name for name in empty.namelist()}
        for name, full_name in names.items():
            known = name != full_name and layout.RECORDS.fullmatch(name)
            require(known, f"its archives have an unknown record {full_name}")
        for name, version in layout.VERSIONS.items():
            require(empty.read(names[name]) == version, f"its archives have another {name}")
        config = json.loads(empty.read(names[layout.WEIGHTS_CONFIG]))
        require(config["config"].keys() == state_dict.keys(), "its archives name other weights")
        for name, entry in config["config"].items():
            _check_entry(entry, state_dict[name])
        records = {}
        for name, tensor in state_dict.items():
            key = (tensor.data_ptr(), tensor.dtype, tensor.size(), tensor.stride())
            if key not in records:
                records[key] = f"weight_{len(records)}"
                full_name = layout.ROOT + layout.WEIGHTS + records[key]
                _write_record(archive, file.tell(), full_name, tensor)
            config["config"][name]["path_name"] = records[key]
            config["config"][name]["tensor_meta"]["storage_offset"] = {"as_int": 0}
        archive.writestr(names[layout.WEIGHTS_CONFIG], json.dumps(config))
        for name, full_name in names.items():
            if not name.startswith(layout.WEIGHTS):
                archive.writestr(full_name, empty.read(full_name))
    os.replace(whole, path)
    return file.sha256.hexdigest()


def _check_entry(entry, tensor):
    """Raise ValueError unless the archive's entry of a weight says what `tensor` is."""
    meta = entry["tensor_meta"]
    known = entry.keys() == layout.ENTRY and entry["use_pickle"] is False
    known &= (meta["layout"], layout.PT2_TYPES[meta["dtype"]]) == (layout.STRIDED, tensor.dtype)
    for numbers, size in ((meta["sizes"], tensor.size()), (meta["strides"], tensor.stride())):
        known &= numbers == [{"as_int": number} for number in size]
    require(known, "its archives describe weights in another way")


def _write_record(archive, position, name, tensor):
    """Append the bytes of `tensor`, aligned by an extra field of padding before them."""
    record = zipfile.ZipInfo(name)
    before = position + layout.HEADER_SIZE + len(name) + 4 + layout.ZIP64_SIZE
    padding = -before % layout.ALIGNMENT
    record.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    if tensor.is_contiguous():
        content = tensor.detach().reshape(-1).view(torch.uint8)
    else:  # the same strides, without whatever lies between and around
        dense = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        dense.copy_(tensor.detach())
        content = torch.empty(0, dtype=torch.uint8).set_(dense.untyped_storage())
    content = memoryview(content.numpy())
    with archive.open(record, "w", force_zip64=True) as file:
        for start in range(0, len(content), CHUNK):
            file.write(content[start : start + CHUNK])
