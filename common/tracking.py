"""The tracking server: which one, the API key on every request, TLS, and whether it answers.

If you only want the API key in your own project, copy `ApiKeyHeader` and `send_api_key`: MLflow
asks a registered header provider at every request, so metrics, artifacts and the registry all carry
it.
"""

import contextlib
import os
import ssl
import sys
import warnings
from pathlib import Path
from urllib.parse import unquote, urlsplit

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import mlflow
import requests
import urllib3
from mlflow.exceptions import MlflowException
from mlflow.tracking.request_header import registry
from mlflow.tracking.request_header.abstract_request_header_provider import RequestHeaderProvider

AMSC_URI = "https://mlflow.american-science-cloud.org"
LOCAL_URI = "sqlite:///mlflow.db"
SCHEMES = ("https", "http", "sqlite", "postgresql", "mysql", "mssql")

# MLflow settings that suit a job log. A user's own value wins.
SETTINGS = {
    # Nothing that a model file brings with it is run as code when the model is loaded.
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    # Models are exported from the CPU. MLflow would try them on a GPU wherever it sees one.
    "MLFLOW_DEFAULT_PREDICTION_DEVICE": "cpu",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the scripts print the run's address first
    "GIT_PYTHON_REFRESH": "quiet",  # no three screens of warning on a machine without git
}

# For the first request only, so that a server that is away costs seconds. MLflow's own patience
# (7 retries, 120 s each) comes back after it, and carries a running job over an outage.
FIRST_REQUEST = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "6",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
}


class ApiKeyHeader(RequestHeaderProvider):
    """Adds `X-Api-Key` to MLflow's requests, read anew from AM_SC_API_KEY each time.

    An exception in a provider is swallowed by MLflow, and the request goes out without the header:
    so the key is validated once in `connect`, and nothing here can fail.
    """

    def in_context(self):
        return bool(api_key()) and keeps_secrets(mlflow.get_tracking_uri())

    def request_headers(self):
        return {"X-Api-Key": api_key()}


def api_key():
    """Return the key without the line break that comes along from a file, or ""."""
    return os.environ.get("AM_SC_API_KEY", "").strip()


def keeps_secrets(uri):
    """Return whether a key may be sent there: over https, or to this machine itself."""
    parts = urlsplit(uri)
    return parts.scheme == "https" or (
        parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")
    )


def send_api_key():
    """Register `ApiKeyHeader`, once: MLflow joins the values of two providers into "key key"."""
    providers = registry._request_header_provider_registry
    if not any(isinstance(provider, ApiKeyHeader) for provider in providers):
        providers.register(ApiKeyHeader)


def connect(tracking_uri=None, ca_bundle=None, experiment=None):
    """Point MLflow at the server, and make sure that it is there, trusted, and accepts the key.

    The address is `tracking_uri`, else MLFLOW_TRACKING_URI, else the AmSC server if AM_SC_API_KEY
    is set, else a local SQLite file. The first line printed says which, and why.

    Raises SystemExit, within 15 seconds, with what is wrong and what to do about it. If
    `experiment` is given, one of that name that was deleted, or that keeps its artifacts on another
    server, counts as wrong too.
    """
    uri, reason = _choose(tracking_uri)
    parts = _check_address(uri)
    _check_variables(uri)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    # Not the user's choice: `requests` would take X-Api-Key along to any host it is sent on to.
    os.environ["MLFLOW_ALLOW_HTTP_REDIRECTS"] = "false"
    if not sys.stderr.isatty():
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

    credential, lock = "", contextlib.nullcontext()
    if parts.scheme.startswith("sqlite"):
        lock = _prepare_sqlite(parts)
    elif parts.scheme in ("http", "https"):
        _set_up_tls(ca_bundle)
        credential = _credential(uri, parts)
        send_api_key()
    mlflow.set_tracking_uri(uri)
    print(f"tracking {_printable(uri)}  ({reason}{credential})", flush=True)
    with lock:
        _check_server(uri, credential)

    if experiment:
        existing = mlflow.get_experiment_by_name(experiment)
        if existing and existing.lifecycle_stage == "deleted":
            raise SystemExit(
                f"error: the experiment {experiment!r} was deleted, and its name is still taken.\n"
                f"hint:  mlflow experiments restore -x {existing.experiment_id}, "
                "or choose another --experiment."
            )
        if existing:
            check_artifact_location(existing.artifact_location)


def check_artifact_location(location):
    """Raise SystemExit if artifacts there belong to another server, which would get the key."""
    parts, own = urlsplit(location), urlsplit(mlflow.get_tracking_uri())
    over_http = parts.scheme in ("http", "https") or (
        parts.scheme == "mlflow-artifacts" and parts.netloc
    )
    unencrypted = parts.scheme == "http" and own.scheme == "https"
    if over_http and (parts.netloc != own.netloc or unencrypted):
        raise SystemExit(
            f"error: the artifacts lie on another server, {location}, and the key must not "
            "go there.\n"
            "hint:  choose another --experiment, or a run of one that keeps its artifacts here."
        )


