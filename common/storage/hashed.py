"""A file that is hashed while it is written, past the page cache: for models of gigabytes."""

import concurrent.futures
import errno
import hashlib
import mmap
import os

CHUNK = 16 * 2**20
DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none


class HashedFile:
    """A new file that is only appended to: hashed as it grows, and on the disk when it is closed.

    It goes past the page cache (`O_DIRECT`) where the filesystem lets it: through the cache the
    same disk took 0.3 GB/s instead of 1.3 where this was measured, and what others have cached had
    to make room. One chunk is filled while the other is being written; hashlib, zlib and the
    operating system work outside Python's lock, so that threads help.
    """

    def __init__(self, path):
        self.descriptor, self.direct = create(path)
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
                done += os.pwrite(self.descriptor, view[done:size], position + done)
        if not self.direct:  # else the disk would stay idle until some gigabytes wait for it
            os.fsync(self.descriptor)

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        try:
            if kind is None:
                self._wait()
                if self.direct:  # the last piece is no whole number of blocks
                    import fcntl  # Windows has none

                    flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
                    fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~DIRECT)
                    self.direct = False
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
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return os.open(path, flags, 0o666), False
