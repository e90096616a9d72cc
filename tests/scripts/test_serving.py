"""The registered model, served by MLflow itself and asked over REST."""

import json
import re
import urllib.request

import pytest
from conftest import clean_environment, free_port, run, serving

from common import training

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def endpoint(local):
    """`mlflow models serve`, as the README has it, on a port of its own."""
    port, log = free_port(), local.folder.parent / "serving.log"
    command = [
        *("mlflow", "models", "serve", "-m", "models:/MNIST_CNN@production"),
        *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)),
    ]
    environment = clean_environment(MLFLOW_TRACKING_URI=local.uri)
    with serving(command, local.folder, environment, f"http://127.0.0.1:{port}/ping", log):
        yield f"http://127.0.0.1:{port}/invocations"


def ask(endpoint, payload):
    request = urllib.request.Request(
        endpoint, json.dumps(payload).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)["predictions"]


@pytest.mark.parametrize("count", [1, 100])
def test_images_are_recognised(endpoint, count):
    """Pixels in [0, 1] and nothing else: the model normalises by itself."""
    test = training.load_data("digits", "unused", train=False)
    pixels = (test.images[:count].float() / 255).tolist()
    logits = ask(endpoint, {"inputs": pixels})
    assert len(logits) == count and {len(row) for row in logits} == {10}
    predicted = [row.index(max(row)) for row in logits]
    correct = sum(p == t for p, t in zip(predicted, test.labels.tolist(), strict=False))
    assert correct >= 0.9 * count


def test_the_example_stored_with_the_model_is_a_ready_request(endpoint, local):
    (example,) = local.folder.glob("mlruns/1/models/*/artifacts/serving_input_example.json")
    assert len(ask(endpoint, json.loads(example.read_text()))) == 2


def test_the_script_asks_for_images(endpoint, tmp_path):
    arguments = ("--url", endpoint, "--images", 20, "--dataset", "digits")
    asked = run("scripts/score_rest.py", *arguments, cwd=tmp_path)
    right = re.findall(r"^sample +\d+  true (\d)  predicted \1$", asked.out, re.MULTILINE)
    assert len(asked.result["predictions"]) == 20 and len(right) >= 18