def _choose(tracking_uri):
    if tracking_uri is not None:
        return tracking_uri.strip(), "from --tracking_uri"
    if uri := os.environ.get("MLFLOW_TRACKING_URI", "").strip():
        return uri, "from MLFLOW_TRACKING_URI"
    if api_key():
        return AMSC_URI, "the AmSC server, because AM_SC_API_KEY is set"
    return LOCAL_URI, "local, because neither MLFLOW_TRACKING_URI nor AM_SC_API_KEY is set"


def _check_address(uri):
    try:
        parts = urlsplit(uri)
        possible = " " not in parts.netloc and parts.port != 0
    except ValueError:  # a port that is no number, brackets that are not closed
        possible = False
    if not possible:
        raise SystemExit(
            "error: the tracking address has an impossible host or port.\n"
            "hint:  it looks like https://HOST or http://127.0.0.1:5000"
        )
    scheme = parts.scheme.split("+")[0]
    if scheme not in SCHEMES or not uri.startswith(f"{parts.scheme}://"):
        raise SystemExit(
            f"error: the tracking address {_printable(uri)!r} is none of "
            f"{', '.join(name + '://' for name in SCHEMES)}.\n"
            f"hint:  a server is https://HOST, a local file {LOCAL_URI}."
        )
    if scheme in ("http", "https") and (
        parts.username or parts.query or parts.fragment or not parts.hostname
    ):
        raise SystemExit(
            "error: the tracking address must have a host, and no user name, password or query in "
            "it (MLflow prints the address).\n"
            "hint:  export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for those."
        )
    return parts


def _printable(uri):
    """The address without its secrets: databases have a password before the @ or in the query."""
    parts = urlsplit(uri)
    if not parts.netloc:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def _check_variables(uri):
    """Refuse MLflow variables that would lead a script elsewhere than its first line says."""
    registry_uri = os.environ.get("MLFLOW_REGISTRY_URI", uri)
    if registry_uri.rstrip("/") != uri.rstrip("/"):
        raise SystemExit(
            "error: MLFLOW_REGISTRY_URI names another server than the tracking address, and the "
            "key must not go there.\n"
            "hint:  unset MLFLOW_REGISTRY_URI; models are registered on the tracking server."
        )
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        raise SystemExit(
            f"error: MLFLOW_RUN_ID is set, so MLflow would write into the run {run_id} again.\n"
            "hint:  unset MLFLOW_RUN_ID"
        )


