"""The conventions of AmSC's servers: a key, a token, workspaces, owners. Real servers, TLS."""

import concurrent.futures
import re
import secrets
import time
from pathlib import Path
from typing import NamedTuple

import mlflow
import pytest
import requests
from conftest import Session, fails, run
from gateway import Gateway, jwt
from mlflow.exceptions import MlflowException
from modes import TOKENS

from common import connection, runs
from common.errors import UserError

pytestmark = pytest.mark.slow
TRAIN = "train_mnist_mlflow.py --dataset digits"


class Mode(NamedTuple):
    gateway: Gateway
    header: str  # the one that every request must have
    credential: str  # what it holds, but for a "Bearer " in front
    workspace: str | None
    folder: Path  # what the server has stored

    @property
    def variables(self):
        """What a user exports, the address and the certificate aside."""
        name = "AM_SC_API_KEY" if self.header == "x-api-key" else "MLFLOW_TRACKING_TOKEN"
        workspace = {"MLFLOW_WORKSPACE": self.workspace} if self.workspace else {}
        return {name: self.credential} | workspace


@pytest.fixture(params=["key", "token", "token and workspace", "token, workspace and owners"])
def mode(request, server, folder_of_server, institute, tls):
    key, token, context = secrets.token_hex(32), jwt(sub="somebody"), tls[0]
    if request.param == "key":
        gateway = Gateway(server, key, tls=context)
        made = Mode(gateway, "x-api-key", key, None, folder_of_server)
    elif request.param == "token":
        gateway = Gateway(server, None, tls=context, users={token: None})
        made = Mode(gateway, "authorization", token, None, folder_of_server)
    else:  # an administrator may do everything, so that permissions play no part
        name, workspace = ("ada", "team-a") if "owners" in request.param else ("admin", "private")
        gateway = institute.gateway(tls=context)
        made = Mode(gateway, "authorization", TOKENS[name], workspace, institute.folder)
    with gateway:
        yield made


def test_the_scripts_in_four_modes(mode, institute, prefork, tls, tmp_path):
    """Train, register, upload; each request has its credential, and nothing keeps it."""
    import torch

    from common import training

    torch.save(training.MNISTCNN().state_dict(), tmp_path / "weights.pth")
    user = Session(
        tmp_path,
        prefork,
        MLFLOW_TRACKING_URI=mode.gateway.uri,
        MLFLOW_TRACKING_SERVER_CERT_PATH=str(tls[1]),
        **mode.variables,
    )
    names = ("--experiment", "modes", "--model_name", "MODES_CNN")
    trained = user.type("train_mnist_mlflow.py --dataset digits --register", *names).result
    run_id = trained["run_id"]
    user.type("register_and_inference.py --model_name MODES_CNN", "--run_id", run_id)
    upload = "upload_external_model.py --dataset digits --model_path weights.pth --alias staging"
    user.type(upload, *names)
    shared = ("--experiment", f"shared in {tmp_path.name}", "--model_name", "SHARED_CNN")
    large = "Modify_artifact_location.py --dataset digits --target_path lustre --register"
    run_id = user.type(large, *shared).result["run_id"]
    pair = "Modify_artifact_location_register_inference.py --verify --model_name SHARED_CNN"
    mapped = user.type(pair, "--run_id", run_id).result
    assert mapped["model_path"].startswith(str(tmp_path / "lustre"))
    assert user.type("scripts/check_connection.py").result["exit_code"] == 0

    seen = mode.gateway.requests
    assert len(seen) > 50 and len(mode.gateway.artifact_uploads()) > 8
    sent = {request.headers.get(mode.header, "").removeprefix("Bearer ") for request in seen}
    assert sent == {mode.credential}
    assert {request.headers.get("x-mlflow-workspace") for request in seen} == {mode.workspace}
    refused = [request.path for request in seen if request.status in (401, 403)]
    # Where MLflow keeps from people what there is, they are told the same of what there is not.
    assert not [path for path in refused if "/registered-models/get?name=" not in path]
    (uploads, sizes) = zip(*((r.path, r.size) for r in seen if r.method == "PUT"), strict=True)
    assert not [path for path in uploads if path.endswith(".pt2") and run_id in path], sizes

    if mode.workspace:  # and in no other one
        for workspace, status in ((mode.workspace, 200), ("default", 404)):
            path = "2.0/mlflow/runs/get"
            answer = institute.ask("admin", "GET", path, workspace, run_id=run_id)
            assert answer.status_code == status
    secret = mode.credential.encode()
    stored = [path for path in mode.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".pt2" for path in stored)
    assert not [path for path in stored if secret in path.read_bytes()]
    assert not [command for command, end in user.ended if mode.credential in end.out + end.err]


