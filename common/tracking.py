"""The tracking server: which one, is it there, and is it trusted; what is wrong is said at once.

Copy this file and call `connect` if you want that for your own scripts. Which key the server is
shown is the matter of common/credentials.py.
"""

import concurrent.futures
import contextlib
import importlib.util
import os
import ssl
import sys
import threading
import time
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
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

AMSC_URI = "https://mlflow.american-science-cloud.org"
LOCAL_URI = "sqlite:///mlflow.db"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
SCHEMES = ("https", "http", "sqlite", "postgresql", "mysql", "mssql")

# MLflow settings that suit a job log. A user's own value wins.
SETTINGS = {
    # MLflow loads no pickle, and from 3.18 on no code beside a model. Neither switch is enough:
    # common/inspection.py looks at what is loaded before it is.
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
    # Models are exported from the CPU. MLflow would try them on a GPU wherever it sees one.
    "MLFLOW_DEFAULT_PREDICTION_DEVICE": "cpu",
    # Files from here on go in parts of as many bytes, past the gateway, where the server offers
    # that. MLflow would begin at 500 MB, and gateways refuse bodies of more than some 16 MB.
    "MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE": str(10 * 1024 * 1024),
    # MLflow tries again for some 4 minutes. It would also wait as long as a server says: hours.
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the scripts print the run's address first
    "GIT_PYTHON_REFRESH": "quiet",  # no three screens of warning on a machine without git
}

# Before any work starts, a server that is away costs seconds. MLflow's own patience (7 retries,
# 120 s each) comes back after that, and carries a running job over an outage.
FIRST_REQUESTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
}
PATIENCE = 13  # seconds for the first requests together, whatever hangs: names, proxies, servers


def connect(tracking_uri=None, ca_bundle=None, experiment=None):
    """Point MLflow at the server, and make sure that it is there, trusted, and accepts the key.

    The address is `tracking_uri`, else MLFLOW_TRACKING_URI, else the AmSC server if there is an API
    key, else a local SQLite file. The first line printed says which, and why.

    Raises SystemExit with what is wrong and what to do about it, and within 15 seconds what MLflow
    raises if the server fails (`failures.explain` makes two lines of that). If `experiment` is
    given, one of that name that was deleted, or that keeps its artifacts on another server, counts
    as wrong too.
    """
    uri, reason = address(tracking_uri)
    settle()
    mlflow.set_tracking_uri(uri)
    if uri.startswith("http"):
        trust(ca_bundle)
        print(f"tracking {_printable(uri)}  ({reason}; {credential()})", flush=True)
        existing = ask_server(experiment)
    else:
        with _prepare_sqlite(uri) if uri.startswith("sqlite") else contextlib.nullcontext():
            print(f"tracking {_printable(uri)}  ({reason})", flush=True)
            existing = _open_store(uri, experiment)
    if existing and existing.lifecycle_stage == "deleted":
        raise SystemExit(
            f"error: the experiment {experiment!r} was deleted, and its name is still taken.\n"
            f"hint:  mlflow experiments restore -x {existing.experiment_id}, "
            "or choose another --experiment."
        )
    if existing:
        check_artifact_location(existing.artifact_location)


