"""Measure what it costs to write a large model and to load it: MLflow's ways and this project's.

    python benchmarks/zero_copy.py
    python benchmarks/zero_copy.py --sizes 16 --folder <shared folder>

Starts an MLflow server of its own on this machine, behind a proxy that counts bytes. Each contender
runs in a process of its own, after a warm-up. Prints a table for writing and one for loading; what
the columns mean stands in benchmarks/README.md. Everything it writes is removed again.
"""

import argparse
import contextlib
import multiprocessing
import os
import platform
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CHUNK = 2**20  # bytes that dd writes at a time
TCP_INFO_SIZE, TCP_INFO_BYTES = 136, 120  # bytes acknowledged and received stand at 120, in 2 x 8
SERVER_EXPERIMENT, SHARED_EXPERIMENT = "through_the_server", "on_the_shared_folder"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes",
        type=float,
        nargs="+",
        default=[0.01, 0.1, 1, 4],
        metavar="GB",
        help="sizes of the model (default: %(default)s)",
    )
    parser.add_argument(
        "--folder",
        default=tempfile.gettempdir(),
        metavar="DIR",
        help="where to write, on the filesystem to measure (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="writes of each kind (default: %(default)s)"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is removed
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    print(f"machine  {platform.node()}, {os.cpu_count()} cores, {processor()}", flush=True)
    with (
        tempfile.TemporaryDirectory(dir=args.folder, prefix="zero_copy_") as folder,
        mlflow_server(Path(folder)) as proxy,
    ):
        writes, loads = [], []
        for size in args.sizes:
            one_size(size, args.repeats, Path(folder), proxy, writes, loads)
    print_table(
        f"Writing, until all of it is on the disk (median of {args.repeats})",
        ("model", "way", "seconds", "GB/s", "of the faster dd", "peak memory", "TMPDIR", "network"),
        writes,
    )
    print_table(
        "Loading, and the first answer (the file is in the page cache)",
        ("model", "way", "seconds", "peak memory", "TMPDIR", "network", "answer after", "private"),
        loads,
    )


def one_size(size, repeats, folder, proxy, writes, loads):
    """Write and load a model of `size` GB in each way, and append the rows."""
    bare = (bare_disk, bare_disk_direct) if takes_direct_writing(folder) else (bare_disk,)
    ways = (*bare, log_to_server, log_to_folder, write_once, write_weights)
    results_of = {way: [] for way in ways}
    for turn in range(repeats):
        # Not always in the same order: many a disk is fast for the first gigabyte after a pause.
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            result = in_a_process(way, folder, proxy, size, f"{way.__name__}_{turn}")
            print(f"{size} GB  {way.__name__}  {result['seconds']:.2f} s", flush=True)
            results_of[way].append(result)
        if turn < repeats - 1:  # the last round's files are loaded below
            remove_files(folder)
    answer = {result["answer"] for results in results_of.values() for result in results}
    disk = min(statistics.median(result["seconds"] for result in results_of[way]) for way in bare)
    for way, results in results_of.items():
        seconds = statistics.median(result["seconds"] for result in results)
        last = results[-1]
        writes.append(
            (
                *(f"{size:g} GB", WAYS[way], f"{seconds:.2f}"),
                *(f"{last['size'] / 1e9 / seconds:.2f}", f"{disk / seconds:.0%}"),
                *(amount(last["memory"]),),
                *(amount(last["scratch"]), amount(last["network"])),
            )
        )
    path = str(weights_of(f"write_once_{turn}"))
    with open(path, "rb", buffering=0) as file:  # written past the page cache
        while file.read(CHUNK):
            pass
    for way, name_or_path in (
        (load_from_server, f"log_to_server_{turn}"),
        (load_from_path, path),
        (map_from_alias, f"write_once_{turn}"),
        (map_from_path, path),
    ):
        result = in_a_process(way, folder, proxy, size, name_or_path)
        answer.add(result["answer"])
        loads.append(
            (
                *(f"{size:g} GB", WAYS[way], f"{result['seconds']:.3f}", amount(result["memory"])),
                *(amount(result["scratch"]), amount(result["network"])),
                *(f"{result['answered']:.2f} s", amount(result["private"])),
            )
        )
    assert len(answer - {None}) == 1, "the ways do not give the same answer"
    remove_files(folder)


def remove_files(folder):
    """At the end of a round: a disk may be faster where it has just written."""
    for name in ("artifacts", "shared", "bare_disk_*", "write_weights_*"):
        subprocess.run(["rm", "-r", *folder.glob(name)], check=True)


def print_table(title, columns, rows):
    print(f"\n{title}\n")
    for row in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(row) + " |")


