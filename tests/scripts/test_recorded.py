"""What runs, settings and answers hold is not trusted: whatever it is, two lines, and at once."""

import argparse
import contextlib
import json
import os
import resource
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import mlflow
import numpy as np
import optuna
import pytest
import torch
from conftest import Session, other_user

from common import runs, storage, training
from common.errors import UserError
from scripts import (
    check_model,
    download_and_infer,
    local_store,
    networks,
    promotions,
    publishing,
    score_rest,
    settings,
    studies,
)


@pytest.fixture
def store(tmp_path, monkeypatch):
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", f"{tmp_path}/mlruns")
    mlflow.set_experiment("Default")  # not what another test has set in this process
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(None)


def refused(act, message):
    """It ends in two lines that say so, within seconds."""
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as raised:
        act()
    assert time.monotonic() - start < 60  # a pipe or a device would be waited for without end
    assert str(raised.value).count("\n") == 1 and len(str(raised.value)) < 5000


def link_out(path):
    """A link to a file that lies outside the folder that the link is in."""
    target = path.parent.with_name("elsewhere")
    target.touch()
    path.symlink_to(target)


ODD_FILES = {
    "pipe": os.mkfifo,
    "link": link_out,
    "link to nothing": lambda path: path.symlink_to(path.parent.with_name("nothing")),
    "link to itself": lambda path: path.symlink_to(path),
    "folder": os.mkdir,
}


# A colleague's run


def file_tags(**changed):
    tags = {"file.path": "WEIGHTS", "file.size_bytes": "7", "file.sha256": "0" * 64}
    tags |= {"file.host": "there"} | {f"file.{name}": value for name, value in changed.items()}
    return {name: value for name, value in tags.items() if value is not None}


FILES = [
    *(file_tags(size_bytes=size) for size in (None, "many", "nan", "-7", "7.0", "9" * 5000)),
    *(file_tags(path=path) for path in ("w.pth", "PIPE", "/dev/zero", "/", "x" * 5000, "")),
    {"file.path": "PIPE"},
]


def test_tags_of_a_file(store, tmp_path):
    weights, pipe = tmp_path / "w.pth", tmp_path / "pipe"
    weights.write_bytes(b"weights")
    os.mkfifo(pipe)
    with mlflow.start_run():
        for i, tags in enumerate([file_tags(), *FILES]):
            path = tags["file.path"].replace("WEIGHTS", str(weights)).replace("PIPE", str(pipe))
            made = mlflow.create_external_model(name=f"m{i}", tags=tags | {"file.path": path})
            if i == 0:
                file = storage.of_model(f"models:/{made.model_id}")
                assert file.size == 7 and file.tags == tags | {"file.path": path}
            else:
                refused(
                    lambda m=made: storage.of_model(f"models:/{m.model_id}"), "the model|no model"
                )


def test_verify_means_the_file_that_was_looked_up(store, tmp_path):
    path, other = tmp_path / "w.pth", tmp_path / "other"
    path.write_bytes(b"weights")
    sha256 = storage.sha256(path)
    with mlflow.start_run():
        tags = storage.recorded(path, sha256).tags
        uri = f"models:/{mlflow.create_external_model(name='m', tags=tags).model_id}"
    storage.verify(storage.of_model(uri))
    file = storage.of_model(uri)
    other.write_bytes(b"weights")
    other.rename(path)  # after it was mapped, and before it was hashed
    refused(lambda: storage.verify(file), "was replaced or changed just now")
    file = storage.of_model(uri)
    path.write_bytes(b"WEIGHTS")
    refused(lambda: storage.verify(file), "was replaced or changed just now")
    refused(lambda: storage.verify(storage.of_model(uri)), "its SHA-256 is")


