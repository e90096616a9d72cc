"""The server of server/: nginx, PostgreSQL and MLflow, started by its one command, trained through.

The object store is moto: it speaks S3, and keeps nothing.

Root runs the server under the accounts of its page, which the tests make, as it says there. They
start one of the two servers as root and one as a user; without root, both as the user at hand.
"""

import contextlib
import fcntl
import hashlib
import http.client
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

import boto3
import pytest
import requests
import trustme
import werkzeug.serving
import yaml
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from conftest import ROOT, Finished, clean_environment, free_port, run
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

SERVER = ROOT / "server"
PAGE = (SERVER / "README.md").read_text()
COMPOSE = yaml.safe_load((SERVER / "compose.yaml").read_text())
sys.path.insert(0, str(SERVER))
serve_module = importlib.import_module("serve")
processes_module = importlib.import_module("processes")

EXPERIMENTS, MODELS = "2.0/mlflow/experiments", "2.0/mlflow/registered-models"
RUNS, VERSIONS = "2.0/mlflow/runs/create", "2.0/mlflow/model-versions/create"

BUCKET = "mlflow"
AWS = {
    "AWS_ACCESS_KEY_ID": "test-access",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def postgres_programs():
    return sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


AS_ROOT = os.geteuid() == 0


def python_for_everybody():
    """An interpreter that every account may run: the system's, where root's lies in its home."""
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        with contextlib.suppress(OSError):
            account = {"user": 65534, "group": 65534, "extra_groups": []} if AS_ROOT else {}
            if subprocess.run([python, "-c", ""], capture_output=True, **account).returncode == 0:
                return python
    return None


FOR_EVERYBODY = python_for_everybody()
PYTHON = FOR_EVERYBODY or sys.executable
needs_servers = pytest.mark.skipif(
    not (Path("/usr/sbin/nginx").exists() and postgres_programs() and FOR_EVERYBODY)
    and "REQUIRE_SERVERS" not in os.environ,
    reason="nginx or PostgreSQL is missing (apt-get install nginx postgresql), or an interpreter "
    "that the accounts may run as which root runs them; .ci/run sees to both and sets "
    "REQUIRE_SERVERS, with which this fails",
)


def environment(**variables):
    packages = {} if sys.executable == PYTHON else {"PYTHONPATH": sysconfig.get_path("purelib")}
    return clean_environment(**packages | variables)


def as_account(name):
    """Popen's options for a process under that account, which the page says how to make."""
    if not AS_ROOT:
        return {}
    if subprocess.run(["getent", "passwd", name], stdout=subprocess.DEVNULL).returncode:
        assert f"useradd --system {name}" in PAGE
        subprocess.run(["useradd", "--system", name], check=True)
    return processes_module.account(name)


def serve(*arguments, code=0, cwd="/", **variables):
    process = subprocess.run(
        list(map(str, [PYTHON, SERVER / "serve.py", *arguments])),
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    finished = Finished(process)
    assert finished.code == code, finished.out + finished.err
    return finished


class Deployment:
    """`serve.py start` as a process. `variables` is what its `export` lines set."""

    def __init__(self, folder, store=None, flags=(), account=None):
        self.folder, self.account = folder, account or {}
        self.port, self.store_port = free_port(), free_port()
        self.arguments = ["--port", self.port, "--store_port", self.store_port, *flags]
        if store:
            self.arguments += ["--artifacts", f"s3://{BUCKET}", "--store", store]
        self.process, self.starts = None, 0

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.stop()

    @property
    def uri(self):
        return f"https://127.0.0.1:{self.port}"

    @property
    def printed(self):
        return (self.folder.parent / "printed.txt").read_text()

    def start(self):
        program = SERVER / "serve.py"
        if self.account:  # the project's folder may be root's alone
            program = self.folder.parent / "program" / "serve.py"
            shutil.copytree(SERVER, program.parent, dirs_exist_ok=True)
        command = [PYTHON, program, "start", "--folder", self.folder]
        with (self.folder.parent / "printed.txt").open("a") as output:
            self.process = subprocess.Popen(
                list(map(str, [*command, *self.arguments])),
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=environment(**AWS, MLFLOW_WORKSPACE="of-a-client"),
                start_new_session=True,
                cwd="/",
                **self.account,
            )
        self.starts += 1
        while self.printed.count("Ctrl-C stops") < self.starts:
            assert self.process.poll() is None, self.printed
            time.sleep(0.1)

    def stop(self):
        """Stop it as systemd does. (What a script starts in the background ignores SIGINT.)"""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(timeout=60) == 0, self.printed
        assert self.processes() == []

    def children(self, name):
        """The ids of the programs that serve.py has started, by a word of their command lines."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = map(int, path.read_text().split())
        return [pid for pid in found if name in Path(f"/proc/{pid}/cmdline").read_text()]

    def processes(self):
        """The command lines of all that runs in the folder."""
        lines = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # ended meanwhile
                lines.append(path.read_bytes().replace(b"\0", b" ").decode())
        return [line for line in lines if str(self.folder) in line]

    @property
    def variables(self):
        """What a shell has after the printed `export` lines."""
        exports = "\n".join(re.findall("^export .*$", self.printed, flags=re.MULTILINE))
        names = set(re.findall(r"^export (\w+)=", exports, flags=re.MULTILINE))
        environment = subprocess.check_output(["bash", "-ec", f"{exports}\nenv -0"], text=True)
        pairs = [line.split("=", 1) for line in environment.split("\0") if line]
        return {name: value for name, value in pairs if name in names}

    def key(self, name="admin"):
        return (self.folder / "keys" / name).read_text().strip()

    def status(self, method="GET", path="/version", key=None, **options):
        headers = {"X-Api-Key": key} if key else {}
        options = {"headers": headers, "verify": self.folder / "ca.pem", "timeout": 60} | options
        return requests.request(method, self.uri + path, **options).status_code

    def ask(self, name, method, path, headers=None, **options):
        """What MLflow answers the owner of a key; `path` as in "2.0/mlflow/runs/create"."""
        headers = {"X-Api-Key": self.key(name)} | (headers or {})
        options = {"verify": self.folder / "ca.pem", "timeout": 60} | options
        return requests.request(method, f"{self.uri}/api/{path}", headers=headers, **options)

    def sql(self, query):
        command = ["psql", "-h", self.folder / "database", "-U", "mlflow", "-d", "mlflow"]
        return subprocess.check_output([*command, "-tAc", query], text=True, cwd="/").strip()

    def log(self, name):
        return (self.folder / "logs" / name).read_text()


@contextlib.contextmanager
def short_path():
    """A folder whose path leaves room for a socket's name; the accounts exist and may enter it."""
    for name in (serve_module.MLFLOW, serve_module.GATEWAY):
        as_account(name)
    memory = Path("/dev/shm")  # where a database need not wait for a disk
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2e9
    with tempfile.TemporaryDirectory(prefix="mlflow-", dir=memory if roomy else "/tmp") as path:
        os.chmod(path, 0o755)
        yield Path(path)


@pytest.fixture
def short_folder():
    with short_path() as folder:
        yield folder


@pytest.fixture
def server_folder(short_folder):
    return short_folder / "server"


class Silent(werkzeug.serving.WSGIRequestHandler):
    def log(self, *arguments):
        pass


class Request(NamedTuple):
    """What reached the store."""

    method: str
    path: str
    size: int
    key: str | None  # of the gateway, by whatever header; it should not come along
    signed: bool  # by a presigned address that is valid for this host, path and query


def is_signed(environ):
    """Whether the address is a valid presigned one: moto takes any, so AWS's own code is asked."""
    query = dict(parse_qsl(environ["QUERY_STRING"]))
    if "X-Amz-Signature" not in query:
        return False
    signature = query.pop("X-Amz-Signature")
    key = Credentials(AWS["AWS_ACCESS_KEY_ID"], AWS["AWS_SECRET_ACCESS_KEY"])
    signer = S3SigV4QueryAuth(key, "s3", AWS["AWS_DEFAULT_REGION"], query["X-Amz-Expires"])
    url = f"https://{environ['HTTP_HOST']}{environ['PATH_INFO']}"
    request = AWSRequest(environ["REQUEST_METHOD"], url, params=query)
    request.context["timestamp"] = query["X-Amz-Date"]
    text = signer.string_to_sign(request, signer.canonical_request(request))
    return signer.signature(text, request) == signature


def bearer_token(environ):
    scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    return token if scheme == "Bearer" else None


@pytest.fixture(scope="module")
def store():
    """(a store's HOST:PORT, an S3 client of it, the requests that reach it)."""
    application, seen = DomainDispatcherApplication(create_backend_app), []

    def recorder(environ, start_response):
        request = Request(
            environ["REQUEST_METHOD"],
            environ["PATH_INFO"],
            int(environ.get("CONTENT_LENGTH") or 0),
            environ.get("HTTP_X_API_KEY") or bearer_token(environ),
            is_signed(environ),
        )
        seen.append(request)
        return application(environ, start_response)

    port = free_port()
    server = werkzeug.serving.make_server(
        "127.0.0.1", port, recorder, threaded=True, request_handler=Silent
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    credentials = {name.lower(): value for name, value in AWS.items() if "REGION" not in name}
    client = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1", **credentials
    )
    client.create_bucket(Bucket=BUCKET)
    yield f"127.0.0.1:{port}", client, seen
    server.shutdown()
    thread.join()


# An institute's server: one for all that its page promises, because to start one takes long


@pytest.fixture(scope="module")
def deployment(store):
    """Started by a user, whom the tests give the name of MLflow's account if they run as root."""
    address, _, _ = store
    with short_path() as folder:
        if account := as_account(serve_module.MLFLOW):
            os.chown(folder, account["user"], account["group"])
        with Deployment(folder / "server", address, account=account) as deployment:
            yield deployment


@pytest.mark.slow
@needs_servers
def test_training_on_the_server(deployment, store, tmp_path):
    """The project's script, with what the server printed: TLS verified, metadata and files kept."""
    _, s3, seen = store
    trained = run(
        "train_mnist_mlflow.py",
        *("--dataset", "digits", "--register"),
        cwd=tmp_path,
        **deployment.variables,
    )
    words = "(from MLFLOW_TRACKING_URI; X-Api-Key from AM_SC_API_KEY_FILE)"
    assert f"\ntracking {deployment.uri}  {words}" in trained.out
    assert deployment.key() not in trained.out + trained.err
    run_id = trained.result["run_id"]
    query = f"SELECT value FROM metrics WHERE run_uuid = '{run_id}' AND key = 'val_accuracy'"
    assert float(deployment.sql(query)) == trained.result["val_accuracy"] > 0.5
    assert deployment.sql("SELECT version FROM model_versions WHERE name = 'MNIST_CNN'") == "1"
    stored = [item["Key"] for item in s3.list_objects_v2(Bucket=BUCKET)["Contents"]]
    assert sum(f"{run_id}/artifacts/plots/confusion_matrix.png" in key for key in stored) == 1
    assert sum(key.endswith("model.pt2") for key in stored) == 1
    assert list((deployment.folder / "run" / "body").iterdir()) == []

    # The same key as a bearer token, for those who use the newer convention.
    token = {"AM_SC_API_KEY_FILE": "", "MLFLOW_TRACKING_TOKEN": deployment.key()}
    checked = run("scripts/check_connection.py", cwd=tmp_path, **deployment.variables | token)
    assert "\ncredential  bearer token from MLFLOW_TRACKING_TOKEN\n" in checked.out
    assert deployment.key() not in checked.out + checked.err
    found = checked.result
    assert found["body_limit"].startswith("16 MB pass, 17 MB do not")
    assert found["multipart"] == f"works; the parts go to 127.0.0.1:{deployment.store_port}"
    assert seen and {request.key for request in seen} == {None}  # the key stays at the gateway


# In a process of its own: importing MLflow's server sets up much that the tests have no use for.
ROUTES = """
from mlflow.server.handlers import get_endpoints
for path, _, methods in get_endpoints():
    for method in methods:
        print(method, path)
"""


@pytest.mark.slow
@needs_servers
def test_every_route_wants_a_key(deployment):
    """All routes that MLflow has, and some that it has not; nothing of it reaches MLflow."""
    command = [sys.executable, "-W", "ignore", "-c", ROUTES]
    listed = subprocess.check_output(command, env=clean_environment(), text=True)
    routes = {tuple(line.split(" ", 1)) for line in listed.splitlines()}
    routes |= {("GET", path) for path in ("/", "/health", "/version", "/static-files/index.js")}
    routes |= {("GET", "/nowhere"), ("POST", "/v1/traces"), ("POST", "/graphql"), ("HEAD", "/")}
    routes |= {("PUT", "/api/2.0/mlflow-artifacts/artifacts/x"), ("OPTIONS", "/api/2.0/mlflow")}
    assert len(routes) > 150
    before = deployment.log("mlflow.log")
    ca_bundle = deployment.folder / "ca.pem"
    with requests.Session() as session:
        for method, path in sorted(routes):
            url = deployment.uri + re.sub("[<>]", "", path)
            answer = session.request(method, url, verify=ca_bundle, timeout=60)
            assert answer.status_code == 401, (method, path)
            assert "Basic" in answer.headers["WWW-Authenticate"]
    key = deployment.key()
    for wrong in ("0" * len(key), key[:-1], f"{key}0", "admin", "-", "default", f"{key} {key}"):
        assert deployment.status(key=wrong) == 401, wrong
        assert deployment.status(headers={"Authorization": f"Bearer {wrong}"}) == 401, wrong
    for header in ("Authorization", "Api-Key", "Cookie"):
        assert deployment.status(headers={header: key}) == 401
    assert deployment.status(path=f"/version?X-Api-Key={'0' * 64}") == 401
    assert deployment.log("mlflow.log") == before
    assert deployment.status(key=key) == 200


@pytest.mark.slow
@needs_servers
def test_bodies_end_at_16_mb(deployment):
    path = "/api/2.0/mlflow-artifacts/artifacts/limit/file.bin"
    limit = 16 * 1024 * 1024
    assert deployment.status("PUT", path, key=deployment.key(), data=bytes(limit)) == 200
    assert deployment.status("PUT", path, key=deployment.key(), data=bytes(limit + 1)) == 413


# Twelve jobs that start at the same moment, as an array does, and log the same data.
ARRAY = """
import multiprocessing, sys
sys.path.insert(0, sys.argv[1])
import mlflow, numpy
from common import connection, runs
connection.connect()
experiment = mlflow.set_experiment("array")
array = numpy.arange(12.0)

def job(together):
    with mlflow.start_run(experiment_id=experiment.experiment_id):
        for number in range(5):
            dataset = mlflow.data.from_numpy(array, name=f"data {number}", digest="0" * 32)
            together.wait()
            if sys.argv[2] == "patiently":
                runs.patiently(mlflow.log_input, dataset, context="training")
            else:
                mlflow.log_input(dataset, context="training")

fork = multiprocessing.get_context("fork")
together = fork.Barrier(12, timeout=60)
jobs = [fork.Process(target=job, args=[together]) for _ in range(12)]
for process in jobs:
    process.start()
for process in jobs:
    process.join()
print(sum(process.exitcode == 0 for process in jobs))
"""


@pytest.mark.slow
@needs_servers
def test_twelve_jobs_log_the_same_data_at_once(deployment, tmp_path):
    """On PostgreSQL; without patience some of them are refused: the same row twice."""
    script = tmp_path / "jobs_at_once.py"
    script.write_text(ARRAY)
    finished = run(script, ROOT, "patiently", cwd=tmp_path, **deployment.variables)
    assert finished.out.splitlines()[-1] == "12", finished.err
    query = "SELECT count(*) FROM inputs i JOIN datasets d ON i.source_id = d.dataset_uuid JOIN "
    query += "experiments e ON d.experiment_id = e.experiment_id WHERE e.name = 'array'"
    assert deployment.sql(query) == "60"


LARGE = """
import sys
sys.path.insert(0, sys.argv[1])
import mlflow
from common import connection
connection.connect()
mlflow.set_experiment("large")
with mlflow.start_run() as run:
    mlflow.log_artifact("large.bin")  # parts begin at 10 MB: connection.connect sees to that
mlflow.artifacts.download_artifacts(
    run_id=run.info.run_id, artifact_path="large.bin", dst_path="downloaded"
)
"""


@pytest.mark.slow
@needs_servers
def test_a_large_file_goes_in_parts(deployment, store, tmp_path):
    """40 MB through a gateway that takes 16: signed addresses of the store, without the key."""
    _, _, seen = store
    script, large = tmp_path / "large.py", tmp_path / "large.bin"
    script.write_text(LARGE)
    large.write_bytes(os.urandom(40_000_000))
    before, logged = len(seen), len(deployment.log("access.log"))
    run(script, ROOT, cwd=tmp_path, **deployment.variables)
    parts = [request for request in seen[before:] if request.method == "PUT"]
    sizes = sorted(part.size for part in parts)
    assert sizes == [40_000_000 - 3 * 10 * 1024**2] + 3 * [10 * 1024**2]
    assert all(part.signed for part in parts)
    downloads = [r.signed for r in seen[before:] if r.method == "GET" and "large.bin" in r.path]
    assert downloads and all(downloads)
    created = r' admin \[\S+\] "POST /api/2.0/mlflow-artifacts/mpu/create/\S+" 200 '
    assert len(re.findall(created, deployment.log("access.log")[logged:])) == 1
    digest = hashlib.sha256(large.read_bytes()).hexdigest()
    downloaded = tmp_path / "downloaded" / "large.bin"
    assert hashlib.sha256(downloaded.read_bytes()).hexdigest() == digest

    # A witness: in one piece, the same file is refused.
    whole = {"MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false"}
    refused = run(script, ROOT, cwd=tmp_path, code=1, **deployment.variables, **whole)
    assert "413" in refused.err

    # A client that sends its key to the store as well does no harm: nginx takes it out.
    bucket = deployment.uri.replace(str(deployment.port), str(deployment.store_port))
    headers = {"X-Api-Key": deployment.key(), "Authorization": f"Bearer {deployment.key()}"}
    where = {"verify": deployment.folder / "ca.pem", "timeout": 60}
    requests.get(f"{bucket}/{BUCKET}", headers=headers, **where)
    assert seen[-1] == Request("GET", f"/{BUCKET}", 0, key=None, signed=False)


# Of the header by which the gateway names the owner of the key; MLflow reads "_" as "-".
SPELLINGS = ("X-Key-Owner", "x-key-owner", "X_Key_Owner", "X-Key_Owner", "X_KEY_OWNER")


def until(condition):
    """nginx reads its keys again, and writes its log, in a moment."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@needs_servers
def test_keys_come_and_go(deployment):
    folder, server = deployment.folder, deployment.process.pid
    made = serve("add-key", "alice", "--folder", folder)
    key = deployment.key("alice")
    assert key not in made.out + made.err
    assert (folder / "keys" / "alice").stat().st_mode & 0o777 == 0o600
    requests.post(
        f"{deployment.uri}/api/2.0/mlflow/experiments/create",
        json={"name": "of an institute"},
        headers={"X-Api-Key": deployment.key()},
        verify=folder / "ca.pem",
        timeout=60,
    ).raise_for_status()
    assert deployment.status(key=key) == 200  # at once: add-key has tried it
    line = re.compile(r'^\S+ alice \[\S+\] "GET /version" 200 ', re.M)
    until(lambda: line.search(deployment.log("access.log")))  # written after the answer

    # The same key as a bearer token, as the bare `mlflow` command sends it; as a password.
    bearer = {"headers": {"Authorization": f"Bearer {key}"}}
    assert deployment.status(**bearer) == 200
    assert deployment.status(path="/", auth=("alice", key), headers={}) == 200
    assert deployment.status(path="/", auth=("admin", key), headers={}) == 401
    # A page of another site cannot use what the browser remembers.
    search = {"path": "/ajax-api/2.0/mlflow/experiments/search", "json": {"max_results": 1}}
    for origin, answer in ((deployment.uri, 200), ("https://elsewhere.example.org", 403)):
        browser = {"auth": ("alice", key), "headers": {"Origin": origin}}
        assert deployment.status("POST", **search, **browser) == answer
    token = {"AM_SC_API_KEY_FILE": "", "MLFLOW_TRACKING_TOKEN": key}
    command = [sys.executable, "-m", "mlflow", "experiments", "search"]
    listed = subprocess.check_output(
        command, env=clean_environment(**deployment.variables | token), text=True, cwd="/"
    )
    assert "of an institute" in listed

    assert "error: alice has a key" in serve("add-key", "alice", "--folder", folder, code=1).error
    # What lies beside the keys and is none, lets nobody in and keeps nobody from being shut out.
    keys, admin = folder / "keys", deployment.key()
    texts = {"blank": "\n", "any": "~.", "quoted": 'a" b', "short": "a" * 16, "copied": admin}
    for name, content in (texts | {'"; "': "b" * 64}).items():
        (keys / name).write_text(content)
    (keys / "0").mkdir()
    (keys / "linked").symlink_to(keys / "admin")
    os.mkfifo(keys / "pipe")
    beside = [path for path in keys.iterdir() if path.name not in ("admin", "alice")]
    assert len(beside) == 9
    said = serve("revoke-key", "alice", "--folder", folder)
    assert said.err.count("is no key, and lets nobody in") == 9
    assert said.out == "revoked  alice  nginx refuses it\n"
    assert deployment.status(key=key) == 401  # at once
    assert "alice has no key" in serve("revoke-key", "alice", "--folder", folder, code=1).error
    assert "there are: admin\n" in serve("revoke-key", "0", "--folder", folder, code=1).error
    for path in beside:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for none in ("", "a" * 64, "b" * 64, "a" * 16, "~.", 'a" b'):
        assert deployment.status(key=none) == 401, none
    assert deployment.status(**bearer) == 401
    assert deployment.status(path="/", auth=("alice", key), headers={}) == 401
    assert deployment.status(key=admin) == 200
    # Two at once: neither undoes the other.
    serve("add-key", "one", "--folder", folder)
    one = deployment.key("one")
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(
            lambda do: serve(*do, "--folder", folder), [("revoke-key", "one"), ("add-key", "two")]
        )
        assert [finished.code for finished in done] == [0, 0]
    assert deployment.status(key=one) == 401 and deployment.status(key=deployment.key("two")) == 200
    assert deployment.process.pid == server and deployment.process.poll() is None


def begun(deployment, name, request):
    """An open connection, on which the beginning of a request of that key's was sent."""
    sock = serve_module.tls_socket("127.0.0.1", deployment.port)
    sock.settimeout(20)
    sock.sendall(request.format(head=head_of(deployment, name)).encode())
    return sock


def head_of(deployment, name):
    return f"Host: 127.0.0.1:{deployment.port}\r\nX-Api-Key: {deployment.key(name)}\r\n"


def answer_on(sock, rest):
    """What comes back when the rest is sent; nothing, if the connection is closed."""
    with sock, contextlib.suppress(OSError):
        sock.sendall(rest.encode())
        return sock.recv(4096).decode()
    return ""


@pytest.mark.slow
@needs_servers
def test_a_revoked_key_is_refused_on_open_connections(deployment):
    """nginx's earlier processes know the key, and go on for minutes with what was begun."""
    folder, search = deployment.folder, "POST /api/2.0/mlflow/experiments/search HTTP/1.1\r\n"
    search += "{head}Content-Type: application/json\r\nContent-Length: 17\r\n\r\n"
    ways = {  # the beginning and the rest of a request
        "head": ("GET /version HTTP/1.1\r\n{head}", "\r\n"),
        "body": (search + '{{"max_re', 'sults":1}}'),
        "idle": ("", "GET /version HTTP/1.1\r\n{head}\r\n"),
    }
    serve("add-key", "late", "--folder", folder)
    head = head_of(deployment, "late")
    others = {way: begun(deployment, "admin", ways[way][0]) for way in ("head", "body")}
    serve("add-key", "later", "--folder", folder)  # cuts off nobody
    for way, sock in others.items():
        assert " 200 " in answer_on(sock, ways[way][1].format()), way
    socks = [(way, begun(deployment, "late", ways[way][0])) for way in ways for _ in range(2)]
    serve("add-key", "latest", "--folder", folder)  # they stay with processes that are to end
    socks += [(way, begun(deployment, "late", ways[way][0])) for way in ways for _ in range(2)]
    serve("revoke-key", "late", "--folder", folder)
    for way, sock in socks:
        assert answer_on(sock, ways[way][1].format(head=head)) == "", way
    assert deployment.status(key=deployment.key()) == 200

    # What became of its file keeps no key from being revoked.
    key = deployment.key("later")
    (folder / "keys" / "later").unlink()
    assert (
        "revoked  later  nginx refuses it" in serve("revoke-key", "later", "--folder", folder).out
    )
    assert deployment.status(key=key) == 401


@pytest.mark.slow
@needs_servers
def test_no_second_server_in_the_folder(deployment):
    error = serve("start", "--folder", deployment.folder, *deployment.arguments, code=1).error
    assert "cannot be listened on" in error
    other = ["--port", free_port(), "--store_port", free_port()]
    error = serve("start", "--folder", deployment.folder, *other, code=1).error
    assert "runs in" in error


@pytest.mark.slow
@needs_servers
def test_backup_and_restore(deployment, tmp_path):
    """The page's two commands, literally; back into the server that they come from."""
    (command,) = re.findall(r"^ *(pg_dump .*)$", PAGE, flags=re.MULTILINE)
    command = command.replace("~/mlflow-server", str(deployment.folder))
    subprocess.run(["bash", "-ec", command], cwd=tmp_path, check=True)
    listed = subprocess.check_output(["pg_restore", "-l", tmp_path / "mlflow.dump"], text=True)
    assert listed.count("TABLE DATA") > 30
    (command,) = re.findall(r"`(pg_restore -h .*?)`", PAGE)
    command = command.replace("FOLDER", str(deployment.folder))
    count = deployment.sql("SELECT count(*) FROM experiments")
    subprocess.run(["bash", "-ec", command], cwd=tmp_path, check=True, timeout=60)
    assert deployment.sql("SELECT count(*) FROM experiments") == count != "0"


@pytest.mark.slow
@needs_servers
def test_no_key_is_written_down(deployment, tmp_path):
    """Neither in a log, nor in the database, nor in what was printed."""
    key = deployment.key()
    dump = ["pg_dump", "-h", deployment.folder / "database", "-U", "mlflow", "mlflow"]
    texts = {"dump": subprocess.check_output(dump, text=True, cwd=tmp_path)}
    texts |= {path.name: path.read_text() for path in (deployment.folder / "logs").iterdir()}
    assert {"access.log", "mlflow.log", "postgres.log"} <= {n for n, text in texts.items() if text}
    for name, text in (texts | {"printed": deployment.printed}).items():
        assert key not in text, name
    assert "X-Amz-Signature" not in texts["access.log"]
    for line in deployment.processes():
        assert key not in line


def ways_to_files(server, location, experiment, headers):
    """Try each route that ends in a file on a run, a model and a trace of the experiment.

    The trace is given the location itself, the others have theirs from the experiment. Returns
    {route: (status, body)}.
    """

    def ask(method, path, **options):
        url = f"{server.uri}/{path}"
        answer = requests.request(
            method, url, headers=headers, verify=server.folder / "ca.pem", timeout=60, **options
        )
        return answer.status_code, answer.text

    def made(path, **body):
        status, text = ask("POST", f"api/{path}", json=body)
        assert status == 200, (path, text)
        return json.loads(text)

    run = made(RUNS, experiment_id=experiment)["run"]["info"]["run_id"]
    model = made("2.0/mlflow/logged-models", experiment_id=experiment, name="model")
    model = model["model"]["info"]["model_id"]
    trace = f"tr-{uuid.uuid4().hex}"
    place = {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": experiment}}
    info = {"trace_id": trace, "trace_location": place, "state": "OK"}
    info |= {"request_time": "2026-01-01T00:00:00Z"}
    made("3.0/mlflow/traces", trace={"trace_info": info})
    tag = {"key": "mlflow.artifactLocation", "value": location}
    assert ask("PATCH", f"api/3.0/mlflow/traces/{trace}/tags", json=tag)[0] == 200
    prompt = {"experiment_id": experiment, "prompt_template": "x", "model_input": "x"}
    prompt |= {"prompt_parameters": [{"key": "a", "value": "b"}], "mlflow_version": "3"}
    prompt |= {"model_parameters": [], "model_route": "x", "model_output": "x"}
    ajax, file, notes = "ajax-api/2.0/mlflow", "notes/it.txt", {"data": b"planted"}
    _, page = ask("POST", f"{ajax}/runs/create-promptlab-run", json=prompt)
    return {
        "upload": ask("POST", f"{ajax}/upload-artifact?run_uuid={run}&path={file}", **notes),
        "promptlab": (200 if '"FINISHED"' in page else 500, page),  # the answer is always 200
        "download": ask("GET", f"get-artifact?run_uuid={run}&path={file}"),
        "list": ask("GET", f"api/2.0/mlflow/artifacts/list?run_id={run}"),
        "model": ask("GET", f"{ajax}/logged-models/{model}/artifacts/files?artifact_file_path=x"),
        "models": ask("GET", f"{ajax}/logged-models/{model}/artifacts/directories"),
        "trace": ask("GET", f"{ajax}/get-trace-artifact?request_id={trace}"),
    }


def files_of(folder):
    """Where a location could lead: all but what the programs write as they go."""
    own = ("artifacts", "database", "logs", "run")
    return {path for path in folder.rglob("*") if path.relative_to(folder).parts[0] not in own}


def secret_in(folder):
    """A folder with a trace that nobody has logged."""
    (folder / "secret").mkdir(exist_ok=True)
    (folder / "secret" / "traces.json").write_text('{"spans": ["a secret"]}')
    for path in (folder / "secret", folder / "secret" / "traces.json"):
        path.chmod(0o777)  # whoever MLflow runs as
    return folder / "secret"


@pytest.mark.slow
@needs_servers
def test_no_location_leads_to_files_of_the_server(deployment):
    """With an ordinary key, without workspaces, as the user who owns the files."""
    folder, headers = deployment.folder, {"X-Api-Key": deployment.key()}

    def created(location):
        body = {"name": f"at {location}", "artifact_location": location}
        answer = deployment.ask("admin", "POST", f"{EXPERIMENTS}/create", json=body)
        return answer.json().get("experiment_id")

    # A witness: these are ways to files, where the location is the server's own.
    found = ways_to_files(deployment, "mlflow-artifacts:/0", created(None) or "0", headers)
    good = [name for name, (status, _) in found.items() if status == 200]
    assert {"upload", "promptlab", "list"} <= set(good), found
    secret = secret_in(folder)
    before, refused = files_of(folder), 0
    locations = [f"file://{secret}", f"file:{secret}", f"file://localhost{secret}", str(secret)]
    locations += ["secret", "./secret", f"FILE://{secret}", f"file:{folder}/keys/../secret"]
    locations += ["mlflow-artifacts:/../secret", f"mlflow-artifacts:/{secret}", "file:///proc/self"]
    for location in locations:
        if experiment := created(location):
            for route, (status, text) in ways_to_files(
                deployment, location, experiment, headers
            ).items():
                assert "a secret" not in text, (location, route)
                if "mlflow-artifacts" not in location:  # that is in the bucket
                    assert status != 200, (location, route, text)
                refused += 1
    assert refused >= 7 * 7
    assert files_of(folder) == before
    for name in ("database", "gateway", "keys", "logs", "run"):  # and no other account gets in
        assert (folder / name).stat().st_mode & 0o077 == 0, name


@pytest.fixture(scope="module")
def with_owners():
    """Without a store, with an institute's certificate; started by root, if root tests."""
    flags = ["--workspaces", "--owners"]
    with short_path() as path:
        folder, gateway = path / "server", path / "server" / "gateway"
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        gateway.mkdir(parents=True)
        certificate.private_key_pem.write_to_path(gateway / "server.key")
        for blob in certificate.cert_chain_pems:
            blob.write_to_path(gateway / "server.pem", append=True)
        authority.cert_pem.write_to_path(folder / "ca.pem")
        folder.chmod(0o775)  # umask 002
        serve_module.credentials.prepare(folder, "127.0.0.1")
        for name in ("ada", "grace", "alice", "array"):
            serve_module.credentials.add_key(folder, name)
        with Deployment(folder, flags=flags) as server:
            yield server


@pytest.mark.slow
@needs_servers
def test_a_server_without_a_store_and_with_an_institutes_certificate(with_owners):
    server, folder = with_owners, with_owners.folder
    assert not (folder / "ca.key").exists() and folder.stat().st_mode & 0o022 == 0
    path = "/api/2.0/mlflow-artifacts/artifacts/some/file.txt"
    assert server.status("PUT", path, key=server.key(), data=b"text") == 200
    assert (folder / "artifacts" / "some" / "file.txt").read_bytes() == b"text"
    assert server.status(path=path, key=server.key()) == 200
    assert "REQUESTS_CA_BUNDLE" not in server.printed

    assert server.variables["MLFLOW_WORKSPACE"] == "default"
    headers = {"Authorization": f"Bearer {server.key()}"}
    team = headers | {"X-MLFLOW-WORKSPACE": "team-c"}
    mlflow, made = "/api/2.0/mlflow/experiments", {"json": {"name": "of a team"}}
    # The new workspace's own location is as good, or as bad, as an experiment's.
    secret = secret_in(folder)
    before = files_of(folder)
    workspace = {"name": "team-c", "default_artifact_root": f"file://{secret}"}
    workspace = {"path": "/api/3.0/mlflow/workspaces", "json": workspace}
    assert server.status("POST", f"{mlflow}/create", headers=team, **made) == 404
    assert server.status("POST", headers=headers, **workspace) == 201
    assert server.status("POST", f"{mlflow}/create", headers=team, **made) == 200
    search = f"{mlflow}/get-by-name?experiment_name=of a team"
    assert server.status(path=search, headers=team) == 200
    assert server.status(path=search, headers=headers) == 404

    found = server.ask("admin", "GET", search.removeprefix("/api/"), team).json()["experiment"]
    assert found["artifact_location"].startswith(f"file://{secret}")
    tried = ways_to_files(server, str(secret), found["experiment_id"], team)
    assert {status for status, _ in tried.values()}.isdisjoint({200}), tried
    assert "a secret" not in str(tried) and files_of(folder) == before
    # Nor does a path below MLflow's own, or one that only looks so.
    for location in (
        f"file://{secret}",
        "mlflow-artifacts:/../secret",
        f"{folder}/artifacts/../secret",
    ):
        status, text = ways_to_files(server, location, "0", headers)["trace"]
        assert status != 200 and "a secret" not in text, location
    for path in (
        "..%2fsecret%2ftraces.json",
        "..%252fsecret%252ftraces.json",
        f"%2f{secret}/traces.json",
    ):
        for method, data in (("PUT", b"planted"), ("GET", None), ("DELETE", None)):
            url = f"2.0/mlflow-artifacts/artifacts/{path}"
            assert not server.ask("admin", method, url, data=data).ok, (method, path)
    assert files_of(folder) == before and "a secret" in (secret / "traces.json").read_text()
    found = ways_to_files(server, str(folder / "artifacts"), "0", headers)  # a witness
    assert found["upload"][0] == found["promptlab"][0] == found["list"][0] == 200, found


# Run by another account: prints which of the files it may open, which of the sockets connect to.
INTRUDER = """
import pathlib, socket, sys
for path in map(pathlib.Path, sys.stdin.read().split("\\0")):
    try:
        if str(path).endswith((".sock", ".5432")):
            socket.socket(socket.AF_UNIX).connect(str(path))
        else:
            path.open("rb")
        print(path.name)
    except PermissionError:
        pass
"""


@pytest.mark.slow
@needs_servers
def test_what_a_local_account_gets_at(with_owners):
    server, folder = with_owners, with_owners.folder
    names = {"artifacts", "database", "gateway", "keys", "logs"}
    there = {path.name for path in folder.iterdir()} - {"secret"}
    assert there == names | {"run", "ca.pem", "lock"}
    for name in names:
        assert (folder / name).stat().st_mode & 0o077 == 0, name
    assert (folder / "lock").stat().st_mode & 0o777 == 0o600
    assert (folder / "run" / "mlflow" / "basic_auth.ini").stat().st_mode & 0o777 == 0o600
    if not AS_ROOT:
        assert (folder / "run").stat().st_mode & 0o077 == 0
        pytest.skip("two users can be had by root only")

    paths = [path for path in folder.rglob("*") if not path.is_dir()]
    paths = [path for path in paths if "secret" not in path.parts]
    assert {"mlflow.sock", ".s.PGSQL.5432", "admin", "keys.conf"} <= {p.name for p in paths}

    def opened(account):
        command = [PYTHON, "-c", INTRUDER]
        text, account = "\0".join(map(str, paths)), processes_module.account(account)
        return set(
            subprocess.run(
                command, input=text, capture_output=True, text=True, check=True, cwd="/", **account
            ).stdout.splitlines()
        )

    anybody = {"ca.pem", "nginx.conf", "nginx.pid"}
    assert opened("nobody") == opened("www-data") == anybody
    code = {path.name for path in (SERVER / "inside").rglob("*") if path.is_file()}
    assert opened(serve_module.GATEWAY) - code == anybody | {"mlflow.sock"}
    of_mlflow = opened(serve_module.MLFLOW)
    assert {"mlflow.sock", ".s.PGSQL.5432", "basic_auth.ini"} <= of_mlflow
    closed = {"admin", "ada", "keys.conf", "passwords.conf", "server.key", "lock", "access.log"}
    assert not closed & of_mlflow

    running, sessions = {}, {server.process.pid, *server.children("")}  # {account: its commands}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode()
            if os.getsid(int(path.parent.name)) in sessions:
                running.setdefault(path.owner(), []).append(line)
    assert running.keys() == {"root", serve_module.MLFLOW, serve_module.GATEWAY}
    assert all("nginx" in line or "serve.py" in line for line in running["root"])
    assert all("nginx: worker" in line for line in running[serve_module.GATEWAY])


@pytest.mark.slow
@needs_servers
def test_what_one_created_another_may_read_only(with_owners):
    server = with_owners

    def ids(name):
        """What somebody's first request makes, and a run in it."""
        made = server.ask(name, "POST", f"{EXPERIMENTS}/create", json={"name": f"of {name}"})
        experiment = made.json()["experiment_id"]
        run = server.ask(name, "POST", RUNS, json={"experiment_id": experiment})
        return experiment, run.json()["run"]["info"]

    experiment, run = ids("ada")
    of_run = {"name": "ADA", "source": f"{run['artifact_uri']}/model", "run_id": run["run_id"]}
    file = run["artifact_uri"].replace("mlflow-artifacts:/", "2.0/mlflow-artifacts/artifacts/")
    assert server.ask("ada", "POST", f"{MODELS}/create", json={"name": "ADA"}).ok
    writes = [
        ("POST", RUNS, {"json": {"experiment_id": experiment}}),
        ("POST", VERSIONS, {"json": of_run}),
        ("PUT", f"{file}/notes.txt", {"data": b"text"}),
        ("POST", f"{MODELS}/alias", {"json": {"name": "ADA", "alias": "best", "version": "1"}}),
        ("POST", f"{EXPERIMENTS}/delete", {"json": {"experiment_id": experiment}}),
    ]
    reads = [
        f"{EXPERIMENTS}/get?experiment_id={experiment}",
        f"2.0/mlflow/runs/get?run_id={run['run_id']}",
        f"{MODELS}/get?name=ADA",
    ]

    def check():
        for method, path, options in writes:
            assert server.ask("grace", method, path, **options).status_code == 403, path
        for path in reads:
            assert server.ask("grace", "GET", path).status_code == 200, path
        for name in ("ada", "admin"):  # all but the deletion
            for method, path, options in writes[:-1]:
                assert server.ask(name, method, path, **options).status_code == 200, path

    check()
    ids("grace")  # may make her own
    # The experiment that was there before belongs to nobody, and the admin can change that.
    earlier = {"json": {"experiment_id": "0"}}
    grant = {"username": "grace", "resource_type": "experiment", "resource_id": "0"}
    assert server.ask("grace", "POST", RUNS, **earlier).status_code == 403
    path = "3.0/mlflow/users/permissions/grant"
    for name, code in (("grace", 403), ("admin", 200)):
        body = grant | {"permission": "EDIT"}
        assert server.ask(name, "POST", path, json=body).status_code == code
    assert server.ask("grace", "POST", RUNS, **earlier).status_code == 200

    # serve.py is killed, and nginx, which should end with it, hangs just then. Its processes answer
    # as before: who lost the key is told so, and may try again.
    key, folder = server.key("ada"), server.folder
    (nginx,) = server.children("nginx")
    os.kill(nginx, signal.SIGSTOP)
    server.process.kill()
    server.process.wait()
    try:
        error = serve("revoke-key", "ada", "--folder", folder, code=1).error
        assert "nginx has not read the keys again; what it knew of ada may still hold" in error
        assert server.key("ada") == key
        assert "runs in" in serve("upgrade", "--folder", folder, code=1).error
    finally:
        os.kill(nginx, signal.SIGCONT)
    until(lambda: server.processes() == [])  # PostgreSQL and MLflow, too
    assert serve("revoke-key", "ada", "--folder", folder).out == "revoked  ada\n"

    # After an upgrade by the page's command, with another key of the same name: the owners are the
    # same. An earlier version's maps knew no bearer tokens.
    serve("add-key", "ada", "--folder", folder)
    assert server.key("ada") != key
    assert "Updating database tables" in serve("upgrade", "--folder", folder).out
    assert server.processes() == []
    (folder / "gateway" / "passwords.conf").write_text("")
    server.start()
    check()
    assert server.status(key=key) == 401
    bearer = {"Authorization": f"Bearer {server.key('ada')}"}
    assert server.status(path=f"/api/{reads[0]}", headers=bearer) == 200


def test_copy_of_a_key_and_the_number_of_no_process(tmp_path, monkeypatch, capsys):
    """A revoked key must not come back by its copy; and -1 is every process there is."""
    credentials, keys, signals = serve_module.credentials, tmp_path / "keys", []
    credentials.prepare(tmp_path, "127.0.0.1")
    for name in ("ada", "eve"):
        credentials.add_key(tmp_path, name)
    key = (keys / "eve").read_text().strip()
    for name in ("aaa", "eve.bak"):
        (keys / name).write_text(f" {key}\n")
        os.utime(keys / name, (time.time() + 9, time.time() + 9))
    with open(keys / "large", "w") as file:
        file.truncate(2**40)
    assert credentials.keys_in(tmp_path).keys() == {"ada", "admin", "eve"}
    credentials.revoke_key(tmp_path, "eve")
    credentials.add_key(tmp_path, "grace")
    assert {path.name for path in keys.iterdir()} == {"ada", "admin", "grace", "large"}
    assert key not in (tmp_path / "gateway" / "keys.conf").read_text()

    monkeypatch.setattr(credentials.os, "kill", lambda *signal: signals.append(signal))
    (tmp_path / "run").mkdir(exist_ok=True)
    with credentials.locked(tmp_path):  # as by a server that runs
        for number in ("-1", "0", "1", "text"):
            (tmp_path / "run" / "nginx.pid").write_text(number)
            with pytest.raises(SystemExit, match="nginx has not read the keys again"):
                credentials.revoke_key(tmp_path, "ada")
    assert signals == [] and (keys / "ada").exists()


def copied_over(keys):
    os.utime(keys / "eve", (1, 1))
    shutil.copy2(keys / "eve", keys / "alf")


@pytest.mark.parametrize(
    "damage",
    [
        lambda keys: (keys / "eve").unlink(),
        lambda keys: (keys / "eve").rename(keys / ".eve"),
        lambda keys: (keys / "eve").rename(keys / "eve~"),
        lambda keys: (keys / "eve").open("a").write("# of Eve\n"),
        lambda keys: (keys / "eve").write_text("a" * 64),
        lambda keys: shutil.copy2(keys / "ada", keys / "eve"),
        lambda keys: [(keys / "eve").rename(keys / ".eve"), (keys / "eve").symlink_to(".eve")],
        copied_over,
    ],
)
def test_a_key_is_revoked_whatever_became_of_its_file(damage, tmp_path, monkeypatch):
    """nginx goes by the maps; and what is left of the file must not bring the key back."""
    credentials, keys = serve_module.credentials, tmp_path / "keys"
    credentials.prepare(tmp_path, "127.0.0.1")
    for name in ("ada", "eve"):
        credentials.add_key(tmp_path, name)
    key, tried, asked = (keys / "eve").read_text().strip(), credentials.tried, []
    damage(keys)

    def recorder(folder, name, lost, let_in):
        asked.append(key in lost)
        return tried(folder, name, lost, let_in)

    monkeypatch.setattr(credentials, "tried", recorder)
    # A server runs and nginx does not answer: the next try still knows what is to be revoked. Nor
    # does a second start, which is refused, forget what nginx knows.
    with credentials.locked(tmp_path):
        credentials.prepare(tmp_path, "127.0.0.1")
        with pytest.raises(SystemExit, match="nginx has not read the keys again"):
            credentials.revoke_key(tmp_path, "eve")
    credentials.revoke_key(tmp_path, "eve")
    assert asked == [True, True]
    assert not any(key in path.read_text() for path in keys.iterdir() if path.is_file())
    for name in ("keys.conf", "passwords.conf"):
        assert key not in (tmp_path / "gateway" / name).read_text()
    credentials.prepare(tmp_path, "127.0.0.1")
    assert key not in (tmp_path / "gateway" / "keys.conf").read_text()
    assert "admin" in credentials.keys_in(tmp_path)
    with pytest.raises(SystemExit, match="eve has no key"):
        credentials.revoke_key(tmp_path, "eve")


def test_a_copy_does_not_take_a_key_over(short_folder):
    """It has the same time, and in which order files are listed is left to chance."""
    credentials, keys = serve_module.credentials, short_folder / "keys"
    credentials.prepare(short_folder, "127.0.0.1")
    for number in range(20):
        shutil.copy2(keys / "admin", keys / f"copy{number}")
    assert credentials.keys_in(short_folder).keys() == {"admin"}


def test_prepare_waits_for_who_revokes_a_key(tmp_path):
    """It would write the maps from what it read before."""
    credentials = serve_module.credentials
    credentials.prepare(tmp_path, "127.0.0.1")
    with credentials.changing(tmp_path):
        other = threading.Thread(target=credentials.prepare, args=(tmp_path, "127.0.0.1"))
        other.start()
        other.join(0.5)
        assert other.is_alive()
    other.join(30)
    assert not other.is_alive()


@pytest.mark.skipif(not AS_ROOT, reason="without root there are no other accounts")
def test_prepare_names_the_other_owner_of_a_folder(short_folder):
    """Who then could have prepared it, and gets at the keys that root makes there."""
    theirs, ours = short_folder / "theirs", short_folder / "ours"
    (theirs / "keys").mkdir(parents=True)
    (ours / "keys").mkdir(parents=True)
    for path in (theirs, theirs / "keys", ours / "keys"):
        shutil.chown(path, "nobody")
    for folder, count in ((theirs, 2), (ours, 1), (short_folder / "new", 0)):
        said = serve("prepare", "--folder", folder).err
        assert len(re.findall(r"^warning: \S+ belongs to nobody, who can", said, re.M)) == count


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_key_is_taken_back_if_add_key_is_stopped(number, code, tmp_path):
    """While it waits for an nginx that does not answer; `sleep` is in its place."""
    credentials, keys = serve_module.credentials, tmp_path / "keys"
    credentials.prepare(tmp_path, "127.0.0.1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "nginx.conf").write_text(f"listen 127.0.0.1:{free_port()} ssl;")
    maps = [tmp_path / "gateway" / name for name in ("keys.conf", "passwords.conf")]
    before = [path.read_text() for path in maps]
    sleeps = subprocess.Popen(["sleep", "60"])
    (tmp_path / "run" / "nginx.pid").write_text(f"{sleeps.pid}\n")
    command = [PYTHON, SERVER / "serve.py", "add-key", "eve", "--folder", tmp_path]
    with credentials.locked(tmp_path):  # as by a server that runs
        adding = subprocess.Popen(
            list(map(str, command)), env=environment(), stderr=subprocess.PIPE, text=True
        )
        assert sleeps.wait(timeout=30) == -signal.SIGHUP  # so it waits now
        assert (keys / "eve").exists() and [path.read_text() for path in maps] != before
        adding.send_signal(number)
        said = adding.communicate(timeout=30)[1]
    assert (adding.returncode, said) == (code, "")
    assert [path.name for path in keys.iterdir()] == ["admin"]
    assert [path.read_text() for path in maps] == before


@pytest.mark.slow
@needs_servers
def test_nobody_becomes_somebody_else(with_owners):
    server, ada = with_owners, with_owners.key("ada")

    def who(name, headers):
        user = server.ask(name, "GET", "2.0/mlflow/users/current", headers=headers).json()["user"]
        return user["username"], user["is_admin"]

    assert who("admin", {}) == ("admin", True)
    passwords = ("password1234", ada)
    basic = [requests.auth._basic_auth_str("admin", password) for password in passwords]
    claims = [{name: "admin"} for name in SPELLINGS]
    claims += [{name: one} for name in ("Authorization", "X-MLflow-Authorization") for one in basic]
    claims += [
        {"Connection": "X-Key-Owner"},
        {"X-Forwarded-User": "admin"},
        {"Cookie": "user=admin"},
    ]
    for claim in claims:
        assert who("ada", claim) == ("ada", False), claim
    for claim in claims:  # and none is a key
        assert server.status(headers=claim) == 401, claim

    # Neither through MLflow's own pages and calls for users.
    new = {"username": "eve", "password": "0123456789ab"}
    for method, path, options in [
        ("POST", "users/create", {"json": new}),
        ("POST", "users/create-ui", {"data": new}),
        ("PATCH", "users/update-admin", {"json": {"username": "ada", "is_admin": True}}),
        ("PATCH", "users/update-password", {"json": new | {"username": "admin"}}),
        ("DELETE", "users/delete", {"json": {"username": "admin"}}),
    ]:
        assert server.ask("ada", method, f"2.0/mlflow/{path}", **options).status_code == 403, path
    assert server.status(path="/signup", key=ada) == 403
    assert server.ask("admin", "POST", "2.0/mlflow/users/create", json=new).ok
    for auth in ((new["username"], new["password"]), ("admin", "password1234")):
        assert server.status(auth=auth, headers={}) == 401  # a password opens nothing

    # Past the gateway there is no header, and no way in.
    named = [(None, 401), ("", 401), ("-", 401), ("ada,admin", 401), ("ada", 200)]
    for name, code in named:
        headers = {} if name is None else {"X-Key-Owner": name}
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        own = server.folder / "run" / "mlflow"
        connection.sock = serve_module.unix_socket(own / "mlflow.sock")
        connection.request("GET", "/api/2.0/mlflow/users/current", headers=headers)
        assert connection.getresponse().status == code, headers
        connection.close()


@pytest.mark.slow
@needs_servers
def test_a_new_key_at_several_workers_at_once(with_owners):
    server = with_owners

    def create(number):
        body = {"name": f"job {number}"}
        return server.ask("array", "POST", f"{EXPERIMENTS}/create", json=body).status_code

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(create, range(8))) == [200] * 8
    assert server.sql("SELECT count(*) FROM users WHERE username = 'array'") == "1"


@pytest.mark.slow
@needs_servers
def test_a_workspace_is_opened_by_the_admin(with_owners, tmp_path):
    """By the page's Python, literally."""
    server = with_owners
    workspace = {"name": "team-b"}
    assert server.ask("grace", "POST", "3.0/mlflow/workspaces", json=workspace).status_code == 403
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S)
    assert '"alice"' in block and '"team-a"' in block
    assert server.ask("alice", "GET", "2.0/mlflow/users/current").ok

    team, made = {"X-MLFLOW-WORKSPACE": "team-a"}, {"json": {"name": "of a team"}}
    token = {"AM_SC_API_KEY_FILE": "", "MLFLOW_TRACKING_TOKEN": server.key()}
    script = tmp_path / "open_workspace.py"
    script.write_text(block)
    run(script, cwd=tmp_path, **server.variables | token)
    search = f"{EXPERIMENTS}/get-by-name?experiment_name=of the admin"
    of_admin = {"json": {"name": "of the admin"}}
    assert server.ask("admin", "POST", f"{EXPERIMENTS}/create", team, **of_admin).ok
    for name, code in (("grace", 403), ("alice", 200)):
        assert server.ask(name, "POST", f"{EXPERIMENTS}/create", team, **made).status_code == code
        assert server.ask(name, "GET", search, team).status_code == code


# Without starting anything


def environment_of(service):
    return COMPOSE["services"][service].get("environment", {})


def option_names(words):
    return {word.split("=")[0] for word in map(str, words) if word.startswith("--")}


def test_compose_and_native_run_the_same():
    """The same templates, filled in with the same names; MLflow with the same options."""
    source = (SERVER / "serve.py").read_text()
    templates = {path.name: path.read_text() for path in SERVER.glob("*.template")}
    assert set(templates) == {"nginx.conf.template", "store.conf.template"}
    used = {name for text in templates.values() for name in re.findall(r"\$\{(\w+)\}", text)}
    native = set(re.findall(r'"(GATEWAY_\w+)":', source))
    nginx = COMPOSE["services"]["nginx"]
    containers = {name for name in environment_of("nginx") if name.startswith("GATEWAY_")}
    assert used == native == containers
    assert not re.findall(r"\$GATEWAY", "".join(templates.values()))  # envsubst would take it too
    mounted = {volume.split(":")[0].removeprefix("./") for volume in nginx["volumes"]}
    assert set(templates) <= mounted

    mlflow_options = option_names(COMPOSE["services"]["mlflow"]["command"])
    body = inspect.getsource(serve_module.start_mlflow)
    natively = set(re.findall(r'"(--[a-z-]+)"', body))
    only_natively = {"--uvicorn-opts", "--app-name"}
    assert natively - only_natively == mlflow_options - {"--host", "--port"}
    assert len(natively) == 7
    settings = environment_of("mlflow")
    assert serve_module.MLFLOW_SETTINGS.items() <= settings.items()
    assert set(settings) - set(serve_module.MLFLOW_SETTINGS) == set(
        re.findall(r'settings \|= \{"(\w+)"', body)
    )


def test_compose_publishes_nginx_only_and_holds_no_password(short_folder):
    published = [name for name, service in COMPOSE["services"].items() if "ports" in service]
    assert published == ["nginx"]
    for name, service in COMPOSE["services"].items():
        assert "healthcheck" in service, name
        tag = service["image"].partition(":")[2]
        assert tag not in ("", "latest") or "build" in service, name
    text = (SERVER / "compose.yaml").read_text()
    variables = set(re.findall(r"\$\{(\w+):\?\}", text))
    assert len(re.findall(r"\$", text)) == len(re.findall(r"\$\{\w+:\?\}", text))  # no default

    one, two = short_folder / "one", short_folder / "two"
    serve("prepare", "--folder", one, "--host", "mlflow.example.org", "--port", "443")
    files = {path.name: path for path in one.glob("*.env")}
    made = dict(line.split("=", 1) for line in files["compose.env"].read_text().splitlines())
    assert set(made) == variables
    assert made["SERVER_AUTHORITY"] == "mlflow.example.org"
    assert made["SERVER_WORKSPACES"] == "false"
    asked = {
        Path(service["env_file"]).name: name
        for name, service in COMPOSE["services"].items()
        if "env_file" in service
    }
    assert set(asked) == set(files) - {"compose.env"}
    secrets = {}
    for name in asked:
        assert files[name].stat().st_mode & 0o077 == 0
        secrets |= dict(line.split("=", 1) for line in files[name].read_text().splitlines())
    assert secrets["PGPASSWORD"] == secrets["POSTGRES_PASSWORD"] and len(secrets["PGPASSWORD"]) > 40
    assert secrets["AWS_SECRET_ACCESS_KEY"] == secrets["ROOT_SECRET_ACCESS_KEY"]
    before = files["postgres.env"].read_text()
    serve("prepare", "--folder", one, "--host", "mlflow.example.org", "--port", "443")
    assert files["postgres.env"].read_text() == before  # the database was made with it
    serve("prepare", "--folder", two, "--workspaces")
    assert "SERVER_WORKSPACES=true\n" in (two / "compose.env").read_text()
    assert (two / "postgres.env").read_text() != before
    chain = ["openssl", "verify", "-x509_strict", "-verify_hostname", "mlflow.example.org"]
    chain += ["-CAfile", one / "ca.pem", one / "gateway" / "server.pem"]
    subprocess.run(chain, check=True)


def test_docker_compose_accepts_the_file(tmp_path):
    compose = ["docker", "compose"]
    if not shutil.which("docker") or subprocess.run([*compose, "version"]).returncode:
        pytest.skip("no docker compose here")
    serve("prepare", "--folder", tmp_path / "server", "--host", "mlflow.example.org")
    files = ["--env-file", tmp_path / "server" / "compose.env", "-f", SERVER / "compose.yaml"]
    subprocess.run([*compose, *files, "config", "-q"], check=True)
    assert subprocess.run([*compose, "-f", SERVER / "compose.yaml", "config", "-q"]).returncode


def test_versions_are_those_of_the_tests():
    """What a container installs is among what the tests install, and MLflow one that they allow."""
    pinned = dict(
        line.split("==")
        for line in (SERVER / "requirements.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    assert set(pinned) == {"mlflow", "psycopg2-binary", "boto3", "Flask-WTF"}
    for_tests = (ROOT / "tests" / "requirements.txt").read_text()
    others = {"psycopg2-binary", "boto3", "flask-wtf"}
    assert others <= set(re.findall(r"^[\w-]+", for_tests, flags=re.M))
    lowest = re.search(r"^mlflow>=([\d.]+)", (ROOT / "requirements.txt").read_text(), flags=re.M)
    assert tuple(map(int, pinned["mlflow"].split("."))) >= tuple(map(int, lowest[1].split(".")))
    recipe = (SERVER / "Dockerfile").read_text()
    assert "COPY inside /opt/inside\nENV PYTHONPATH=/opt/inside\n" in recipe
    assert "COPY requirements.txt /tmp/requirements.txt" in recipe
    assert "pip install --no-cache-dir -r /tmp/requirements.txt" in recipe


def commands_of_the_page():
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines()]


def test_commands_of_the_page():
    """Each is one that a test runs, or is compared with what does the same elsewhere."""
    ci, compose_header = (ROOT / ".ci" / "run").read_text(), (SERVER / "compose.yaml").read_text()
    compose = "docker compose --env-file /srv/mlflow/compose.env -f server/compose.yaml "
    subcommands, compared = set(), 0
    for line in commands_of_the_page():
        if line.startswith("python server/serve.py "):
            arguments = line.removeprefix("python server/serve.py ").split()
            subcommands.add(serve_module.build_parser().parse_args(arguments).command)
        elif line.startswith(compose):
            action = line.removeprefix(compose).split()
            assert action[0] in ("up", "exec", "build", "run")
            if action[0] == "exec":
                assert action[1] in COMPOSE["services"]
            if action[0] == "run":  # the tables that are changed are those that MLflow opens
                assert (
                    f"--backend-store-uri={action[-1]}" in COMPOSE["services"]["mlflow"]["command"]
                )
        elif line.startswith("sudo apt-get install"):
            packages = set(line.split()[4:]) - {"python3-venv"}
            assert packages == {"nginx", "postgresql", "openssl"}
            assert "--no-install-recommends nginx postgresql openssl shellcheck\n" in ci
        else:
            assert line in (
                "python3 -m venv venv && . venv/bin/activate",
                "pip install -r server/requirements.txt",
                "python server/local.py start",  # tests/test_guides.py
                "export AWS_ACCESS_KEY_ID=<access key> AWS_SECRET_ACCESS_KEY=<secret key>",
            ) or line.startswith("pg_dump "), line
        compared += 1
    assert compared >= 15
    assert subcommands == {"start", "prepare", "upgrade", "add-key", "revoke-key"}
    header = re.findall(r"^#     (.*)$", compose_header, flags=re.MULTILINE)
    assert len(header) == 2 and set(header) <= set(commands_of_the_page())


def test_help_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", SERVER / "serve.py", "start", "--help"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = set(re.findall(r"\| +(\w+)", process.stderr))
    assert "argparse" in imported
    assert not imported & {"mlflow", "boto3", "botocore", "requests", "numpy"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["start", "--folder", "a b"], 2, "must not hold blanks"),
        (["start", "--folder", "x" * 120], 2, "too long a path"),
        (["start", "--folder", "x", "--artifacts", "s3://mlflow"], 2, "go together"),
        (["start", "--folder", "x", "--store", "https://host"], 2, "must be HOST:PORT"),
        (["start", "--folder", "x", "--port", "65536"], 2, "must be a port, 1 to 65535"),
        (["prepare", "--folder", "x", "--store_port", "0"], 2, "must be a port, 1 to 65535"),
        (["add-key", "a b", "--folder", "x"], 2, "must be up to 32 letters"),
        (["add-key", "../alice", "--folder", "x"], 2, "must be up to 32 letters"),
        (["add-key", "alice", "--folder", "x"], 1, "is not the folder of a server"),
        (["revoke-key", "alice", "--folder", "x"], 1, "is not the folder of a server"),
        (["upgrade", "--folder", "x"], 1, "is not the folder of a server"),
    ],
)
def test_mistakes_are_said_in_a_sentence(arguments, code, message, short_folder):
    finished = serve(*arguments, code=code, cwd=short_folder)
    assert message in finished.error
    assert "Traceback" not in finished.err
    assert list(short_folder.iterdir()) == []


def test_local_py_on_windows_says_what_to_do_instead():
    """There is no fcntl there, nor pwd and grp."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('fcntl', 'grp', 'pwd')); "
        f"sys.path.insert(0, {str(SERVER)!r}); import local; local.main(sys.argv[1:])"
    )
    for arguments, said in (
        (["start", "--port", "5001"], "python -m mlflow server --backend-store-uri sqlite:///"),
        (["start", "--default-artifact-root", "a b"], '--artifacts-destination "a b" --host'),
        (["stop"], "Ctrl-C ends"),
    ):
        command = [sys.executable, "-c", code, *arguments]
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.returncode == 1 and process.stdout == ""
        what, hint = process.stderr.splitlines()
        assert what.startswith("error: Windows ") and hint.startswith("hint:  ") and said in hint
    # What it prints is what is started elsewhere.
    local = importlib.import_module("local")
    printed = local.mlflow_server(local.build_parser().parse_args(["start", "--port", "5001"]))
    assert printed[:3] == ["-m", "mlflow", "server"] and printed[-4:-2] == ["--port", "5001"]


def test_local_py_says_what_is_wrong(tmp_path):
    for text in ("", "text", "9" * 30):
        (tmp_path / "mlflow-server-5001.pid").write_text(text)
        error = run(SERVER / "local.py", "stop", "--port", "5001", cwd=tmp_path, code=1).error
        assert "no server on port 5001 was started from this folder" in error
    assert list(tmp_path.iterdir()) == []
    for port in ("65536", "-1", "a"):
        refused = run(SERVER / "local.py", "start", f"--port={port}", cwd=tmp_path, code=2)
        assert f"must be a port, 1 to 65535, not '{port}'" in refused.err


# What is sent instead of being sent; a test that a guard is missing must not end the machine.
STOP = """
import os, sys
os.kill = os.killpg = lambda *signal: print("signal", *signal)
sys.path.insert(0, sys.argv.pop(1))
import local
local.main(["stop", "--port", "5001"])
"""


@pytest.mark.parametrize("text", ["0", "1", "-1", "text", "", "9" * 30])
def test_local_py_signals_no_group_that_it_did_not_start(text, tmp_path):
    path = tmp_path / "mlflow-server-5001.pid"
    path.write_text(text)
    with path.open() as file:  # as by a server that runs
        fcntl.flock(file, fcntl.LOCK_EX)
        command = [sys.executable, "-c", STOP, str(SERVER)]
        stopped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (stopped.returncode, stopped.stdout) == (1, "")
    assert "error: no server on port 5001 was started from this folder" in stopped.stderr
    assert len(stopped.stderr.splitlines()) == 2


@pytest.mark.parametrize("name", ["pid", "log"])
def test_local_py_follows_nothing_that_others_put_there(name, tmp_path):
    """In a folder where they may write, as /tmp."""
    port = free_port()
    target, path = tmp_path / "precious", tmp_path / f"mlflow-server-{port}.{name}"
    target.write_text("12345")

    def of_another():
        path.write_text("12345")
        shutil.chown(path, "nobody")

    plants = [lambda: path.symlink_to(target), lambda: path.hardlink_to(target), path.mkdir]
    plants += [lambda: os.mkfifo(path)] + [of_another] * AS_ROOT
    for plant in plants:
        plant()
        for command in ("start", "stop") if name == "pid" else ("start",):
            arguments = (SERVER / "local.py", command, "--port", port)
            finished = run(*arguments, cwd=tmp_path, code=1, timeout=60)
            assert f"error: {path}" in finished.err and "\nhint:  it must be a" in finished.err
            assert len(finished.err.splitlines()) == 2 and finished.out == ""
        path.rmdir() if path.is_dir() else path.unlink()
        assert target.read_text() == "12345"
    assert list(tmp_path.iterdir()) == [target]  # nothing was started


def test_folders_that_cannot_be_used_are_said_in_two_lines(short_folder):
    file, one, two = (short_folder / name for name in ("file", "one", "two"))
    file.touch()
    one.mkdir()
    (one / "keys").touch()
    serve("prepare", "--folder", two)
    (two / "lock").unlink(missing_ok=True)
    (two / "lock").symlink_to(file)
    cases = [("prepare", file), ("prepare", "/proc/server"), ("prepare", one), ("add-key", two)]
    for command, folder in cases:
        name = ["eve"] if command == "add-key" else []
        error = serve(command, *name, "--folder", folder, code=1).err
        assert re.fullmatch(r"error: /\S+: .+\.\nhint:  --folder .+\n", error), error
    assert [path.name for path in (two / "keys").iterdir()] == ["admin"]


@pytest.mark.skipif(not AS_ROOT, reason="without root there are no other accounts")
def test_folder_of_another_user_is_said_in_two_lines(short_folder, server_folder):
    serve("prepare", "--folder", server_folder)
    shutil.copytree(SERVER, short_folder / "program")
    nobody = as_account("nobody")
    for command in (["add-key", "eve"], ["revoke-key", "admin"], ["prepare"]):
        command = [PYTHON, short_folder / "program" / "serve.py", *command]
        command = list(map(str, [*command, "--folder", server_folder]))
        options = {"capture_output": True, "text": True, "env": environment(), "cwd": "/"} | nobody
        finished = subprocess.run(command, **options)
        assert finished.returncode == 1 and finished.stdout == ""
        assert re.fullmatch(r"error: /\S+: .+\.\nhint:  --folder .+\n", finished.stderr)


@pytest.mark.skipif(not AS_ROOT, reason="without root there are no other accounts")
def test_an_account_that_is_missing_or_shut_out(short_folder, server_folder, monkeypatch):
    with pytest.raises(SystemExit, match="needs the account nobody-has-it.*\nhint:  useradd --sys"):
        processes_module.account("nobody-has-it")
    short_folder.chmod(0o700)
    with pytest.raises(SystemExit, match="account nobody, .* cannot get at .*\nhint:  choose a pl"):
        processes_module.account("nobody", short_folder)
    monkeypatch.setattr(serve_module, "GATEWAY", "nobody-has-it")
    with pytest.raises(SystemExit, match="(needs the account nobody-has-it|cannot get at)"):
        serve_module.main(["start", "--folder", str(server_folder)])
    assert not server_folder.exists()


def test_owners_need_flask_wtf(monkeypatch, server_folder):
    monkeypatch.setitem(sys.modules, "flask_wtf", None)
    with pytest.raises(SystemExit, match="Flask-WTF, which is not installed.\nhint:  pip install"):
        serve_module.main(["start", "--folder", str(server_folder), "--owners"])
    assert not server_folder.exists()


@pytest.mark.slow
@needs_servers
def test_what_reaches_mlflow(server_folder):
    """nginx alone, in front of a socket on which something else than MLflow listens."""
    seen = []

    def recorder(environ, start_response):
        seen.append(environ)
        start_response("200 OK", [])
        return [b"recorded"]

    ports = ["--port", str(free_port()), "--store_port", str(free_port())]
    words = ["start", "--folder", str(server_folder), *ports]
    args = serve_module.build_parser().parse_args(words)
    serve_module.credentials.prepare(args.folder, args.host)
    for name in ("logs", "run", "run/mlflow"):
        (server_folder / name).mkdir()
    key = (server_folder / "keys" / "admin").read_text().strip()
    with (
        serve_module.credentials.locked(server_folder) as lock,
        serve_module.Processes(server_folder, server_folder / "logs", lock) as processes,
    ):
        serve_module.start_nginx(args, processes)
        path = server_folder / "run" / "mlflow" / "mlflow.sock"
        upstream = werkzeug.serving.make_server(
            f"unix://{path}", 0, recorder, request_handler=Silent
        )
        path.chmod(0o666)  # as uvicorn does
        thread = threading.Thread(target=upstream.serve_forever, daemon=True)
        thread.start()
        pretended = {"X-Forwarded-For": "10.1.2.3", "X-Forwarded-Proto": "http"}
        pretended |= dict.fromkeys(SPELLINGS, "somebody")
        for extra in ({"headers": {"X-Api-Key": key} | pretended}, {"auth": ("admin", key)}):
            url, ca_bundle = f"https://127.0.0.1:{args.port}/a%20b?c=d", server_folder / "ca.pem"
            answer = requests.get(url, verify=ca_bundle, timeout=60, **extra)
            assert (answer.status_code, answer.text) == (200, "recorded")
            environ = seen.pop()
            assert key not in str(environ)
            assert not {"HTTP_X_API_KEY", "HTTP_AUTHORIZATION"} & set(environ)
            assert environ["HTTP_HOST"] == f"127.0.0.1:{args.port}"
            assert environ["HTTP_X_FORWARDED_FOR"] == "127.0.0.1"
            assert environ["HTTP_X_FORWARDED_PROTO"] == "https"
            assert environ["HTTP_X_KEY_OWNER"] == "admin"
            assert (environ["PATH_INFO"], environ["QUERY_STRING"]) == ("/a b", "c=d")
        upstream.shutdown()
        thread.join()
    log = (server_folder / "logs" / "access.log").read_text()
    assert len(re.findall(r'^127.0.0.1 admin \[\S+\] "GET /a b" 200 ', log, flags=re.M)) == 2
    assert "c=d" not in log


@pytest.mark.slow
@needs_servers
def test_a_certificate_for_another_name_stops_the_start(server_folder):
    serve("prepare", "--folder", server_folder, "--host", "one.example.org")
    ports = ["--port", free_port(), "--store_port", free_port()]
    other = ["--host", "other.example.org"]
    error = serve("start", "--folder", server_folder, *ports, *other, code=1).error
    assert "clients would refuse the certificate" in error and "mismatch" in error
    assert Deployment(server_folder).processes() == []


@pytest.mark.slow
@needs_servers
def test_a_wrong_bucket_stops_the_start(server_folder, store):
    address, _, _ = store
    ports = ["--port", free_port(), "--store_port", free_port()]
    where = ["--artifacts", "s3://elsewhere", "--store", address]
    finished = serve("start", "--folder", server_folder, *ports, *where, code=1, **AWS)
    assert "error: the bucket elsewhere cannot be reached" in finished.error
    # No process is left, and the certificate and key that were made are there for the next start.
    assert Deployment(server_folder).processes() == []
    assert (server_folder / "keys" / "admin").exists()
