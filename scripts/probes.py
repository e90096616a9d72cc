"""Probes of the way to a tracking server: each does one thing there and returns what it found.

scripts/check_connection.py makes lines of that. They ask through MLflow, and so meet what a
training script meets.
"""

import os
import re
import socket
import ssl
import statistics
import tempfile
import threading
import time
from email.utils import parsedate_to_datetime
from http.client import HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import requests
from cryptography import x509
from mlflow.exceptions import MlflowException

# Not documented by MLflow, whose client hides which parts of a file it sends where. If it goes,
# check_connection.py ends at its import.
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from common import connection

MB = 1_000_000
LARGEST_BODY = 64 * MB  # the search for the limit on request bodies ends there
SLOW = 8  # seconds for one upload, after which no larger one is tried
PROXY_VARIABLE = re.compile("(https?|all|no)_proxy", re.IGNORECASE)
PATIENCE = 5  # seconds for a name, for a connection, for a handshake


def proxy_variables():
    """Return the names of the variables that say something about proxies, as they are set."""
    return [name for name, value in os.environ.items() if PROXY_VARIABLE.fullmatch(name) and value]


def first_hop(uri):
    """Return (host, port) of what is connected to first: the proxy, or the server itself."""
    parts = urlsplit(connection.proxy_of(uri) or uri)
    return parts.hostname, parts.port or {"https": 443}.get(parts.scheme, 80)