@pytest.mark.slow
def test_model_of_a_colleague_with_a_link(store, tmp_path):
    """What a link leads to is not copied: /dev/zero has no end, and a pipe nobody who writes."""
    network, example = training.MNISTCNN().eval(), np.zeros((2, 1, 28, 28), "float32")
    with mlflow.start_run():
        logged = mlflow.pytorch.log_model(network, name="model", input_example=example)
    with storage.checked_copy(logged.model_uri) as folder:
        mlflow.pytorch.load_model(folder)
    (folder,) = (path.parent for path in tmp_path.rglob("MLmodel"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, limits[1]))  # not the whole disk, if it fails
    try:
        links = {"more": "/dev/zero", "MLmodel": "/dev/zero", "data/x": "/tmp", "x": "."}
        for name, leads_to in links.items():
            link = folder / name
            kept = link.read_bytes() if link.exists() else None
            link.unlink(missing_ok=True)
            link.symlink_to(leads_to)
            refused(storage.checked_copy(logged.model_uri).__enter__, "a link, or what is no file")
            link.unlink()
            if kept:
                link.write_bytes(kept)
        os.mkfifo(folder / "pipe.yml")
        refused(storage.checked_copy(logged.model_uri).__enter__, "pipe.yml` is a named pipe")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


GOOD = {"digest": "d", "predictions": [1, 2, 3]}
PREDICTIONS = [
    *(b"", b"[]", b"{}", b'"text"', b"null", b"\xff\xfe", b"[" * 200_000, b"9" * 5000),
    *(json.dumps(GOOD | changed).encode() for changed in ({"predictions": None}, {"digest": 7})),
    *(json.dumps(GOOD | {"predictions": p}).encode() for p in ([1, 2], [1] * 4, "123", {}, [[]])),
    b'{"digest": "d", "predictions": [NaN, 1e999, ' + b"9" * 4000 + b"]}",
]


def test_predictions_of_a_run(store):
    class Test:
        digest, labels = "d", [1, 2, 3]

    found = training.Evaluation(0.1, 1.0, torch.tensor([1, 2, 3]))
    with mlflow.start_run() as active:
        mlflow.log_metric("val_accuracy", float("nan"))
        mlflow.log_param("dataset", "cifar10")
    run, client = mlflow.get_run(active.info.run_id), store

    def check():
        runs.check_predictions(run, Test, found, "models:/m-1")

    refused(check, "the trained one had nan")
    client.log_dict(run.info.run_id, GOOD, runs.PREDICTIONS)
    check()
    (path,) = Path("mlruns").rglob("test.json")
    for content in PREDICTIONS:
        path.write_bytes(content)
        refused(check, "not what a script|differently|not the one that the run was scored on")
    with path.open("wb") as file:
        file.truncate(1 << 40)
    refused(check, "not what a script")
    path.unlink()
    os.mkfifo(path)
    refused(check, "not what a script")
    path.unlink()
    for leads_to in ("/dev/zero", "/etc/hostname"):
        path.symlink_to(leads_to)
        refused(check, "not what a script")
        path.unlink()
    refused(
        lambda: training.load_data(runs.recorded_dataset(run), "data", train=False),
        "there is no data set 'cifar10' here",
    )


def test_record_of_a_promotion(store):
    mlflow.set_experiment("promotions")
    with mlflow.start_run(tags={"promotion.model": "CNN", "promotion.number": "many"}):
        pass
    refused(lambda: promotions.records("promotions", "CNN"), "is no record of a promotion of CNN")


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_registered(prefork, tmp_path):
    network = training.MNISTCNN()
    network.fc2.bias.data[3] = float("nan")
    torch.save(network.state_dict(), tmp_path / "w.pth")
    command = "upload_external_model.py --in_place --model_path w.pth --dataset digits"
    me = Session(tmp_path, prefork)
    finished = me.type(f"{command} --model_name CNN", code=1)
    assert "not finite: fc2.bias" in finished.error and not (tmp_path / "mlflow.db").exists()
    os.mkfifo(tmp_path / "pipe.pt2")
    finished = me.type("upload_external_model.py --in_place --model_path pipe.pt2", code=2)
    assert "must be a file, not a pipe or a device" in finished.err
    network.fc2.bias.data[3] = 0
    torch.save(network.state_dict(), tmp_path / "w.pth")
    flags = "--ca_bundle pipe.pt2 --tracking_uri https://127.0.0.1:9"
    finished = me.type(f"upload_external_model.py --model_path w.pth {flags}", code=1)
    assert "no PEM certificates can be read from pipe.pt2: it is no file" in finished.error


