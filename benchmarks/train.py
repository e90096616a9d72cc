"""Measure what an epoch of training costs: this project, a textbook loop, PyTorch Lightning.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/train.py --data_dir ./data
    python benchmarks/train.py --epochs 1 --contenders this_project textbook

All train the guide's network on the same data with the same hyperparameters, each in a process of
its own, one after the other, and are tracked in a local MLflow store that is removed again. Prints
the rate of a large matrix product, and a table; benchmarks/README.md says what its columns mean.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LEARNING_RATE, BATCH_SIZE = 0.001, 64
MEAN, DEVIATION = 0.1307, 0.3081  # the textbook normalises the images, this project in the network


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--epochs", type=int, default=2, help="epochs of each contender (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of each contender (default: %(default)s)"
    )
    parser.add_argument(
        "--data_dir", default="./data", metavar="DIR", help="MNIST's files (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="where to train (default: a GPU if there is one)",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of this project; the others compute in fp32 (default: %(default)s)",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=list(CONTENDERS),
        metavar="NAME",
        help=f"which to measure, of {', '.join(CONTENDERS)} (default: all)",
    )
    parser.add_argument(
        "--figure", metavar="FILE", help="draw the seconds per epoch into this file (default: no)"
    )
    parser.add_argument("--in_this_process", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser


def main():
    args = build_parser().parse_args()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    args.data_dir = os.path.abspath(args.data_dir)
    if args.in_this_process:
        print(json.dumps(CONTENDERS[args.in_this_process][1](args)))
        return
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    print(f"machine  {machine(args.device)}", flush=True)
    work = flop_per_image()
    rates = {name: matrix_rate(args.device, name) for name in ("fp32", "bf16")}
    print(f"network  {work / 1e6:.1f} MFLOP per image, forward and backward", flush=True)
    for name, rate in rates.items():
        print(f"matrices {name}  {rate / 1e9:.0f} GFLOP/s", flush=True)
    rows, textbook = [], None
    for name in args.contenders:
        result = in_a_process(name, args)
        seconds = min(result["seconds"])
        print(f"{name}  {result['seconds']} s", flush=True)
        if name == "textbook":
            textbook = seconds
        speed = result["images"] / seconds
        rows.append(
            (
                *(CONTENDERS[name][0], f"{seconds:.2f}", f"{speed:.0f}", seconds),
                *(f"{min(result['cpu']):.1f} s",),
                *(f"{result['accuracy']:.2%}",),
                f"{speed * work / rates[result['precision']]:.0%} of {result['precision']}",
                f"{result['first_step']:.1f} s",
                f"{result['tracking']:.3f} s",
                f"{result['whole']:.1f} s",
            )
        )
    columns = ("way", "s per epoch", "images/s", "against the textbook", "CPU time", "accuracy")
    columns += ("of the matrix rate", "first step after", "tracking per epoch", "whole process")
    against = [f"{textbook / row[3]:.2f} x" if textbook else "" for row in rows]
    print_table(
        f"{args.epochs} epochs of MNIST, batches of {BATCH_SIZE}, {args.device}",
        columns,
        [(*row[:3], ratio, *row[4:]) for row, ratio in zip(rows, against, strict=True)],
    )
    if args.figure:
        floors = {name: 60_000 * work / rate for name, rate in rates.items()}
        draw({row[0]: row[3] for row in rows}, floors).savefig(args.figure, dpi=150)


def in_a_process(name, args):
    """Run a contender in a new process, in a folder that is removed again."""
    command = [sys.executable, __file__, "--in_this_process", name]
    for flag in ("epochs", "seed", "data_dir", "device", "precision"):
        command += [f"--{flag}", str(getattr(args, flag))]
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        process = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        end = time.time()
    if process.returncode:
        raise SystemExit(f"error: {name} failed; what it printed stands above.")
    result = json.loads(process.stdout.splitlines()[-1])
    return result | {"first_step": result["first_step"] - start, "whole": end - start}


def machine(device):
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")
    text = f"{platform.node()}, {name}, {torch.get_num_threads()} threads"
    if device == "cuda":
        text += f", {torch.cuda.get_device_name()}"
    return f"{text}, PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def flop_per_image():
    """Multiplications and additions of a step, for one image, as PyTorch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from common.training import MNISTCNN

    with FlopCounterMode(display=False) as counter:
        MNISTCNN()(torch.zeros(64, 1, 28, 28)).sum().backward()
    return counter.get_total_flops() / 64


