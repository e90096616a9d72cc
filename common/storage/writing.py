"""A model written once, at the speed of the disk, and hashed meanwhile.

PyTorch writes an archive through one core, with a copy of each weight: 0.4 GB/s where this was
measured. Here PyTorch writes all but the weights, and they follow from where they lie in memory.
"""

import concurrent.futures
import copy
import errno
import hashlib
import io
import json
import mmap
import os
import shutil
import struct
import time
import zipfile

import torch

from . import layout
from .damage import DAMAGED, reason, require
from .files import sha256

CHUNK = 16 * 2**20
DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none


def write_model(folder, network, save):
    """Have `save(network)` write the model into the empty `folder`.

    Returns (the SHA-256 of its file, the seconds that it took).
    `save` gets a copy of `network` that has no weights, and they are written after it. If that does
    not make the archive that is known here, `save` gets `network` itself, and one line says so.
    """
    start = time.perf_counter()
    folder.rmdir()  # which fails unless it is empty: what is in it may be removed below
    folder.mkdir()
    try:
        save(without_weights(network))
        digest = add_weights(folder / layout.MODEL_FILE, network.state_dict())
        return digest, time.perf_counter() - start
    except (ImportError, OSError, *DAMAGED) as error:  # `save` says again what `network` lacks
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # no direct writing here
            raise
        print(f"write    more slowly, by PyTorch alone: {reason(error)}", flush=True)
    shutil.rmtree(folder)
    folder.mkdir()
    save(network)
    return sha256(folder / layout.MODEL_FILE), time.perf_counter() - start


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

    Raises one of DAMAGED if the archive is not as known, OSError if the disk is full.
    """
    whole, records = path.with_suffix(".whole"), {}
    with (
        zipfile.ZipFile(path) as empty,
        HashedFile(whole) as file,
        zipfile.ZipFile(file, "w") as archive,
    ):
        names = [name.removeprefix(layout.ROOT) for name in empty.namelist()]
        require(all(map(layout.RECORDS.fullmatch, names)), "its archives have other records")
        others = [name for name in names if not name.startswith(layout.TENSORS[0])]
        contents = {name: empty.read(layout.ROOT + name) for name in others}
        require(layout.VERSIONS.items() <= contents.items(), "its archives have another version")
        config = json.loads(contents[layout.WEIGHTS_CONFIG])
        require(config["config"].keys() == state_dict.keys(), "its archives name other weights")
        for name, tensor in state_dict.items():
            entry = config["config"][name]
            _check_entry(entry, tensor)
            key = (tensor.data_ptr(), tensor.dtype, tensor.size(), tensor.stride())
            if key not in records:
                records[key] = f"weight_{len(records)}"
                _write_record(archive, file.size, records[key], tensor)
            entry["path_name"] = records[key]
            entry["tensor_meta"]["storage_offset"] = {"as_int": 0}
        contents[layout.WEIGHTS_CONFIG] = json.dumps(config)
        for name, content in contents.items():
            archive.writestr(layout.ROOT + name, content)
    os.replace(whole, path)
    return file.sha256.hexdigest()


def _check_entry(entry, tensor):
    """Raise ValueError unless the archive's entry of a weight says what `tensor` is."""
    meta = entry["tensor_meta"]
    known = entry.keys() == layout.ENTRY and entry["use_pickle"] is False
    known &= (meta["layout"], layout.PT2_TYPES[meta["dtype"]]) == (layout.STRIDED, tensor.dtype)
    for field, numbers in (("sizes", tensor.size()), ("strides", tensor.stride())):
        known &= meta[field] == [{"as_int": number} for number in numbers]
    require(known, "its archives describe weights in another way")


def _write_record(archive, position, name, tensor):
    """Append the bytes of `tensor`, aligned by an extra field of padding before them."""
    record = zipfile.ZipInfo(layout.ROOT + layout.WEIGHTS + name)
    before = position + layout.HEADER_SIZE + len(record.filename) + 4 + layout.ZIP64_SIZE
    padding = -before % layout.ALIGNMENT
    record.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    content = tensor.detach()
    if not tensor.is_contiguous():  # the same strides, without whatever lies between and around
        content = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        content.copy_(tensor.detach())
        content = torch.empty(0, dtype=torch.uint8).set_(content.untyped_storage())
    content = memoryview(content.reshape(-1).view(torch.uint8).numpy())
    with archive.open(record, "w", force_zip64=True) as file:
        for start in range(0, len(content), CHUNK):
            file.write(content[start : start + CHUNK])


class HashedFile(io.RawIOBase):
    """A new file that is only appended to: hashed as it grows, on the disk at the block's end.

    It goes past the page cache where it can: the same disk took 0.3 GB/s through it, and 1.3 so.
    Two threads hash and write one chunk, outside Python's lock, while the other is filled.
    """

    def __init__(self, path):
        self.path, flags = path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self.descriptor = os.open(path, flags | DIRECT, 0o666)
        except OSError:  # the filesystem takes no direct writing; else this says what is wrong:
            self.descriptor = os.open(path, flags, 0o666)
        self.sha256, self.size = hashlib.sha256(), 0
        # Direct writing wants whole blocks, from whole pages of memory, which an mmap gives.
        self.chunk, self.other = (memoryview(mmap.mmap(-1, CHUNK)) for _ in range(2))
        self.threads, self.working = concurrent.futures.ThreadPoolExecutor(2), []

    def write(self, data):
        rest = memoryview(data)
        while len(rest):
            filled = self.size % CHUNK
            count = min(len(rest), CHUNK - filled)
            self.chunk[filled : filled + count] = rest[:count]
            self.size += count
            rest = rest[count:]
            if filled + count == CHUNK:
                self._wait()
                tasks = (self.sha256.update, self._put)
                self.working = [self.threads.submit(task, self.chunk) for task in tasks]
                self.chunk, self.other = self.other, self.chunk
        return len(data)

    def _wait(self):
        for task in self.working:
            task.result()  # raises what the writing raised: no space, no quota

    def _put(self, data):
        while len(data):  # a system may take a part only
            data = data[os.write(self.descriptor, data) :]

    def __exit__(self, kind, *rest):
        try:
            if kind is None:
                self._wait()
                last = self.chunk[: self.size % CHUNK]
                self.sha256.update(last)
                with open(self.path, "ab") as file:  # the last piece is no whole number of blocks
                    file.write(last)
                    file.flush()
                    os.fsync(file.fileno())
        finally:
            self.threads.shutdown()
            os.close(self.descriptor)
