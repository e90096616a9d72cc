"""The tracking server: which one it is, with which credentials, and what its failures mean.

    from common import connection
    connection.connect()    # then MLflow as usual; each request to the server carries the key

Copy this folder, common/errors.py and an empty common/__init__.py. `__main__.py`, which runs the
`mlflow` command with the credentials, may be left out; so may `failures.py` and `messages.py`, if
the import of `failures` below goes with them.
"""

from .address import AMSC_URI, LOCAL_URI, LOOPBACK, address, printable, proxy_of
from .credentials import credential, without_secrets
from .failures import Failure, diagnose
from .preflight import ask_server, connect, settle
from .settings import FIRST_REQUESTS, SETTINGS, environment
from .tls import trust

__all__ = ["AMSC_URI", "FIRST_REQUESTS", "LOCAL_URI", "LOOPBACK", "SETTINGS", "Failure", "address"]
__all__ += ["ask_server", "connect", "credential", "diagnose", "environment", "printable"]
__all__ += ["proxy_of", "settle", "trust", "without_secrets"]