def matrix_rate(device, precision):
    """FLOP/s of the fastest of the matrix products of a second: others may use the machine."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    best, size, largest = 0.0, 512, 8192 if device == "cuda" else 2048
    deadline = time.perf_counter() + 1
    while time.perf_counter() < deadline:
        x = torch.ones(size, size, device=device, dtype=dtype)
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
        size = min(2 * size, largest)  # small ones first: some CPUs are slow at bfloat16
    return best


def print_table(title, columns, rows):
    print(f"\n{title}\n")
    for row in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(row) + " |")


def draw(seconds, floors):
    """Bars of the seconds per epoch, and the time that the arithmetic alone would take."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.6 * len(seconds) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(list(seconds), list(seconds.values()), color="tab:blue", height=0.6)
    axes.bar_label(bars, fmt="%.1f s", padding=4)
    for (name, floor), style in zip(floors.items(), ("--", ":"), strict=True):
        axes.axvline(floor, color="black", linestyle=style, label=f"{name}: matrix products alone")
    axes.set(xlabel="seconds per epoch of MNIST", xlim=(0, 1.12 * max(seconds.values())))
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


# Contenders. Each gives the seconds of its epochs (training alone), its accuracy on the test set,
# the time of its first step, and the seconds per epoch that tracking took.


def this_project(args):
    """The script itself, watched from the outside."""
    import train_mnist_mlflow

    watch = Watch()
    train_mnist_mlflow.main(
        [
            *("--epochs", str(args.epochs), "--seed", str(args.seed), "--device", args.device),
            *("--precision", args.precision, "--data_dir", args.data_dir),
            *("--tracking_uri", "sqlite:///mlflow.db"),
        ]
    )
    return watch.result()


def without_tracking(args):
    """The same training without MLflow."""
    import torch

    from common import training

    watch = Watch()
    train, test = (training.load_data("mnist", args.data_dir, train=part) for part in (True, False))
    device = training.best_device(args.device)
    torch.manual_seed(args.seed)
    network = training.MNISTCNN().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    precision = training.best_precision(args.precision, device)
    for _ in training.epochs(
        network, optimizer, train, test, args.epochs, BATCH_SIZE, args.seed, precision
    ):
        pass
    return watch.result()


class Watch:
    """Goes through `training.epochs` as the script does, and notes the time."""

    def __init__(self):
        from common import training
        from common.training import loop

        self.epochs, self.train = training.epochs, loop.train_epoch
        self.seconds, self.cpu, self.elsewhere = [], [], []
        training.epochs, loop.train_epoch = self.watch, self.one_epoch

    def one_epoch(self, *arguments):
        start = time.process_time()
        result = self.train(*arguments)
        self.cpu.append(time.process_time() - start)
        return result

    def watch(self, network, optimizer, train, *arguments):
        self.images, self.precision = len(train.images), arguments[4]  # of `training.epochs`
        self.first_step = time.time()
        for epoch in self.epochs(network, optimizer, train, *arguments):
            self.seconds.append(epoch.seconds)
            self.accuracy = epoch.val_accuracy
            start = time.perf_counter()
            yield epoch
            self.elsewhere.append(time.perf_counter() - start)

    def result(self):
        return {
            "seconds": self.seconds,
            "cpu": self.cpu,
            "images": self.images,
            "accuracy": self.accuracy,
            "precision": self.precision,
            "first_step": self.first_step,
            "tracking": statistics.median(self.elsewhere),
        }