@pytest.mark.slow
def test_file_that_is_called_as_mlflow_calls_its_own(prefork, tmp_path):
    """An archive in place, without the rest of MLflow's folder around it."""
    network, me = training.MNISTCNN(), Session(tmp_path, prefork)
    example = np.zeros((2, 1, 28, 28), "float32")
    mlflow.pytorch.save_model(network.eval(), tmp_path / "saved", input_example=example)
    (tmp_path / "data").mkdir()
    (tmp_path / "saved" / "data" / "model.pt2").rename(tmp_path / "data" / "model.pt2")
    command = "upload_external_model.py --in_place --model_path data/model.pt2 --dataset digits"
    run_id = me.type(command).result["run_id"]
    command = "Modify_artifact_location_register_inference.py --dataset digits --verify --run_id"
    assert me.type(f"{command} {run_id}").result["model_version"] == "1"


# Settings files


@pytest.mark.parametrize(
    "text",
    [
        *("epochs: " + "[" * 5000, "epochs: 2001-99-99", "epochs: [1]", "epochs: {a: 1}", "- 1"),
        "a: &a0 [x]\n"
        + "".join(f"b{i}: &a{i + 1} [{','.join([f'*a{i}'] * 9)}]\n" for i in range(9)),
        "epochs: !!python/object/apply:os.getcwd []",
    ],
)
def test_settings_file(text, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int)
    settings.add_config_argument(parser)
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(SystemExit) as ending:
        settings.parse_with_config(parser, ["--config", "s.yaml"])
    assert ending.value.code == 2 and "error: argument --" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"a thesis", b"[1]", b"\x00" * 20, b'{"other": 1}'])
def test_study_in_a_file_that_is_none(content, tmp_path):
    """Optuna would append to any file."""
    path = tmp_path / "thesis"
    path.write_bytes(content)
    refused(lambda: studies.open_storage(str(path)), "it is another file, and not a study's")
    assert path.read_bytes() == content
    for _ in range(2):
        optuna.create_study(storage=studies.open_storage(f"{path}.log"), load_if_exists=True)


@pytest.mark.parametrize("rest", [b'{"op_code": 4, "worker_id": "x', b"{", b"\0\0"])
def test_study_whose_last_line_was_cut_off(rest, tmp_path):
    """By a full disk. What is stored goes on."""
    path = str(tmp_path / "study.log")
    study = optuna.create_study(storage=studies.open_storage(path), study_name="s")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with open(path, "ab") as file:
        file.write(rest)
    for trials in (2, 3):
        study = optuna.load_study(storage=studies.open_storage(path), study_name="s")
        study.add_trial(optuna.trial.create_trial(value=1.0))
        assert len(study.trials) == trials
    with open(path, "ab") as file:
        file.write(b'{"op_code": 99}\n')
    refused(lambda: studies.open_storage(path), "or the file is damaged")
    assert sorted(os.listdir(tmp_path)) == ["study.log"]


@pytest.mark.parametrize("rest", ["sec@ret:pw@h/y", "sec@h:x/y", "sec@[h/y"])
def test_study_at_an_impossible_address(rest):
    refused(lambda: studies.open_storage(f"postgresql://u:{rest}"), "^(?!.*(sec|ret|pw)).*kept in")


def test_study_of_another_experiment_or_of_a_deleted_run(store):
    run = store.create_run(store.create_experiment("one"))
    other = mlflow.get_experiment(store.create_experiment("other"))
    refused(lambda: studies.check_parent(run, other, "s"), "belongs to the experiment 'one'")
    own = mlflow.get_experiment(run.info.experiment_id)
    studies.check_parent(run, own, "s")
    store.delete_run(run.info.run_id)
    run = mlflow.get_run(run.info.run_id)
    refused(lambda: studies.check_parent(run, own, "s"), "was deleted")


@pytest.mark.parametrize("name", ["a#1", "what?", "50%41", "two\nlines"])
def test_files_whose_names_would_not_arrive(name, tmp_path):
    """MLflow puts a name into the address as it is: `a#1` and `a#2` would both become `a`."""
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a b.txt").touch()
    assert list(publishing.files_in(tmp_path)) == ["plots/a b.txt"]
    (tmp_path / "plots" / name).touch()
    refused(lambda: publishing.files_in(tmp_path), "it would not arrive")
    (tmp_path / "plots" / name).unlink()
    (tmp_path / name).mkdir()
    refused(lambda: publishing.files_in(tmp_path), "it would not arrive")


