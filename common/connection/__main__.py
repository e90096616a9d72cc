"""The `mlflow` command, whatever it does, with the credentials on its requests.

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
    if not (failure := diagnose(error)):
        raise
    print(failure, file=sys.stderr, flush=True)
    sys.exit(failure.code)
