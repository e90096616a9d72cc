"""Flags: instant help, checked values, one spelling."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FURTHER_SCRIPTS, ROOT, SCRIPTS, clean_environment, fails, run

import train_mnist_mlflow
from common import cli, connection
from common.errors import UserError, check_packages

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
    ("train_mnist_mlflow.py", "--model_name", ".."),
    ("train_mnist_mlflow.py", "--experiment", "two\nlines"),
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


@pytest.mark.parametrize("flag, name", [("d\udce9part", "x"), ("x", "Andr\udce9")])
def test_bytes_that_are_no_text_are_a_usage_error(flag, name, tmp_path):
    finished = run(SCRIPTS[0], "--note", flag, cwd=tmp_path, code=2, LOGNAME=name)
    assert finished.err.endswith("a flag, LOGNAME or USER holds bytes that are no text\n")


def test_names_that_mlflow_refuses(capsys):
    """Or that a database has no space for."""
    for flag, value in (
        ("--experiment", "e" * 600),
        ("--experiment", "caf\udce9"),  # bytes that are no text in this locale
        ("--workspace", "w" * 501),
        ("--model_name", "."),
        ("--model_name", "m" * 256),
    ):
        with pytest.raises(SystemExit) as stopped:
            train_mnist_mlflow.build_parser().parse_args([flag, value])
        assert stopped.value.code == 2
        assert f"error: argument {flag}: must be" in capsys.readouterr().err


def test_home_is_expanded_where_no_shell_does_it(monkeypatch):
    """It leaves the ~ in `--data_dir=~/data` alone, and in what another program has set."""
    monkeypatch.setenv("HOME", "/home/8cf")
    train = train_mnist_mlflow.build_parser().parse_args
    assert train(["--data_dir=~/data"]).data_dir == "/home/8cf/data"
    assert train(["--checkpoint=~/ck"]).checkpoint == "/home/8cf/ck"
    assert train([]).data_dir == "./data" and cli.path("a~b") == "a~b"
    assert cli.path("sqlite:///~/study.db") == "sqlite:////home/8cf/study.db"
    assert cli.path("models:/NAME@alias") == "models:/NAME@alias"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///~/mlflow.db")
    assert connection.address()[0] == "sqlite:////home/8cf/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", "~/ca.pem")
    with pytest.raises(UserError, match="can be read from /home/8cf/ca.pem: No such file"):
        connection.trust()


SPACE = """
import sys
from common import cli

def main():
    if sys.argv[1] == "print":
        print("a line of a job's log", flush=True)
    elif sys.argv[1] == "text":
        raise RuntimeError("The following failures occurred: x: [Errno 122] Disk quota exceeded")
    try:
        open("/dev/full", "wb", buffering=0).write(b"x")
    except OSError as error:
        raise ValueError("the model could not be logged") from error

cli.run(main)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("where", ["print", "text", "cause"])
def test_no_space_left_anywhere(where, tmp_path):
    with open("/dev/full" if where == "print" else os.devnull, "w") as log:
        process = subprocess.run(
            [sys.executable, "-c", SPACE, where],
            cwd=tmp_path,
            env=clean_environment(PYTHONPATH=str(ROOT)),
            stdout=log,
            stderr=subprocess.PIPE,
            text=True,
        )
    said = "Disk quota exceeded" if where == "text" else "No space left on device"
    assert process.stderr.startswith(f"error: {said}.\nhint:  make room there")
    assert process.returncode and "Traceback" not in process.stderr


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


def test_bytes_that_are_no_text(tmp_path):
    command = [sys.executable, ROOT / "train_mnist_mlflow.py", "--note", b"caf\xe9"]
    finished = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True)
    assert finished.returncode == 2 and b"bytes that are no text" in finished.stderr
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize(
    "name, value",
    [
        *(("MLFLOW_LOGGING_LEVEL", value) for value in ("loud", "10", " ")),
        *(("MLFLOW_CONFIGURE_LOGGING", value) for value in ("yes", "")),
    ],
)
def test_variable_with_which_mlflow_cannot_be_imported(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}.* has an impossible value"):
        check_packages()


@pytest.mark.parametrize("level, switch", [("debug", "0"), ("", "TRUE"), ("WARN", "1")])
def test_variables_with_which_it_can(level, switch, monkeypatch):
    monkeypatch.setenv("MLFLOW_LOGGING_LEVEL", level)
    monkeypatch.setenv("MLFLOW_CONFIGURE_LOGGING", switch)
    check_packages()


@pytest.mark.parametrize("name", ["torchvision", "matplotlib.pyplot", "sklearn"])
def test_package_that_is_missing(name, capsys):
    with pytest.raises(SystemExit) as ended:
        error = ModuleNotFoundError(f"No module named {name!r}", name=name)
        cli.print_and_exit(ModuleNotFoundError, error, None)
    assert ended.value.code == 1
    what, hint = capsys.readouterr().err.splitlines()
    assert "not installed" in what and repr(name) in what and "pip install -r" in hint


def test_packages_that_are_missing(tmp_path):
    command = [sys.executable, "-S", str(ROOT / "train_mnist_mlflow.py")]  # -S: no site-packages
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "error: mlflow 3.17 or newer is needed, and none is installed." in process.stderr


def test_a_script_ends_at_once_and_loses_nothing(tmp_path):
    """The interpreter takes nothing apart; threads and handlers have had their turn before."""
    (tmp_path / "script.py").write_text(
        "import atexit, sys, threading, time\n"
        "class Kept:\n"
        "    def __del__(self): print('taken apart', flush=True)\n"
        "def main():\n"
        "    sys.modules['kept'] = Kept()\n"
        "    atexit.register(print, 'handler')\n"
        "    wait = lambda: (time.sleep(0.3), print('thread'))\n"
        "    threading.Thread(target=wait).start()\n"
        "    print('main')\n"
        "    if sys.argv[1:]: raise SystemExit(7)\n"
        "from common import cli\n"
        "cli.run(main)\n"
    )
    for arguments, code, last in (((), 0, []), (("fail",), 7, ["taken apart"])):
        finished = run(tmp_path / "script.py", *arguments, cwd=tmp_path, code=code, PYTHONPATH=ROOT)
        assert finished.out.split("\n")[:-1] == ["main", "thread", "handler", *last]
