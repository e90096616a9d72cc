"""The room by itself, as it is copied into another project."""

import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT, clean_environment

from common import training

# What the docstring calls optional, and then nothing at all is left out.
OPTIONAL = [("data", "networks", "device", "checkpoints"), ()]


@pytest.mark.parametrize("left_out", OPTIONAL)
@pytest.mark.slow
def test_what_the_docstring_promises_works_in_a_copy(left_out, tmp_path):
    common = tmp_path / "common"
    shutil.copytree(
        ROOT / "common" / "training",
        common / "training",
        ignore=shutil.ignore_patterns("__pycache__", *(f"{name}.py" for name in left_out)),
    )
    shutil.copy(ROOT / "common" / "errors.py", common)
    (common / "__init__.py").touch()
    room = common / "training" / "__init__.py"
    for name in left_out:  # "each with its line below"
        assert f"{name}.py" in training.__doc__
        text = room.read_text()
        imported = re.search(rf"^from \.{name} import (.*)\n", text, re.M)
        room.write_text(text.replace(imported[0], ""))

    promised = textwrap.dedent("\n".join(re.findall(r"^    .*|^$", training.__doc__, re.M)))
    assert "training.train_epoch(" in promised and "training.evaluate(" in promised
    process = subprocess.run(
        [sys.executable, "-c", f"{promised}\nprint(training.__file__, dir(training))"],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    accuracy, place = process.stdout.splitlines()
    assert 0 <= float(accuracy) <= 1 and place.startswith(f"{room} ")
    assert ("'load_data'" in place) == (not left_out)


def test_torchvision_and_scikit_learn_are_imported_only_for_their_data():
    code = (
        "import sys; from common import training\n"
        "assert not {'torchvision', 'sklearn', 'mlflow'} & set(sys.modules)"
    )
    environment = clean_environment()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
