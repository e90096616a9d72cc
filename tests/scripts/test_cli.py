"""Flags: instant help, checked values, one spelling."""

import re
import subprocess
import sys

import pytest
from conftest import FURTHER_SCRIPTS, ROOT, SCRIPTS, clean_environment, fails, run

HEAVY = (
    "torch",
    "torchvision",
    "mlflow",
    "matplotlib",
    "sklearn",
    "numpy",
    "pandas",
    "optuna",
    "yaml",
)


def imported(script, *arguments, cwd):
    """Run a script, and return (exit code, top-level packages that it imported, stderr)."""
    process = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / script), *arguments],
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    names = re.findall(r"^import time:.*\|\s*(\S+)$", process.stderr, flags=re.MULTILINE)
    assert "argparse" in names, "the output of -X importtime was not understood"
    return process.returncode, {name.split(".")[0] for name in names}, process.stderr


@pytest.mark.parametrize("script", SCRIPTS + FURTHER_SCRIPTS)
def test_help_and_typo_answer_without_heavy_imports(script, tmp_path):
    code, packages, _ = imported(script, "--help", cwd=tmp_path)
    assert code == 0 and packages.isdisjoint(HEAVY)

    code, packages, err = imported(script, "--epoch_count", "3", cwd=tmp_path)
    assert code == 2 and packages.isdisjoint(HEAVY)
    assert "error:" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS + FURTHER_SCRIPTS)
def test_help_is_the_docstring(script, tmp_path):
    text = run(script, "--help", cwd=tmp_path).out
    assert f"    python {script}" in text
    assert "You will see" in text
    assert "--tracking_uri" in text  # score_rest.py says why there is none


BAD_VALUES = [
    ("train_mnist_mlflow.py", "--epochs", "0"),
    ("train_mnist_mlflow.py", "--epochs", "two"),
    ("train_mnist_mlflow.py", "--batch_size", "0"),
    ("train_mnist_mlflow.py", "--batch_size", "-64"),
    ("train_mnist_mlflow.py", "--lr", "nan"),
    ("train_mnist_mlflow.py", "--lr", "inf"),
    ("train_mnist_mlflow.py", "--lr", "0"),
    ("train_mnist_mlflow.py", "--seed", "-1"),
    ("train_mnist_mlflow.py", "--phase", "prod"),
    ("train_mnist_mlflow.py", "--dataset", "cifar10"),
    ("train_mnist_mlflow.py", "--lr", "1e300"),
    ("train_mnist_mlflow.py", "--batch_size", "99999999999999999999"),
    ("train_mnist_mlflow.py", "--model_name", "a/b"),
    ("train_mnist_mlflow.py", "--model_name", "what?"),
    ("train_mnist_mlflow.py", "--model_name", " MNIST_CNN"),
    ("train_mnist_mlflow.py", "--model_name", "two\nlines"),
    ("register_and_inference.py", "--alias", "a" * 256),
    ("train_mnist_mlflow.py", "--experiment", ""),
    ("Modify_artifact_location.py", "--target_path", ""),
    ("register_and_inference.py", "--run_id", " "),
    ("upload_external_model.py", "--model_path", ""),
    ("register_and_inference.py", "--alias", "latest"),
    ("register_and_inference.py", "--alias", "v2"),
    ("register_and_inference.py", "--alias", "pro duction"),
]


@pytest.mark.parametrize(("script", "flag", "value"), BAD_VALUES)
def test_bad_value_is_a_usage_error_that_names_it(script, flag, value, tmp_path):
    required = ("--run_id", "x") if flag == "--alias" else ()
    finished = run(script, *required, flag, value, cwd=tmp_path, code=2)
    last = finished.err.rstrip().splitlines()[-1]
    assert f"error: argument {flag}" in last and repr(value) in last
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("register_and_inference.py", "--run_id"),
        ("upload_external_model.py", "--model_path"),
        ("Modify_artifact_location.py", "--target_path"),
        ("Modify_artifact_location_register_inference.py", "--run_id"),
    ],
)
def test_required_flags(script, flag, tmp_path):
    assert f"required: {flag}" in run(script, cwd=tmp_path, code=2).err


def test_flags_cannot_be_abbreviated(tmp_path):
    assert "--epoch 3" in run("train_mnist_mlflow.py", "--epoch", 3, cwd=tmp_path, code=2).err


def test_model_name_without_register(tmp_path):
    err = run("train_mnist_mlflow.py", "--model_name", "MINE", cwd=tmp_path, code=2).err
    assert "--model_name needs --register" in err


def test_alias_without_model_name(tmp_path):
    arguments = ("--model_path", "x.pth", "--alias", "production")
    err = run("upload_external_model.py", *arguments, cwd=tmp_path, code=2).err
    assert "--alias needs --model_name" in err


@pytest.mark.parametrize(("name", "found"), [("mlflow", "3.16.1"), ("torch", "2.9.1+cu128")])
def test_package_that_is_too_old(name, found, tmp_path):
    """Two lines at once; without them, a traceback, and with luck before the training."""
    folder = tmp_path / "packages" / f"{name}-{found}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {found}\n")
    path = str(folder.parent)
    message = fails("train_mnist_mlflow.py", "--dataset", "digits", cwd=tmp_path, PYTHONPATH=path)
    assert f" or newer is needed, and {found} is installed." in message
    assert f"error: {name} " in message and "pip install -r requirements.txt" in message
    run("train_mnist_mlflow.py", "--help", cwd=tmp_path, PYTHONPATH=path)


def test_packages_that_are_missing(tmp_path):
    command = [sys.executable, "-S", str(ROOT / "train_mnist_mlflow.py")]  # -S: no site-packages
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "error: mlflow 3.17 or newer is needed, and none is installed." in process.stderr
