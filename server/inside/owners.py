"""Who MLflow takes a request to be from: the owner of the key, as the gateway says.

MLflow's own users and permissions ask this module in place of a password: `serve.py start --owners`
names it as their authorization_function. The gateway sets the header, whatever the client sends,
and nothing else reaches MLflow's socket. Each user has a random password, which opens nothing.
"""

import fcntl
import os
import re
import secrets

from flask import make_response, request
from mlflow.server.auth import store
from mlflow.utils.workspace_utils import DEFAULT_WORKSPACE_NAME
from werkzeug.datastructures import Authorization

HEADER = "X-Key-Owner"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,31}")  # as add-key has it
known = set()  # the users that this process has seen


def owner_of_the_key():
    name = request.headers.get(HEADER, "")
    if not NAME.fullmatch(name):  # nor is it "-", nobody, or "ada,admin", two headers in one
        return make_response(f"no {HEADER}: this server is reached through its gateway", 401)
    if name not in known or not store.has_user(name):
        introduce(name)
        known.add(name)
    return Authorization("basic", {"username": name})


def introduce(name):
    """Make the user, unless there is one, who may create in `default`; MLflow made `admin`."""
    with open(os.environ["MLFLOW_AUTH_CONFIG_PATH"], "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several workers may see the same new key at once
        if not store.has_user(name):
            store.create_user(name, secrets.token_hex(32))
        if store.get_workspace_permission(DEFAULT_WORKSPACE_NAME, name) is None:
            store.set_workspace_permission(DEFAULT_WORKSPACE_NAME, name, "USE")
