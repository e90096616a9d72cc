"""Runs the scripts as a user does: as processes, from another folder, against real stores."""

import contextlib
import itertools
import json
import os
import random
import shlex
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import modes
import pytest
import trustme
from gateway import Gateway

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"  # real MNIST, where a machine has it
KEY = "test-key-0123456789"
# A suite that was started with `nohup`, or by a script in the background, inherits these as
# ignored, and so would every script that it starts.
for ignored, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, 0)):
    if signal.getsignal(ignored) == signal.SIG_IGN:
        signal.signal(ignored, handler)
SECONDS = 100  # MLflow by itself would take longer; on a busy machine, importing it takes most

FILL = f"from torchvision.datasets import MNIST; MNIST('{REAL_DATA}', download=True)"
REAL_MNIST = pytest.mark.skipif(
    not REAL_DATA.is_dir(),
    reason=f'no real MNIST in {REAL_DATA}, which this fills: python -c "{FILL}"',
)

SCRIPTS = (
    "train_mnist_mlflow.py",
    "register_and_inference.py",
    "upload_external_model.py",
    "Modify_artifact_location.py",
    "Modify_artifact_location_register_inference.py",
)
FURTHER_SCRIPTS = (
    "scripts/check_connection.py",
    "scripts/check_model.py",
    "scripts/train_and_register_model.py",
    "scripts/load_and_use_models.py",
    "scripts/train_simple_mnist.py",
    "scripts/download_and_infer.py",
    "scripts/train_with_mlflow.py",
    "scripts/register_model.py",
    "scripts/score_rest.py",
    "scripts/train_fashion_mnist.py",
    "scripts/tune_fashion_mnist.py",
    "scripts/log_plot.py",
    "scripts/train_your_model.py",
    "scripts/promote.py",
    "scripts/publish.py",
)


class Finished:
    """A process that has ended: its exit code, what it printed, and its last line as JSON."""

    def __init__(self, process):
        self.code, self.out, self.err = process.returncode, process.stdout, process.stderr

    @property
    def result(self):
        return json.loads(self.out.rstrip().splitlines()[-1])

    @property
    def error(self):
        """The message on stderr, from the line "error: ..." on."""
        start = self.err.find("error: ")
        assert start >= 0, f"no error message in:\n{self.err}"
        return self.err[start:]


def clean_environment(**variables):
    """The environment of a user who has configured nothing, plus `variables`.

    The virtual environment is activated: `mlflow models serve` looks for uvicorn on the PATH.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(("MLFLOW_", "_MLFLOW_", "AM_SC_", "SLURM_", "PBS_", "LSB_"))
        and not name.startswith(("RANK", "WORLD_", "LOCAL_", "MASTER_", "PMI", "PALS_", "OMPI_"))
        and name.lower() not in ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
        and not name.startswith("GIT_")  # in a hook of git's: which repository it is about
        and name not in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PYTHONPATH")
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    fixed = {"PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
    return kept | fixed | variables


# What is done in this process, and not in one that is started, goes the same way.
for name in set(os.environ) - set(clean_environment()):
    del os.environ[name]


def run(script, *arguments, cwd, code=0, timeout=600, prefork=None, **variables):
    """Run a script of the project (or any other by its full path), and check its exit code.

    `code=None` takes any that is not 0. With `prefork`, the fixture, it starts 3 s sooner.
    """
    if prefork:
        with tempfile.TemporaryDirectory() as outputs:
            session, start = Session(cwd, prefork, **variables), time.monotonic()
            session.outputs = Path(outputs)
            finished = session.type(script, *arguments, code=code)
            assert time.monotonic() - start < timeout
            assert finished.code or code == 0
            return finished
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    process = subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )
    finished = Finished(process)
    assert finished.code == code or (code is None and finished.code), (
        f"{command} ended with {finished.code}\n{finished.out}{finished.err}"
    )
    return finished


def fails(script, *arguments, cwd, code=1, **variables):
    """Run a script that must fail with a message, no traceback and no key; return the message."""
    finished = run(script, *arguments, cwd=cwd, code=code, timeout=SECONDS, **variables)
    assert "Traceback" not in finished.err
    assert "\nhint:  " in finished.error
    assert KEY not in finished.out + finished.err
    return finished.error


@contextlib.contextmanager
def training_process(cwd, *arguments, **variables):
    """The training script as a process, its output to be read as it comes; killed on leaving."""
    command = [sys.executable, "-u", str(ROOT / "train_mnist_mlflow.py"), "--dataset", "digits"]
    process = subprocess.Popen(
        [*command, *arguments],
        cwd=cwd,
        env=clean_environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_line(process, start):
    return next(line for line in process.stdout if line.startswith(start))


def write_idx(path, array):
    """Write a numpy array of uint8 in the format of the MNIST files."""
    magic = bytes([0, 0, 8, array.ndim])
    path.write_bytes(magic + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def write_mnist(folder):
    """Write scikit-learn's digits as if they were MNIST: the four files that torchvision reads."""
    from common import training

    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, train in (("train", True), ("t10k", False)):
        split = training.load_data("digits", "unused", train=train)
        write_idx(raw / f"{name}-images-idx3-ubyte", split.images[:, 0].numpy())
        write_idx(raw / f"{name}-labels-idx1-ubyte", split.labels.numpy().astype("uint8"))
    return folder