def test_the_gateway_wants_a_valid_token(institute, tls):
    expired = jwt(sub="ada", exp=time.time() - 1)
    with institute.gateway(tls=tls[0]) as gateway:
        gateway.users[expired] = gateway.users[TOKENS["ada"]]

        def ask(authorization):
            url = f"{gateway.uri}/api/2.0/mlflow/users/current"
            headers = {"Authorization": authorization} if authorization else {}
            return requests.get(url, headers=headers, verify=tls[1], timeout=60)

        for wrong in (None, TOKENS["ada"], "Basic YWRhOmFkYQ=="):
            answer = ask(wrong)
            assert (answer.status_code, answer.text) == (401, "Bearer token required")
        for wrong in (jwt(sub="ada"), f"{TOKENS['ada']}0", expired, "unknown"):
            answer = ask(f"Bearer {wrong}")
            assert (answer.status_code, answer.text) == (401, "Invalid Bearer Token")
        for name in TOKENS:
            assert ask(f"Bearer {TOKENS[name]}").json()["user"]["username"] == name


# What MLflow 3.17 answers somebody else than the owner: where others may read, and where not.
READ, WRITE, EXISTS = (200, 403), (403, 403), (400, 400)
SECOND_USER = (
    (READ, "GET", "experiments/get-by-name", {"experiment_name": "{name}"}),
    (READ, "GET", "runs/get", {"run_id": "{run_id}"}),
    (READ, "GET", "registered-models/get", {"name": "{name}"}),
    (EXISTS, "POST", "experiments/create", {"name": "{name}"}),
    (EXISTS, "POST", "registered-models/create", {"name": "{name}"}),
    (WRITE, "POST", "runs/create", {"experiment_id": "{experiment_id}"}),
    (WRITE, "POST", "runs/log-batch", {"run_id": "{run_id}"}),
    (WRITE, "POST", "logged-models", {"experiment_id": "{experiment_id}", "name": "model"}),
    (WRITE, "POST", "model-versions/create", {"name": "{name}", "source": "runs:/{run_id}/x"}),
    (
        *(WRITE, "POST", "registered-models/alias"),
        {"name": "{name}", "alias": "production", "version": "1"},
    ),
    (WRITE, "POST", "registered-models/set-tag", {"name": "{name}", "key": "k", "value": "v"}),
)


@pytest.mark.parametrize(("column", "workspace"), [(0, "team-a"), (1, "default")])
def test_what_a_second_user_may(column, workspace, institute):
    """Facts about MLflow that the scripts' messages rest on: whose what is, and who sees it."""

    def ask(user, method, path, **body):
        return institute.ask(user, method, f"2.0/mlflow/{path}", workspace, **body)

    name = f"of ada in {workspace}"
    made = {"name": name} | ask("ada", "POST", "experiments/create", name=name).json()
    run = ask("ada", "POST", "runs/create", experiment_id=made["experiment_id"]).json()["run"]
    made["run_id"] = run["info"]["run_id"]
    assert ask("ada", "POST", "registered-models/create", name=name).ok
    artifact = f"artifacts/workspaces/{workspace}/{made['experiment_id']}/{made['run_id']}/a"
    for expected, method, path, body in SECOND_USER:
        body = {field: text.format(**made) for field, text in body.items()}
        answer = ask("grace", method, path, **body)
        assert answer.status_code == expected[column], (path, answer.text)
        if answer.status_code == 403:
            assert answer.text == "Permission denied"  # MLflow's own words, and no JSON
    for user, status in (("grace", 403), ("ada", 200)):
        path = f"2.0/mlflow-artifacts/{artifact}"
        assert institute.ask(user, "PUT", path, workspace).status_code == status


def test_workspaces_that_are_not_there_or_not_ours(institute, server):
    def create(workspace, user="grace"):
        answer = institute.ask(
            user, "POST", "2.0/mlflow/experiments/create", workspace, name=f"{user} was here"
        )
        return answer.status_code, answer.text

    status, text = create("nowhere")
    assert status == 404 and "Workspace 'nowhere' not found" in text
    assert create("private") == (403, "Permission denied")
    assert create("private", "ada")[0] == 200
    elsewhere = institute._replace(uri=server)
    path = "2.0/mlflow/experiments/search"
    answer = elsewhere.ask("ada", "POST", path, "team-a", max_results=1)
    assert answer.status_code == 500 and "workspaces are not enabled" in answer.json()["message"]


