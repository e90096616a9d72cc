"""Nothing in a model file runs: crafted models, and random ones; the check and the scripts."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import crafted
import mlflow
import pytest
from conftest import ROOT, Session, clean_environment, mlflow_server, other_user
from gateway import Gateway

from common.errors import UserError
from common.storage import check_model

KEY = "key-of-the-inspection-0123456789"
# Writes the key of whoever loads the model into a file, as a thief would send it.
PAYLOAD = (
    "__import__('pathlib').Path({!r}).write_text(__import__('os').environ.get('AM_SC_API_KEY', ''))"
)


@pytest.fixture(scope="session")
def model_folder(local):
    """The folder of a model that the training script has logged."""
    (folder,) = (local.folder / "mlruns").glob("*/models/*/artifacts")
    return folder


def craft(kind, model_folder, tmp_path, marker=None):
    """Return a copy of the model that would make the file `marker`."""
    folder = shutil.copytree(model_folder, tmp_path / kind.__name__ / "model")
    kind(folder, PAYLOAD.format(str(marker or tmp_path / kind.__name__ / "marker")))
    return folder


def planted_module(folder, payload):
    """A folder for the path, with the module that some crafted models import."""
    (folder / "path").mkdir()
    (folder / "path" / f"{crafted.MODULE}.py").write_text(f"from builtins import dict\n{payload}")
    return str(folder / "path")


PLAIN_LOADER = """
import os, sys, torch, mlflow.pytorch
for folder in sys.argv[1:]:
    os.chdir(os.path.dirname(folder))
    try:
        mlflow.pytorch.load_model(folder)(torch.zeros(3, 1, 28, 28))
    except BaseException as error:
        print(type(error).__name__)
"""


@pytest.mark.slow
def test_each_of_these_runs_without_the_check(model_folder, tmp_path):
    """The control: MLflow alone, told to allow no pickle, runs what these models bring along."""
    folders = [craft(kind, model_folder, tmp_path) for kind in crafted.RUN]
    imported = tmp_path / "imported"
    process = subprocess.run(
        [sys.executable, "-c", PLAIN_LOADER, *map(str, folders)],
        env=clean_environment(
            MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false",
            PYTHONPATH=planted_module(tmp_path, PAYLOAD.format(str(imported))),
        ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    made = {path.parent.name for path in tmp_path.glob("*/marker")}
    if (tmp_path / crafted.file_is_made.__name__ / "made-by-the-model").exists():
        made.add(crafted.file_is_made.__name__)
    by_import = {"key_of_an_enum", "default_of_a_dict", "enum_in_a_context"}
    assert imported.exists()
    assert made == {kind.__name__ for kind in crafted.RUN} - by_import, process.stderr[-2000:]


@pytest.mark.parametrize("kind", crafted.RUN + crafted.STOPPED, ids=lambda kind: kind.__name__)
def test_crafted_model_is_refused(kind, model_folder, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    monkeypatch.syspath_prepend(planted_module(tmp_path, PAYLOAD.format(str(marker))))
    folder = craft(kind, model_folder, tmp_path, marker)
    with pytest.raises(UserError) as refused:
        check_model(folder)
    first, second = str(refused.value).splitlines()
    assert first.startswith("error: the model ") and "may run code when it is loaded: " in first
    assert second.startswith("hint:  ") and "weights_only" not in first
    assert len(first) < len(str(folder)) + 300
    assert not marker.exists() and crafted.MODULE not in sys.modules
    assert not Path("made-by-the-model").exists()


def test_model_of_the_training_script_passes(model_folder):
    check_model(model_folder)


def test_what_cannot_be_read_is_no_code(model_folder, public):
    """Files that are gone, cut short, or somebody else's: no advice to switch the check off."""
    folder, public_file = shutil.copytree(model_folder, public / "model"), 0o644
    file = folder / "data" / "model.pt2"
    whole = file.read_bytes()
    for content, reason in (
        (whole[:100_000], "cut short"),
        (b"", "cut short"),
        (None, "No such file"),
    ):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError, match=f"cannot be read: .*{reason}.*\nhint: ") as refused:
            check_model(folder)
        assert "MLFLOW_ALLOW" not in str(refused.value)
    file.write_bytes(whole)
    file.chmod(0o600)
    with (
        other_user(),
        pytest.raises(UserError, match="read: Permission denied.\nhint:  ask its owner"),
    ):
        check_model(folder)
    file.chmod(public_file)
    (folder / "MLmodel").write_text("flavors: {sklearn: {}}")
    with pytest.raises(UserError, match="of the flavor sklearn") as refused:
        check_model(folder)
    assert "MLFLOW_ALLOW" not in str(refused.value)


