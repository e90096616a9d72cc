"""All that is used here of MLflow without being documented, and what breaks if it goes."""

import re

import mlflow
import requests
from mlflow.exceptions import MlflowException, RestException
from mlflow.tracking.request_auth import registry
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request, verify_rest_response

# The variable that says where a database store keeps the artifacts of new experiments: this is how
# `mlflow server` tells its own processes. A version that does not look here uses ./mlruns.
ARTIFACT_ROOT = "_MLFLOW_SERVER_ARTIFACT_ROOT"

# MLflow's words, where an exception says no more. If they change, the failure keeps its traceback,
# or gets a more general message.
NOT_JSON = "valid JSON format"  # the answer was a web page
STATUS = re.compile(
    r"error code (\d{3})|too many (\d{3}) error|(\d{3}) (?:Client|Server) Error"
    r"|server-\w+: (\d{3})\b"  # the first request if there is a workspace
)
SAID = re.compile(
    r"(?s)(?:(?:Response (?:body|text)|PERMISSION_DENIED|UNAUTHENTICATED):|server-\w+: \d{3} )"
    r"\s*'?(?![<'])(\S.*?)'?\s*$"
)
ENDPOINT = re.compile(r"API request to endpoint (\S+)")
# What belongs to whom the experiment belongs to.
OWNED = re.compile(r"/(experiments/(create|get|set)|runs/(create|log|set|update)|logged-models)")
NO_WORKSPACES = re.compile("remote server does not support workspaces|could not determine whether")
WORKSPACE = re.compile("(?i)workspace(?!s are enabled)")  # that: no location can be given
PARTS = re.compile(r"Failed to (?:upload at least one part|download \d+ chunk)")
SWALLOWED = "Failed to download artifacts from path"  # says no reason at all
# A database's words for a row that is there already: SQLite's, PostgreSQL's, MySQL's.
TWICE = re.compile(r"(?i)error_code.*(unique constraint|duplicate entry)")


def register(provider):
    """Register a request-auth provider, once. It would take an installed package to do without.

    If the registry goes, importing this module fails: nothing is ever sent without the provider.
    """
    providers = registry._request_auth_provider_registry
    if provider not in list(providers):
        providers.register(lambda: provider)


def json_of(response):
    """Return the JSON of an answer, or None. Raises what `requests` has for a bad one if it is so
    deep that MLflow's own reading of it would end in a RecursionError."""
    try:
        return response.json()
    except ValueError:
        return None
    except RecursionError as error:
        raise requests.exceptions.ContentDecodingError(NOT_JSON) from error


def answered(error):
    """Return the JSON that a server answered with, or {}. Without it, messages say less."""
    if isinstance(error, RestException):
        return getattr(error, "json", {})
    said = json_of(error.response) if getattr(error, "response", None) is not None else {}
    return said if isinstance(said, dict) else {}


def server_version():
    """Return the server's version of MLflow, or None if it, or its gateway, does not tell."""
    text = _text_at("/version").strip()
    return text if re.fullmatch(r"\d+(\.\w+){1,4}", text) else None


def lacks_logged_models():
    """Return whether the server is older than 3.0, whatever a gateway may answer at /version."""
    asked = {"json": {"experiment_ids": []}, "timeout": 5, "max_retries": 0}
    return request("/api/2.0/mlflow/logged-models/search", "POST", **asked).status_code == 404


def wants_direct_uploads():
    """Return whether the server takes no files itself, as from MLflow 3.18 on it can be told."""
    return re.search(r'"artifacts_presigned_only": ?true', _text_at("/api/3.0/mlflow/server-info"))


def request(path, method, checked=False, **arguments):
    """Send a request that has no public call as MLflow does; if `checked`, raise what it raises."""
    # If these functions of MLflow go, so do the questions here, and those of check_connection.py.
    creds = get_default_host_creds(mlflow.get_tracking_uri())
    response = http_request(creds, path, method, **arguments)
    return verify_rest_response(response, path) if checked else response


def _text_at(path):
    try:
        response = request(path, "GET", timeout=5, max_retries=0)
    except MlflowException:
        return ""
    return response.text if response.ok else ""
