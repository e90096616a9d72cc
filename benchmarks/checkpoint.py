"""Measure what a checkpoint costs: written after an epoch, and read by the next job.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --sizes 0.005 4 --folder <scratch>

Sizes are those of the weights, in GB. Adam keeps two more numbers for each of them, so the file and
the memory are three times as large. `dd conv=fsync` writes as many bytes in the same folder.
"""

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train import machine, print_table  # noqa: E402 (a file beside this one; it finds common/)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes, shown = [0.005, 1], "(default: %(default)s)"
    parser.add_argument("--sizes", type=float, nargs="+", default=sizes, help=f"GB {shown}")
    parser.add_argument("--repeats", type=int, default=5, help=f"checkpoints written {shown}")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    print(f"machine  {machine('cpu')}", flush=True)
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
                written = processes.apply(write, (folder, size, args.repeats))
                read = processes.apply(resume, (folder, size))
            bytes_written = Path(folder, "training.pt").stat().st_size
            floor = dd(folder, bytes_written)
        rows.append(
            (
                *(f"{size:g} GB", f"{bytes_written / 1e9:.3g} GB"),
                *(f"{statistics.median(written):.3f}", f"{max(written):.3f}"),
                *(f"{floor:.3f}", f"{read:.3f}"),
            )
        )
    columns = ("weights", "file", "s per epoch", "at most", "dd conv=fsync", "s to resume")
    print_table("A checkpoint", columns, rows)


def build(size):
    """A network with `size` GB of weights, and its optimizer."""
    import torch

    side = int(min(4096, (size * 1e9 / 4) ** 0.5))
    layers = max(1, round(size * 1e9 / 4 / side**2))
    network = torch.nn.Sequential(*(torch.nn.Linear(side, side, bias=False) for _ in range(layers)))
    return network, torch.optim.Adam(network.parameters(), lr=0.001, fused=True)


def write(folder, size, repeats):
    """Seconds of each of `repeats` checkpoints, after a step that gives Adam its state."""
    import torch

    from common import training

    network, optimizer = build(size)
    for weight in network.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    checkpoint, seconds = training.Checkpoint(folder, {}, network, optimizer), []
    for number in range(1, repeats + 1):
        start = time.perf_counter()
        checkpoint.add(training.Epoch(number, 0.0, 0.0, 0.0, 0.0, 0.0, 0))
        seconds.append(time.perf_counter() - start)
    return seconds


def resume(folder, size):
    """Seconds until a new process has the weights and the optimizer's state."""
    from common import training

    network, optimizer = build(size)
    start = time.perf_counter()
    assert training.Checkpoint(folder, {}, network, optimizer).epochs
    return time.perf_counter() - start


def dd(folder, size):
    """Seconds that it takes to write as many bytes, and to have them on the disk."""
    block = min(size, 2**24)
    command = ["dd", "if=/dev/zero", f"of={folder}/dd", f"bs={block}", f"count={size // block}"]
    start = time.perf_counter()
    subprocess.run([*command, "conv=fsync"], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
