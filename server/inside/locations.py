"""Which files MLflow opens: those of its own artifacts, whatever location a client names.

With any key, an experiment, a workspace or a trace can be given the location file:///home/ada, and
MLflow would read and write there as whoever runs it. Such a location stays what it is for the
clients that see the filesystem, as in docs/large-models.md; the server does not follow it. MLflow
takes this for its own way to open files (a plugin, named in gateway.dist-info), so no route can be
forgotten.
"""

import os


def own_only(artifact_uri, tracking_uri=None, registry_uri=None):
    # Imported here: a plugin that cannot be imported is a warning to MLflow, which would go on
    # without it. So it is a request that fails.
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    repository = LocalArtifactRepository(artifact_uri, tracking_uri, registry_uri)
    own = os.environ.get("ARTIFACTS_FOLDER")  # unset where they are in an object store
    inside = own and os.path.realpath(own)
    if not own or os.path.commonpath([inside, os.path.realpath(repository.artifact_dir)]) != inside:
        raise MlflowException(
            "This server opens no files but its own artifacts. The location is one for clients "
            "that see the filesystem.",
            PERMISSION_DENIED,
        )
    return repository
