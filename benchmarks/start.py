"""Measure what a short training costs outside of the training: imports, tables, export, the end.

    python benchmarks/start.py
    python benchmarks/start.py --root OTHER_CHECKOUT    # before and after a change

Each contender runs as a process in a folder of its own, which is removed again. Its processor time
is read from Linux at each line that it prints, and the clock with it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ("train_mnist_mlflow.py", "--dataset", "digits", "--register")

# The same calls of MLflow with nothing around them, and without training: the floor.
BARE = """
import os, sys
import mlflow, torch
print("imported", flush=True)
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
mlflow.set_tracking_uri("sqlite:///mlflow.db")
mlflow.set_experiment("bare")
print("store", flush=True)
x = torch.tensor(load_digits().images, dtype=torch.float32)[:2, None]
net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(),
                          torch.nn.Linear(288, 10)).eval()
optimizer = torch.optim.Adam(net.parameters())
F.cross_entropy(net(x), torch.zeros(2).long()).backward()
optimizer.step()
with mlflow.start_run():
    mlflow.set_tags({"owner": "me"})
    mlflow.log_params({"lr": 0.001})
    mlflow.log_input(mlflow.data.from_numpy(x.numpy()))
    mlflow.log_metrics({"loss": 1.0}, step=1)
    print("epoch", flush=True)
    figure = Figure()
    figure.add_subplot().imshow(x[0, 0])
    mlflow.log_figure(figure, "figure.png")
    mlflow.log_dict({}, "predictions.json")
    model = mlflow.pytorch.log_model(net, name="model", input_example=x.numpy(),
                                     pip_requirements=["torch", "numpy"])
print("logged", flush=True)
version = mlflow.register_model(model.model_uri, "BARE")
mlflow.MlflowClient().set_registered_model_alias("BARE", "production", version.version)
mlflow.pytorch.load_model("models:/BARE@production")(x)
print("{result}", flush=True)
if "--leave" in sys.argv:
    os._exit(0)
"""


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root", default=ROOT, metavar="DIR", help="the checkout to measure (default: this one)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of each; the least counts (default: 3)"
    )
    return parser


def main():
    args = build_parser().parse_args()
    # One thread: waiting threads use processor time, too.
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
    script = [str(Path(args.root, SCRIPT[0]).resolve()), *SCRIPT[1:]]
    bare = ["-c", BARE]
    contenders = {"script, new store": (script, 1), "script, again": (script, 2)}
    contenders |= {
        "MLflow's calls alone": (bare, 1),
        "the same, left at once": ([*bare, "--leave"], 1),
    }
    print("| what | line | processor s | clock s |\n| --- | --- | --- | --- |")
    for name, (command, times) in contenders.items():
        runs = [measured(command, times, environment) for _ in range(args.repeats)]
        for at, (line, _, _) in enumerate(runs[0]):
            cpu, clock = (min(run[at][column] for run in runs) for column in (1, 2))
            print(f"| {name} | {line} | {cpu:.2f} | {clock:.2f} |", flush=True)


def measured(command, times, environment):
    """Run `command` `times` times in one folder; of the last, [(word, processor s, clock s)]."""
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(times):
            start, found = time.perf_counter(), []
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for line in process.stdout:
                word = "result" if line.startswith("{") else line.split()[0]
                found.append((word, processor_time(process.pid), time.perf_counter() - start))
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"error: {command[0]} failed with {process.returncode}.")
            cpu = usage.ru_utime + usage.ru_stime
            found.append(("end", cpu, time.perf_counter() - start))
    return found


def processor_time(pid):
    """Seconds that a process has used so far, its ended children not included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