def textbook(args):
    """A loop as tutorials have it, with MLflow as MLflow's own tutorial has it."""
    import mlflow
    import torch

    loaders = textbook_loaders(args)
    torch.manual_seed(args.seed)
    network = textbook_network().to(args.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    mlflow.set_experiment("textbook")
    seconds, cpu, tracking, first_step = [], [], [], None
    with mlflow.start_run():
        mlflow.log_params({"batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE})
        for epoch in range(args.epochs):
            start, cpu_start = time.perf_counter(), time.process_time()
            first_step = first_step or time.time()
            losses = textbook_epoch(network, optimizer, loaders["train"], args.device)
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - cpu_start)
            network.eval()
            correct = 0
            with torch.no_grad():
                for x, y in loaders["test"]:
                    x, y = x.to(args.device), y.to(args.device)
                    correct += (network(x).argmax(dim=1) == y).sum().item()
            accuracy = correct / len(loaders["test"].dataset)
            start = time.perf_counter()
            mlflow.log_metric("train_loss", statistics.mean(losses), step=epoch)
            mlflow.log_metric("val_accuracy", accuracy, step=epoch)
            tracking.append(time.perf_counter() - start)
        mlflow.pytorch.log_model(
            network.cpu(), name="model", input_example=torch.zeros(2, 1, 28, 28).numpy()
        )
    return {
        "seconds": seconds,
        "cpu": cpu,
        "images": len(loaders["train"].dataset),
        "accuracy": accuracy,
        "precision": "fp32",
        "first_step": first_step,
        "tracking": statistics.median(tracking),
    }


def textbook_epoch(network, optimizer, batches, device="cpu"):
    """Train `network` once on `batches` of (x, y), and return the loss of each."""
    import torch.nn.functional as F

    losses = []
    network.train()
    for x, y in batches:
        x, y = x.to(device), y.to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def textbook_loaders(args):
    import torch
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((MEAN,), (DEVIATION,))]
    )
    return {
        part: torch.utils.data.DataLoader(
            datasets.MNIST(args.data_dir, train=part == "train", transform=transform),
            batch_size=BATCH_SIZE if part == "train" else 1000,
            shuffle=part == "train",
        )
        for part in ("train", "test")
    }


def textbook_network():
    """The guide's network as it is usually written: ReLU, then pooling."""
    from torch import nn

    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)),
    )


def lightning(args):
    """PyTorch Lightning with its MLFlowLogger, at its defaults but for the progress bar."""
    import lightning
    import torch
    import torch.nn.functional as F
    from lightning.pytorch.loggers import MLFlowLogger

    class Learner(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = textbook_network()
            self.seconds, self.cpu_seconds, self.tracking = [], [], []
            self.first_step = None

        def training_step(self, batch, _):
            loss = F.cross_entropy(self.network(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, _):
            correct = (self.network(batch[0]).argmax(dim=1) == batch[1]).float().mean()
            self.log("val_accuracy", correct)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)

        def on_train_epoch_start(self):
            self.start, self.cpu_start = time.perf_counter(), time.process_time()
            self.first_step = self.first_step or time.time()
            self.logged = 0.0

        def on_validation_start(self):  # it validates before it ends the epoch
            self.seconds.append(time.perf_counter() - self.start)
            self.cpu_seconds.append(time.process_time() - self.cpu_start)
            self.tracking.append(self.logged)

    class TimedLogger(MLFlowLogger):
        def log_metrics(self, metrics, step=None):
            start = time.perf_counter()
            super().log_metrics(metrics, step)
            learner.logged += time.perf_counter() - start

    loaders = textbook_loaders(args)
    torch.manual_seed(args.seed)
    learner = Learner()
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accelerator=args.device,
        devices=1,
        logger=TimedLogger("lightning", tracking_uri="sqlite:///mlflow.db"),
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(learner, loaders["train"], loaders["test"])
    return {
        "seconds": learner.seconds,
        "cpu": learner.cpu_seconds,
        "images": len(loaders["train"].dataset),
        "accuracy": trainer.callback_metrics["val_accuracy"].item(),
        "precision": "fp32",
        "first_step": learner.first_step,
        "tracking": statistics.median(learner.tracking),
    }


CONTENDERS = {
    "this_project": ("this project", this_project),
    "without_tracking": ("the same without MLflow", without_tracking),
    "textbook": ("textbook loop", textbook),
    "lightning": ("PyTorch Lightning, MLFlowLogger", lightning),
}
if __name__ == "__main__":
    main()
