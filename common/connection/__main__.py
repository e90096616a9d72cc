"""The `mlflow` command, whatever it does, with the credentials on its requests.

python -m common.connection runs list --experiment-id 0
python -m common.connection models serve -m models:/NAME@alias --env-manager local --port 5001
"""

import contextlib
import sys

from mlflow.cli import cli  # the `mlflow` command's own entry point

from common.errors import Printed, print_and_exit

from .preflight import connect

sys.excepthook = print_and_exit
if sys.stdout.isatty():  # names that others gave may hold more than letters
    sys.stdout = Printed(sys.stdout, one_line=False)
with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the command
    connect()
cli(prog_name="mlflow")
