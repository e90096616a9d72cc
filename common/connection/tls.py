"""Which authorities are trusted."""

import os
import ssl
import sys
import warnings

import mlflow
import urllib3

from common.errors import UserError


def trust(ca_bundle=None):
    """Have TLS verified against `ca_bundle`, MLFLOW_TRACKING_SERVER_CERT_PATH, or the public CAs.

    Raises UserError if that file holds no certificates, or if MLFLOW_TRACKING_INSECURE_TLS
    contradicts it.
    """
    name = "MLFLOW_TRACKING_SERVER_CERT_PATH"
    if ca_bundle is not None:
        os.environ[name] = ca_bundle
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
            ssl.create_default_context(cafile=path)
        if path := os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"):
            ssl.create_default_context().load_cert_chain(path)
    except OSError as error:  # ssl.SSLError is one
        what = f"no PEM certificates can be read from {path}: {error.strerror or error}."
        raise UserError(what, "correct --ca_bundle, or the variable for it.") from error
