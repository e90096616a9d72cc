"""docs/adapt.md is true: its example works from a copy, its commands find and do what they say."""

import json
import re
import subprocess
import urllib.request

import mlflow
import numpy as np
import pytest
from conftest import KEY, ROOT, clean_environment, free_port, run, serving
from test_docs import FENCE, assert_printed, blocks_of, read, section

from common import storage

PAGE = "docs/adapt.md"
BLOCKS = blocks_of(PAGE)
SCRIPT = "scripts/train_your_model.py"
MARKS = [f"# --- {i} of 3:" for i in (1, 2, 3)] + ["# --- From here on"]


def block_with(words, language="bash"):
    (found,) = (b for b in BLOCKS if b.language == language and words in b.command)
    return found


COPY = block_with("cp -r common/__init__.py")
RENAME = block_with("sed -i")
SEARCH = block_with("grep")
LIST = block_with("runs list")
SERVE = block_with("models serve")


def type_block(command, cwd, code=0, **variables):
    process = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        env=clean_environment(**variables),
        capture_output=True,
        text=True,
    )
    assert process.returncode == code, f"{command}\n{process.stdout}{process.stderr}"
    return process


def copied(home):
    """Type the commands that copy, and return the folder with the copy."""
    commands = COPY.command.partition("cd ")[0]
    type_block(commands, ROOT, HOME=str(home))
    return home / "my_project"


def adapted(text):
    """Change the names and the three places as the page says."""
    names, *places = (
        block.command
        for block in BLOCKS
        if block.language == "python" and block.command.startswith(("EXPERIMENT", *MARKS))
    )
    assert [place.startswith(mark) for place, mark in zip(places, MARKS, strict=False)] == 3 * [
        True
    ]
    for line in names.splitlines():
        name = line.split(" = ")[0]
        text, count = re.subn(rf"^{name} = .*$", line, text, flags=re.MULTILINE)
        assert count == 1
    for place, mark, following in zip(places, MARKS, MARKS[1:], strict=False):
        begin, end = text.index(mark), text.index(following)
        text = f"{text[:begin]}{place}\n\n{text[end:]}"
    return text


def load(model_uri, folder, monkeypatch):
    """The model as somebody loads it who has none of this code, and trusts nobody."""
    path = mlflow.artifacts.download_artifacts(model_uri, dst_path=str(folder / "downloaded"))
    storage.check_model(path)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    return mlflow.pytorch.load_model(path), mlflow.pyfunc.load_model(path)


# Your own model and data


@pytest.mark.slow
def test_the_example_works_from_a_copy(tmp_path, monkeypatch):
    """First as it stands, then with the changes of the page; only what it names is copied."""
    folder = copied(tmp_path)
    assert {path.name for path in folder.iterdir()} == {"common", "scripts"}
    command = COPY.command.splitlines()[-1]
    process = type_block(command, folder)
    assert_printed(COPY.shown, process.stdout)

    script = folder / "scripts" / "train_signals.py"
    script.write_text(adapted(script.read_text()))
    process = type_block(command, folder)
    shown = re.search(r"now prints:\n\n```text\n(.*?)```", read(PAGE), flags=re.DOTALL)[1]
    assert_printed(shown, process.stdout)
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["val_accuracy"] > 0.9

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    monkeypatch.chdir(folder)
    network, function = load("models:/SIGNALS_CNN@production", tmp_path, monkeypatch)
    rows = np.random.default_rng(0).normal(20, 5, (7, 1, 128)).astype("float32")
    for count in (1, 2, 7):
        assert function.predict(rows[:count]).shape == (count, 3)

    # A folder of the name `common` in the user's project.
    process = type_block(RENAME.command.partition("cd ~/my_project\n")[2], folder)
    assert json.loads(process.stdout.splitlines()[-1])["val_accuracy"] > 0
    assert not (folder / "common").exists()


