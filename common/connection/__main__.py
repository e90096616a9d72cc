"""The `mlflow` command, whatever it does, with the credentials on its requests.

python -m common.connection runs list --experiment-id 0
python -m common.connection models serve -m models:/NAME@alias --env-manager local --port 5001
"""

import contextlib
import sys
import traceback

import requests
from mlflow.cli import cli  # the `mlflow` command's own entry point
from mlflow.exceptions import MlflowException

from common.errors import UserError

from .credentials import without_secrets
from .failures import diagnose
from .preflight import connect

try:
    with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the command
        connect()
    cli(prog_name="mlflow")
except (UserError, MlflowException, requests.RequestException) as error:
    failure = diagnose(error)
    print(failure or without_secrets(traceback.format_exc()), file=sys.stderr, flush=True)
    sys.exit(failure.code if failure else 1)
