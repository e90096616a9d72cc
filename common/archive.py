"""A model's archive, written at the speed of the disk.

A `.pt2` archive, MLflow's format for PyTorch models, is a zip file whose weights lie one after the
other, uncompressed and aligned. PyTorch writes it through one core, with a copy of each weight, at
0.4 GB/s where this was measured. Here PyTorch writes all but the weights, and they follow from
where they lie in memory. If you only want a file's SHA-256 without reading it back, copy
`_HashedFile`.
"""

import concurrent.futures
import copy
import hashlib
import json
import os
import struct
import zipfile
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

MODEL_FILE = "data/model.pt2"  # within the folder of a model that MLflow has saved
WEIGHTS = "data/weights/"  # within the archive, under its name
CONFIG = WEIGHTS + "model_weights_config.json"
ALIGNMENT = 64  # bytes; PyTorch's own
CHUNK = 16 * 2**20
FLUSH = 256 * 2**20  # after so many bytes the disk is set to work


def without_weights(network):
    """Return a copy of `network` whose weights have a shape and no content.

    `save_model` traces it as it would trace `network`, and writes everything but the weights. It
    would write them, too, through one core and a copy of each: 0.4 GB/s where this was measured.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = network.state_dict(keep_vars=True).values()
    # What deepcopy finds in its memo it takes for copied.
    return copy.deepcopy(network, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})


def write_weights(path, state_dict):
    """Put `state_dict` into the archive `path`, which was saved of `without_weights(network)`.

    Returns its SHA-256. Each byte is handed to the disk once, from where it lies in
    memory; the SHA-256 is computed beside it, on a second core, as the bytes go by.
    """
    path = Path(path)
    whole = path.with_suffix(".whole")
    with zipfile.ZipFile(path) as empty, _HashedFile(whole) as file:
        root = empty.namelist()[0].split("/")[0] + "/"
        config = json.loads(empty.read(root + CONFIG))
        if config["config"].keys() != state_dict.keys():
            raise RuntimeError(f"{path} is not the archive of this network")
        with zipfile.ZipFile(file, "w") as archive:
            records = {}  # tied weights are written once
            for name, tensor in state_dict.items():
                entry = config["config"][name]
                key = (tensor.data_ptr(), tensor.dtype, tensor.size(), tensor.stride())
                if key not in records:
                    records[key] = f"weight_{len(records)}"
                    _write_record(archive, file.tell(), root + WEIGHTS + records[key], tensor)
                entry["path_name"] = records[key]
                entry["tensor_meta"]["storage_offset"] = {"as_int": 0}
            archive.writestr(root + CONFIG, json.dumps(config))
            for name in empty.namelist():
                if not name.startswith(root + WEIGHTS):
                    archive.writestr(name, empty.read(name))
    os.replace(whole, path)
    return file.sha256.hexdigest()


def _write_record(archive, position, name, tensor):
    """Append the bytes of `tensor`, aligned. They follow a header of 30 bytes, `name`, two extra
    fields: the padding, and the 20 bytes that say that the record may be larger than 4 GB.
    """
    record = zipfile.ZipInfo(name)
    padding = -(position + 30 + len(name) + 4 + 20) % ALIGNMENT
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


class _HashedFile:
    """A new file that is only appended to: hashed as it grows, and on the disk when it is closed.

    hashlib, zlib and the operating system all work outside Python's lock, so that threads help.
    """

    def __init__(self, path):
        self.file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self.sha256 = hashlib.sha256()
        self.hasher = concurrent.futures.ThreadPoolExecutor(1)
        self.flusher = concurrent.futures.ThreadPoolExecutor(1)
        self.flushing, self.flushed_at = None, 0

    def tell(self):
        return self.file.tell()

    def flush(self):
        pass

    def write(self, data):
        self.hasher.submit(self.sha256.update, data)
        rest = memoryview(data)
        while len(rest):  # a file without a buffer may take a part only
            rest = rest[self.file.write(rest) :]
        # Without this the disk would stay idle until some gigabytes wait for it.
        if self.tell() >= self.flushed_at + FLUSH:
            self._wait_for_flush()
            self.flushing = self.flusher.submit(os.fsync, self.file.fileno())
            self.flushed_at = self.tell()
        return len(data)

    def _wait_for_flush(self):
        if self.flushing is not None:
            self.flushing.result()  # raises what fsync raised: no space, no quota

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        self.hasher.shutdown(cancel_futures=kind is not None)
        self.flusher.shutdown()
        with self.file:
            if kind is None:
                self._wait_for_flush()
                os.fsync(self.file.fileno())
