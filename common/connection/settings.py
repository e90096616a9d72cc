"""How MLflow is set: for a job log, for the first requests, and whom TLS trusts."""

import contextlib
import os
import ssl
import sys
import warnings

import mlflow
import urllib3

from common.errors import UserError

# A user's own value wins.
SETTINGS = {
    # MLflow loads no pickle, and from 3.18 on no code beside a model. Neither switch is enough: the
    # check in common/storage/ looks at a model before it is loaded.
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
    # Models are exported from the CPU. MLflow would try them on a GPU wherever it sees one.
    "MLFLOW_DEFAULT_PREDICTION_DEVICE": "cpu",
    # Files from here on go in parts of this many bytes, past the gateway, where the server offers
    # that. MLflow would begin at 500 MB, and gateways refuse bodies of more than some 16 MB. It
    # would also ask first whether the server offers that, and most versions do not say so.
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true",
    "MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE": str(10 * 1024 * 1024),
    # A server that hangs: MLflow waits so long for each of 8 answers, 120 s if this is not set.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # MLflow tries again for some 4 minutes. It would also wait as long as a server says: hours.
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "PGCONNECT_TIMEOUT": "10",  # of PostgreSQL's client, which would wait without end
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # three of them stay behind for each model
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


@contextlib.contextmanager
def environment(**variables):
    """Set environment variables for a while."""
    own = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(own)


def trust(ca_bundle=None):
    """Have TLS verified against `ca_bundle`, MLFLOW_TRACKING_SERVER_CERT_PATH, or the public CAs.

    Raises UserError if that file is no such bundle, or MLFLOW_TRACKING_INSECURE_TLS is set as well.
    """
    name = "MLFLOW_TRACKING_SERVER_CERT_PATH"
    if given := ca_bundle or os.environ.get(name):
        os.environ[name] = os.path.expanduser(given)  # a shell does not, after a =
    # An empty value would switch verification off without a word.
    if not os.environ.get(name, "unset"):
        del os.environ[name]
    path = os.environ.get(name)
    if mlflow.environment_variables.MLFLOW_TRACKING_INSECURE_TLS.get():
        if path:
            what = f"MLFLOW_TRACKING_INSECURE_TLS=true contradicts the CA bundle {path}."
            raise UserError(what, "unset MLFLOW_TRACKING_INSECURE_TLS; the bundle is safer.")
        print("warning: TLS is not verified (MLFLOW_TRACKING_INSECURE_TLS=true)", file=sys.stderr)
        warnings.simplefilter("ignore", urllib3.exceptions.InsecureRequestWarning)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # where `requests` looks next
        path = path or os.environ.get(name)
    try:
        if path and not os.path.isdir(path):
            if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
                raise OSError("it is no file")
            ssl.create_default_context(cafile=path)
        if path := os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"):
            ssl.create_default_context().load_cert_chain(path)
    except OSError as error:  # ssl.SSLError is one
        what = f"no PEM certificates can be read from {path}: {error.strerror or error}."
        raise UserError(what, "correct --ca_bundle, or the variable for it.") from error
