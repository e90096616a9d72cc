"""Walk the scripts through servers of other versions of MLflow, and print a table of what works.

    python tests/versions.py 2.22.5 3.0.1 3.17.2
    python tests/versions.py --keep ~/servers 3.0.1

Each server gets a virtual environment of its own (pip: a minute and 1 GB each), which --keep keeps
for the next time. The scripts are those of this checkout, run by the Python that runs this. You
will see each scene on stderr as it ends, and the table in the end.
"""

import argparse
import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, Session, clean_environment, free_port, serving

INSTALLATION = 900  # seconds for pip
LONGEST = 120  # characters of a message
SCENE = 200  # seconds for a script, after which it gets SIGTERM

# {train} and {large} are the runs that those scenes have made.
SCENES = {
    "check": "scripts/check_connection.py",
    "train": "train_mnist_mlflow.py --dataset digits --register",
    "register": "register_and_inference.py --run_id {train}",
    "upload": "upload_external_model.py --dataset digits --model_path weights.pth --model_name UP",
    "in place": "upload_external_model.py --dataset digits --model_path weights.pth --in_place",
    "large": "Modify_artifact_location.py --dataset digits --target_path shared",
    "large, register": "Modify_artifact_location_register_inference.py --run_id {large}",
    "promote": "scripts/promote.py MNIST_CNN --version 1 --by 0",  # the other one is its equal
}


class NoServerError(Exception):
    """A version that cannot be installed, or does not start."""


def install(version, folder):
    """Return the Python of a virtual environment in `folder` that has this MLflow."""
    python = folder / version / "bin" / "python"
    if python.with_name("mlflow").exists():  # the last that pip writes
        return python
    # MLflow before 3.9 imports what SQLAlchemy 2.1 does not have any more.
    old = tuple(map(int, version.split(".")[:2])) < (3, 9)
    pinned = ["sqlalchemy<2.1"] if old else []
    pip = ["-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    for command in (
        ["-m", "venv", "--without-pip", folder / version],
        [*pip, f"mlflow=={version}", *pinned],
    ):
        process = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=INSTALLATION
        )
        if process.returncode:
            raise NoServerError(f"cannot be installed: {process.stderr.strip()}")
    return python


@contextlib.contextmanager
def running(python, folder):
    """An `mlflow server` of another Python, on SQLite in `folder`; yields its address."""
    uri, log = f"http://127.0.0.1:{free_port()}", folder / "server.log"
    command = [
        *(python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", uri.split(":")[-1]),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--artifacts-destination", folder / "artifacts"),
    ]
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    environment = clean_environment(PATH=path, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    server = serving(command, folder, environment, f"{uri}/health", log)
    try:
        server.__enter__()
    except AssertionError as error:
        raise NoServerError(f"does not start: {error}") from error
    with contextlib.ExitStack() as stack:
        stack.push(server)
        yield uri


def walk(uri, folder, prefork):
    """Play the scenes in `folder`; return {scene: None, or the first line of what it said}."""
    import torch

    from common import training

    torch.manual_seed(0)
    torch.save(training.MNISTCNN().state_dict(), folder / "weights.pth")
    (folder / "shared").mkdir()
    session, runs, said = Session(folder, prefork, MLFLOW_TRACKING_URI=uri), {}, {}
    for scene, command in SCENES.items():
        start = time.monotonic()
        needed = re.findall(r"{(\w+)}", command)
        if missing := [name for name in needed if name not in runs]:
            said[scene] = f"needs the scene {missing[0]!r}"
            continue

        def over(end=start + SCENE):
            """It has ended, which prefork.py says; or it never will."""
            return select.select([prefork.stdout], [], [], 0)[0] or time.monotonic() > end

        finished = session.type(command.format(**runs), code=None, until=over)
        said[scene] = first_line(finished).replace(uri, "SERVER") if finished.code else None
        if not finished.code:
            runs[scene] = finished.result.get("run_id")
        took = f"{time.monotonic() - start:.0f} s"
        print(f"  {scene:<15}  {took:>5}  {said[scene] or 'passed'}", file=sys.stderr, flush=True)
    return said


def first_line(finished):
    """The first line of a message; of a traceback the last one."""
    error = re.search(r"^error: (.*)", finished.err, re.MULTILINE)
    lines = finished.err.strip().splitlines()
    what = error[1] if error else lines[-1] if lines else "nothing"
    return f"exit code {finished.code}: {what[:LONGEST]}{'...' if len(what) > LONGEST else ''}"


def row(version, said):
    """A line of the table; what several scenes say stands there once."""
    groups = {}
    for scene, line in said.items():
        groups.setdefault(line, []).append(scene)
    passed = len(groups.pop(None, []))
    failed = "; ".join(f"{', '.join(scenes)}: {line}" for line, scenes in groups.items())
    return f"| {version} | {passed} of {len(SCENES)} | {failed.replace('|', '/') or 'nothing'} |"


def result(version, keep, prefork):
    """Install, start and walk one version; return its line of the table."""
    print(f"MLflow {version}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with running(install(version, keep or Path(folder)), Path(folder)) as uri:
                return row(version, walk(uri, Path(folder), prefork))
        except NoServerError as error:
            return f"| {version} | 0 of {len(SCENES)} | {str(error).splitlines()[-1]} |"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="of MLflow, such as 3.0.1")
    where = "folder that keeps the virtual environments (default: they are deleted)"
    parser.add_argument("--keep", type=Path, metavar="DIR", help=where)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.path.insert(0, str(ROOT))  # where common/ is
    with subprocess.Popen(
        [sys.executable, ROOT / "tests" / "scripts" / "prefork.py"],
        cwd=tempfile.gettempdir(),
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as prefork:
        keep = args.keep and args.keep.absolute()
        rows = [result(version, keep, prefork) for version in args.versions]
    print("| server | scenes passed | what fails |\n| --- | --- | --- |", *rows, sep="\n")


if __name__ == "__main__":
    main()
