"""The room by itself: a network that cannot be stored, and the call that its docstring promises."""

import shutil
import subprocess
import sys

import mlflow
import numpy as np
import pytest
import torch
from conftest import ROOT, clean_environment

from common import runs
from common.errors import UserError


class DecidesByValues(torch.nn.Module):
    """Cannot be exported: which way it goes depends on the numbers in a tensor."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, x):
        if x.mean() > 1e9:
            return x
        return self.linear(x)


def test_a_network_that_cannot_be_stored_is_found_out_before_training():
    with pytest.raises(UserError, match="cannot be exported") as refused:
        runs.check_export(DecidesByValues(), np.zeros((2, 3), "float32"))
    assert "DecidesByValues" in refused.value.what and "\n" not in refused.value.what
    assert "does not decide by values" in refused.value.hint


class Pair(torch.nn.Module):
    def forward(self, x, y=None):
        return x, x


class TwoInputs(torch.nn.Module):
    def forward(self, x, y):
        return x + y


@pytest.mark.parametrize("network", [Pair(), TwoInputs()], ids=["tuple", "two inputs"])
def test_more_than_one_tensor_is_found_out_too(network):
    with pytest.raises(UserError, match="cannot be exported"):
        runs.check_export(network, np.zeros((2, 3), "float32"))


def test_a_network_that_can_be_stored_is_left_as_it_was():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout()
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    runs.check_export(network, np.ones((2, 3), "float32"))
    assert network.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


PROMISED = """
import mlflow, numpy, torch
from common import runs

mlflow.set_tracking_uri("sqlite:///mlflow.db")
network = torch.nn.Linear(3, 1)
runs.check_export(network, numpy.zeros((2, 3), "float32"))
with mlflow.start_run(), runs.always_ended():
    mlflow.set_tags({**runs.git_tags(__file__), **runs.job_tags()})
"""


@pytest.mark.slow
def test_what_the_docstring_promises_works_in_a_copy(tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").touch()
    shutil.copy(ROOT / "common" / "errors.py", tmp_path / "common")
    shutil.copytree(ROOT / "common" / "runs", tmp_path / "common" / "runs")
    (tmp_path / "mine.py").write_text(PROMISED)
    subprocess.run(
        [sys.executable, "mine.py"], cwd=tmp_path, env=clean_environment(), check=True, timeout=120
    )
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED" and run.data.tags["host"]
    for call in ("runs.check_export(network, ", "runs.always_ended()", "runs.git_tags(__file__)"):
        assert call in runs.__doc__ and call in PROMISED