def addresses(host):
    """Return the addresses of a name. Raises OSError if it has none, or none within seconds.

    In a thread that can be left behind: a resolver may try for a minute, and has no time limit.
    """
    found = []

    def look_up():
        try:
            found.extend(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not found:
        raise TimeoutError(f"no answer within {PATIENCE} s")
    if isinstance(found[0], OSError):
        raise found[0]
    return sorted({entry[4][0] for entry in found})


def tcp(host, port):
    """Return the seconds that a TCP connection takes. Raises OSError."""
    start = time.perf_counter()
    with socket.create_connection((host, port), timeout=PATIENCE):
        return time.perf_counter() - start


def certificate(uri, ca_bundle, verify=True):
    """Return (TLS version, the server's certificate), through the proxy if there is one.

    `ca_bundle` is a PEM file or a folder of them; the certificate an `x509.Certificate` of the
    package cryptography. Raises OSError: with `verify`, also if the certificate is not trusted.
    """
    folder = os.path.isdir(ca_bundle)
    context = ssl.create_default_context(
        cafile=None if folder else ca_bundle, capath=ca_bundle if folder else None
    )
    if own := os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"):
        context.load_cert_chain(own)
    if not verify:  # to say who signed a certificate that is not trusted; nothing is sent
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    server = urlsplit(uri)
    through = connection.proxy_of(uri)
    host, port = first_hop(uri)
    https = HTTPSConnection(host, port, context=context, timeout=PATIENCE)
    if through:
        headers = requests.adapters.HTTPAdapter().proxy_headers(through)
        https.set_tunnel(server.hostname, server.port or 443, headers)
    try:
        https.connect()
        return https.sock.version(), x509.load_der_x509_certificate(https.sock.getpeercert(True))
    finally:
        https.close()


def name_of(subject_or_issuer):
    """Return a certificate's subject or issuer in a few words: its common name and organisation."""
    attributes = {a.rfc4514_attribute_name: a.value for a in subject_or_issuer}
    return ", ".join(filter(None, (attributes.get("CN"), attributes.get("O")))) or "no name"


def answers(count=5):
    """Ask for an experiment `count` times, and return (median seconds, the server's clock's lead).

    The lead is in seconds, to within one, or None if the server does not tell its time.
    """
    path, seconds, lead = "/api/2.0/mlflow/experiments/search", [], None
    for _ in range(count):
        start = time.time()
        order = {"json": {"max_results": 1}, "timeout": 10}
        response = connection.request(path, "POST", checked=True, **order)
        seconds.append(time.time() - start)
        if told := response.headers.get("Date"):
            # Whole seconds, cut off: half a second is added.
            lead = parsedate_to_datetime(told).timestamp() + 0.5 - (start + seconds[-1] / 2)
    return statistics.median(seconds), lead


def new_run(name, cleanup):
    """Make the experiment `name` and a run in it; `cleanup` deletes both.

    A gateway may report an error after the server has done as it was told. So what is to be deleted
    is found by name, and an experiment that is there already is the one that was just made.
    """
    client = mlflow.MlflowClient()

    def delete_experiment():
        if experiment := client.get_experiment_by_name(name):
            client.delete_experiment(experiment.experiment_id)

    cleanup.callback(delete_experiment)
    try:
        experiment_id = client.create_experiment(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        experiment_id = client.get_experiment_by_name(name).experiment_id
    run = client.create_run(experiment_id, run_name=name)
    if not experiment_id or not run.info.run_id:
        raise MlflowException("no ids in its answers, as with error code 404")  # no MLflow
    cleanup.callback(client.delete_run, run.info.run_id)
    client.log_metric(run.info.run_id, "written", 1)
    client.set_terminated(run.info.run_id)
    return run


def artifact(run, cleanup):
    """Write a small file to the run, and read it back, both through the server if it offers that.

    Raises MlflowException if it comes back changed. `cleanup` deletes all files of the run.
    """
    client = mlflow.MlflowClient()
    repository = get_artifact_repository(run.info.artifact_uri)
    client.log_text(run.info.run_id, "written", "check/file.txt")
    cleanup.callback(repository.delete_artifacts)
    client.list_artifacts(run.info.run_id, "check")  # by itself: a download hides its failure
    with (
        tempfile.TemporaryDirectory() as folder,
        connection.environment(MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD="false"),
    ):
        path = client.download_artifacts(run.info.run_id, "check/file.txt", folder)
        if Path(path).read_text() != "written":
            raise MlflowException("a file that was written comes back with other content")


def body_limit(run):
    """Search for the largest request body that passes, by uploading files of zeros to the run.

    Returns (bytes that passed, bytes that did not or None, MB/s of the largest upload).
    """
    passed, refused, rate, size = 0, None, 0, MB
    with connection.environment(MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD="false"):
        while size <= LARGEST_BODY and (refused is None or refused - passed > MB):
            try:
                seconds = _upload(run, size)
                passed, rate = size, size / MB / seconds
                if seconds > SLOW:
                    break
            except requests.HTTPError as error:
                if error.response.status_code != 413:
                    raise
                refused = size
            size = passed * 2 if refused is None else (passed + refused) // 2 // MB * MB
    return passed, refused, rate


def multipart(run):
    """Upload a file in two parts, past the gateway, and fetch it back.

    Returns where the parts went, as "host:port", or None if the server does not offer that. Raises
    OSError if that host cannot be reached: MLflow would try for minutes.
    """
    repository = get_artifact_repository(run.info.artifact_uri)
    try:
        upload = repository.create_multipart_upload("parts.bin", 1, "check")
    except requests.HTTPError as error:
        if error.response.status_code != 501:  # the store behind the server takes no parts
            raise
        return None
    repository.abort_multipart_upload("parts.bin", upload.upload_id, "check")
    host, port = first_hop(upload.credentials[0].url)
    try:
        tcp(host, port)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{host}:{port}, where the parts go, cannot be reached: {reason}") from error
    part = mlflow.environment_variables.MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE.get()
    with connection.environment(MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE="1"):
        _upload(run, part + MB)
    with tempfile.TemporaryDirectory() as folder:
        path = mlflow.MlflowClient().download_artifacts(run.info.run_id, "check/zeros.bin", folder)
        if os.path.getsize(path) != part + MB:
            raise MlflowException("a file that went in parts comes back with another size")
    return f"{host}:{port}"


def registered_model(name, run, cleanup):
    """Register a model of the run as `name`, and point an alias at it; `cleanup` deletes both."""
    client = mlflow.MlflowClient()

    def delete_model():
        try:
            client.delete_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise

    cleanup.callback(delete_model)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        *(name, f"runs:/{run.info.run_id}/check"), run_id=run.info.run_id, await_creation_for=None
    )
    client.set_registered_model_alias(name, "check", version.version)


def _upload(run, size):
    """Upload a file of `size` bytes to the run; return the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "zeros.bin")
        with path.open("wb") as file:
            file.truncate(size)  # zeros, which take no room here
        start = time.perf_counter()
        mlflow.MlflowClient().log_artifact(run.info.run_id, str(path), "check")
        return time.perf_counter() - start
