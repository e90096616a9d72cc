"""Every filter string of the README's search tables, on the local store and through a server."""

import re

import mlflow
import pytest
from conftest import KEY, ROOT, run
from gateway import Gateway

FLAGS = ("--dataset", "digits", "--epochs", 3, "--phase", "production", "--owner", "8cf")


def readme_filters():
    """The filter strings in the tables and code blocks of the README's chapter on searching."""
    text = (ROOT / "README.md").read_text()
    chapter = re.search(r"^## Search.*?(?=^## )", text, flags=re.MULTILINE | re.DOTALL).group()
    in_tables = re.findall(r"^\|.*\| `([^`]+)` \|$", chapter, flags=re.MULTILINE)
    in_blocks = re.findall(r"```sql\n(.*?)\n```", chapter, flags=re.DOTALL)
    return in_tables + in_blocks


# What the guide's tables and its last example hold, for runs of this project.
GUIDE_FILTERS = [
    "tags.project.phase = 'production'",
    "tags.owner = '8cf'",
    "tags.model.type = 'Computer Vision'",
    "metrics.val_accuracy > 0.95",
    "metrics.train_loss < 0.1",
    "params.batch_size = '64'",
    "params.optimizer = 'Adam'",
    "attributes.run_name = 'MNIST_production_8cf'",
    "attributes.run_name LIKE 'MNIST%'",
    "attributes.status = 'FINISHED'",
    "attributes.start_time > 1672531200000",
]


@pytest.fixture(scope="module")
def searched(local):
    """The client of a local store with one run that each filter finds."""
    return mlflow.MlflowClient(local.uri)


def found(client, run_id, filter_string):
    commit = client.get_run(run_id).data.tags.get("git.commit", "")
    filter_string = filter_string.replace("'a1b2c3d'", f"'{commit}'")
    experiment = client.get_experiment_by_name("mnist_cnn_pytorch")
    runs = client.search_runs([experiment.experiment_id], filter_string)
    return run_id in [found.info.run_id for found in runs]