def _prepare_sqlite(parts):
    """Check that the file can be made, and keep its artifacts beside it.

    Returns a context in which no other script opens the file: two that make its tables at the same
    moment (a job array, say) would get in each other's way, and one of them fail.
    """
    path = Path(unquote(parts.path[1:])).absolute()
    if parts.netloc or path.is_dir() or path.name == ":memory:":
        raise SystemExit(
            "error: the tracking address names no SQLite file, and the run would be lost.\n"
            f"hint:  {LOCAL_URI} is a file here, sqlite:////PATH/mlflow.db one elsewhere."
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise SystemExit(
            f"error: the local store {path} cannot be written.\n"
            "hint:  change to a folder of your own, or give --tracking_uri sqlite:////PATH/mlflow.db"
        )
    file = path.open("a+b")
    file.seek(0)
    if file.read(16) not in (b"", b"SQLite format 3\0"):
        raise SystemExit(
            f"error: {path} is no SQLite database.\nhint:  give another --tracking_uri."
        )
    # MLflow would put them into ./mlruns, wherever that is at the time. This is how `mlflow server`
    # tells its own processes; a version that does not look here uses ./mlruns as before.
    os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = (path.parent / "mlruns").as_uri()
    if fcntl:
        with contextlib.suppress(OSError):  # a mount without such locks: do without
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
    return file


def _set_up_tls(ca_bundle):
    name = "MLFLOW_TRACKING_SERVER_CERT_PATH"
    if ca_bundle is not None:
        os.environ[name] = ca_bundle
    # An empty value would switch verification off without a word.
    if not os.environ.get(name, "unset"):
        del os.environ[name]
    try:
        insecure = mlflow.environment_variables.MLFLOW_TRACKING_INSECURE_TLS.get()
    except ValueError as error:
        raise SystemExit(f"error: {error}\nhint:  use true or false.") from error
    path = os.environ.get(name)
    if insecure and path:
        raise SystemExit(
            f"error: MLFLOW_TRACKING_INSECURE_TLS=true contradicts the CA bundle {path}.\n"
            "hint:  unset MLFLOW_TRACKING_INSECURE_TLS; the bundle is the safe one of the two."
        )
    if insecure:
        print("warning: TLS is not verified (MLFLOW_TRACKING_INSECURE_TLS=true)", file=sys.stderr)
        warnings.simplefilter("ignore", urllib3.exceptions.InsecureRequestWarning)
    if path and not os.path.isdir(path):
        try:
            ssl.create_default_context(cafile=path)
        except OSError as error:  # ssl.SSLError is one
            raise SystemExit(
                f"error: no PEM certificates can be read from {path}: {error.strerror or error}.\n"
                f"hint:  correct --ca_bundle or {name}."
            ) from error


def _credential(uri, parts):
    """Check what the server will be shown, before it is asked, and return words for it."""
    key = api_key()
    if not key.isascii() or any(character.isspace() for character in key):
        raise SystemExit(
            "error: AM_SC_API_KEY holds a space, a line break or a letter outside ASCII: no header "
            "can carry it.\n"
            "hint:  export it again, in quotes, exactly as you were given it."
        )
    sent = []
    if key and keeps_secrets(uri):
        sent.append("X-Api-Key")
    if os.environ.get("MLFLOW_TRACKING_USERNAME"):
        sent.append("user and password")
    elif os.environ.get("MLFLOW_TRACKING_TOKEN"):
        sent.append("bearer token")
    if not sent and parts.hostname == urlsplit(AMSC_URI).hostname:
        raise SystemExit(
            "error: AM_SC_API_KEY is not set, so the AmSC server would refuse every request.\n"
            'hint:  export AM_SC_API_KEY="<your key>"'
        )
    if key and not keeps_secrets(uri):
        sent.append("X-Api-Key withheld: plain http")
    return f"; {', '.join(sent)}" if sent else "; no credentials"


def _check_server(uri, credential):
    own = {name: os.environ.get(name) for name in FIRST_REQUEST}
    os.environ.update(FIRST_REQUEST)
    try:
        mlflow.MlflowClient().search_experiments(max_results=1)
    except MlflowException as error:
        raise SystemExit(_diagnose(error, uri, credential)) from error
    except ImportError as error:  # the driver of a database
        raise SystemExit(
            f"error: the store {_printable(uri)} cannot be opened: {error}.\n"
            f"hint:  pip install {error.name}"
        ) from error
    finally:
        for name, value in own.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _diagnose(error, uri, credential):
    """Return one sentence what went wrong and one what to do."""
    address = _printable(uri)
    text = " ".join(str(error).split())
    for secret in (api_key(), os.environ.get("MLFLOW_TRACKING_TOKEN")):
        text = text.replace(secret, "<secret>") if secret else text
    causes, cause = [], error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__

    def caused_by(kind):
        return any(isinstance(cause, kind) for cause in causes)

    if caused_by(requests.exceptions.ProxyError):
        what = f"the proxy on the way to {address} does not answer"
        advice = "check http_proxy, https_proxy and no_proxy."
    elif caused_by(requests.exceptions.SSLError):
        reason = text.partition("SSLError(")[2][:200] or text[:200]
        what = f"no trusted TLS connection to {address}: {reason}"
        advice = (
            "if the server has a certificate of your institution, give --ca_bundle FILE; "
            "if it has none, its address starts with http://."
        )
    elif caused_by(requests.exceptions.Timeout) or "ReadTimeoutError" in text:
        what = f"{address} did not answer within {FIRST_REQUEST['MLFLOW_HTTP_REQUEST_TIMEOUT']} s"
        advice = "check the address, and on a compute node whether it has a network at all."
    elif caused_by(requests.exceptions.ConnectionError) and "too many" not in text:
        unknown = "NameResolutionError" in text
        what = f"the name of {address} is unknown" if unknown else f"no server answers at {address}"
        advice = "check the address and the network, and that the server runs."
    elif "valid JSON format" in text:
        what = f"{address} answers with a web page, not as an MLflow server: probably a login page"
        advice = f"check AM_SC_API_KEY and that the address is right and https (sent{credential})."
    elif error.error_code in ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED"):
        sent_none = credential.startswith("; no ") or "withheld" in credential
        what = f"{address} refuses the request: {text[-200:]}"
        advice = (
            f"it wants a key or token{credential}: export AM_SC_API_KEY, and use https."
            if sent_none
            else f"check the key or token{credential}, and that it is allowed to do this."
        )
    elif "failed with error code 3" in text:
        what = f"{address} redirects to another address, which is not followed, to protect the key"
        advice = "use the address that it redirects to; often https:// in place of http://."
    elif error.error_code == "ENDPOINT_NOT_FOUND":
        what = f"there is a web server at {address}, but no MLflow"
        advice = "check the path of the address."
    elif uri.startswith("http"):
        what = f"{address} answers with an error: {text[:300]}"
        advice = "try again in a minute; if it stays, ask those who run the server."
    else:
        what = f"the store {address} cannot be opened: {text[:300]}"
        advice = "is the file from a newer MLflow, or no MLflow store? Give another --tracking_uri."
    return f"error: {what}.\nhint:  {advice}"
