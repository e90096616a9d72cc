"""Weights from elsewhere: read without running code, checked, logged, registered on request."""

import pickle
import re
import subprocess
import sys
import zipfile

import mlflow
import pytest
import torch
from conftest import Session, clean_environment, run
from crafted import Payload

from common.errors import UserError
from common.storage import load_weights, map_weights
from common.storage.weights import read_weights
from common.training import MNISTCNN

# Plain PyTorch, as one finds it outside this project: the guide's network, its own loop.
ELSEWHERE = """
import sys, torch
import torch.nn as nn, torch.nn.functional as F
from sklearn.datasets import load_digits

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)
    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.log_softmax(self.fc2(F.relu(self.fc1(torch.flatten(x, 1)))), dim=1)

torch.manual_seed(1)
bunch = load_digits()
x = F.interpolate(torch.tensor(bunch.images / 16, dtype=torch.float32)[:, None], size=28)
x, y = (x - 0.1307) / 0.3081, torch.tensor(bunch.target)
net = Net()
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
for epoch in range(2):
    for i in torch.randperm(1400).split(64):
        optimizer.zero_grad()
        F.nll_loss(net(x[i]), y[i]).backward()
        optimizer.step()
torch.save(net.state_dict(), "my_local_mnist_model.pth")
"""


@pytest.fixture(scope="module")
def elsewhere_weights(tmp_path_factory):
    """The file that a script outside this project saved, in a folder of its own."""
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-c", ELSEWHERE]
    subprocess.run(command, cwd=folder, env=clean_environment(), check=True)
    return folder / "my_local_mnist_model.pth"


def upload(path, cwd, *flags, code=0):
    flags = ("--model_path", path, "--dataset", "digits", *flags)
    return run("upload_external_model.py", *flags, cwd=cwd, code=code)


@pytest.mark.slow
def test_weights_of_plain_pytorch_code(elsewhere_weights, tmp_path):
    """The guide's command. They are as good here as there: the normalisation is the same."""
    finished = upload(elsewhere_weights, tmp_path, "--note", "from the laptop")
    assert finished.result["val_accuracy"] > 0.9
    assert "model_version" not in finished.result
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    logged = client.get_run(finished.result["run_id"])
    assert logged.info.status == "FINISHED"
    assert logged.info.run_name.startswith("MNIST_external_")
    assert logged.data.tags["source.file"] == "my_local_mnist_model.pth"
    assert len(logged.data.tags["source.sha256"]) == 64
    assert logged.data.tags["mlflow.note.content"] == "from the laptop"
    assert logged.data.metrics["val_accuracy"] == finished.result["val_accuracy"]
    assert client.search_registered_models() == []


@pytest.mark.slow
def test_weights_where_no_data_can_be_had(elsewhere_weights, prefork, tmp_path):
    """Logged, checked on random images and registered; without a score, and that is said."""
    session = Session(tmp_path, prefork)
    flags = ("--model_path", elsewhere_weights, "--model_name", "M", "--alias", "staging")
    uploaded = session.type("upload_external_model.py --dataset none", *flags)
    assert "not scored" in uploaded.out and "random images  no score" in uploaded.out
    assert uploaded.result["val_accuracy"] is None
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    logged = client.get_run(uploaded.result["run_id"])
    assert logged.data.metrics == {} and "dataset" not in logged.data.params
    version = client.get_model_version_by_alias("M", "staging")
    assert "without a score" in version.description and "dataset" not in version.tags
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["mlruns"]  # no data


def as_pt(state, path):
    torch.save(state, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def as_safetensors(state, path):
    from safetensors.torch import save_file

    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def as_checkpoint(state, path):
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}}, path)
    return path


def as_data_parallel(state, path):
    torch.save({f"module.{key}": value for key, value in state.items()}, path)
    return path


def as_compiled(state, path):
    torch.save({f"_orig_mod.{key}": value for key, value in state.items()}, path)
    return path