def settle():
    """Set the MLflow variables that suit a job log, where the user has not."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    # Not the user's choice: `requests` would take X-Api-Key along to any host it is sent on to.
    os.environ["MLFLOW_ALLOW_HTTP_REDIRECTS"] = "false"
    # `requests` would send a password from ~/.netrc in place of the token.
    os.environ.setdefault("NETRC", os.devnull)
    if not sys.stderr.isatty():
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def address(tracking_uri=None):
    """Return (the tracking address, where it comes from). Raises SystemExit if it cannot be one."""
    uri, reason = _choose(tracking_uri)
    scheme, colon, rest = uri.partition(":")
    if scheme.lower() in ("http", "https"):
        uri = scheme.lower() + colon + rest
    _check_address(uri)
    _check_variables(uri)
    if uri.startswith("http"):
        _check_proxy(uri)
    return uri, reason


def trust(ca_bundle=None):
    """Have TLS verified against `ca_bundle`, MLFLOW_TRACKING_SERVER_CERT_PATH, or the public CAs.

    Raises SystemExit if that file is none, or contradicts MLFLOW_TRACKING_INSECURE_TLS.
    """
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
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # where `requests` looks next
        path = path or os.environ.get(name)
    try:
        if path and not os.path.isdir(path):
            ssl.create_default_context(cafile=path)
        if path := os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"):
            ssl.create_default_context().load_cert_chain(path)
    except OSError as error:  # ssl.SSLError is one
        raise SystemExit(
            f"error: no PEM certificates can be read from {path}: {error.strerror or error}.\n"
            "hint:  correct --ca_bundle, or the variable that names this file."
        ) from error


def credential():
    """Return in words, never in values, what the server will be shown (see common/credentials.py).

    Raises SystemExit if it cannot be used, or if there is nothing for the AmSC server.
    """
    providers = registry._request_header_provider_registry
    words = ", ".join(p.describe() for p in providers if hasattr(p, "describe"))
    if not words and urlsplit(mlflow.get_tracking_uri()).hostname == urlsplit(AMSC_URI).hostname:
        raise SystemExit(
            "error: AM_SC_API_KEY is not set, so the AmSC server would refuse every request.\n"
            'hint:  export AM_SC_API_KEY="<your key>"'
        )
    return words or "no credentials"


def check_artifact_location(location):
    """Raise SystemExit if artifacts there belong to another server, which would get the key."""
    parts, own = urlsplit(location), urlsplit(mlflow.get_tracking_uri())
    proxied = parts.scheme == "mlflow-artifacts" and not parts.netloc
    if proxied and own.scheme not in ("http", "https"):
        raise SystemExit(
            f"error: the artifacts go through a tracking server, {location}, and this address is "
            "its database.\n"
            "hint:  start the server and give its address, http://..., or choose another "
            "--experiment."
        )
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
    for name in ("AM_SC_API_KEY_FILE", "AM_SC_API_KEY"):
        if os.environ.get(name, "").strip():
            return AMSC_URI, f"the AmSC server, because {name} is set"
    return LOCAL_URI, "local, because neither MLFLOW_TRACKING_URI nor AM_SC_API_KEY is set"


def _check_address(uri):
    try:
        parts = urlsplit(uri)
        possible = uri.isprintable() and " " not in parts.netloc and parts.port != 0
        (parts.hostname or "").encode("idna")
    except ValueError:  # a port that is no number, brackets that are not closed, a label too long
        possible = False
    if not possible:
        raise SystemExit(
            "error: the tracking address has an impossible host or port.\n"
            "hint:  it looks like https://HOST or http://127.0.0.1:5000"
        )
    scheme = parts.scheme
    if not scheme.startswith("http"):
        scheme = scheme.split("+")[0]  # postgresql+psycopg2
    if scheme not in SCHEMES or not uri.startswith(f"{parts.scheme}://"):
        raise SystemExit(
            f"error: the tracking address {_printable(uri)!r} is none of "
            f"{', '.join(name + '://' for name in SCHEMES)}.\n"
            f"hint:  a server is https://HOST, a local file {LOCAL_URI}."
        )
    if scheme in ("http", "https") and (
        "@" in parts.netloc or parts.query or parts.fragment or not parts.hostname
    ):
        raise SystemExit(
            "error: the tracking address must have a host, and no user name, password or query in "
            "it (MLflow prints the address).\n"
            "hint:  export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for those."
        )


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
    for name in (*FIRST_REQUESTS, "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER"):
        try:
            getattr(mlflow.environment_variables, name).get()
        except ValueError as error:
            raise SystemExit(
                f"error: {name} has an impossible value: {error}.\nhint:  unset {name}"
            ) from error
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        raise SystemExit(
            f"error: MLFLOW_RUN_ID is set, so MLflow would write into the run {run_id} again.\n"
            "hint:  unset MLFLOW_RUN_ID"
        )


def _check_proxy(uri):
    """Refuse a proxy that cannot be used, and go round it on the way to this machine itself."""
    parts = urlsplit(uri)
    if parts.scheme == "http" and parts.hostname in LOOPBACK:  # an ssh tunnel, say
        own = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        os.environ["no_proxy"] = ",".join(filter(None, [own, *LOOPBACK]))
    proxy = requests.utils.select_proxy(uri, requests.utils.get_environ_proxies(uri))
    if not proxy:
        return
    try:
        parts = urlsplit(proxy if "://" in proxy or "@" in proxy else f"http://{proxy}")
        possible = parts.hostname and parts.scheme and (parts.port or 1)
    except ValueError:
        possible = False
    if not possible:
        raise SystemExit(
            "error: the proxy that http_proxy, https_proxy or all_proxy names is no address.\n"
            "hint:  it looks like http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, with %23 for "
            "a # in the password, %2F for a /."
        )
    if parts.scheme.startswith("socks") and importlib.util.find_spec("socks") is None:
        raise SystemExit(
            f"error: the proxy for this address speaks {parts.scheme}, for which a package is "
            "missing.\n"
            "hint:  pip install pysocks"
        )


def _prepare_sqlite(uri):
    """Check that the file can be made, and keep its artifacts beside it.

    Returns a context in which no other script opens the file: two that make its tables at the same
    moment (a job array, say) would get in each other's way, and one of them fail.
    """
    parts = urlsplit(uri)
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


def _open_store(uri, experiment):
    """Return the experiment of a database if it exists; or raise SystemExit."""
    try:
        mlflow.MlflowClient().search_experiments(max_results=1)
        return _find_experiment(experiment)
    except ImportError as error:  # the driver of a database
        raise SystemExit(
            f"error: the store {_printable(uri)} cannot be opened: {error}.\n"
            f"hint:  pip install {error.name}"
        ) from error
    except MlflowException as error:
        text = " ".join(str(error).split())[:300]
        raise SystemExit(
            f"error: the store {_printable(uri)} cannot be opened: {text}.\n"
            "hint:  is the file from a newer MLflow, or no MLflow store? Give another "
            "--tracking_uri."
        ) from error


def ask_server(experiment=None):
    """Return the experiment if it exists; raise what MLflow raises, within `PATIENCE`.

    In a thread that can be left behind: the time limit of `requests` counts anew for each address
    of a name, and does not count at all while the name is looked up.
    """
    own = {name: os.environ.get(name) for name in FIRST_REQUESTS}
    os.environ.update(FIRST_REQUESTS)
    answer = concurrent.futures.Future()

    def ask():
        try:
            _ask_for_experiments()
            answer.set_result(_find_experiment(experiment))
        except BaseException as error:  # noqa: BLE001 (handed over: `result` raises it again)
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(PATIENCE)
    except concurrent.futures.TimeoutError:
        raise requests.exceptions.Timeout(f"nothing within {PATIENCE} s") from None
    finally:
        for name, value in own.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _ask_for_experiments():
    """Make the first request; raise `requests.HTTPError` with the answer if it is a bad one.

    By hand, because MLflow drops the status of an answer in JSON, and many gateways refuse so.
    """
    path = "/api/2.0/mlflow/experiments/search"
    for pause in (1, 0):
        creds = get_default_host_creds(mlflow.get_tracking_uri())
        response = http_request(creds, path, "POST", json={"max_results": 1})
        # MLflow repeats what is refused for a moment, but not a 403, and gateways under load
        # answer with that as well.
        if response.status_code != 403:
            break
        time.sleep(pause)
    if response.status_code != 200:
        text = f"error code {response.status_code}. Response body: '{response.text[:300]}'"
        raise requests.HTTPError(text, response=response)
    answer = response.json()
    if not isinstance(answer, dict) or not isinstance(answer.get("experiments", []), list):
        raise requests.JSONDecodeError("no list of experiments", "", 0)


def _find_experiment(name):
    return mlflow.MlflowClient().get_experiment_by_name(name) if name else None