def networks():
    """Networks of other kinds than this project's, each with an example of its input."""
    import torch
    from torch import nn
    from torchvision.models import mobilenet_v3_small

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = nn.LSTM(8, 16, batch_first=True)

        def forward(self, x):
            return self.cells(x)[0][:, -1]

    class Guarded(nn.Module):
        """Its shapes depend on one another, so the program has guards, and sizes to compute."""

        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(8))

        def forward(self, x):
            y = torch.einsum("bi,bj->bij", x * self.scale, x).to(torch.float64)
            z = x.reshape(x.shape[0] // 2, -1).float() + torch.arange(1)
            z = z.masked_fill((z > 0) & (z < 1), float("-inf"))
            return {"a": y.reshape(x.shape[0] * 4, -1), "b": (z, torch.tensor([1.0, 2.0]))}

    transformer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return {
        "recurrent": (Recurrent(), torch.rand(4, 5, 8)),
        "guarded": (Guarded(), torch.rand(6, 8)),
        "transformer": (nn.TransformerEncoder(transformer, 2), torch.rand(4, 5, 8)),
        "padded": (nn.Conv1d(3, 4, 3, padding="same"), torch.rand(4, 3, 20)),
        "mobilenet": (mobilenet_v3_small(), torch.rand(2, 3, 32, 32)),
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_networks_of_other_kinds_pass(tmp_path):
    import torch

    archive = tmp_path / "model.pt2"
    for network, example in networks().values():
        sizes = ({0: torch.export.Dim.AUTO},)
        torch.export.save(
            torch.export.export(network.eval(), (example,), dynamic_shapes=sizes), archive
        )
        check_model(archive)


# At random

ODD = [
    *(None, True, 0, -1, 2**70, 1.5, float("nan"), "", "x", "a.b", "__class__", "é" * 5, "\x00"),
    *("open('x')", [], {}, [1], {"a": 1}, {"as_int": "3"}, [[[]]]),
    {"as_expr": {"expr_str": "open('x')", "hint": None}},
]


def places(value, path=()):
    """All places in a JSON value, as tuples of keys and indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


def change_bytes(rng, content):
    changed = bytearray(content)
    for _ in range(rng.choice([1, 3, 30])):
        # The weights are most of the file; what is read as a program comes last.
        start = 0 if rng.random() < 0.3 else max(0, len(changed) - 30_000)
        changed[rng.randrange(start, len(changed))] = rng.randrange(256)
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.1 else changed)


def change_json(rng, content):
    value = json.loads(content)
    *path, last = rng.choice(list(places(value)))
    place = value
    for key in path:
        place = place[key]
    kind = rng.random()
    if kind < 0.2:
        del place[last]
    elif kind < 0.4 and isinstance(place, dict):
        place[rng.choice(["x", "__y__", "type", "expr_str"])] = place.pop(last)
    else:
        place[last] = rng.choice(ODD)
    return json.dumps(value).encode()


def random_change(rng, records, folder, original):
    """Change one thing in `folder`, which is otherwise as `original`."""
    for name in ("MLmodel", "data/model.pt2"):
        shutil.copyfile(original / name, folder / name)
    which = rng.choice(["archive", "record", "program", "program", "MLmodel"])
    if which in ("archive", "MLmodel"):
        path = folder / {"archive": "data/model.pt2"}.get(which, which)
        path.write_bytes(change_bytes(rng, path.read_bytes()))
        return
    ends = "models/model.json" if which == "program" else "_config.json"
    name = rng.choice([name for name in records if name.endswith(ends) and len(records[name]) > 20])
    with zipfile.ZipFile(folder / "data" / "model.pt2", "w") as archive:
        for other, content in records.items():
            archive.writestr(other, change_json(rng, content) if other == name else content)


FUZZER = """
import encodings.cp437, random, shutil, sys, zipfile
from pathlib import Path
original, folder, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
sys.path[:0] = sys.argv[4:]
import mlflow.pytorch, torch
from common.errors import UserError
from common.storage import check_model
from test_inspection import random_change
check_model(original)
mlflow.pytorch.load_model(original)(torch.zeros(2, 1, 28, 28))
shutil.copytree(original, folder)
with zipfile.ZipFile(original / "data" / "model.pt2") as archive:
    records = {name: archive.read(name) for name in archive.namelist()}
ran = []
def hook(event, arguments):
    if watching and event in ("exec", "import", "os.system", "subprocess.Popen", "os.exec"):
        ran.append((event, str(arguments[0])[:80]))
watching = False
sys.addaudithook(hook)
rng, passed, refused = random.Random(1), [], 0
for number in range(count):
    random_change(rng, records, folder, original)
    watching = True
    try:
        check_model(folder)
        passed.append(number)
    except UserError as error:
        assert str(error).startswith("error: ") and "\\nhint:  " in str(error), error
        refused += 1
    finally:
        watching = False
for name in ("MLmodel", "data/model.pt2"):
    shutil.copyfile(original / name, folder / name)
check_model(folder)
print(len(passed), refused, ran)
"""


@pytest.mark.slow
def test_the_check_survives_800_random_changes(model_folder, tmp_path):
    """No crash, no code, and the untouched folder still passes."""
    process = subprocess.run(
        [
            *(sys.executable, "-c", FUZZER, str(model_folder), str(tmp_path / "changed"), "800"),
            *(str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT)),
        ],
        env=clean_environment(MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    passed, refused, ran = process.stdout.split(maxsplit=2)
    assert int(passed) > 40 and int(refused) > 400
    assert ran.strip() == "[]"


# Through the scripts, with a key, as on a real server


@pytest.fixture(scope="module")
def institute(tls, prefork, tmp_path_factory):
    """(the server's folder, a gateway with TLS that demands the key, somebody who types there)."""
    folder = tmp_path_factory.mktemp("institute")
    (folder / "work").mkdir()
    with mlflow_server(folder) as server, Gateway(server, KEY, tls=tls[0]) as gateway:
        session = Session(
            folder / "work",
            prefork,
            MLFLOW_TRACKING_URI=gateway.uri,
            MLFLOW_TRACKING_SERVER_CERT_PATH=str(tls[1]),
            AM_SC_API_KEY=KEY,
            PYTHONPATH=planted_module(folder, PAYLOAD.format(str(folder / "marker"))),
        )
        mlflow.set_tracking_uri(server)
        yield folder, gateway, session


@pytest.fixture(scope="module")
def colleague(institute):
    """A run whose model was registered as it was, and its folder on the server, to be changed."""
    folder, _, session = institute
    command = "python train_mnist_mlflow.py --dataset digits --register --model_name COLLEAGUE"
    result = session.type(command).result
    return result["run_id"], last_model(folder)


def last_model(folder):
    """The folder of the model that was logged last, on the server's disk."""
    found = (folder / "artifacts").glob("*/models/*/artifacts")
    return max(found, key=lambda path: path.stat().st_mtime)


def refused(finished, folder):
    first = finished.error.splitlines()[0]
    assert "may run code when it is loaded" in first
    assert not (folder / "marker").exists()
    assert not (folder / "work" / "made-by-the-model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", crafted.RUN, ids=lambda kind: kind.__name__)
def test_scripts_refuse_a_colleagues_model(kind, institute, colleague, tmp_path):
    folder, _, session = institute
    run_id, model = colleague
    shutil.copytree(model, tmp_path / "kept")
    commands = [
        f"python register_and_inference.py --run_id {run_id} --model_name MINE",
        f"python scripts/load_and_use_models.py from-run {run_id} --predict",
        "python scripts/load_and_use_models.py from-registry COLLEAGUE --alias production",
        "python scripts/check_model.py models:/COLLEAGUE@production",
    ]
    if kind not in (crafted.size, crafted.planted_code):
        commands = commands[:1]
    try:
        kind(model, PAYLOAD.format(str(folder / "marker")))
        for command in commands:
            refused(session.type(command, code=1), folder)
    finally:
        shutil.rmtree(model)
        shutil.copytree(tmp_path / "kept", model)
    registered = {m.name for m in mlflow.MlflowClient().search_registered_models()}
    assert "COLLEAGUE" in registered and "MINE" not in registered


@pytest.mark.slow
def test_nothing_is_wrong_with_it_unchanged(institute, colleague):
    """The same commands on the same model, before and after: the refusals are not for nothing."""
    _, _, session = institute
    run_id, model = colleague
    session.type(f"python scripts/load_and_use_models.py from-run {run_id} --predict")
    shown = session.type("python scripts/check_model.py models:/COLLEAGUE@production")
    assert shown.result == {
        "model": "models:/COLLEAGUE@production",
        "files": len(re.findall("^file ", shown.out, re.MULTILINE)),
        "runs_code": False,
    }
    assert "data/model.pt2" in shown.out
    on_disk = session.type(f"python scripts/check_model.py {model}")
    assert on_disk.result["runs_code"] is False


@pytest.mark.slow
@pytest.mark.parametrize("kind", [crafted.size, crafted.planted_code], ids=lambda k: k.__name__)
@pytest.mark.parametrize(
    "command",
    [
        "python train_mnist_mlflow.py --register --model_name MINE --dataset digits",
        "python upload_external_model.py --dataset digits --model_path w.pth --model_name MINE",
        "python scripts/tune_fashion_mnist.py --trials 1 --epochs 1 --dataset digits",
    ],
    ids=lambda command: command.split()[1],
)
def test_scripts_refuse_what_was_changed_after_they_logged_it(kind, command, institute):
    """Somebody who may write the server's files is quick: the model is changed once it is there."""
    folder, gateway, session = institute
    if "w.pth" in command:
        import torch

        from common.training import MNISTCNN

        torch.save(MNISTCNN().state_dict(), folder / "work" / "w.pth")
    changed = []

    def when_the_model_is_ready(request):
        if request.method == "PATCH" and re.search(r"/logged-models/m-\w+$", request.path):
            changed.append(last_model(folder))
            kind(changed[-1], PAYLOAD.format(str(folder / "marker")))

    gateway.on_request = when_the_model_is_ready
    try:
        refused(session.type(command, code=1), folder)
    finally:
        gateway.on_request = lambda request: None
    assert len(changed) == 1
    registered = {m.name for m in mlflow.MlflowClient().search_registered_models()}
    assert "MINE" not in registered


@pytest.mark.slow
@pytest.mark.parametrize("kind", [crafted.size, crafted.planted_code], ids=lambda k: k.__name__)
def test_a_model_on_a_shared_filesystem_is_looked_at_before_it_is_registered(
    kind, institute, tmp_path
):
    """Mapping it runs nothing; but those who load the version with MLflow alone would."""
    folder, _, session = institute
    target = tmp_path / "shared"
    train = "python Modify_artifact_location.py --dataset digits --experiment"
    run_id = session.type(f"{train} {kind.__name__} --target_path {target}").result["run_id"]
    (model,) = target.glob("**/MLmodel")
    kind(model.parent, PAYLOAD.format(str(folder / "marker")))
    register = "python Modify_artifact_location_register_inference.py --model_name MINE --run_id"
    finished = session.type(f"{register} {run_id}", code=1)
    assert finished.error.startswith("error: ")
    assert not (folder / "marker").exists()
    registered = {m.name for m in mlflow.MlflowClient().search_registered_models()}
    assert "MINE" not in registered


@pytest.mark.slow
def test_the_way_out_says_what_it_means(institute, colleague, tmp_path):
    """Who trusts the author sets a variable, and is told at each model that it was not checked."""
    folder, _, session = institute
    run_id, model = colleague
    shutil.copytree(model, tmp_path / "kept")
    command = f"python scripts/load_and_use_models.py from-run {run_id}"
    name = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"
    try:
        crafted.size(model, PAYLOAD.format(str(tmp_path / "marker")))
        assert "docs/troubleshooting.md" in session.type(command, code=1).error
        session.environment[name] = "true"
        finished = session.type(command)
    finally:
        session.environment.pop(name, None)
        shutil.rmtree(model)
        shutil.copytree(tmp_path / "kept", model)
    assert "warning: the model is not checked, and code in it runs" in finished.err
    assert (tmp_path / "marker").read_text() == KEY


def test_every_script_that_loads_checks_first():
    """Wherever `mlflow.pytorch.load_model` stands, it loads the folder that was just checked."""
    loads = 0
    for path in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("common/**/*.py")]:
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if re.match(r"[^#]*pytorch\.load_model\(", line):
                block = "\n".join(lines[max(0, number - 3) : number])
                assert "load_model(folder" in line and "storage.checked_copy(" in block, path
                loads += 1
    assert loads >= 5
