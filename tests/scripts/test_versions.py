"""The scripts at the oldest server that they work with; tests/versions.py walks any other."""

import tempfile
from pathlib import Path

import mlflow
import pytest
import versions

OLDEST = "3.0.1"


@pytest.mark.slow
def test_oldest_server(prefork, tmp_path):
    with tempfile.TemporaryDirectory() as folder:  # 1 GB, of which pytest would keep three
        try:
            python = versions.install(OLDEST, Path(folder))
        except versions.NoServerError as error:
            if "connection broken" in str(error):
                pytest.skip(f"pip cannot reach the package index to install MLflow {OLDEST}")
            raise
        with versions.running(python, tmp_path) as uri:
            said = versions.walk(uri, tmp_path, prefork)
            client = mlflow.MlflowClient(uri)
            promoted = client.get_model_version_by_alias("MNIST_CNN", "production")
    assert said == dict.fromkeys(versions.SCENES)
    assert promoted.version == "1"  # after register_and_inference.py had made it version 2


def test_line_of_the_table():
    said = dict.fromkeys(versions.SCENES) | {"train": "exit code 1: a|b", "promote": "needs it"}
    line = versions.row("1.0", said)
    assert line == "| 1.0 | 6 of 8 | train: exit code 1: a/b; promote: needs it |"
    same = dict.fromkeys(versions.SCENES, "exit code 22: no")
    assert versions.row("1.0", same).endswith("large, register, promote: exit code 22: no |")
    assert versions.row("1.0", dict.fromkeys(said)) == "| 1.0 | 8 of 8 | nothing |"
