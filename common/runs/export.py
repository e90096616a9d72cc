"""Can the model be stored at all? Found out before the first epoch, not after the last."""

import re
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mlflow
from mlflow.exceptions import MlflowException

from common.errors import UserError, check_folder


def check_place(experiment, network=None):
    """Raise UserError if files cannot be written to TMPDIR, where MLflow makes them, and from there
    to where the experiment keeps them. A folder of this machine is printed, unless it is beside a
    local store: a server may name any, and so may a database that was copied.
    """
    tensors = network.state_dict().values() if network else ()
    size = 2**20 + sum(tensor.nbytes for tensor in tensors)
    check_folder(tempfile.gettempdir(), "the folder for temporary files (TMPDIR)", size)
    location = urlsplit(experiment.artifact_location)
    if location.scheme not in ("", "file", "http", "https", "mlflow-artifacts"):
        _check_store(experiment.artifact_location)
    if location.scheme not in ("", "file"):
        return
    folder = Path(url2pathname(location.path)).absolute()
    store = Path(mlflow.get_tracking_uri().rpartition(":///")[2]).absolute()
    if store.parent not in folder.parents:
        print(f"files    {folder}", flush=True)
    hint = "ask for a server that takes files itself (--serve-artifacts); beside a local store, "
    hint += "another --experiment gets a folder of its own."
    for part in (folder, folder / "models"):
        check_folder(part, "the folder for the experiment's files", size, hint)


def _check_store(location):
    """Raise UserError if MLflow cannot list what an object store holds: no package, no login."""

    def of_s3():  # asked when something was raised: by then the package is imported
        found = sys.modules.get("botocore.exceptions")
        return (found.BotoCoreError, found.ClientError) if found else ()

    try:
        mlflow.artifacts.list_artifacts(artifact_uri=location)
    except (ImportError, MlflowException, OSError, ValueError, *of_s3()) as error:
        shown = re.sub("//[^/@]*:[^/@]*@", "//", location)  # without a login
        reason = " ".join(str(error).replace(location, shown).split())[:300]
        what = f"MLflow cannot use {shown}, where the experiment's files are to go: {reason}."
        hint = "install its package, or export its login; or give another --experiment."
        raise UserError(what, hint) from error


def check_export(network, input_example):
    """Raise UserError unless MLflow can store `network`, which it exports after the training.

    `network` is on the CPU, `input_example` a numpy array with a batch of at least 2. One that
    cannot be exported would train to the end and then be lost. Takes 1 to 2 s.
    """
    import torch

    example = torch.from_numpy(input_example)
    training, name = network.training, type(network).__name__
    try:
        with torch.inference_mode():
            outputs = network.eval()(example)
        if not isinstance(outputs, torch.Tensor):
            raise TypeError(f"it returns a {type(outputs).__name__} in place of one tensor")
        # As `mlflow.pytorch.log_model` does it: any batch size, from the CPU, in eval mode.
        sizes = ({0: torch.export.Dim.AUTO},)
        torch.export.export(network, (example,), dynamic_shapes=sizes)
    except (RuntimeError, TypeError, ValueError) as error:  # PyTorch's own are among these
        reason = str(error).strip().splitlines()[0][:200]
        what = f"the network {name} cannot be exported, so MLflow could not store it: {reason}"
        hint = "`forward` takes one such tensor, returns one, and does not decide by values: "
        raise UserError(what, f"{hint}docs/adapt.md has more.") from error
    finally:
        network.train(training)