class User(Session):
    """Somebody at the institute, who follows hints: `$USER` is their name."""

    def __init__(self, name, gateway, workspace, prefork, tls, folder):
        folder.mkdir()
        super().__init__(
            folder,
            prefork,
            MLFLOW_TRACKING_URI=gateway.uri,
            MLFLOW_TRACKING_SERVER_CERT_PATH=str(tls[1]),
            MLFLOW_TRACKING_TOKEN=TOKENS[name],
            MLFLOW_WORKSPACE=workspace,
            USER=name,
            LOGNAME=name,
        )

    def is_told(self, command, *more):
        """The flags that the hint of an error gives, as a shell would hand them on."""
        failed = self.type(command, *more, code=1)
        assert "Traceback" not in failed.err and "\nepoch" not in failed.out, failed.err
        assert self.environment["MLFLOW_TRACKING_TOKEN"] not in failed.out + failed.err
        found = re.search(r"(--\w+) (\w+_\$USER)", failed.error)
        flags = (found[1], found[2].replace("$USER", self.environment["USER"])) if found else ()
        return failed.error, flags


@pytest.mark.parametrize("workspace", ["team-a", "default"])
def test_second_user_with_the_default_names(workspace, institute, prefork, tls, tmp_path):
    """What the first one made may be read in one workspace, and not even that in the other."""
    with institute.gateway(tls=tls[0]) as gateway:
        rest = (gateway, workspace, prefork, tls)
        ada, grace = (User(name, *rest, tmp_path / name) for name in ("ada", "grace"))
        first = ada.type(TRAIN, "--register").result
        seen = len(gateway.requests)

        message, experiment = grace.is_told(TRAIN)
        assert "does not let you write to the experiment mnist_cnn_pytorch" in message
        assert f"or for a role in the workspace {workspace}" in message
        message, name = grace.is_told(TRAIN, "--register", *experiment)
        assert "the registered model MNIST_CNN is somebody else's" in message
        trained = grace.type(TRAIN, "--register", *experiment, *name).result
        assert trained["model_name"] == "MNIST_CNN_grace" and trained["model_version"] == "1"

        # Not her run, and then not her model's name: no version is made.
        register = f"register_and_inference.py --dataset digits --run_id {first['run_id']}"
        message, _ = grace.is_told(register, *name)
        assert ("the run is somebody else's" in message) == (workspace == "team-a"), message
        register = f"register_and_inference.py --run_id {trained['run_id']}"
        message, again = grace.is_told(register)
        assert again == name
        assert grace.type(register, *name).result["model_version"] == "2"

        checked = grace.type("scripts/check_connection.py", code=21)
        assert "does not let you write to the experiment" in checked.error
        assert len({r.path for r in gateway.requests[seen:]}) > 10

    def versions(model):
        path = "2.0/mlflow/model-versions/search"
        found = institute.ask("admin", "GET", path, workspace, filter=f"name = '{model}'").json()
        return len(found.get("model_versions", []))

    assert versions("MNIST_CNN") == 1 and versions("MNIST_CNN_grace") == 2


@pytest.mark.parametrize(
    ("workspace", "words"),
    [
        (
            "nowhere",
            "the workspace nowhere cannot be used, and says: Workspace 'nowhere' not found",
        ),
        (
            "No Name",
            "the workspace No Name cannot be used, and says: Workspace name 'No Name' must",
        ),
        ("private", "or for a role in the workspace private"),
    ],
)
def test_workspace_that_cannot_be_used(workspace, words, institute, prefork, tls, tmp_path):
    with institute.gateway(tls=tls[0]) as gateway:
        grace = User("grace", gateway, workspace, prefork, tls, tmp_path / "grace")
        message, _ = grace.is_told(TRAIN)
        assert words in message
        failed = grace.type("scripts/check_connection.py", code=None)
        assert "Traceback" not in failed.err


def test_server_without_workspaces(server, tmp_path):
    message = fails(
        *TRAIN.split(), "--workspace", "team-a", cwd=tmp_path, MLFLOW_TRACKING_URI=server
    )
    assert "the workspace team-a cannot be used: the server has no workspaces" in message


