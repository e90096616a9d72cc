"""The `mlflow` command with the credentials, whatever it does: the server sees them.

python -m common.connection runs list --experiment-id 0
python -m common.connection models serve -m models:/NAME@alias --env-manager local --port 5001
"""

import contextlib
import sys

import requests
from mlflow.cli import cli  # the `mlflow` command's own entry point
from mlflow.exceptions import MlflowException

from common.errors import UserError

from .failures import diagnose
from .preflight import connect

try:
    with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the command
        connect()
    cli(prog_name="mlflow")
except (UserError, MlflowException, requests.RequestException) as error:
    failure = diagnose(error)
    if failure is None:
        raise
    print(failure, file=sys.stderr, flush=True)
    sys.exit(failure.code)