def test_files_that_cannot_be_sent(public):
    """Left out without a word, they would be missed when the job's folder is gone."""
    plots = public / "files" / "plots"
    plots.mkdir(parents=True)
    (plots / "a.png").touch()
    (public / "to all").symlink_to("files")
    refused(lambda: publishing.files_in(public / "to all"), "to all is a link")
    for leads_to in ("/etc/hostname", "/etc", "/no/where"):
        (plots / "link").symlink_to(leads_to)
        refused(lambda: publishing.files_in(plots.parent), "link is a link")
        (plots / "link").unlink()
    os.mkfifo(plots / "pipe")
    refused(lambda: publishing.files_in(plots.parent), "pipe is a link or no file")
    (plots / "pipe").unlink()
    plots.chmod(0)
    with other_user():
        refused(
            lambda: publishing.files_in(plots.parent), "plots cannot be read: Permission denied"
        )
    assert list(publishing.files_in(plots.parent)) == ["plots/a.png"]
    assert publishing.files_in(public / "none") == {}


def test_lock_that_somebody_has_planted(tmp_path):
    """Neither waited for without end, nor followed."""
    local = local_store.LocalStore(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)
    lock = tmp_path / "mlflow.db.publishing"
    lock.symlink_to(tmp_path / "victim")
    with local.locked():
        assert not (tmp_path / "victim").exists()
    lock.unlink()
    os.mkfifo(lock)
    with local.locked():
        pass


# Answers of a served model


@pytest.fixture
def served():
    """(address, what it answers: to be set)."""
    answer = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response_only(answer.get("status", 200))
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for byte in answer["body"] if "slowly" in answer else ():
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.1)
                self.wfile.write(answer["body"])

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://me:pa55word@127.0.0.1:{server.server_port}", answer
    server.shutdown()


def test_answers_of_a_served_model(served, capsys, monkeypatch):
    url, answer = served
    flags = ["--url", url, "--dataset", "digits"]
    for body in (b"[" * 100_000, b"9" * 5000, b"{}", b'{"predictions": []}', b'{"predictions": 7}'):
        answer["body"] = body
        refused(lambda: score_rest.main(flags), "but not as a served model")
    for row in (7, [], [None, "x"], "text"):
        answer["body"] = json.dumps({"predictions": [row, row]}).encode()
        refused(lambda: score_rest.main([*flags, "--images", "2"]), "one number per class")
    answer["body"] = b'{"predictions": [1, {"a": NaN}]}'
    score_rest.main([*flags, "--data", "[[1, 2, 3, 4], [5, 6, 7, 8]]"])
    assert '"predictions": [1, {"a": null}]}' in capsys.readouterr().out  # JSON has no NaN
    answer["body"] = b'{"predictions": [' + b"1," * 2**25
    refused(lambda: score_rest.main(flags), "its answer takes more than 67108864 bytes")
    monkeypatch.setattr(score_rest, "PATIENCE", 1)
    answer |= {"body": b"{" + b" " * 100, "slowly": True}
    refused(lambda: score_rest.main(flags), "its answer takes more than")
    answer |= {"body": b"", "status": 307}
    refused(lambda: score_rest.main(flags), "but not as a served model")  # it is not gone after
    refused(lambda: score_rest.main(["--url", "http://[::1"]), "no served model answers")
    for rows in ("[[NaN, 2, 3, 4]]", "[" * 30_000):
        with pytest.raises(SystemExit):
            score_rest.main([*flags, "--data", rows])
    with pytest.raises(UserError) as raised:
        score_rest.main(["--url", "http://me:pa55word@127.0.0.1:9"])
    assert "pa55word" not in str(raised.value) + capsys.readouterr().out


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://me:pa55word@127.0.0.1:9//x", "http://127.0.0.1:9//x/invocations: Conn"),
        ("http://me:pa//55word@127.0.0.1:9", "http://127.0.0.1:9/invocations: InvalidURL"),
        ("http://me:pa?55word@127.0.0.1:9", "http://...: "),
        ("http://me:pa#55word@127.0.0.1:9", "http://...: "),
        ("http://me:pa@55word@127.0.0.1:9", "http://...: "),
        ("http://127.0.0.1:9/x?token=pa55word", "http://127.0.0.1:9/x: Conn"),
        ("http://127.0.0.1:9/x#pa55word", "http://127.0.0.1:9/x: Conn"),
        ("me:pa55word@127.0.0.1:9", "127.0.0.1:9/invocations: "),
        ("//me:pa55word@127.0.0.1:9", "//127.0.0.1:9/invocations: "),
        (f"http://{'m' * 200}:pa55word@[::1", "http://[::1/invocations: "),
        ("ftp://me:pa55word@127.0.0.1", "ftp://127.0.0.1/invocations: "),
        ("http://me:pa55word@127.0.0.1:9\x1b", ""),
        ("", ""),
    ],
)
def test_no_login_of_a_served_model_is_shown(url, shown, capsys):
    with pytest.raises((UserError, SystemExit)) as raised:
        score_rest.main(["--url", url])
    said = str(raised.value) + "".join(capsys.readouterr())
    assert (f"answers at {shown}" if shown else "is empty, or holds control") in said
    assert "55word" not in said and "me:" not in said


