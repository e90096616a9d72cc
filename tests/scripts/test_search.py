"""Every filter string of the README's search tables, on the local store and through a server."""

import re

import mlflow
import pytest
from conftest import KEY, ROOT, run
from gateway import Gateway

FLAGS = ("--dataset", "digits", "--epochs", 8, "--phase", "production", "--owner", "8cf")


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
    filter_string = filter_string.replace("a1b2c3d%", f"{commit[:7]}%")
    experiment = client.get_experiment_by_name("mnist_cnn_pytorch")
    runs = client.search_runs([experiment.experiment_id], filter_string)
    return run_id in [found.info.run_id for found in runs]


@pytest.mark.parametrize("filter_string", GUIDE_FILTERS)
def test_filter_on_the_local_store(filter_string, local, searched):
    assert found(searched, local.run_id, filter_string)


def test_filters_that_do_not_match_find_nothing(local, searched):
    """A filter that finds every run would pass the tests above, too."""
    for filter_string in (
        "tags.project.phase = 'development'",
        "metrics.val_accuracy > 1.0",
        "params.batch_size = '128'",
        "attributes.status = 'FAILED'",
        "attributes.run_name LIKE 'CIFAR%'",
    ):
        assert not found(searched, local.run_id, filter_string)


def test_git_commit_filter(local, searched):
    if "git.commit" not in searched.get_run(local.run_id).data.tags:
        pytest.skip("the project is no git checkout here, so the run has no tag git.commit")
    assert found(searched, local.run_id, "tags.git.commit = 'a1b2c3d'")


def test_readme_has_the_guides_filters(local, searched):
    filters = readme_filters()
    assert len(filters) >= len(GUIDE_FILTERS) + 2  # and the commit, and the combined ones
    assert set(GUIDE_FILTERS) <= set(filters)
    has_commit = "git.commit" in searched.get_run(local.run_id).data.tags
    for filter_string in filters:
        if "git.commit" not in filter_string or has_commit:
            assert found(searched, local.run_id, filter_string), filter_string


@pytest.mark.slow
def test_filters_through_a_server(server, tmp_path):
    with Gateway(server, KEY) as gateway:
        variables = {"MLFLOW_TRACKING_URI": gateway.uri, "AM_SC_API_KEY": KEY}
        run_id = run("train_mnist_mlflow.py", *FLAGS, cwd=tmp_path, **variables).result["run_id"]
    client = mlflow.MlflowClient(server)
    has_commit = "git.commit" in client.get_run(run_id).data.tags
    for filter_string in readme_filters():
        if "git.commit" not in filter_string or has_commit:
            assert found(client, run_id, filter_string), filter_string
