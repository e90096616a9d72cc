"""The tracking server: which one it is, with which credentials, and what its failures mean.

    from common import connection
    connection.connect()    # then MLflow as usual; each request to the server carries the key

Copy this folder, common/errors.py and an empty common/__init__.py. May be left out: `__main__.py`,
the `mlflow` command with the credentials; `failures.py`, with the import of `failures` below.
"""

from .address import AMSC_URI, LOCAL_URI, LOOPBACK, address, printable, proxy_of
from .credentials import credential, without_secrets
from .failures import Failure, diagnose
from .preflight import ask_server, connect, settle
from .secret import check_token
from .settings import FIRST_REQUESTS, SETTINGS, environment, trust
from .undocumented import request, server_version