def amount(size):
    """Bytes for people; small amounts to the byte."""
    if size is None:
        return ""
    return f"{size} B" if size < 100_000 else f"{size / 1e6:.1f} MB"


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")


# Contenders. Each runs in a new process, and gives what it measured as a dict.


def bare_disk(folder, size, name):
    return dd(folder, size, name, f"bs={CHUNK}", "conv=fsync")


def bare_disk_direct(folder, size, name):
    return dd(folder, size, name, "bs=16M", "conv=fsync", "oflag=direct")


def takes_direct_writing(folder):
    probe = folder / "bare_disk_probe"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | getattr(os, "O_DIRECT", 0), 0o666))
    except OSError:
        return False
    return hasattr(os, "O_DIRECT")


def dd(folder, size, name, *options):
    """As many bytes, by dd. Not zeros, which some disks do not write; and the file stays.

    Else the next contender would get its blocks, and disks are faster where they have just written.
    """
    with torch.device("meta"):
        size = sum(4 * parameter.numel() for parameter in Layers(size).parameters())
    file, count = folder / f"{name}.dd", round(size / CHUNK)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        source = Path(memory, "random")
        with source.open("wb") as content:
            for _ in range(count):
                content.write(os.urandom(CHUNK))
        command = ["dd", f"if={source}", f"of={file}", *options]
        start = time.perf_counter()
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "size": count * CHUNK, "memory": None, "network": 0, "answer": None}


def log_to_server(folder, size, name):
    return log_model(SERVER_EXPERIMENT, size, name, folder / "artifacts")


def log_to_folder(folder, size, name):
    return log_model(SHARED_EXPERIMENT, size, name, folder / "shared")


def log_model(experiment, size, name, where):
    import mlflow

    from common import training

    mlflow.set_experiment(experiment)
    network = Layers.filled(size)
    with mlflow.start_run(), measured() as written:
        logged = mlflow.pytorch.log_model(
            network,
            name="model",
            input_example=training.input_example(network.question()),
            pip_requirements=training.pip_requirements(),
        )
        (file,) = where.glob(f"**/{logged.model_id}/artifacts/data/model.pt2")
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    register(logged.model_uri, name, tags=None)
    return written_result(written, file, network)


def write_once(folder, size, name):
    import mlflow

    from common import runs, storage
    from Modify_artifact_location import save_model_once

    mlflow.set_experiment(SHARED_EXPERIMENT)
    network = Layers.filled(size)
    with mlflow.start_run() as run, measured() as written:
        save_model_once(network, network.question(), step=0)
    model_uri = runs.ready_model(run)
    file = storage.of_model(model_uri)
    register(model_uri, name, file.tags)
    return written_result(written, file.path, network)


def write_weights(folder, size, name):
    """The part of it that grows with the model."""
    from common import storage
    from common.storage import writing

    network = Layers.filled(size)
    file = folder / name / storage.MODEL_FILE
    file.parent.mkdir(parents=True)
    empty = torch.export.export(writing.without_weights(network), (torch.ones(2, network.width),))
    torch.export.save(empty, file)
    with measured() as written:
        writing.add_weights(file, network.state_dict())
    return written_result(written, file, network)


def written_result(written, file, network):
    return {
        "seconds": written.seconds,
        "size": file.stat().st_size,
        "memory": written.memory,
        "network": written.network,
        "answer": network.answer(),
    }


def register(model_uri, name, tags):
    import mlflow

    version = mlflow.register_model(model_uri, name, tags=tags)
    mlflow.MlflowClient().set_registered_model_alias(name, "production", version.version)


def load_from_server(folder, size, name):
    import mlflow

    with tempfile.TemporaryDirectory() as copy:
        return load(lambda: mlflow.pytorch.load_model(f"models:/{name}@production", dst_path=copy))


def load_from_path(folder, size, path):
    import mlflow

    return load(lambda: mlflow.pytorch.load_model(str(Path(path).parents[1])))


def map_from_alias(folder, size, name):
    from common import storage

    return load(lambda: storage.map_weights(lambda: Layers(size), weights_of(name)))


def map_from_path(folder, size, path):
    from common import storage

    return load(lambda: storage.map_weights(lambda: Layers(size), path))


def weights_of(name):
    from common import storage

    return storage.of_alias(name, "production").path


def load(function):
    before = private_memory()
    with measured() as loaded:
        network = function()
    start = time.perf_counter()
    answer = Layers.answer(network)
    return {
        "seconds": loaded.seconds,
        "memory": loaded.memory,
        "network": loaded.network,
        "answer": answer,
        "answered": time.perf_counter() - start,
        "private": max(0, private_memory() - before),
    }


class Cost:
    """Filled in when the block of `measured` ends; `memory` and `network` are bytes."""

    seconds, memory, network = 0.0, 0, 0


