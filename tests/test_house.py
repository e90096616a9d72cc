"""How the project is built: what is promised about the code's structure."""

import ast
import difflib
import re

from conftest import FURTHER_SCRIPTS, ROOT, SCRIPTS


def imports(path, top_level_only=False):
    """The modules that a file imports, as ("common", "tracking") or ("mlflow", "")."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name.split(".")[0], "") for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module.split(".")[0], name.name) for name in node.names)


def test_common_modules_are_leaves():
    modules = sorted((ROOT / "common").glob("*.py"))
    assert len(modules) >= 9
    for path in modules:
        assert "common" not in {package for package, _ in imports(path)}, path


def test_every_common_module_is_used_by_a_script():
    scripts = [ROOT / script for script in SCRIPTS + FURTHER_SCRIPTS]
    used = {name for s in scripts for package, name in imports(s) if package == "common"}
    there = {path.stem for path in (ROOT / "common").glob("*.py")} - {"__init__"}
    assert used == there


def test_every_script_is_listed():
    """The tests that go through all scripts go through these."""
    there = {str(path.relative_to(ROOT)) for path in ROOT.glob("*.py")}
    there |= {str(path.relative_to(ROOT)) for path in ROOT.glob("scripts/*.py")}
    assert there == set(SCRIPTS + FURTHER_SCRIPTS)


def test_scripts_import_nothing_heavy_at_module_level():
    allowed = {("common", "cli"), ("pathlib", "Path"), ("sys", "")}
    for script in SCRIPTS + FURTHER_SCRIPTS:
        assert set(imports(ROOT / script, top_level_only=True)) <= allowed


def test_run_time_packages_are_those_in_requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    further = (ROOT / "scripts" / "requirements.txt").read_text()
    assert re.findall(r"^\w+", further, flags=re.MULTILINE) == ["optuna", "pyyaml"]
    named = {re.split(r"[><=\s]", line)[0] for line in lines if line and not line.startswith("#")}
    named = {"sklearn" if name == "scikit-learn" else name for name in named}
    used = set()
    scripts = [ROOT / script for script in SCRIPTS + FURTHER_SCRIPTS]
    for path in [*scripts, *(ROOT / "common").glob("*.py")]:
        used |= {package for package, _ in imports(path)}
    # safetensors is optional; what comes after it MLflow itself uses, or Optuna, and brings.
    assert used - set(__import__("sys").stdlib_module_names) - {"common"} == (
        (named - {"numpy"})
        | {"optuna", "yaml", "safetensors", "requests", "cryptography", "sqlalchemy"}
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
    calls = readme()[readme().index("## MLflow in seventeen calls") : readme().index("## Search")]
    table = re.findall(r"^\| (\d+) \| `(?:mlflow\.)?(?:\w+\.)*(\w+)", calls, flags=re.MULTILINE)
    assert dict(table) == names
    assert len(names) == 17


def readme():
    return (ROOT / "README.md").read_text()


def test_the_training_scripts_differ_by_the_lesson_only():
    """Where the artifacts go: everything else in the two is the same."""
    one, other = (
        (ROOT / name).read_text().splitlines()
        for name in ("train_mnist_mlflow.py", "Modify_artifact_location.py")
    )
    changes = [
        line
        for line in difflib.unified_diff(one, other, lineterm="", n=0)
        if line[0] in "+-" and not line.startswith(("+++", "---")) and line[1:].strip()
    ]
    assert 0 < len(changes) < 150