def as_compiled_layers(state, path):
    names = {key: key.replace("conv1.", "conv1._orig_mod.") for key in state}
    torch.save({f"module.{names[key]}": value for key, value in state.items()}, path)
    return path


def as_lightning(state, path):
    inner = {f"model.{key}": value for key, value in state.items()}
    torch.save({"epoch": 3, "pytorch-lightning_version": "2.5.0", "state_dict": inner}, path)
    return path


def as_legacy_file(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


FORMS = [as_pt, as_safetensors, as_checkpoint, as_data_parallel, as_compiled, as_compiled_layers]
FORMS += [as_lightning, as_legacy_file]


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_state_dict(form, tmp_path):
    state = MNISTCNN().state_dict()
    path = form(state, tmp_path / "weights.pth")
    network = MNISTCNN()
    load_weights(network, path)
    networks = [network] if form is as_legacy_file else [network, map_weights(MNISTCNN, path)]
    for key, value in state.items():
        assert all(torch.equal(value, network.state_dict()[key]) for network in networks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32, torch.bool])
def test_numbers_of_another_type_are_converted_and_that_is_said(dtype, tmp_path, capsys):
    state = MNISTCNN().state_dict() | {"fc2.bias": torch.ones(10, dtype=dtype)}
    torch.save(state, tmp_path / "weights.pth")
    load_weights(network := MNISTCNN(), tmp_path / "weights.pth")
    assert torch.equal(network.fc2.bias, torch.ones(10))
    said = f"convert  {tmp_path}/weights.pth  {dtype} to torch.float32\n"
    assert capsys.readouterr().out == said


