"""The variables of MLflow that suit a job log, and those for the first requests."""

import contextlib
import os

# A user's own value wins.
SETTINGS = {
    # MLflow loads no pickle, and from 3.18 on no code beside a model. Neither switch is enough: the
    # check in common/storage/ looks at a model before it is loaded.
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
    # Models are exported from the CPU. MLflow would try them on a GPU wherever it sees one.
    "MLFLOW_DEFAULT_PREDICTION_DEVICE": "cpu",
    # Files from here on go in parts of this many bytes, past the gateway, where the server offers
    # that. MLflow would begin at 500 MB, and gateways refuse bodies of more than some 16 MB.
    "MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE": str(10 * 1024 * 1024),
    # MLflow tries again for some 4 minutes. It would also wait as long as a server says: hours.
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the scripts print the run's address first
    "GIT_PYTHON_REFRESH": "quiet",  # no three screens of warning on a machine without git
}

# Before any work starts, a server that is away costs seconds. MLflow's own patience (7 retries,
# 120 s each) comes back after that, and carries a running job over an outage.
FIRST_REQUESTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
}


@contextlib.contextmanager
def environment(**variables):
    """Set environment variables for a while."""
    own = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in own.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
