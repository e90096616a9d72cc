"""Several processes, one training: the scores of one process, and an end that nobody waits for."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys

import mlflow
import pytest
from conftest import ROOT, clean_environment, free_port, run, wait_for_line

SCRIPT = [sys.executable, str(ROOT / "train_mnist_mlflow.py"), "--dataset", "digits"]

TRAIN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from common import training
world = training.join()
train, test = (training.load_data("digits", "unused", train=part) for part in (True, False))
train = train._replace(images=train.images[:257], labels=train.labels[:257])
torch.manual_seed(0)
network = training.MNISTCNN().to(memory_format=torch.channels_last)
optimizer = torch.optim.Adam(network.parameters(), lr=0.001, fused=True)
epochs = training.epochs(network, optimizer, train, test, 2, 64, 0)
print(json.dumps([[world.rank, world.size]] + [epoch[1:5] for epoch in epochs]))
training.leave()
"""

JOINS = """
import os, sys, time
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from common import training
init = dist.init_process_group

def slowly(*arguments, **options):
    init(*arguments, **options)
    time.sleep(2 if os.environ["PMI_RANK"] == "1" else 0)
    open(os.environ["PMI_RANK"], "w").close()

dist.init_process_group = slowly
training.join()
print(sorted(os.listdir()), flush=True)
time.sleep(1)
"""


def two_places(**variables):
    """What MPICH tells the two processes of a job, and where they meet."""
    common = {"PMI_SIZE": "2", "MASTER_PORT": str(free_port()), **variables}
    return [{"PMI_RANK": rank, **common} for rank in "01"]


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


def statuses(folder):
    found = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_runs(["1"])
    return [run.info.status for run in found]


@pytest.mark.slow
def test_two_processes_get_the_scores_of_one(tmp_path):
    """Dropout included, with a last batch of one image, of which one process has none."""
    command = [sys.executable, "-c", TRAIN, str(ROOT)]
    started = launch([{}, *two_places()], command, tmp_path)
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    (place, *one), (place_0, *rank_0), (place_1, *rank_1) = [
        json.loads(out.splitlines()[-1]) for out, _ in outputs
    ]
    assert [place, place_0, place_1] == [[0, 1], [0, 2], [1, 2]]
    assert rank_0 == rank_1
    assert rank_0[0] == pytest.approx(one[0], rel=1e-5)  # losses and accuracies, first epoch
    assert rank_0[1] == pytest.approx(one[1], rel=1e-3)


@pytest.mark.slow
def test_no_process_goes_on_before_all_have_met(tmp_path):
    """Process 0 answers the others while they connect: if it ended then, they would not meet."""
    started = launch(two_places(), [sys.executable, "-c", JOINS, str(ROOT)], tmp_path)
    outputs = [process.communicate(timeout=300) for process in started]
    assert [out.splitlines()[-1] for out, _ in outputs] == ["['0', '1']"] * 2, outputs


# Under torchrun, which sends SIGTERM to all processes when one has ended


@contextlib.contextmanager
def torchrun(cwd, *arguments, **variables):
    """The training script under torchrun, on two processes; all are killed on leaving."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
        *("--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"),
        *SCRIPT[1:],
        *arguments,
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
    # The second process says nothing.
    words = [line.split()[0] for line in out.splitlines()[:-1]]
    assert words[:7] == ["import", "meet", "tracking", "run", "device", "epoch", "epoch"]
    assert len(words) == len(set(words)) + 1
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
    """It sends SIGTERM to all in each case, and nobody hangs. Process 0 may get it first."""
    with torchrun(tmp_path, "--epochs", "10000") as process:
        wait_for_line(process, "epoch 1/")
        workers = children(process)
        if end == signal.SIGKILL:
            os.kill(workers["1"], end)
        elif end == signal.SIGTERM:
            process.terminate()
        else:  # Ctrl-C: to all processes of the terminal
            os.killpg(process.pid, end)
        _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    (status,) = statuses(tmp_path)
    assert status == "KILLED" or (status == "FAILED" and end == signal.SIGKILL), err
    assert not [pid for pid in workers.values() if os.path.exists(f"/proc/{pid}")]


# Without a launcher that looks after the processes


@contextlib.contextmanager
def two_endless_trainings(variables, cwd):
    """Process 0 and 1 of one training, once the first epoch is over; killed on leaving."""
    started = launch(variables, [*SCRIPT, "--epochs", "10000"], cwd)
    try:
        wait_for_line(started[0], "epoch 1/")
        yield started
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
def test_death_of_a_process_that_srun_started(tmp_path):
    """Nobody sends a signal here: process 0 notices by itself."""
    common = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    common |= {"MASTER_PORT": str(free_port())}
    variables = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank, **common} for rank in "01"]
    with two_endless_trainings(variables, tmp_path) as (first, second):
        second.kill()
        assert second.communicate(timeout=60)[0] == ""
        _, err = first.communicate(timeout=60)
    assert first.returncode == 1, err
    assert "error: another of the 2 processes has ended or hangs: " in err
    assert "Traceback" not in err
    assert statuses(tmp_path) == ["FAILED"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--tracking_uri", "http://127.0.0.1:9"), 75, "no server answers at http://127.0.0.1:9"),
        (("--lr", "1e37"), 1, "error: the training diverged"),
    ],
)
def test_failure_of_process_0_ends_the_others_silently(arguments, code, message, tmp_path):
    """srun reports the largest exit code: that of process 0, which knows what happened."""
    first, second = launch(two_places(), [*SCRIPT, *arguments], tmp_path)
    (_, err), (out, silence) = (process.communicate(timeout=300) for process in (first, second))
    assert (first.returncode, second.returncode) == (code, 1), err
    assert message in err and err.count("error: ") == 1
    assert out == "" and "error" not in silence and "Traceback" not in silence


@pytest.mark.slow
def test_processes_that_do_not_meet_say_so(tmp_path):
    """The port is taken by something else."""
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
