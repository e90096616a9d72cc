"""All that is used here of MLflow without being documented, and what breaks if it goes."""

import re

from mlflow.exceptions import RestException
from mlflow.tracking.request_auth import registry

# The variable that says where a database store keeps the artifacts of new experiments: this is how
# `mlflow server` tells its own processes. A version that does not look here uses ./mlruns.
ARTIFACT_ROOT = "_MLFLOW_SERVER_ARTIFACT_ROOT"

# MLflow's words, where an exception says no more. If they change, the failure keeps its traceback,
# or gets a more general message.
NOT_JSON = "valid JSON format"  # the answer was a web page
STATUS = re.compile(r"error code (\d{3})|too many (\d{3}) error|(\d{3}) (?:Client|Server) Error")
SAID = re.compile(
    r"(?:Response (?:body|text)|PERMISSION_DENIED|UNAUTHENTICATED):\s*'?(?![<'])(\S[^']*)"
)
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


def answered(error):
    """Return the JSON that a server answered with, or {}. Without it, messages say less."""
    return getattr(error, "json", {}) if isinstance(error, RestException) else {}
