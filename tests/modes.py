"""What the newer AmSC servers have: MLflow's workspaces, and its own users and permissions.

`conftest.institute` is one such server. In it, ada and grace may create in two workspaces, and own
what they create; nobody but ada may in the third:

    team-a     what others created may be read
    default    and here it may not
    private    ada's alone
"""

from pathlib import Path
from typing import NamedTuple

import requests
from gateway import Gateway, jwt

FLAGS = ("--enable-workspaces", "--app-name", "basic-auth")
PASSWORDS = {name: f"password-of-{name}-0123456789" for name in ("admin", "ada", "grace")}
TOKENS = {name: jwt(sub=name) for name in PASSWORDS}

# Without the cache, each request takes half a second, for the hash of its password.
CONFIGURATION = """
[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/users.db
admin_username = admin
auth_cache_ttl_seconds = 3600
"""


def variables(folder):
    """What `mlflow server --app-name basic-auth` reads."""
    path = folder / "basic_auth.ini"
    path.write_text(CONFIGURATION.format(folder=folder))
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(path),
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORDS["admin"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of no use here",
    }


class Institute(NamedTuple):
    """The server; `folder` holds its databases, artifacts and log."""

    uri: str
    folder: Path

    def gateway(self, *names, **options):
        """A gateway that takes the `TOKENS` of these users, all of them if none is named."""
        users = {TOKENS[name]: (name, PASSWORDS[name]) for name in names or TOKENS}
        return Gateway(self.uri, None, users=users, **options)

    def ask(self, user, method, path, workspace=None, /, **body):
        """What MLflow answers a user; `path` as in "2.0/mlflow/runs/create"."""
        return requests.request(
            method,
            f"{self.uri}/api/{path}",
            auth=(user, PASSWORDS[user]),
            headers={"X-MLFLOW-WORKSPACE": workspace} if workspace else {},
            timeout=60,
            **({"params": body} if method == "GET" else {"json": body}),
        )


def settle(institute):
    """Make the users and the workspaces, and return the server."""

    def post(path, **body):
        answer = institute.ask("admin", "POST", path, **body)
        answer.raise_for_status()
        return answer.json()

    for name in ("ada", "grace"):
        post("2.0/mlflow/users/create", username=name, password=PASSWORDS[name])
    for workspace, names in (
        ("team-a", ["ada", "grace"]),
        ("default", ["ada", "grace"]),
        ("private", ["ada"]),
    ):
        if workspace != "default":
            post("3.0/mlflow/workspaces", name=workspace)
        made = post("3.0/mlflow/roles/create", workspace=workspace, name="member")
        role = made["role"]["id"]
        grants = [("workspace", "USE")]  # by itself, it does not let read what others created
        if workspace == "team-a":
            grants += [("experiment", "READ"), ("registered_model", "READ")]
        for resource, permission in grants:
            what = {"resource_type": resource, "resource_pattern": "*", "permission": permission}
            post("3.0/mlflow/roles/permissions/add", role_id=role, **what)
        for name in names:
            post("3.0/mlflow/roles/assign", role_id=role, username=name)
    return institute
