"""Measure how training scales with the number of processes on this machine.

    python benchmarks/scaling.py --data_dir ./data
    python benchmarks/scaling.py --processes 1 2 4 --threads 4

Runs the training script under torchrun with the same global batch in each case, so that all cases
do the same work, and prints a table. Each process gets as many threads as the largest case leaves.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train import ROOT, machine, print_table  # noqa: E402 (a file beside this one)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[1, 2],
        metavar="N",
        help="numbers of processes (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, help="threads per process (default: cores / most processes)"
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=64,
        help="global batch size, over all processes (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=int, default=2, help="epochs of each case (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="as the training script's; with bf16 the losses agree in fewer digits "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--dataset",
        choices=("mnist", "digits"),
        default="mnist",
        help="digits needs no download, and is too small to say much (default: %(default)s)",
    )
    parser.add_argument(
        "--data_dir", default="./data", metavar="DIR", help="MNIST's files (default: %(default)s)"
    )
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    threads = args.threads or max(1, cores // max(args.processes))
    print(f"machine  {machine('cpu')}", flush=True)
    rows, first = [], None
    for count in args.processes:
        seconds, result = train(args, count, threads)
        first = first or seconds * count
        print(f"{count} processes  {seconds:.2f} s per epoch", flush=True)
        rows.append(
            (
                *(str(count), str(threads), f"{seconds:.2f}", f"{first / seconds:.2f} x"),
                *(f"{first / seconds / count:.0%}",),
                *(f"{result['train_loss']:.6f}", f"{result['val_accuracy']:.2%}"),
            )
        )
    print_table(
        f"{args.epochs} epochs of {args.dataset}, global batch {args.batch_size}",
        *(("processes", "threads each", "s per epoch", "speed", "efficiency", "loss", "accuracy"),),
        rows,
    )


def train(args, count, threads):
    """Seconds of the median epoch, and the result line, of a training on `count` processes."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}"),
        *("--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"),  # any free port
        *(str(ROOT / "train_mnist_mlflow.py"), "--epochs", str(args.epochs)),
        *("--batch_size", str(args.batch_size), "--dataset", args.dataset),
        *("--precision", args.precision),
        *("--data_dir", os.path.abspath(args.data_dir)),
        *("--tracking_uri", "sqlite:///mlflow.db"),
    ]
    variables = {"OMP_NUM_THREADS": str(threads), "MLFLOW_DISABLE_TELEMETRY": "true"}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.run(
            command, cwd=folder, env=os.environ | variables, stdout=subprocess.PIPE, text=True
        )
    if process.returncode:
        raise SystemExit(f"error: {count} processes failed; what they printed stands above.")
    seconds = re.findall(r"^epoch .* ([\d.]+) s$", process.stdout, flags=re.MULTILINE)
    return statistics.median(map(float, seconds)), json.loads(process.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