@pytest.fixture(scope="session")
def mnist_dir(tmp_path_factory):
    """A `--data_dir` with a small data set in MNIST's format."""
    return write_mnist(tmp_path_factory.mktemp("data"))


# Files whose tests share a scene that takes long to make: each runs in one process.
TOGETHER = (
    *("test_guides", "test_deployment", "test_inspection", "test_large_model", "test_modes"),
    *("test_promote", "test_publish", "test_search", "test_secrets", "test_serving"),
    "test_workspaces",
)


def pytest_collection_modifyitems(items):
    """What takes longest first: the rest fits beside it."""
    longest = "test_a_job_that_is_preempted_and_out_of_time_is_one_run"
    items.sort(key=lambda item: (item.name != longest, item.path.stem not in TOGETHER))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests go to whichever process is free, but for those of a file in `TOGETHER`."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if Path(file).stem in TOGETHER else nodeid

    return Scheduling(config, log)


@pytest.fixture
def own_environment():
    """What a test sets, or what `connect` sets in it, the next one in this process does not see."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def elsewhere(own_environment, tmp_path, monkeypatch):
    """No test works in the project's folder: opening a SQLite store makes ./mlruns.

    The environment comes first: `monkeypatch` puts back what it found, and `connect` may have
    set that.
    """
    monkeypatch.chdir(tmp_path)


class Session:
    """Somebody who types commands in a folder, one after another."""

    def __init__(self, folder, prefork, **variables):
        self.folder, self.outputs, self.prefork = folder, folder, prefork
        self.environment = clean_environment(**variables)
        self.ended = []  # (what was typed, how it ended)

    def type(self, command, *more, code=0, until=None, stop=signal.SIGTERM):
        """Return how it `Finished`; `code=None` takes any exit code.

        With `until`, it gets the signal `stop` as soon as that returns true, if it still runs.
        """
        script, *arguments = shlex.split(command.removeprefix("python "))
        files = [self.outputs / f"{len(self.ended)}.{name}" for name in ("out", "err")]
        for path in files:
            path.touch()
        order = {
            "arguments": [str(ROOT / script), *arguments, *map(str, more)],
            "cwd": str(self.folder),
            "environment": self.environment,
            **dict(zip(("out", "err"), map(str, files), strict=True)),
        }
        print(json.dumps(order), file=self.prefork.stdin, flush=True)
        process = int(self.prefork.stdout.readline())
        try:
            if until:
                deadline = time.monotonic() + 300
                while not until():
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                with contextlib.suppress(ProcessLookupError):  # it was faster
                    os.kill(process, stop)
        finally:
            returned = int(self.prefork.stdout.readline())
        out, err = (path.read_text() for path in files)
        assert code in (returned, None), f"{command} ended with {returned}\n{out}{err}"
        finished = Finished(SimpleNamespace(returncode=returned, stdout=out, stderr=err))
        self.ended.append((command, finished))
        return finished


@pytest.fixture(scope="session")
def prefork(tmp_path_factory):
    """tests/scripts/prefork.py, which starts the scripts."""
    with subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "scripts" / "prefork.py")],
        cwd=tmp_path_factory.mktemp("prefork"),
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


class Local(NamedTuple):
    """A folder in which the training script has run, on a local store of its own."""

    folder: Path
    trained: Finished

    @property
    def uri(self):
        return f"sqlite:///{self.folder}/mlflow.db"

    @property
    def run_id(self):
        return self.trained.result["run_id"]


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    """The first command of the README, run in an empty folder, with a few flags on top."""
    folder = tmp_path_factory.mktemp("local")
    trained = run(
        "train_mnist_mlflow.py",
        *("--dataset", "digits", "--register", "--epochs", 8, "--phase", "production"),
        *("--owner", "8cf", "--note", "Baseline CNN model"),
        *("--precision", "fp32"),  # the same losses on every CPU, with AMX or without
        cwd=folder,
    )
    return Local(folder, trained)


def ports_of_this_worker():
    """Port numbers that no other worker takes, and the kernel gives to nobody who asks for any."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 4
    first = 30000 + 600 * worker
    return itertools.cycle(random.sample(range(first, first + 600), 600))


