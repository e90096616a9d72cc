"""Training by itself: the same science as a textbook loop, on any number of processes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import mlflow
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, clean_environment, free_port, run, wait_for_line

from common import data, model, processes, training


@pytest.fixture(scope="module")
def digits():
    """(300 pictures for training, 360 for testing), and one thread: other tests run beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train, test = (data.load("digits", "unused", train=part) for part in (True, False))
    yield train._replace(images=train.images[:300], labels=train.labels[:300]), test
    torch.set_num_threads(threads)


# One process


def test_losses_are_those_of_a_textbook_loop(digits):
    """The guide's network, dropout included, against a plain loop in the usual layout."""
    train, test = digits
    torch.manual_seed(7)
    textbook = model.MNISTCNN()
    optimizer = torch.optim.Adam(textbook.parameters(), lr=0.001)
    order, expected = torch.Generator().manual_seed(3), []
    for _ in range(2):
        total = 0.0
        for batch in torch.randperm(300, generator=order).split(64):  # the last: 44
            optimizer.zero_grad()
            x, y = train.images[batch].float() / 255, train.labels[batch]
            loss = F.cross_entropy(textbook(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        expected.append(total / 300)

    torch.manual_seed(7)
    network = model.MNISTCNN().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001, fused=True)
    epochs = list(training.epochs(network, optimizer, train, test, 2, 64, 3))
    assert [epoch.number for epoch in epochs] == [1, 2]
    assert epochs[0].train_loss == pytest.approx(expected[0], rel=1e-6)
    assert epochs[1].train_loss == pytest.approx(expected[1], rel=1e-3)  # Adam amplifies rounding
    assert epochs[1].val_accuracy == training.evaluate(network, test.images, test.labels).accuracy
    assert 0.1 < epochs[0].train_accuracy < epochs[1].train_accuracy < 1


def losses_of_a_perceptron(digits, precision):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    epochs = training.epochs(network, optimizer, *digits, 1, 64, 0, precision)
    losses = [epoch.train_loss for epoch in epochs]
    assert all(weight.dtype == torch.float32 for weight in network.parameters())
    return losses


def test_bf16_multiplies_in_bfloat16_and_learns_the_same(digits):
    exact, rounded = (losses_of_a_perceptron(digits, name) for name in ("fp32", "bf16"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(
    ("capabilities", "taken"),
    [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "fp32"), ({}, "fp32")],
)
def test_auto_takes_bf16_on_a_cpu_that_has_amx(capabilities, taken, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities, raising=False)
    assert training.best_precision("auto", cpu) == taken
    assert training.best_precision("bf16", cpu) == "bf16"
    assert training.best_precision("fp32", cpu) == "fp32"


def test_device_that_is_not_there():
    missing = "cuda" if not torch.cuda.is_available() else "mps"
    with pytest.raises(SystemExit, match=f"error: --device {missing}.*\nhint: "):
        training.best_device(missing)
    assert training.best_device("cpu") == torch.device("cpu")


# Which process of how many


@pytest.mark.parametrize(
    ("variables", "world"),
    [
        ({}, (0, 1, 0, 1)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            (5, 8, 1, 4),
        ),
        # srun, two nodes of four
        (
            {
                **{"SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2"},
                **{"SLURM_NTASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
            },
            (6, 8, 2, 4),
        ),
        # torchrun started by srun, once a node
        (
            {
                **{"RANK": "4", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"},
                **{"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"},
            },
            (4, 8, 0, 4),
        ),
        # The batch script of a job with four tasks, and a login shell within one: one process.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, (0, 1, 0, 1)),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, (0, 1, 0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0, 1)),
        (
            {
                **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
                **{"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
                "PMIX_RANK": "3",
            },
            (3, 4, 1, 2),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, (1, 2, 0, 1)),
        (
            {
                **{"PALS_RANKID": "13", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "12"},
                **{"PMI_RANK": "13", "PMI_SIZE": "24"},
            },
            (13, 24, 1, 12),
        ),
        ({"PMIX_RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 1, 1)),
    ],
)
def test_place_is_read_from_the_launchers_variables(variables, world):
    assert tuple(processes.find(variables)) == world


@pytest.mark.parametrize("name", ["RANK", "PMI_RANK", "PMIX_RANK"])
def test_number_without_a_count_is_an_error(name):
    """Each of the processes would else make a run of its own."""
    with pytest.raises(SystemExit, match=f"error: {name} is set, and no variable says how many"):
        processes.find({name: "0"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("nid001234", "nid001234"),
        ("nid[001234-001237,001240]", "nid001234"),
        ("frontier[00005,00009]", "frontier00005"),
        ("login1,nid[12-15]", "login1"),
        ("rack[1-2]node7,rack3node1", "rack1node7"),
    ],
)
def test_processes_of_slurm_meet_on_the_first_node(nodes, first):
    host, port = processes.meeting_point({"SLURM_JOB_NODELIST": nodes, "SLURM_JOB_ID": "4711"})
    assert (host, port) == (first, 14711)


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1", "WORLD_SIZE": "1"},
        {"RANK": "1", "WORLD_SIZE": ""},
        {"RANK": "5", "WORLD_SIZE": "2"},
    ],
)
def test_process_that_cannot_be(variables):
    """It would train, log nothing, and end well; or wait."""
    with pytest.raises(SystemExit, match="error: RANK is .*there is no such process.\nhint: "):
        processes.find(variables)


@pytest.mark.parametrize("port", ["abc", "0", "99999"])
def test_port_that_is_none(port):
    with pytest.raises(SystemExit, match="error: MASTER_PORT is .*which is no port.\nhint: "):
        processes.meeting_point({"MASTER_PORT": port})


def test_slurm_knows_the_node_where_pmi_does_not():
    """srun --mpi=pmi2; but within a Slurm job mpiexec starts a process a node by srun."""
    by_slurm = {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
    variables = {"PMI_RANK": "4", "PMI_SIZE": "8", **by_slurm}
    variables |= {"SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "8"}
    assert processes.find(variables) == (4, 8, 0, 4)
    variables |= {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    assert processes.find(variables)[:2] == (4, 8)


def test_meeting_point_of_pbs_and_of_the_user(tmp_path):
    (tmp_path / "nodes").write_text("x3001c0s7b0n0.hsn\nx3001c0s7b1n0.hsn\n")
    variables = {"PBS_NODEFILE": str(tmp_path / "nodes"), "PBS_JOBID": "123[4].aurora-pbs-01"}
    host, port = processes.meeting_point(variables)
    assert host == "x3001c0s7b0n0.hsn" and 10000 <= port < 30000
    variables |= {"MASTER_ADDR": "here", "MASTER_PORT": "12345"}
    assert processes.meeting_point(variables) == ("here", 12345)
    assert processes.meeting_point({}) == ("127.0.0.1", 29500)


# Several processes

TRAIN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from common import data, model, processes, training
world = processes.join()
train, test = (data.load("digits", "unused", train=part) for part in (True, False))
train = train._replace(images=train.images[:257], labels=train.labels[:257])
torch.manual_seed(0)
network = model.MNISTCNN().to(memory_format=torch.channels_last)
optimizer = torch.optim.Adam(network.parameters(), lr=0.001, fused=True)
epochs = training.epochs(network, optimizer, train, test, 2, 64, 0)
print(json.dumps([[world.rank, world.size]] + [epoch[1:5] for epoch in epochs]))
processes.leave()
"""


def launch(variables, command, cwd):
    """One process for each of the dicts of variables; output as text."""
    return [
        subprocess.Popen(
            command,
            cwd=cwd,
            env=clean_environment(**own),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in variables
    ]


def test_two_processes_get_the_scores_of_one(tmp_path):
    """Dropout included, with a last batch of one picture, of which one process has none."""
    command = [sys.executable, "-c", TRAIN, str(ROOT)]
    port = str(free_port())
    started = launch(
        [{}] + [{"PMI_RANK": r, "PMI_SIZE": "2", "MASTER_PORT": port} for r in "01"],
        command,
        tmp_path,
    )
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    (place, *one), (place_0, *rank_0), (place_1, *rank_1) = [
        json.loads(out.splitlines()[-1]) for out, _ in outputs
    ]
    assert [place, place_0, place_1] == [[0, 1], [0, 2], [1, 2]]
    assert rank_0 == rank_1
    assert rank_0[0] == pytest.approx(one[0], rel=1e-5)  # losses and accuracies, first epoch
    assert rank_0[1] == pytest.approx(one[1], rel=1e-3)


@contextlib.contextmanager
def torchrun(cwd, *arguments, **variables):
    """The training script under torchrun, on two processes; all are killed on leaving."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
        *("--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"),
        *(str(ROOT / "train_mnist_mlflow.py"), "--dataset", "digits", *arguments),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        command, cwd=cwd, env=clean_environment(**variables), start_new_session=True, **pipes
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_torchrun_makes_one_run_with_the_losses_of_one_process(local, server, tmp_path):
    experiment = "on_two_processes"
    arguments = ("--epochs", "2", "--experiment", experiment, "--tracking_uri", server)
    arguments += ("--precision", "fp32")  # as `local`: bfloat16 would agree in three digits
    with torchrun(tmp_path, *arguments) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert [line.split()[0] for line in out.splitlines()[:-1]] == [
        *("meet", "tracking", "run", "device", "epoch", "epoch")
    ]
    client = mlflow.MlflowClient(server)
    (logged,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert logged.info.run_id == result["run_id"] and logged.info.status == "FINISHED"
    assert logged.data.params["processes"] == "2"
    points = client.get_metric_history(result["run_id"], "train_loss")
    alone = mlflow.MlflowClient(local.uri).get_metric_history(local.run_id, "train_loss")
    assert [point.step for point in points] == [1, 2]
    assert points[0].value == pytest.approx(alone[0].value, rel=1e-5)
    assert points[1].value == pytest.approx(alone[1].value, rel=1e-3)
    assert list(tmp_path.iterdir()) == []


def statuses(folder):
    found = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_runs(["1"])
    return [run.info.status for run in found]


def children(process):
    """The process ids of torchrun's workers, by rank."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[1] == str(process.pid):
                with open(f"/proc/{pid}/environ") as file:
                    variables = dict(v.split("=", 1) for v in file.read().split("\0") if v)
                found[variables["RANK"]] = int(pid)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_death_of_a_process_and_the_end_of_the_time_under_torchrun(end, tmp_path):
    """It sends SIGTERM to all in each case; the run tells them apart, and nobody hangs."""
    with torchrun(tmp_path, "--epochs", "10000") as process:
        wait_for_line(process, "epoch 1/")
        workers = children(process)
        if end == signal.SIGKILL:
            os.kill(workers["1"], end)
        elif end == signal.SIGTERM:
            process.terminate()
        else:  # Ctrl-C: to all processes of the terminal
            os.killpg(process.pid, end)
        process.communicate(timeout=60)
    assert process.returncode != 0
    assert statuses(tmp_path) == ["FAILED" if end == signal.SIGKILL else "KILLED"]
    assert not [pid for pid in workers.values() if os.path.exists(f"/proc/{pid}")]


@contextlib.contextmanager
def two_endless_trainings(variables, cwd):
    """Process 0 and 1 of one training, once the first epoch is over; killed on leaving."""
    command = [sys.executable, str(ROOT / "train_mnist_mlflow.py"), "--dataset", "digits"]
    started = launch(variables, [*command, "--epochs", "10000"], cwd)
    try:
        wait_for_line(started[0], "epoch 1/")
        yield started
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
def test_death_of_a_process_that_srun_started(tmp_path):
    """Nobody sends a signal here: process 0 notices by itself, and says so."""
    common = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    common |= {"MASTER_PORT": str(free_port())}
    variables = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank, **common} for rank in "01"]
    with two_endless_trainings(variables, tmp_path) as (first, second):
        second.kill()
        assert second.communicate(timeout=60)[0] == ""
        _, err = first.communicate(timeout=60)
    assert first.returncode == 1
    assert "error: another of the 2 processes has ended or hangs: " in err
    assert "Traceback" not in err
    assert statuses(tmp_path) == ["FAILED"]


@pytest.mark.slow
def test_end_of_the_time_while_another_process_hangs(tmp_path):
    """Process 0 waits for it in C++ code, and gets to no signal handler."""
    port = str(free_port())
    variables = [{"PMI_RANK": r, "PMI_SIZE": "2", "MASTER_PORT": port} for r in "01"]
    with two_endless_trainings(variables, tmp_path) as (first, second):
        second.send_signal(signal.SIGSTOP)
        time.sleep(5)
        first.terminate()
        _, err = first.communicate(timeout=30)
    assert first.returncode == 143
    assert "error: stopped by SIGTERM while it hung; the run is marked KILLED." in err
    assert statuses(tmp_path) == ["KILLED"]


JOINS = """
import os, sys, time
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from common import processes
init = dist.init_process_group

def slowly(*arguments, **options):
    init(*arguments, **options)
    time.sleep(2 if os.environ["PMI_RANK"] == "1" else 0)
    open(os.environ["PMI_RANK"], "w").close()

dist.init_process_group = slowly
processes.join()
print(sorted(os.listdir()), flush=True)
time.sleep(1)
"""


@pytest.mark.slow
def test_no_process_goes_on_before_all_have_met(tmp_path):
    """Process 0 answers the others while they connect: if it ended then, they would not meet."""
    port = str(free_port())
    variables = [{"PMI_RANK": r, "PMI_SIZE": "2", "MASTER_PORT": port} for r in "01"]
    started = launch(variables, [sys.executable, "-c", JOINS, str(ROOT)], tmp_path)
    outputs = [process.communicate(timeout=300) for process in started]
    assert [out.splitlines()[-1] for out, _ in outputs] == ["['0', '1']"] * 2, outputs


@pytest.mark.slow
def test_failure_of_process_0_ends_the_others_silently(tmp_path):
    port = str(free_port())
    variables = [{"PMI_RANK": r, "PMI_SIZE": "2", "MASTER_PORT": port} for r in "01"]
    command = [sys.executable, str(ROOT / "train_mnist_mlflow.py"), "--dataset", "digits"]
    command += ["--tracking_uri", "http://127.0.0.1:9"]
    first, second = launch(variables, command, tmp_path)
    (_, err), (out, silence) = (process.communicate(timeout=300) for process in (first, second))
    assert (first.returncode, second.returncode) == (14, 1)
    assert "no server answers at http://127.0.0.1:9" in err
    assert out == "" and "error" not in silence and "Traceback" not in silence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_that_do_not_meet_say_so(tmp_path):
    """The port is taken by something else."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        finished = run(
            *("train_mnist_mlflow.py", "--dataset", "digits"),
            cwd=tmp_path,
            code=1,
            **{"PMI_RANK": "0", "PMI_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
            MASTER_PORT=str(taken.getsockname()[1]),
        )
    assert "error: the 2 processes do not meet at 127.0.0.1 port" in finished.error
    assert "MASTER_PORT" in finished.error


# The benchmarks


@pytest.mark.slow
def test_benchmark_of_training_compares_equals(mnist_dir, tmp_path):
    finished = run(
        *("benchmarks/train.py", "--epochs", 1, "--data_dir", mnist_dir, "--device", "cpu"),
        *("--contenders", "without_tracking", "textbook"),
        cwd=tmp_path,
    )
    rows = [line.strip("| ").split(" | ") for line in finished.out.splitlines() if "|" in line]
    columns, _, *ways = rows
    table = [dict(zip(columns, way, strict=True)) for way in ways]
    assert [row["way"] for row in table] == ["the same without MLflow", "textbook loop"]
    work = float(re.search(r"^network  (\S+) MFLOP", finished.out, re.M)[1])
    rates = dict(re.findall(r"^matrices (\w+)  (\d+) GFLOP/s", finished.out, re.M))
    for row in table:
        assert float(row["accuracy"].rstrip("%")) > 70
        share, precision = re.fullmatch(r"(\d+)% of (\w+)", row["of the matrix rate"]).groups()
        used = float(row["pictures/s"]) * work / 1e3  # GFLOP/s
        assert int(share) == pytest.approx(100 * used / float(rates[precision]), rel=0.05, abs=1)
        assert float(row["s an epoch"]) * float(row["pictures/s"]) == pytest.approx(1437, rel=0.02)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_benchmark_of_scaling_trains_the_same_on_two_processes(local, tmp_path):
    flags = ("--processes", 2, "--dataset", "digits", "--epochs", 1, "--threads", 1)
    flags += ("--precision", "fp32")
    finished = run("benchmarks/scaling.py", *flags, cwd=tmp_path)
    rows = [line.strip("| ").split(" | ") for line in finished.out.splitlines() if "|" in line]
    assert [row[0] for row in rows] == ["processes", "---", "2"]
    alone = mlflow.MlflowClient(local.uri).get_metric_history(local.run_id, "train_loss")
    assert float(rows[2][5]) == pytest.approx(alone[0].value, rel=1e-5)
    assert list(tmp_path.iterdir()) == []
