"""The room alone, as one copies it into another project: whole, and for one purpose each."""

import ast
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, clean_environment

ROOM = ROOT / "common" / "storage"

FOREIGN_WEIGHTS = """
import torch
from common import storage

network, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
torch.save({"state_dict": other.state_dict()}, "weights.pth")
storage.load_weights(network, "weights.pth")
assert torch.equal(network.weight, other.weight)
"""

MAPPED = """
import torch
from common import storage

class Network(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

network, x = Network(), torch.rand(4, 3)
torch.export.save(torch.export.export(network, (x,)), "model.pt2")
assert torch.equal(storage.map_weights(Network, "model.pt2")(x), network(x))
"""

SHARED = """
import mlflow, numpy as np, torch
from common import storage

folder = storage.prepare("models")
network, example = torch.nn.Linear(3, 2), np.ones((2, 3), "float32")
signature = mlflow.models.infer_signature(example, np.ones((2, 2), "float32"))
with storage.staged(folder / "mine") as staging:
    mlflow.pytorch.save_model(
        network, path=staging, input_example=example, signature=signature,
        pip_requirements=["torch"],
    )
assert mlflow.pytorch.load_model(str(folder / "mine"))(torch.ones(5, 3)).shape == (5, 2)
"""

CHECKED = """
import mlflow, numpy as np, torch
from common import storage

mlflow.set_tracking_uri("sqlite:///mlflow.db")
with mlflow.start_run():
    logged = mlflow.pytorch.log_model(
        torch.nn.Linear(3, 2), name="model", input_example=np.ones((2, 3), "float32"),
        pip_requirements=["torch"],
    )
with storage.checked_copy(logged.model_uri) as folder:
    network = mlflow.pytorch.load_model(folder)
assert network(torch.ones(5, 3)).shape == (5, 2)
"""

RECORDED = """
import mlflow, torch
from pathlib import Path
from common import storage

mlflow.set_tracking_uri("sqlite:///mlflow.db")
Path("weights.pth").write_bytes(b"weights")
file = storage.recorded(Path("weights.pth").absolute(), storage.sha256("weights.pth"))
with mlflow.start_run():
    logged = mlflow.create_external_model(name="model", tags=file.tags)
version = mlflow.register_model(logged.model_uri, "NAME", tags=file.tags)
mlflow.MlflowClient().set_registered_model_alias("NAME", "production", version.version)
assert storage.of_alias("NAME", "production") == file
storage.verify(file)
"""

WRITTEN = """
import torch
from pathlib import Path
from common import storage

network, x = torch.nn.Linear(3, 2), torch.rand(4, 3)
with storage.staged("models/mine") as folder:
    def save(traced):
        (folder / "data").mkdir()
        torch.export.save(torch.export.export(traced, (x,)), folder / storage.MODEL_FILE)
    sha256, seconds = storage.write_model(folder, network, save)
path = Path("models/mine") / storage.MODEL_FILE
assert storage.sha256(path) == sha256
assert torch.equal(torch.export.load(path).module()(x), network(x))
storage.throughput("write", path.stat().st_size, seconds)
"""

# A promise of the docstring, by a piece of it: the program that tries it, and the files it needs.
PURPOSES = {
    "load_weights(": (FOREIGN_WEIGHTS, "weights damage layout"),
    "map_weights(": (MAPPED, "mapping weights damage layout"),
    "checked_copy(": (CHECKED, "inspection program damage layout"),
    "staged(path)": (SHARED, "folders"),
    "of_alias(": (RECORDED, "files folders layout"),
    "`write_model`": (WRITTEN, "writing damage files folders layout"),
}


def run_alone(program, folder):
    process = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr


def copy_room(folder, names):
    """Copy some files of the room, and take the lines of the others out of its __init__.py."""
    room = folder / "common" / "storage"
    room.mkdir(parents=True)
    (folder / "common" / "__init__.py").touch()
    shutil.copy(ROOT / "common" / "errors.py", folder / "common")
    for name in names:
        shutil.copy(ROOM / f"{name}.py", room)
    text = (ROOM / "__init__.py").read_text()
    kept = text.splitlines()
    for node in reversed(ast.parse(text).body):
        if isinstance(node, ast.ImportFrom) and node.module not in names:
            del kept[node.lineno - 1 : node.end_lineno]
    (room / "__init__.py").write_text("\n".join(kept))


@pytest.mark.slow
@pytest.mark.parametrize("promise", PURPOSES)
def test_files_of_one_purpose(promise, tmp_path):
    program, names = PURPOSES[promise]
    docstring = ast.get_docstring(ast.parse((ROOM / "__init__.py").read_text()))
    assert promise in docstring
    copy_room(tmp_path, names.split())
    run_alone(program, tmp_path)


@pytest.mark.slow
def test_the_whole_room(tmp_path):
    copy_room(tmp_path, [path.stem for path in ROOM.glob("*.py") if path.stem != "__init__"])
    run_alone(
        MAPPED + SHARED.replace("import mlflow, numpy as np, torch", "import mlflow, numpy as np"),
        tmp_path,
    )
