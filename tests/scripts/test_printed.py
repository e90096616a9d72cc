"""What others wrote is printed as text: no control characters, no lines that look like ours."""

import io

import mlflow
import pytest
from conftest import Session

from common.errors import Printed, UserError, plain

ODD = "x\x1b]0;title\x07\x1b[31m\r\nmodel    FAKE version 9\x9b2J\u202e\u2028{}"


@pytest.mark.parametrize(
    ("one_line", "texts", "shown"),
    [
        (True, ["run      a\nb\x1b[2J", "\n"], "run      a b\n"),
        (True, ["one\n", "\n", "två — ok\n"], "one\n\ntvå — ok\n"),
        (True, ["x" * 5000], "x" * 5000),
        (False, ["error: a\nhint:  b\x07\n"], "error: a\nhint:  b \n"),
        (False, ["\r 50%|###", "\r     "], "\r 50%|###\r     "),
        (False, ["a\rb\x1b[A\u202ec\n"], "a b c\n"),
        (False, ["x" * 30_000 + "\n"], "x" * 1600 + " ... " + "x" * 400 + "\n"),
    ],
)
def test_texts_are_shown_as_text(one_line, texts, shown):
    stream = io.StringIO()
    printed = Printed(stream, one_line)
    for text in texts:
        printed.write(text)
    assert stream.getvalue() == shown and not printed.isatty()


def test_message_has_two_lines_whatever_it_names():
    message = str(UserError(f"there is no {ODD}.", f"give {ODD}{'y' * 9000}"))
    assert message.count("\n") == 1 and len(message) < 5000
    assert all(line.isprintable() for line in message.split("\n"))
    assert plain("a\tb\0") == "a b "


def test_long_values_of_flags_are_shortened(tmp_path):
    for flags in (["--model_path", "w" * 20_000], ["--model_path", "w.pth", "--alias", "?" * 9999]):
        error = fails_at_once(*flags, cwd=tmp_path)
        assert 200 < len(error) < 6000


def fails_at_once(*flags, cwd):
    """`fails` wants a hint, which a flag's message has not."""
    from conftest import run

    return run("upload_external_model.py", *flags, cwd=cwd, code=None).err


@pytest.fixture(scope="module")
def poisoned(prefork, tmp_path_factory):
    """A user's folder with a local store in which every text that MLflow lets be odd is odd."""
    me = Session(tmp_path_factory.mktemp("poisoned"), prefork)
    train = "train_mnist_mlflow.py --dataset digits --register --batch_size 512"
    run_id = me.type(train).result["run_id"]
    client = mlflow.MlflowClient(f"sqlite:///{me.folder}/mlflow.db")
    for name in ("owner", "mlflow.runName", "mlflow.note.content", "git.commit", "host"):
        client.set_tag(run_id, name, ODD)
    client.update_registered_model("MNIST_CNN", ODD)
    client.update_model_version("MNIST_CNN", "1", ODD)
    client.create_registered_model(ODD, description=ODD)
    model_id = client.get_model_version("MNIST_CNN", "1").source.removeprefix("models:/")
    client.set_logged_model_tags(model_id, {"file.host": ODD, "file.sha256": ODD})
    return me, client, run_id


COMMANDS = [
    "register_and_inference.py --run_id {}",
    "Modify_artifact_location_register_inference.py --run_id {}",
    "scripts/load_and_use_models.py list",
    "scripts/load_and_use_models.py versions MNIST_CNN",
    "scripts/load_and_use_models.py from-run {} --predict",
    "scripts/register_model.py --run_id {} --model_name OTHER",
    "scripts/promote.py --model_name MNIST_CNN --history",
]


@pytest.mark.slow
def test_nothing_odd_is_printed(poisoned):
    me, client, run_id = poisoned
    for command in COMMANDS:
        finished = me.type(command.format(run_id), code=None)
        for line in (finished.out + finished.err).split("\n"):
            assert line.isprintable(), (command, line)
            assert not line.startswith("model    FAKE"), command
        assert "Traceback" not in finished.err, (command, finished.err)
    shown = "".join(finished.out for _, finished in me.ended)
    assert shown.count("model    FAKE version 9") > 3, "nothing odd was met"
