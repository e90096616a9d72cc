"""How long a step took, and how fast that was."""

import contextlib
import time


class Measured:
    """`seconds` is set when the block of `measured` ends."""

    seconds = 0.0

    def report(self, what, size):
        """Print a line about `size` bytes, and return it as metrics {"write.seconds": ...}."""
        speed = size / 1e9 / self.seconds
        line = f"{what:<8} {size / 1e9:.4g} GB  {self.seconds:.3f} s  {speed:.3g} GB/s"
        print(line, flush=True)
        values = {"seconds": self.seconds, "size_bytes": size, "gigabytes_per_second": speed}
        return {f"{what}.{name}": value for name, value in values.items()}


@contextlib.contextmanager
def measured():
    """Measure the block inside: yields a `Measured`."""
    result, start = Measured(), time.perf_counter()
    yield result
    result.seconds = time.perf_counter() - start
