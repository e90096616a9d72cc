"""How the project is built: rooms that stand alone, budgets, and what is private to others."""

import ast
import difflib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import FURTHER_SCRIPTS, ROOT, SCRIPTS, clean_environment

COMMON = ROOT / "common"
ROOMS = sorted(path.parent.name for path in COMMON.glob("*/__init__.py"))
MODULES = sorted(COMMON.rglob("*.py"))


def imports(path, top_level_only=False):
    """The modules that a file imports, as ("common", "runs") or ("mlflow", ""), absolute ones."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name.split(".")[0], "") for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            package, _, module = node.module.partition(".")
            yield from ((package, module or name.name) for name in node.names)


def relative_imports(path):
    """The modules of its own room that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [name.name for name in node.names]


def length(path):
    return len(path.read_text().splitlines())


def test_the_rooms_are_those_of_the_design():
    assert ROOMS == ["connection", "runs", "storage", "training"]
    alone = {path.name for path in COMMON.glob("*.py")}
    assert alone == {"__init__.py", "cli.py", "errors.py"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_the_errors_and_no_other_room(room):
    for path in (COMMON / room).rglob("*.py"):
        ours = {module for package, module in imports(path) if package in ("common", "scripts")}
        assert ours <= {"errors"}, path


@pytest.mark.parametrize("room", ROOMS)
def test_no_circle_inside_a_room(room):
    files = {path.stem: set(relative_imports(path)) for path in (COMMON / room).glob("*.py")}
    files.pop("__init__")
    while files:
        free = [name for name, needed in files.items() if not needed & files.keys()]
        assert free, f"a circle among {sorted(files)}"
        for name in free:
            del files[name]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_to_copy(room):
    docstring = ast.get_docstring(ast.parse((COMMON / room / "__init__.py").read_text()))
    assert "copy" in docstring.lower() and "common/errors.py" in docstring
    assert f"from common import {room}" in docstring


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)
def test_a_room_alone_can_be_imported(room, tmp_path):
    """Each room's own tests make the call that its docstring promises."""
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").touch()
    shutil.copy(COMMON / "errors.py", tmp_path / "common")
    shutil.copytree(COMMON / room, tmp_path / "common" / room)
    command = [sys.executable, "-c", f"from common import {room}"]
    subprocess.run(command, cwd=tmp_path, env=clean_environment(), check=True)


def test_budgets():
    assert sum(map(length, MODULES)) < 4026
    assert {str(path): length(path) for path in MODULES if length(path) >= 200} == {}
    assert {name: length(ROOT / name) for name in SCRIPTS if length(ROOT / name) >= 230} == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_first_mlflow_call_stands_on_the_first_screen(script):
    lines = (ROOT / script).read_text().splitlines()
    (main,) = (i for i, line in enumerate(lines) if line.startswith("def main("))
    screen = "\n".join(lines[main : main + 40])
    assert re.search(r"^ +(\w+ = )?(with \()?mlflow\.", screen, re.MULTILINE), screen


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_names_the_rooms_it_needs(script):
    tree = ast.parse((ROOT / script).read_text())
    used = {module for package, module in imports(ROOT / script) if package == "common"}
    docstring = ast.get_docstring(tree)
    assert {room for room in ROOMS if re.search(rf"\b{room}\b", docstring.split("Needs")[1])} == (
        used - {"cli", "errors"}
    )


def test_every_script_is_listed():
    """The tests that go through all scripts go through these."""
    there = {str(path.relative_to(ROOT)) for path in ROOT.glob("*.py")}
    there |= {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("scripts/*.py")
        if "__main__" in path.read_text()
    }
    assert there == set(SCRIPTS + FURTHER_SCRIPTS)


def test_scripts_import_nothing_heavy_at_module_level():
    allowed = {("common", "cli"), ("common", "errors"), ("scripts", "settings")}
    allowed |= {("pathlib", ""), ("pathlib", "Path"), ("sys", "")}
    for script in SCRIPTS + FURTHER_SCRIPTS:
        assert set(imports(ROOT / script, top_level_only=True)) <= allowed, script


def test_run_time_packages_are_those_in_requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    further = (ROOT / "scripts" / "requirements.txt").read_text()
    assert re.findall(r"^\w+", further, flags=re.MULTILINE) == ["optuna", "pyyaml"]
    named = {re.split(r"[><=\s]", line)[0] for line in lines if line and not line.startswith("#")}
    named = {"sklearn" if name == "scikit-learn" else name for name in named}
    used = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *MODULES]:
        used |= {package for package, _ in imports(path)}
    # safetensors is optional; what comes after it MLflow itself uses, or Optuna, and brings.
    assert used - set(sys.stdlib_module_names) - {"common", "scripts"} == (
        (named - {"numpy"})
        | {"optuna", "yaml", "safetensors", "requests", "cryptography", "sqlalchemy", "google"}
    )
    # The root's scripts do without the packages of scripts/.
    root = {package for script in SCRIPTS for package, _ in imports(ROOT / script)}
    assert root.isdisjoint({"optuna", "yaml"})
    assert "numpy" in named  # its arrays are handed to MLflow; no script names it