PORTS = ports_of_this_worker()


def free_port():
    """A port on which a process may listen that is yet to be started."""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def stop(process):
    """End a server by its own process id, and all that it started."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(url, process, log, seconds=180):
    """Wait until `url` answers with status 200."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended:\n{log.read_text()}"
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} did not answer within {seconds} s:\n{log.read_text()}")


@contextlib.contextmanager
def serving(command, cwd, environment, url, log):
    """Start a server, wait until `url` answers, and stop it on leaving."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_for(url, process, log)
            yield
        finally:
            stop(process)


@contextlib.contextmanager
def mlflow_server(folder, *flags, artifacts=None, **variables):
    """A real `mlflow server` on SQLite in `folder`, without a key; yields its address."""
    port, log = free_port(), folder / "server.log"
    command = [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--artifacts-destination", artifacts or str(folder / "artifacts")),
        *flags,
    ]
    environment = clean_environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", **variables)
    with serving(command, folder, environment, f"http://127.0.0.1:{port}/health", log):
        yield f"http://127.0.0.1:{port}"


def certificate(folder):
    """(an ssl context for a server at 127.0.0.1, the PEM file of the authority made for it)."""
    authority = trustme.CA(organization_name="Test Institute")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    return context, folder / "ca.pem"


@pytest.fixture(scope="session")
def folder_of_server(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="session")
def server(folder_of_server):
    """The address of a real `mlflow server` on SQLite, without a key."""
    with mlflow_server(folder_of_server) as uri:
        yield uri


@pytest.fixture(scope="session")
def institute(tmp_path_factory):
    """A real `mlflow server` with workspaces and users: `modes.Institute`."""
    folder = tmp_path_factory.mktemp("institute")
    with mlflow_server(folder, *modes.FLAGS, **modes.variables(folder)) as uri:
        yield modes.settle(modes.Institute(uri, folder))


@pytest.fixture(scope="session")
def tls(tmp_path_factory):
    """What `certificate` makes, once."""
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def box(server, tls):
    """The server behind a gateway of this test's own: TLS of a private authority, key, limits."""
    with Gateway(server, KEY, tls=tls[0]) as gateway:
        yield gateway


@pytest.fixture
def box_variables(box, tls):
    """What a user of the box exports."""
    return {
        "MLFLOW_TRACKING_URI": box.uri,
        "MLFLOW_TRACKING_SERVER_CERT_PATH": str(tls[1]),
        "AM_SC_API_KEY": KEY,
    }


@contextlib.contextmanager
def other_user(number=12345, groups=()):
    """Within the block this process is another user, for what files it may read and write.

    Only what is imported already can be used: that user may not read the interpreter's files.
    """
    if os.name != "posix" or os.getuid() != 0:
        pytest.skip("only root can become another user")
    own = os.getgroups()
    os.setgroups(groups)
    os.setegid(groups[0] if groups else number)
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(own)


@pytest.fixture
def public(monkeypatch):
    """A folder that other users reach, as they do not those of pytest, and may not write to."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with monkeypatch.context() as inside:
            inside.chdir(folder)
            yield Path(folder)


@pytest.fixture
def user():
    """Sets what a user exports, in this process; all is as it was when the test ends."""
    import mlflow

    before = dict(os.environ)
    yield lambda **variables: os.environ.update(variables)
    mlflow.set_tracking_uri(None)
    os.environ.clear()
    os.environ.update(before)