# A colleague's checkpoint, and a folder where others may write


@pytest.fixture
def checkpoint(store, tmp_path):
    """(what runs the script on a run with a checkpoint, the checkpoint)"""
    path = tmp_path / "model.pth"
    torch.save(networks.SimpleMNIST().state_dict(), path)
    run_id = store.create_run("0").info.run_id
    store.log_artifact(run_id, path)

    def infer(*flags):
        download_and_infer.main(["--run_id", run_id, "--dataset", "digits", *map(str, flags)])

    return infer, path


@pytest.mark.parametrize("kind", [*ODD_FILES, "file"])
@pytest.mark.slow
def test_a_checkpoint_replaces_nothing(kind, checkpoint, tmp_path):
    infer, _ = checkpoint
    folder = tmp_path / "shared"
    folder.mkdir(mode=0o777)
    {**ODD_FILES, "file": Path.touch}[kind](folder / "model.pth")
    before = (folder / "model.pth").lstat()
    refused(lambda: infer("--download_dir", folder), "model.pth is there already")
    assert (folder / "model.pth").lstat() == before
    assert [path.name for path in folder.iterdir()] == ["model.pth"]
    assert not (tmp_path / "nothing").exists()


def test_a_checkpoint_can_be_downloaded_again(checkpoint, tmp_path):
    infer, path = checkpoint
    for _ in range(2):
        infer("--download_dir", tmp_path / "a" / "b")
        assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["model.pth"]
    assert (tmp_path / "a" / "b" / "model.pth").read_bytes() == path.read_bytes()


def test_folders_that_cannot_be_written(checkpoint, tmp_path):
    infer, path = checkpoint
    (tmp_path / "link").symlink_to("/no-such-folder")
    for folder in (path / "below", path, tmp_path / "link", "/proc/x", "/dev/null/x"):
        refused(lambda folder=folder: infer("--download_dir", folder), "download_dir .* cannot be")


@pytest.mark.parametrize("kind", ODD_FILES)
def test_a_checkpoint_that_is_no_file(kind, store, tmp_path):
    run = store.create_run("0")
    path = Path(run.info.artifact_uri.removeprefix("file://"), "model.pth")
    path.parent.mkdir(parents=True, exist_ok=True)
    ODD_FILES[kind](path)
    flags = ["--run_id", run.info.run_id, "--dataset", "digits"]
    refused(lambda: download_and_infer.main(flags), "has no model.pth|cannot be downloaded")


# A colleague's model, which check_model.py fetches


@pytest.mark.parametrize("kind", [kind for kind in ODD_FILES if kind != "folder"])
@pytest.mark.slow
def test_a_model_with_what_is_no_file(kind, store, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "MLmodel").touch()
    ODD_FILES[kind](tmp_path / "model" / "odd")
    store.create_registered_model("ODD")
    store.create_model_version("ODD", str(tmp_path / "model"))
    message = "No such file or directory" if kind == "link to nothing" else "holds a link, or what"
    refused(lambda: check_model.main(["models:/ODD/1"]), message)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://bucket/x", "cannot be fetched: Unable to locate credentials"),
        ("foo://x/y", "cannot be fetched: Could not find a registered"),
        ("runs:/", "cannot be fetched: Not a proper"),
        ("models:/NONE/1", "there is no model models:/NONE/1"),
    ],
)
def test_addresses_without_a_model(address, message, store, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # where botocore looks for a login
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    refused(lambda: check_model.main([address]), message)