@pytest.mark.timeout(60)
@pytest.mark.slow
def test_very_many_names(tmp_path):
    torch.save({f"{i}.conv1.weight": torch.zeros(1) for i in range(30_000)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="missing conv1.weight; .*; ...\\."):
        load_weights(MNISTCNN(), tmp_path / "w.pth")


def test_prefix_stays_if_the_names_do_not_fit_then(tmp_path):
    """Two networks in one file, and one weight too many."""
    state = MNISTCNN().state_dict()
    one, other = ({f"{name}.{key}": w for key, w in state.items()} for name in ("model", "teacher"))
    for more in (other, {"criterion.weight": torch.ones(2)}):
        torch.save(one | more, tmp_path / "weights.pth")
        with pytest.raises(
            UserError, match=r"missing conv1.weight; .*unexpected model\.conv1.weight"
        ):
            load_weights(MNISTCNN(), tmp_path / "weights.pth")


@pytest.mark.slow
def test_registered_with_alias(elsewhere_weights, tmp_path):
    finished = upload(
        elsewhere_weights, tmp_path, "--model_name", "EXTERNAL", "--alias", "candidate"
    )
    assert finished.result["model_uri"] == "models:/EXTERNAL/1"
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    version = client.get_model_version_by_alias("EXTERNAL", "candidate")
    assert version.run_id == finished.result["run_id"]


RUNS_CODE = Payload("__import__('os').mkdir('code-was-run')")


def other_network(path):
    state = MNISTCNN().state_dict()
    state["fc3.weight"] = state.pop("fc2.weight")
    state["conv1.weight"] = torch.zeros(16, 1, 3, 3)
    torch.save(state, path)


FLOAT8 = torch.zeros(3, dtype=torch.float8_e4m3fn)


def packed(value):
    """As two numbers a byte: numbers for those who know how to read them."""
    return torch.zeros(value.shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


def changed(function):
    return {key: function(value) for key, value in MNISTCNN().state_dict().items()}


BAD_FILES = {
    "another network": (
        other_network,
        ["missing fc2.weight", "unexpected fc3.weight", "[16, 1, 3, 3]"],
    ),
    "a whole model": (
        lambda path: torch.save(MNISTCNN(), path),
        ["no file of plain weights", "a pickle that needs common.training.networks.MNISTCNN)"],
    ),
    "TorchScript": (
        lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path),
        ["no file of plain weights (it is of another kind, or damaged)"],
    ),
    "code": (lambda path: torch.save(RUNS_CODE, path), ["no file of plain weights"]),
    "a bare pickle": (
        lambda path: path.write_bytes(pickle.dumps(RUNS_CODE)),
        ["no file of plain"],
    ),
    "text": (lambda path: path.write_text("epoch,loss\n1,0.3\n"), ["no file of plain weights"]),
    "empty": (lambda path: path.write_bytes(b""), ["no file of plain weights"]),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), ["holds Tensor, not a dict"]),
    "settings": (lambda path: torch.save({"lr": 0.1}, path), ["holds a dict of lr"]),
    "numbers for names": (
        lambda path: torch.save({1: torch.zeros(3)}, path),
        ["holds a dict of int"],
    ),
    "not a number": (
        lambda path: torch.save(changed(lambda value: value * float("nan")), path),
        ["not finite: conv1.weight"],
    ),
    "sparse": (
        lambda path: torch.save(changed(torch.Tensor.to_sparse), path),
        ["not a dict of tensors of plain numbers"],
    ),
    "float8, one of them": (
        lambda path: torch.save(MNISTCNN().state_dict() | {"x": FLOAT8}, path),
        ["holds a dict of x, not a dict of tensors of plain numbers"],
    ),
    "float4": (
        lambda path: torch.save(changed(packed), path),
        ["not a dict of tensors of plain numbers"],
    ),
    "complex": (
        lambda path: torch.save(changed(lambda value: value * 1j), path),
        ["not a dict of tensors of plain numbers"],
    ),
    "nested": (
        lambda path: torch.save(changed(lambda value: torch.nested.nested_tensor([value])), path),
        ["not a dict of tensors of plain numbers"],
    ),
    "expanded": (  # 2^33 numbers in a file of 1 kB
        lambda path: torch.save(changed(lambda value: torch.zeros(1).expand(2**33)), path),
        ["conv1.weight has shape torch.Size([8589934592])"],
    ),
    "no numbers": (
        lambda path: torch.save(changed(lambda value: value[:0]), path),
        ["conv1.bias has shape torch.Size([0])"],
    ),
    "an empty archive": (
        lambda path: zipfile.ZipFile(path, "w").close(),
        ["no file of plain weights"],
    ),
    "a folder": (lambda path: path.mkdir(), ["cannot be read"]),
    "nothing": (lambda path: None, ["cannot be read", "No such file"]),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file(kind, tmp_path):
    make, messages = BAD_FILES[kind]
    path = tmp_path / "weights.pth"
    make(path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"^error: .*\nhint:  \w") as refusal:
        load_weights(MNISTCNN(), path)
    for message in (*messages, str(path)):
        assert message in str(refusal.value)
    assert not re.search("weights_only|torch.load|add_safe_globals|PyTorch 2", str(refusal.value))
    assert sorted(tmp_path.iterdir()) == before, "code from the file was run"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["another network", "code"])
def test_bad_file_is_not_uploaded(kind, tmp_path):
    make, messages = BAD_FILES[kind]
    path, work = tmp_path / "weights.pth", tmp_path / "work"
    make(path)
    work.mkdir()
    finished = upload(path, work, code=1)
    for message in (*messages, str(path), "\nhint:  "):
        assert message in finished.error
    assert "Traceback" not in finished.err
    assert list(work.iterdir()) == [], "something was logged, or code from the file was run"


@pytest.mark.parametrize("cut", [100, 4000])
def test_file_that_is_cut_short(cut, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(MNISTCNN().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match="no file of plain weights"):
        read_weights(path)


def test_safetensors_that_is_none(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="no file of plain weights"):
        read_weights(path)


def test_message_without_control_characters(tmp_path):
    """What an error says of a file comes from the file."""
    path = tmp_path / "weights.pth"
    path.write_bytes(b"\x80\x02cos\n\x1b[31msystem\n.")
    with pytest.raises(UserError) as refusal:
        read_weights(path)
    assert refusal.value.what.isprintable()
