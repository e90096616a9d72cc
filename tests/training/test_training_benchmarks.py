"""The benchmarks of training: they compare equals, and leave nothing behind."""

import re

import mlflow
import pytest
from conftest import clean_environment, run
from PIL import Image

from benchmarks import start


def table(finished):
    """The rows of the printed table, as dicts."""
    rows = [line.strip("| ").split(" | ") for line in finished.out.splitlines() if "|" in line]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


@pytest.mark.slow
def test_benchmark_of_training_compares_equals(mnist_dir, tmp_path):
    finished = run(
        *("benchmarks/train.py", "--epochs", 1, "--data_dir", mnist_dir, "--device", "cpu"),
        *("--contenders", "this_project", "without_tracking", "textbook", "--figure", "bars.png"),
        cwd=tmp_path,
    )
    assert Image.open(tmp_path / "bars.png").size == (1125, 480)
    rows = table(finished)
    assert [row["way"] for row in rows] == [
        *("this project", "the same without MLflow", "textbook loop")
    ]
    work = float(re.search(r"^network  (\S+) MFLOP", finished.out, re.M)[1])
    rates = dict(re.findall(r"^matrices (\w+)  (\d+) GFLOP/s", finished.out, re.M))
    for row in rows:
        assert float(row["accuracy"].rstrip("%")) > 70
        share, precision = re.fullmatch(r"(\d+)% of (\w+)", row["of the matrix rate"]).groups()
        used = float(row["images/s"]) * work / 1e3  # GFLOP/s
        assert int(share) == pytest.approx(100 * used / float(rates[precision]), rel=0.05, abs=1)
        assert float(row["s per epoch"]) * float(row["images/s"]) == pytest.approx(1437, rel=0.02)
    assert [path.name for path in tmp_path.iterdir()] == ["bars.png"]


@pytest.mark.slow
def test_benchmark_of_scaling_trains_the_same_on_two_processes(local, tmp_path):
    flags = ("--processes", 2, "--dataset", "digits", "--epochs", 1, "--threads", 1)
    flags += ("--precision", "fp32")
    (row,) = table(run("benchmarks/scaling.py", *flags, cwd=tmp_path))
    assert row["processes"] == "2"
    alone = mlflow.MlflowClient(local.uri).get_metric_history(local.run_id, "train_loss")
    assert float(row["loss"]) == pytest.approx(alone[0].value, rel=1e-5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_benchmark_of_checkpoints_writes_them_and_goes_on(tmp_path):
    flags = ("--sizes", 0.001, 0.002, "--repeats", 2, "--folder", tmp_path)
    rows = table(run("benchmarks/checkpoint.py", *flags, cwd=tmp_path))
    assert [row["weights"] for row in rows] == ["0.001 GB", "0.002 GB"]
    assert rows[1]["file"] == "0.006 GB"  # three numbers for each weight
    assert all(float(row["s to resume"]) > 0 for row in rows)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_benchmark_of_the_start_reads_clock_and_processor_at_each_line():
    lines = start.measured(["-c", start.BARE, "--leave"], 1, clean_environment())
    assert [word for word, *_ in lines] == ["imported", "store", "epoch", "logged", "result", "end"]
    for column in (1, 2):
        times = [line[column] for line in lines]
        assert times[0] > 0 and times == sorted(times)