def landmarks(text):
    """The numbered MLflow calls in a text: {number: name}."""
    return re.findall(r"\[MLflow (\d+)\]`? ?\|? ?`?(\w+)", text)


def test_landmarks_agree_with_the_readme():
    names = {}
    for script in SCRIPTS:
        found = landmarks((ROOT / script).read_text())
        assert found, script
        for number, name in found:
            assert names.setdefault(number, name) == name
    readme = (ROOT / "README.md").read_text()
    calls = readme[readme.index("## MLflow in seventeen calls") : readme.index("## Search")]
    table = re.findall(r"^\| (\d+) \| `(?:mlflow\.)?(?:\w+\.)*(\w+)", calls, flags=re.MULTILINE)
    assert dict(table) == names
    assert len(names) == 17


# What the two training scripts may differ in: where the artifacts go. Each pattern is a line that
# only the large-model script has, or that is worded otherwise there.
LESSON = (
    r"target_path|folder|storage\.|save_model_once|model_path|map_weights|file\.tags|\bfile\b|"
    r"create_experiment|get_experiment_by_name|EXPERIMENT =|log_model|load_model|"
    r"checked_copy|ready_model|import functools|^tags = {'launch': |check_predictions|"
    r"register_model|model_uri|points at the path|external|check_place"
)


def test_the_training_scripts_differ_by_the_lesson_only():
    """Where the artifacts go; everything else in the two is the same, line by line."""
    one, other = (
        ast.unparse(
            next(
                node
                for node in ast.parse((ROOT / name).read_text()).body
                if isinstance(node, ast.FunctionDef) and node.name == "main"
            )
        ).splitlines()
        for name in ("train_mnist_mlflow.py", "Modify_artifact_location.py")
    )
    changes = [
        line[1:].strip()
        for line in difflib.unified_diff(one, other, lineterm="", n=0)
        if line[0] in "+-" and not line.startswith(("+++", "---")) and line[1:].strip()
    ]
    assert changes
    assert [line for line in changes if not re.search(LESSON, line)] == []


# Each touch of what MLflow, PyTorch or Gloo keep private, or do not document: the one file that it
# stands in. A comment there says what breaks when it goes.
PRIVATE = {
    r"torch\._C\b": "common/storage/inspection.py",  # the reader of archives
    r"torch\._export\b": "common/storage/program.py",  # the schema of the JSON in them
    r"torch\._subclasses\b": "common/storage/writing.py",  # tensors without content
    r"request_auth import registry|_provider_registry": "common/connection/undocumented.py",
    r"cannot be specified": "common/storage/folders.py",  # MLflow's words where workspaces are on
    r"_MLFLOW_SERVER_ARTIFACT_ROOT": "common/connection/undocumented.py",
    r"valid JSON format|Failed to \(\?:": "common/connection/undocumented.py",  # MLflow's words
    r"from mlflow import cli|mlflow\.cli\b": "common/connection/__main__.py",
    r"get_capabilities": "common/training/device.py",
    r"mlflow\.utils\.": "common/connection/undocumented.py",  # a request by hand
    r"mlflow\.store\.": "scripts/probes.py",  # the parts of a file that it sends
}


@pytest.mark.parametrize("pattern", PRIVATE)
def test_what_others_keep_private_is_touched_in_one_place(pattern):
    files = [*MODULES, *ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]
    found = [path for path in files if re.search(pattern, path.read_text())]
    assert [str(path.relative_to(ROOT)) for path in found] == [PRIVATE[pattern]]
    lines = found[0].read_text().splitlines()
    (first, *_) = (i for i, line in enumerate(lines) if re.search(pattern, line))
    around = "\n".join(lines[max(0, first - 8) : first + 3])
    assert "#" in around or '"""' in around, f"{found[0]}: no comment on what breaks"


def test_nothing_else_is_private():
    """Names below mlflow and torch that begin with an underscore."""
    for path in [*MODULES, *ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]:
        for name in re.findall(r"\b(?:mlflow|torch)(?:\.\w+)*\.(?:_(?!_)\w+)", path.read_text()):
            assert any(re.search(pattern, name) for pattern in PRIVATE), f"{path}: {name}"
