"""A model's archive, written at the speed of the disk.

A `.pt2` archive, MLflow's format for PyTorch models, is a zip file whose weights lie one after the
other, uncompressed and aligned. PyTorch writes it through one core, with a copy of each weight, at
0.4 GB/s where this was measured. Here PyTorch writes all but the weights, and they follow from
where they lie in memory. If you only want a file's SHA-256 without reading it back, copy
`_HashedFile`.
"""

import concurrent.futures
import contextlib
import copy
import hashlib
import json
import os
import struct
import threading
import zipfile

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

MODEL_FILE = "data/model.pt2"  # within the folder of a model that MLflow has saved
ROOT = "model/"  # within the archive: PyTorch takes the file's name
WEIGHTS = "data/weights/"
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


@contextlib.contextmanager
def weights_written(folder, state_dict):
    """Write the weights of the model that is saved into `folder` in the block, and put them there.

    The block saves `without_weights(network)`; tracing it takes about a second, in which a thread
    writes the weights beside `folder`. Each byte is handed to the disk once, from where it lies in
    memory; the SHA-256 is computed meanwhile, on another core. Yields an object whose
    `sha256.hexdigest()` is the file's when the block has ended. Raises OSError if the disk is full.
    """
    whole, saved = folder.with_name(folder.name + ".weights"), folder / MODEL_FILE
    stop = threading.Event()
    with (
        _HashedFile(whole) as file,
        zipfile.ZipFile(file, "w") as archive,
        concurrent.futures.ThreadPoolExecutor(1) as writer,
    ):
        records = writer.submit(_write_records, archive, file, state_dict, stop)
        try:
            yield file
            _add_rest(archive, saved, records.result())
        except BaseException:  # a signal, too: it does not wait for gigabytes
            stop.set()
            raise
    os.replace(whole, saved)


def _write_records(archive, file, state_dict, stop):
    """Append the weights, and return {name: its record}. Tied weights are written once."""
    records, names = {}, {}
    for name, tensor in state_dict.items():
        key = (tensor.data_ptr(), tensor.dtype, tensor.size(), tensor.stride())
        if key not in records:
            records[key] = f"weight_{len(records)}"
            _write_record(archive, file.tell(), ROOT + WEIGHTS + records[key], tensor, stop)
        names[name] = records[key]
    return names


def _add_rest(archive, saved, records):
    """Append all but the weights from the archive `saved`, which is then told where they lie."""
    with zipfile.ZipFile(saved) as empty:
        config = json.loads(empty.read(ROOT + CONFIG))
        if config["config"].keys() != records.keys():
            raise RuntimeError(f"{saved} is not the archive of this network")
        for name, entry in config["config"].items():
            entry["path_name"] = records[name]
            entry["tensor_meta"]["storage_offset"] = {"as_int": 0}
        archive.writestr(ROOT + CONFIG, json.dumps(config))
        for name in empty.namelist():
            if not name.startswith(ROOT + WEIGHTS):
                archive.writestr(name, empty.read(name))


def _write_record(archive, position, name, tensor, stop):
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
            if stop.is_set():
                return
            file.write(content[start : start + CHUNK])


class _HashedFile:
    """A new file that is only appended to: hashed as it grows, and on the disk when it is closed.

    hashlib, zlib and the operating system all work outside Python's lock, so that threads help.
    """

    def __init__(self, path):
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
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
