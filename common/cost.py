"""What a step cost: seconds, memory, bytes over the network.

Copy `measured` for your own steps. Memory and network are read from Linux; elsewhere they are not
known, and are not shown.
"""

import contextlib
import os
import socket
import struct
import time
from pathlib import Path

TCP_INFO_SIZE, TCP_INFO_BYTES = 136, 120  # bytes acknowledged and received stand at 120, in 2 x 8


class Cost:
    """Filled in when the block of `measured` ends; `memory` and `network` are bytes, or None."""

    seconds, memory, network = 0.0, None, None

    def report(self, what, size):
        """Print a line about `size` bytes, and return it as metrics {"write.seconds": ...}."""
        speed = size / 1e9 / self.seconds
        line = f"{what:<8} {size / 1e9:.4g} GB  {self.seconds:.3f} s  {speed:.3g} GB/s"
        metrics = {"seconds": self.seconds, "size_bytes": size, "gigabytes_per_second": speed}
        if self.memory is not None:
            line += f"  network {self.network} bytes  peak memory +{self.memory / 1e6:.1f} MB"
            metrics |= {"network_bytes": self.network, "peak_memory_bytes": self.memory}
        print(line, flush=True)
        return {f"{what}.{name}": value for name, value in metrics.items()}


@contextlib.contextmanager
def measured():
    """Measure the block inside: yields a `Cost`.

    Memory: by how much the process grew at its peak, mapped files included as far as they were
    used. Network: what its TCP connections carried, to any host, but for one closed in the block.
    """
    cost = Cost()
    known = False
    with contextlib.suppress(OSError):  # not Linux, or one that does not tell
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
        memory, network = _resident("VmRSS:"), _network_bytes()
        known = True
    start = time.perf_counter()
    yield cost
    cost.seconds = time.perf_counter() - start
    if known:
        cost.memory = max(0, _resident("VmHWM:") - memory)
        cost.network = sum(count - network.get(name, 0) for name, count in _network_bytes().items())


def _resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _network_bytes():
    """{TCP connection: bytes that it has carried}; those that have closed are not among them."""
    counts = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{name}")
            if not link.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
                counts[link] = sum(struct.unpack_from("QQ", info, TCP_INFO_BYTES))
        except OSError:  # closed meanwhile, or no TCP connection
            continue
    return counts