@pytest.mark.slow
def test_your_model_through_the_box_and_served(box, box_variables, tmp_path, monkeypatch):
    """Each request carries the key; what is registered takes raw rows, in batches of any size."""
    finished = run(SCRIPT, "--register", "--alias", "champion", cwd=tmp_path, **box_variables)
    assert box.artifact_uploads()
    assert {request.headers.get("x-api-key") for request in box.requests} == {KEY}
    assert finished.result["val_error"] < 45  # 70 for a network that knows nothing

    folder = tmp_path / "elsewhere"
    folder.mkdir()
    port = free_port()
    command = SERVE.command.replace("MNIST_CNN@production", "DIABETES_MLP@champion")
    arguments = ["bash", "-c", f"exec {command.replace('5001', str(port))}"]
    environment = clean_environment(PYTHONPATH=str(ROOT), **box_variables)
    url, log = f"http://127.0.0.1:{port}", tmp_path / "server.log"
    with serving(arguments, folder, environment, f"{url}/health", log):
        from sklearn.datasets import load_diabetes

        table = load_diabetes(scaled=False)
        for count in (1, 5):
            payload = json.dumps({"inputs": table.data[:count].tolist()})
            request = urllib.request.Request(
                f"{url}/invocations", payload.encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                predicted = json.load(answer)["predictions"]
            assert len(predicted) == count
            assert np.abs(np.array(predicted) - table.target[:count]).max() < 200

    for name, value in box_variables.items():
        monkeypatch.setenv(name, value)
    from common import connection

    connection.connect()
    load("models:/DIABETES_MLP@champion", folder, monkeypatch)


@pytest.mark.slow
def test_a_network_that_cannot_be_stored_is_refused_before_training(tmp_path):
    folder = copied(tmp_path)
    script = folder / "scripts" / "train_signals.py"
    text = script.read_text().replace(
        "        def forward(self, x):\n",
        "        def forward(self, x):\n            x = x if x.mean() > 1e9 else x + 1\n",
    )
    assert text != script.read_text()
    script.write_text(text)
    finished = run(script, cwd=folder, code=1)
    assert "cannot be exported" in finished.error
    assert "run   " not in finished.out and "epoch" not in finished.out


@pytest.mark.slow
def test_a_training_that_diverges_stops_at_once(tmp_path):
    finished = run(SCRIPT, "--lr", "1e30", "--register", cwd=tmp_path, code=1)
    assert "the training diverged" in finished.error
    assert "epoch 2" not in finished.out and "model   " not in finished.out


def test_an_alias_needs_a_version(tmp_path):
    finished = run(SCRIPT, "--alias", "production", cwd=tmp_path, code=2)
    assert "--alias needs --register" in finished.err
    assert list(tmp_path.iterdir()) == []


# Only the connection


def own_code():
    title = "Only the connection, in your own code"
    found = [code for language, code in FENCE.findall(section(PAGE, title)) if language == "python"]
    assert len(found) == 2
    return found


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_own_code_with_the_connection_alone(which, box, box_variables, tmp_path):
    folder = tmp_path / "mine"
    (folder / "common").mkdir(parents=True)
    files = ["__init__.py", "errors.py", "connection", *(["cli.py"] if which else [])]
    for name in files:
        type_block(f"cp -r common/{name} {folder}/common/", ROOT)
    script = folder / "mine.py"
    use = "\nimport mlflow\nwith mlflow.start_run(): mlflow.log_text('text', 'file.txt')\n"
    script.write_text(own_code()[which] + ("" if which else use))
    finished = run(script, cwd=tmp_path, **box_variables)
    assert finished.out.startswith("tracking https://127.0.0.1:")
    assert any(request.path.endswith("/runs/create") for request in box.requests)
    assert {request.headers.get("x-api-key") for request in box.requests} == {KEY}
    assert which or box.artifact_uploads()
    # And without a key: MLflow's exception, or two lines.
    finished = run(script, cwd=tmp_path, code=1, **box_variables | {"AM_SC_API_KEY": ""})
    if which:
        assert finished.err.startswith("error: ") and "refuses access (error 401)" in finished.err
    else:
        assert "Traceback" in finished.err and "error code 401" in finished.err


# From the copied key patch

REQUEST = "http_" + "request"  # in two parts, so that the search does not find this file
TLS = "MLFLOW_TRACKING_" + "INSECURE_TLS"
PATCHES = {
    "guide.py": f"import mlflow.utils.rest_utils as rest_utils\nrest_utils.{REQUEST} = patched\n",
    "short.py": f"import mlflow\nmlflow.utils.rest_utils.{REQUEST}=patched\n",
    "store.py": f"rest_store.{REQUEST} = shim\n",
    "setattr.py": f'setattr(rest_utils, "{REQUEST}", patched)\n',
    "mock.py": f"mock.patch('mlflow.utils.rest_utils.{REQUEST}', patched).start()\n",
    "session.py": "requests.Session." + "request = with_key\n",
    "called.py": "from amsc import enable_amsc_" + "x_api_key\n",
    "private.py": "_enable_amsc_" + "x_api_key()\n",
    "notebook.ipynb": json.dumps({"source": [f"rest_utils.{REQUEST} = patched\n"]}),
    "tls.ipynb": json.dumps({"source": [f'os.environ["{TLS}"] = "true"\n']}),
    "tls.py": f'os.environ["{TLS}"] = "true"\n',
    "default.py": f"os.environ.setdefault('{TLS}', '1')\n",
    "job.sh": f"  export {TLS}=true\n",
    ".env": f'{TLS}="true"\n',
    "ssl.py": "ssl._create_default_https_context = ssl._create_" + "unverified_context\n",
    "quiet.py": "urllib3.disable_" + "warnings(InsecureRequestWarning)\n",
}
HARMLESS = {
    "use.py": f"from mlflow.utils.rest_utils import {REQUEST}, verify_rest_response\n"
    f'answer = {REQUEST}(creds, "/version", "GET")\n',
    "read.py": f'insecure = os.environ.get("{TLS}", "").lower() in ("1", "true")\n',
    "session.py": "session.request(method, url)\n",
    "notes.txt": f"rest_utils.{REQUEST} = patched\n",
    "venv/lib/mlflow.py": f"rest_utils.{REQUEST} = patched\n",
}


def found_by_the_search(folder):
    output = type_block(SEARCH.command, folder).stdout
    return {line.split(":")[0].removeprefix("./") for line in output.splitlines()}


def test_the_search_finds_the_patch_and_nothing_else(tmp_path):
    for name, text in PATCHES.items():
        path = tmp_path / "old" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for name, text in HARMLESS.items():
        path = tmp_path / "good" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert found_by_the_search(tmp_path) == {f"old/{name}" for name in PATCHES}
    assert found_by_the_search(tmp_path / "good") == {"nothing found"}


def test_the_search_finds_nothing_in_this_project():
    """But for the tests, where a witness carries the patch."""
    found = {path for path in found_by_the_search(ROOT) if not path.startswith("tests/")}
    assert found <= {"nothing found"}


# From Weights & Biases


def rows():
    lines = re.findall(r"^\| (.*) \|$", section(PAGE, "From Weights & Biases"), re.MULTILINE)
    return [[cell.strip() for cell in line.split(" | ")] for line in lines[2:]]


def test_each_mlflow_name_in_the_table_exists():
    names = []
    assert rows()
    for row in rows():
        assert len(row) == 3, row
        names += re.findall(r"`([^`]+)`", row[1])
    assert len(names) > 20
    for name in names:
        found = {"mlflow": mlflow, "MlflowClient": mlflow.MlflowClient}
        start, *parts = name.removesuffix("()").split(".")
        if start == "connection":
            from common import connection

            assert hasattr(connection, parts[0])
            continue
        thing = found[start]
        for part in parts:
            thing = getattr(thing, part)
        assert callable(thing), name


def test_what_differs_is_as_the_table_says(tmp_path):
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_experiment("w")
    with mlflow.start_run() as started:
        mlflow.log_param("lr", 0.1)
        with pytest.raises(mlflow.MlflowException, match="Changing param values"):
            mlflow.log_param("lr", 0.2)
        mlflow.log_metric("loss", 2.0)
        mlflow.log_metric("loss", 1.0)
        mlflow.log_table({"sample": [1, 2]}, "table.json")
    client = mlflow.MlflowClient()
    assert [m.step for m in client.get_metric_history(started.info.run_id, "loss")] == [0, 0]
    assert client.get_run(started.info.run_id).data.params == {"lr": "0.1"}
    assert len(mlflow.load_table("table.json", run_ids=[started.info.run_id])) == 2


# The mlflow command


@pytest.mark.slow
def test_the_command_sends_the_key(box, box_variables, tmp_path):
    """From another folder; what it prints on stdout is MLflow's alone."""
    variables = {"PYTHONPATH": str(ROOT), **box_variables}
    finished = type_block(LIST.command, tmp_path, **variables)
    assert "Default" in finished.stdout and "tracking" not in finished.stdout
    assert "tracking https://127.0.0.1:" in finished.stderr
    assert {request.headers.get("x-api-key") for request in box.requests} == {KEY}
    plain = LIST.command.splitlines()[0].replace("python -m common.connection", "mlflow")
    assert plain.startswith("mlflow ")
    assert "401" in type_block(plain, tmp_path, code=1, **variables).stderr
