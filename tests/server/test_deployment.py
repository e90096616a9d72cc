"""The server of server/: nginx, PostgreSQL and MLflow, started by its one command, trained through.

The object store is moto: it speaks S3, and keeps nothing.
"""

import contextlib
import hashlib
import http.client
import importlib
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
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
from conftest import ROOT, clean_environment, free_port, run
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

SERVER = ROOT / "server"
PAGE = (SERVER / "README.md").read_text()
COMPOSE = yaml.safe_load((SERVER / "compose.yaml").read_text())
sys.path.insert(0, str(SERVER))
serve_module = importlib.import_module("serve")

BUCKET = "mlflow"
AWS = {
    "AWS_ACCESS_KEY_ID": "test-access",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def postgres_programs():
    return sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


needs_servers = pytest.mark.skipif(
    not (Path("/usr/sbin/nginx").exists() and postgres_programs())
    and "REQUIRE_SERVERS" not in os.environ,
    reason="nginx or PostgreSQL is missing (apt-get install nginx postgresql); .ci/run installs "
    "them and sets REQUIRE_SERVERS, with which this fails",
)


def serve(*arguments, code=0, cwd="/", **variables):
    return run(SERVER / "serve.py", *arguments, cwd=cwd, code=code, **variables)


class Deployment:
    """`serve.py start` as a process. `variables` is what its `export` lines set."""

    def __init__(self, folder, store=None, flags=()):
        self.folder = folder
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
        command = [sys.executable, SERVER / "serve.py", "start", "--folder", self.folder]
        with (self.folder.parent / "printed.txt").open("a") as output:
            self.process = subprocess.Popen(
                list(map(str, [*command, *self.arguments])),
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=clean_environment(**AWS, MLFLOW_WORKSPACE="of-a-client"),
                start_new_session=True,
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
    """A folder whose path leaves room for a socket's name; PostgreSQL's account may enter it."""
    with tempfile.TemporaryDirectory(prefix="mlflow-", dir="/tmp") as path:
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
    address, _, _ = store
    with short_path() as folder, Deployment(folder / "server", address) as deployment:
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
    assert trained.out.startswith(f"tracking {deployment.uri}  {words}")
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
    until(lambda: deployment.status(key=key) == 200)
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
    for name, content in (("blank", "\n"), ("any", "~."), ("quoted", 'a" b')):
        (folder / "keys" / name).write_text(content)
    (folder / "keys" / "0").mkdir()
    said = serve("revoke-key", "alice", "--folder", folder)
    assert said.err.count("holds no key, and lets nobody in") == 4
    for name in ("blank", "any", "quoted"):
        (folder / "keys" / name).unlink()
    (folder / "keys" / "0").rmdir()
    until(lambda: deployment.status(key=key) == 401)
    assert deployment.status(key="") == deployment.status(key="a" * 64) == 401
    until(lambda: deployment.status(key=key) == 401)
    assert deployment.status(**bearer) == 401
    assert deployment.status(path="/", auth=("alice", key), headers={}) == 401
    assert deployment.status(key=deployment.key()) == 200
    assert "there are: admin" in serve("revoke-key", "alice", "--folder", folder, code=1).error
    assert deployment.process.pid == server and deployment.process.poll() is None


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


@pytest.mark.slow
@needs_servers
def test_an_upgrade_keeps_what_is_stored(deployment):
    """The page's command, on a server that is stopped for it, and the same server after it."""
    created = requests.post(
        f"{deployment.uri}/api/2.0/mlflow/experiments/create",
        json={"name": "before the upgrade"},
        headers={"X-Api-Key": deployment.key()},
        verify=deployment.folder / "ca.pem",
        timeout=60,
    ).json()
    deployment.stop()
    assert "Updating database tables" in serve("upgrade", "--folder", deployment.folder).out
    assert deployment.processes() == []
    (deployment.folder / "gateway" / "passwords.conf").write_text("")  # it knew no bearer tokens
    deployment.start()
    path = f"/api/2.0/mlflow/experiments/get?experiment_id={created['experiment_id']}"
    for name, value in (("X-Api-Key", ""), ("Authorization", "Bearer ")):
        assert deployment.status(path=path, headers={name: value + deployment.key()}) == 200


@pytest.mark.slow
@needs_servers
def test_a_server_without_a_store_and_with_an_institutes_certificate(server_folder):
    authority, gateway = trustme.CA(), server_folder / "gateway"
    certificate = authority.issue_cert("127.0.0.1")
    gateway.mkdir(parents=True)
    certificate.private_key_pem.write_to_path(gateway / "server.key")
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(gateway / "server.pem", append=True)
    authority.cert_pem.write_to_path(server_folder / "ca.pem")
    with Deployment(server_folder, flags=["--workspaces"]) as deployment:
        assert not (server_folder / "ca.key").exists()
        path = "/api/2.0/mlflow-artifacts/artifacts/some/file.txt"
        assert deployment.status("PUT", path, key=deployment.key(), data=b"text") == 200
        assert (server_folder / "artifacts" / "some" / "file.txt").read_bytes() == b"text"
        assert deployment.status(path=path, key=deployment.key()) == 200
        assert "REQUESTS_CA_BUNDLE" not in deployment.printed

        assert deployment.variables["MLFLOW_WORKSPACE"] == "default"
        headers = {"Authorization": f"Bearer {deployment.key()}"}
        team = headers | {"X-MLFLOW-WORKSPACE": "team-a"}
        mlflow, made = "/api/2.0/mlflow/experiments", {"json": {"name": "of a team"}}
        workspace = {"path": "/api/3.0/mlflow/workspaces", "json": {"name": "team-a"}}
        assert deployment.status("POST", f"{mlflow}/create", headers=team, **made) == 404
        assert deployment.status("POST", headers=headers, **workspace) == 201
        assert deployment.status("POST", f"{mlflow}/create", headers=team, **made) == 200
        search = f"{mlflow}/get-by-name?experiment_name=of a team"
        assert deployment.status(path=search, headers=team) == 200
        assert deployment.status(path=search, headers=headers) == 404

        # Another account of the machine gets at nothing but the certificate of the authority.
        names = {"artifacts", "database", "gateway", "keys", "logs", "run"}
        assert {path.name for path in server_folder.iterdir()} == names | {"ca.pem", "lock"}
        for name in names:
            assert (server_folder / name).stat().st_mode & 0o007 == 0, name


EXPERIMENTS, MODELS = "2.0/mlflow/experiments", "2.0/mlflow/registered-models"
RUNS, VERSIONS = "2.0/mlflow/runs/create", "2.0/mlflow/model-versions/create"


@pytest.fixture(scope="module")
def with_owners():
    flags = ["--workspaces", "--owners"]
    with short_path() as folder, Deployment(folder / "server", flags=flags) as server:
        for name in ("ada", "grace", "alice", "array"):
            serve("add-key", name, "--folder", server.folder)
        # A page of which MLflow asks nobody's name: the keys are valid, the users not made.
        until(lambda: server.status(key=server.key("array"), path="/health") == 200)
        yield server


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

    # Another start, and another key of the same name: the owners are the same.
    server.stop()
    for action in ("revoke-key", "add-key"):
        serve(action, "ada", "--folder", server.folder)
    server.start()
    check()


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
        connection.sock = serve_module.unix_socket(server.folder / "run" / "mlflow.sock")
        connection.request("GET", "/api/2.0/mlflow/users/current", headers=headers)
        assert connection.getresponse().status == code, headers
        connection.close()
    assert (server.folder / "run").stat().st_mode & 0o007 == 0
    assert (server.folder / "run" / "basic_auth.ini").stat().st_mode & 0o777 == 0o600


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
    for name in ("logs", "run"):
        (server_folder / name).mkdir()
    key = (server_folder / "keys" / "admin").read_text().strip()
    with serve_module.Processes(server_folder, server_folder / "logs") as processes:
        serve_module.start_nginx(args, processes)
        path = server_folder / "run" / "mlflow.sock"
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
