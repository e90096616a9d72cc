"""Is the server there, is it trusted, and does it accept the credentials? Asked before any work."""

import concurrent.futures
import contextlib
import logging
import os
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
import requests
from mlflow.exceptions import MlflowException

from common.errors import UserError

from . import undocumented
from .address import address, belongs_to_server, lie_elsewhere, printable
from .credentials import CREDENTIALS, credential
from .secret import check_token
from .settings import FIRST_REQUESTS, SETTINGS, environment, trust

WORKSPACE = "MLFLOW_WORKSPACE"
OLDEST = 3  # the major version of servers that all scripts work with
PATIENCE = 13  # seconds for the first requests together, whatever hangs: names, proxies, servers


def connect(tracking_uri=None, ca_bundle=None, experiment=None, workspace=None):
    """Point MLflow at the server; make sure that it is there, trusted, and accepts key or token.

    The address is `tracking_uri`, else MLFLOW_TRACKING_URI, else the AmSC server if there is an API
    key, else a local SQLite file; the workspace is `workspace`, else MLFLOW_WORKSPACE, else the
    server's default. The first line printed says which, and why.

    Raises UserError, also if `experiment` was deleted or keeps its artifacts elsewhere; and within
    15 seconds what MLflow raises if the server fails (`diagnose` makes two lines of that).
    """
    uri, reason = address(tracking_uri)
    settle(workspace)
    where = os.environ.get(WORKSPACE)
    mlflow.set_tracking_uri(uri)
    if uri.startswith("http"):
        trust(ca_bundle)
        words = f"{reason}; {credential()}" + (f"; workspace {where}" if where else "")
        print(f"tracking {printable(uri)}  ({words})", flush=True)
        check_token()
        existing = ask_server(experiment)
    else:
        reason += f"; no workspaces here, so not in {where}" if where else ""
        with _prepare_sqlite(uri) if uri.startswith("sqlite") else contextlib.nullcontext() as file:
            print(f"tracking {printable(uri)}  ({reason})", flush=True)
            logging.getLogger("mlflow.store").setLevel("CRITICAL")  # its tracebacks: raised as well
            if file and not os.fstat(file.fileno()).st_size:  # it takes MLflow some seconds
                print(f"store    creating {file.name}", flush=True)
            existing = _open_store(uri, experiment)
    if existing and existing.lifecycle_stage == "deleted":
        hint = f"mlflow experiments restore -x {existing.experiment_id}, or another --experiment."
        raise UserError(f"the experiment {experiment!r} was deleted, and its name is taken.", hint)
    if existing:
        _check_location(existing.artifact_location)


def settle(workspace=None):
    """Set the MLflow variables, where the user has not, and register the credentials.

    `connect` does that. A process that inherits its variables needs only this, and `trust()`.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    # Not the user's choice: `requests` would take X-Api-Key along to any host it is sent on to.
    os.environ["MLFLOW_ALLOW_HTTP_REDIRECTS"] = "false"
    if workspace := (workspace or os.environ.pop(WORKSPACE, "")).strip():
        os.environ[WORKSPACE] = workspace
    CREDENTIALS.register()


def ask_server(experiment=None):
    """Return the experiment if it exists; raise what MLflow raises, within `PATIENCE`.

    In a thread that can be left behind: the time limit of `requests` counts anew for each address
    of a name, and does not count at all while the name is looked up.
    """
    answer = concurrent.futures.Future()

    def ask():
        try:
            found = _look_up(experiment)
            _check_version()
            answer.set_result(found)
        except BaseException as error:  # noqa: BLE001 (handed over: `result` raises it again)
            answer.set_exception(error)

    CREDENTIALS.experiment = experiment
    with environment(**FIRST_REQUESTS):
        threading.Thread(target=ask, daemon=True).start()
        try:
            return answer.result(PATIENCE)
        except concurrent.futures.TimeoutError:
            raise requests.exceptions.Timeout(f"nothing within {PATIENCE} s") from None


def _look_up(experiment):
    """Make the first request, whatever is there; return the experiment if it exists."""
    client = mlflow.MlflowClient()
    client.search_experiments(max_results=1)
    return client.get_experiment_by_name(experiment) if experiment else None


def _check_version():
    """Raise UserError if server and client do not fit. A gateway may withhold what they are."""
    version = undocumented.server_version()
    old = version and int(version.split(".")[0]) < OLDEST
    if old and undocumented.lacks_logged_models():
        what = f"the server runs MLflow {version}, and the scripts need {OLDEST}.0 or newer there."
        hint = f"ask those who run it for an upgrade (the client here is {mlflow.__version__})."
        raise UserError(what, hint)
    client = [int(number) for number in mlflow.__version__.split(".")[:2]]
    if client < [3, 18] and undocumented.wants_direct_uploads():
        what = "the server takes files by direct upload only, which this client cannot do"
        hint = "pip install -U mlflow; a client of 3.18 or newer can."
        raise UserError(f"{what} (MLflow {mlflow.__version__}).", hint)


def _check_location(location):
    """Raise UserError if artifacts there belong to another server, which would get the key."""
    parts, own = urlsplit(location), urlsplit(mlflow.get_tracking_uri()).scheme
    if parts.scheme == "mlflow-artifacts" and not parts.netloc:  # of whichever server it is
        if not own.startswith("http"):
            what = f"the artifacts go through a tracking server, {location}; this is its database."
            raise UserError(what, "give the server's address, or choose another --experiment.")
    elif parts.scheme in ("http", "https", "mlflow-artifacts"):
        url = location.replace("mlflow-artifacts:", f"{own}:", 1)
        if not belongs_to_server(url):
            raise lie_elsewhere(location)


def _prepare_sqlite(uri):
    """Keep artifacts beside the file; return a context in which no other script opens it.

    One of two that make its tables at the same moment (a job array, say) would fail.
    """
    path = Path(unquote(urlsplit(uri).path[1:])).absolute()
    try:
        if path.exists() and not path.is_file():  # /dev/null, say, or a pipe, which would block
            raise ValueError("it is no file")
        file = path.open("a+b")
    except (OSError, ValueError) as error:
        hint = "change to a folder of your own, or give --tracking_uri sqlite:////PATH/mlflow.db"
        what = f"the local store {path} cannot be written: {getattr(error, 'strerror', error)}."
        raise UserError(what, hint) from error
    file.seek(0)
    if file.read(16) not in (b"", b"SQLite format 3\0"):
        raise UserError(f"{path} is no SQLite database.", "give another --tracking_uri.")
    os.environ[undocumented.ARTIFACT_ROOT] = (path.parent / "mlruns").as_uri()
    with contextlib.suppress(ImportError, OSError):  # Windows; a mount without such locks
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
    return file


def _open_store(uri, experiment):
    """Return the experiment of a database if it exists; or raise UserError."""
    import sqlalchemy  # here: only databases need the package

    try:
        # MLflow would try for 100 s, and longer. Only it knows what TLS to MySQL takes.
        if not uri.startswith("sqlite") and "MLFLOW_MYSQL_SSL_" not in " ".join(os.environ):
            sqlalchemy.create_engine(uri).connect().close()
        return _look_up(experiment)
    except (ImportError, MlflowException, sqlalchemy.exc.SQLAlchemyError) as error:
        if hasattr(error, "orig") or hasattr(error.__cause__, "orig"):  # `diagnose` has more
            raise
        text = " ".join(str(error).split())[:300]
        hint = "is it from a newer MLflow, or is a database's driver to be installed with pip?"
        raise UserError(f"the store {printable(uri)} cannot be opened: {text}.", hint) from error
