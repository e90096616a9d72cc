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
import errno
import hashlib
import json
import mmap
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
DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none
REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)  # what a filesystem without it says


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
    writes the weights beside `folder`. Each byte goes to the disk once, and the SHA-256 is computed
    meanwhile, on another core. Yields an object whose `sha256.hexdigest()` is the file's when the
    block has ended. Raises OSError if the disk is full.
    """
    whole, saved = folder.with_name(folder.name + ".weights"), folder / MODEL_FILE
    stop = threading.Event()
    with (
        _HashedFile(whole, stop) as file,
        zipfile.ZipFile(file, "w") as archive,
        concurrent.futures.ThreadPoolExecutor(1) as writer,
    ):
        records = writer.submit(_write_records, archive, file, state_dict, stop)
        try:
            yield file
            _add_rest(archive, saved, records.result())
        except BaseException:  # a signal, too: it does not wait for gigabytes
            stop.set()  # and what the zip file would add to a full disk is left out
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

    It goes past the page cache (`O_DIRECT`) where the filesystem lets it: through the cache the
    same disk took 0.3 GB/s instead of 1.3 where this was measured, and what others have cached had
    to make room. One chunk is filled while the other is being written; hashlib, zlib and the
    operating system work outside Python's lock, so that threads help. Nothing is written any more
    once `stop` is set.
    """

    def __init__(self, path, stop):
        self.descriptor, self.direct = create(path)
        self.stop = stop
        self.sha256 = hashlib.sha256()
        self.hasher = concurrent.futures.ThreadPoolExecutor(1)
        self.writer = concurrent.futures.ThreadPoolExecutor(1)
        # Direct writing wants whole blocks, from whole pages of memory, which an mmap gives.
        self.chunk, self.other = mmap.mmap(-1, CHUNK), mmap.mmap(-1, CHUNK)
        self.filled, self.written = 0, 0  # bytes in `chunk`, bytes in the file before it
        self.writing = None  # the future of `other`

    def tell(self):
        return self.written + self.filled

    def flush(self):
        pass

    def write(self, data):
        if self.stop.is_set():
            return len(data)
        self.hasher.submit(self.sha256.update, data)
        rest = memoryview(data)
        while len(rest):
            count = min(len(rest), CHUNK - self.filled)
            self.chunk[self.filled : self.filled + count] = rest[:count]
            self.filled += count
            rest = rest[count:]
            if self.filled == CHUNK:
                self._wait()
                self.writing = self.writer.submit(self._put, self.chunk, CHUNK, self.written)
                self.chunk, self.other = self.other, self.chunk
                self.filled, self.written = 0, self.written + CHUNK
        return len(data)

    def _wait(self):
        if self.writing is not None:
            self.writing.result()  # raises what the writing raised: no space, no quota

    def _put(self, chunk, size, position):
        done = 0
        with memoryview(chunk) as view:
            while done < size:  # a system may take a part only
                try:
                    done += os.pwrite(self.descriptor, view[done:size], position + done)
                except OSError as error:
                    if error.errno not in REFUSED or not self.direct:
                        raise
                    self._leave_direct()
        if not self.direct:  # else the disk would stay idle until some gigabytes wait for it
            os.fsync(self.descriptor)

    def _leave_direct(self):
        """Write through the page cache from now on."""
        if self.direct:
            import fcntl  # Windows has none

            flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~DIRECT)
            self.direct = False

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        try:
            if kind is None:
                self._wait()
                self._leave_direct()  # the last piece is no whole number of blocks
                self._put(self.chunk, self.filled, self.written)
        finally:
            self.hasher.shutdown(cancel_futures=kind is not None)
            self.writer.shutdown()
            os.close(self.descriptor)


def create(path):
    """Create a file; return its descriptor, and whether the filesystem takes direct writing."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | DIRECT, 0o666), bool(DIRECT)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        return os.open(path, flags, 0o666), False