@contextlib.contextmanager
def measured():
    """Measure the block inside: yields a `Cost`. Linux tells the memory and the network.

    Memory: by how much the process grew at its peak, mapped files included as far as they were
    used. Network: what its TCP connections carried, to any host, but for one closed in the block.
    """
    cost = Cost()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    memory, network = resident("VmRSS:"), network_bytes()
    start = time.perf_counter()
    yield cost
    cost.seconds = time.perf_counter() - start
    cost.memory = max(0, resident("VmHWM:") - memory)
    cost.network = sum(count - network.get(name, 0) for name, count in network_bytes().items())


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def network_bytes():
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


def private_memory():
    """Memory of this process alone: without files that are mapped."""
    return resident("RssAnon:")


WAYS = {
    bare_disk: "dd",
    bare_disk_direct: "dd, past the page cache",
    log_to_server: "log_model, through the server",
    log_to_folder: "log_model, to a shared folder",
    write_once: "this project",
    write_weights: "of that, the weights",
    load_from_server: "load_model, through the server",
    load_from_path: "load_model, by path",
    map_from_alias: "this project, by models:/NAME@alias",
    map_from_path: "this project, by path",
}


class Layers(torch.nn.Module):
    """Square dense layers, `size` GB of them."""

    def __init__(self, size):
        super().__init__()
        self.width = 512 if size < 0.05 else 2048 if size < 0.5 else 8192
        count = max(1, round(size * 1e9 / (4 * self.width**2)))
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(self.width, self.width) for _ in range(count)
        )

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x

    @classmethod
    def filled(cls, size):
        torch.manual_seed(0)
        with torch.device("meta"):  # torch's own start values would take a minute
            network = cls(size)
        network.to_empty(device="cpu")
        for parameter in network.parameters():
            torch.nn.init.uniform_(parameter, -0.01, 0.03)
        return network.eval()

    def question(self):
        return torch.full((2, self.width), 255, dtype=torch.uint8)

    def answer(self):
        """What any network made of these layers, also an exported one, says to two rows of ones."""
        width = next(self.parameters()).shape[-1]
        with torch.inference_mode():
            return self(torch.ones(2, width)).double().sum().item()


# Around the contenders


def in_a_process(way, folder, proxy, size, name):
    """Run `way` in a new process, and add what an onlooker sees: the network, and TMPDIR."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=contend,
            args=(there, way.__name__, (folder, size, name), proxy.address, scratch),
        )
        process.start()
        there.close()
        here.recv()  # it is warm
        before, most = proxy.total, 0
        here.send("go")
        while not here.poll(0.02):
            most = max(most, size_of(scratch))
        result = here.recv()
        process.join()
    # The proxy sees the tracking server alone, and the process all hosts, but no closed connection.
    return result | {"scratch": most, "network": max(result["network"], proxy.total - before)}


def contend(connection, way, arguments, address, scratch):
    os.environ["MLFLOW_TRACKING_URI"] = address
    os.environ["TMPDIR"] = scratch
    import io

    import mlflow.pytorch  # noqa: F401

    # The first export and the first load import a great deal, which is no matter of size.
    file = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), file)
    torch.export.load(file).module()
    connection.send("warm")
    connection.recv()
    connection.send(globals()[way](*arguments))


def size_of(folder):
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):  # removed meanwhile
                total += os.path.getsize(os.path.join(parent, name))
    return total


class CountingProxy:
    """Passes TCP connections on, and counts the bytes in both directions."""

    def __init__(self, port):
        self.port, self.total, self.lock = port, 0, threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.listener.accept()
            server = socket.create_connection(("127.0.0.1", self.port))
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self.pump, args=(source, target), daemon=True).start()

    def pump(self, source, target):
        buffer = memoryview(bytearray(2**20))
        with contextlib.suppress(OSError):  # the other side has closed
            while size := source.recv_into(buffer):
                with self.lock:
                    self.total += size
                target.sendall(buffer[:size])
            target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def mlflow_server(folder):
    """A real server, with one experiment whose files pass through it and one on a folder."""
    import mlflow

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--artifacts-destination", str(folder / "artifacts")),
    ]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health")
            proxy = CountingProxy(port)
            mlflow.set_tracking_uri(proxy.address)
            mlflow.create_experiment(SERVER_EXPERIMENT)
            location = (folder / "shared").as_uri()
            mlflow.create_experiment(SHARED_EXPERIMENT, artifact_location=location)
            yield proxy
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def wait_for(url):
    for _ in range(300):
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.2)
    raise RuntimeError(f"the MLflow server did not start: no answer from {url}")


if __name__ == "__main__":
    main()