def test_local_store_has_no_workspaces(tmp_path):
    """A variable that is meant for a server does no harm, and it is said."""
    end = run(*TRAIN.split(), cwd=tmp_path, MLFLOW_WORKSPACE="team-a")
    assert "no workspaces here, so not in team-a)" in end.out.splitlines()[1]


def test_experiment_named_by_the_environment(institute, prefork, tls, tmp_path):
    with institute.gateway(tls=tls[0]) as gateway:
        ada = User("ada", gateway, "team-a", prefork, tls, tmp_path / "ada")
        ada.environment["MLFLOW_EXPERIMENT_NAME"] = "project-ada"
        line = ada.type(TRAIN).out.splitlines()[2]
        assert "experiment project-ada" in line and line.endswith("?workspace=team-a")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", "refuses access (error 401), and says: a bad day"),
        ("json", 'refuses access (error 401), and says: {"message": "No API key found"}'),
        ("503", "is not available (error 503)"),
        ("redirect", "redirects to another address"),
        ("echo", "authorization: Bearer <secret>"),
        ((404, {}, b"not here"), "cannot be used: the server has no workspaces, or is no MLflow"),
    ],
)
def test_first_request_with_a_workspace(fault, words, institute, user):
    """It is another one than without, and MLflow says otherwise that it failed."""
    with institute.gateway() as gateway:
        user(MLFLOW_TRACKING_URI=gateway.uri, MLFLOW_TRACKING_TOKEN=TOKENS["ada"])
        gateway.fault = fault
        with pytest.raises(MlflowException) as raised:
            connection.connect(workspace="team-a")
    failure = connection.diagnose(raised.value)
    assert words in failure.what and failure.code == (75 if fault == "503" else 1)


def test_workspace_in_the_environment_may_have_blanks_around_it(institute, user, capsys):
    with institute.gateway() as gateway:
        user(MLFLOW_TRACKING_URI=gateway.uri, MLFLOW_TRACKING_TOKEN=TOKENS["ada"])
        for value, words in (("team-a\n", "; workspace team-a)\n"), ("  ", " UTC)\n")):
            user(MLFLOW_WORKSPACE=value)
            connection.connect()
            assert capsys.readouterr().out.endswith(words)


@pytest.mark.parametrize("workspace", ["team-a", "default"])
def test_asking_whose_a_registered_model_is(workspace, institute, user):
    """Also at the same moment, as the jobs of an array do. What is there stays as it is."""
    with institute.gateway() as gateway:
        user(MLFLOW_TRACKING_URI=gateway.uri, MLFLOW_TRACKING_TOKEN=TOKENS["ada"])
        connection.connect(workspace=workspace)
        with concurrent.futures.ThreadPoolExecutor(6) as jobs:
            list(jobs.map(runs.check_registrable, ["of an array"] * 6))
        client = mlflow.MlflowClient()
        client.set_registered_model_tag("of an array", "permission", "granted")
        runs.check_registrable("of an array")
        assert client.get_registered_model("of an array").tags == {"permission": "granted"}
        assert not [r for r in gateway.requests if r.path.endswith("/registered-models/delete")]
        user(MLFLOW_TRACKING_TOKEN=TOKENS["grace"])
        with pytest.raises(UserError, match="the registered model of an array is somebody else's"):
            runs.check_registrable("of an array")


def test_publishing_to_a_server_with_users(institute, tmp_path):
    """Of a run that is not there, it says that one may not see it. Locations it does not allow."""
    run(*TRAIN.split(), cwd=tmp_path)
    large = ("Modify_artifact_location.py", "--dataset", "digits", "--target_path", "lustre")
    run(*large, cwd=tmp_path)
    with institute.gateway() as gateway:
        variables = {"MLFLOW_TRACKING_URI": gateway.uri, "MLFLOW_TRACKING_TOKEN": TOKENS["ada"]}
        variables["MLFLOW_WORKSPACE"] = "team-a"
        publish = ("scripts/publish.py", "--experiment")
        there = ("--to_experiment", "published")
        done = run(*publish, "mnist_cnn_pytorch", *there, cwd=tmp_path, **variables)
        assert done.result["runs"] == 1
        message = fails(*publish, "mnist_cnn_pytorch_shared", cwd=tmp_path, **variables)
        assert "artifact_location cannot be specified" in message
        assert "correct --workspace" not in message
