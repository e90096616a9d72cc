"""Would loading a model run code that its author put there? Checked before it is loaded.

`mlflow.pytorch.load_model` runs what a model brings along: pickles, modules in a folder `code`, and
text in a `.pt2` archive that PyTorch hands to `eval`, `exec` or `import`. MLflow's own switch,
MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false, stops the pickles alone. Here a model passes only if
everything in it is known to be harmless. Nothing of it is imported, unpickled or evaluated.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
import zipfile
from pathlib import Path

import mlflow
import yaml
from mlflow.exceptions import MlflowException

# Private to PyTorch: the reader that loads an archive. If it goes, no model can be checked.
from torch._C import PyTorchFileReader

from common.errors import UserError

from . import layout
from .damage import DAMAGED, reason, require
from .examples import check_examples
from .program import check_config, check_program

FILES = re.compile(
    r"MLmodel|registered_model_meta|(serving_)?input_example\.json|(conda|python_env)\.yaml|"
    r"(requirements|constraints)\.txt|uv\.lock|pyproject\.toml|\.python-version|"
    + re.escape(layout.MODEL_FILE)
)
# The settings in MLmodel that name files and modules, and the values that lead nowhere else.
SETTINGS = {
    "pytorch": {"model_data": ("data",), "code": (None,)},
    "python_function": {
        "data": ("data",),
        "code": (None,),
        "loader_module": ("mlflow.pytorch",),
        "pickle_module_name": (None, "mlflow.pytorch.pickle_module"),
    },
}


@contextlib.contextmanager
def checked_copy(model_uri):
    """Download the model to a temporary folder, check it, and yield the folder to load it from.

    What is loaded is the copy that was checked, so nobody can change it in between. It is removed
    at the end of the block; the loaded model does not need it. Raises UserError if the model may
    run code, if it cannot be loaded in the block, or if there are no files of it.
    """
    # In a folder that is removed: MLflow would leave a full copy of each model in TMPDIR.
    with tempfile.TemporaryDirectory() as parent:
        folder = mlflow.artifacts.download_artifacts(model_uri, dst_path=parent)
        if not os.path.exists(f"{folder}/MLmodel"):
            raise UserError(
                f"no files of the model {model_uri} are where the tracking server says.",
                "were they deleted, or moved? For models on a shared filesystem: is it mounted on "
                "this machine?",
            )
        if mlflow.environment_variables.MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get():
            print(
                "warning: the model is not checked, and code in it runs with your permissions "
                "(MLFLOW_ALLOW_PICKLE_DESERIALIZATION=true)",
                file=sys.stderr,
                flush=True,
            )
        else:
            check_model(folder, model_uri)
        try:
            yield folder
        except (*DAMAGED, OSError, ImportError, MlflowException) as error:
            raise UserError(
                f"the model {model_uri} cannot be loaded: {reason(error)}.",
                "it is damaged, or of a newer PyTorch or MLflow than the ones here.",
            ) from error


def check_model(folder, name=None):
    """Raise UserError unless loading the model in `folder` runs no code of its author's.

    `name` is what the message calls it. Passes models of the flavor `pytorch` in MLflow's format
    `pt2`, of tensors, PyTorch's own operations, and sizes that follow from the input by integer
    arithmetic.
    """
    folder = Path(folder)
    with _refusing(name or folder):
        _check_folder(folder)
        _check_records(folder / layout.MODEL_FILE)


def check_archive(path):
    """The same for a .pt2 archive alone."""
    with _refusing(path):
        _check_records(path)


@contextlib.contextmanager
def _refusing(name):
    try:
        yield
    except (*DAMAGED, OSError, yaml.YAMLError) as error:
        raise UserError(
            f"the model {name} may run code when it is loaded: {reason(error)}.",
            "its author may train again with a script of this project and log that. To run "
            "whatever is in it, as you and with your keys: "
            "export MLFLOW_ALLOW_PICKLE_DESERIALIZATION=true",
        ) from error


def _check_folder(folder):
    for path in (folder, *folder.rglob("*")):
        plain = not path.is_symlink() and (path.is_file() or path.is_dir())
        require(plain, f"{path.name} is a link, or no file")
    require(os.path.getsize(folder / "MLmodel") < 2**17, "MLmodel is too large")
    # MLflow reads it in the encoding of the locale, which does not matter for ASCII.
    flavors = yaml.safe_load((folder / "MLmodel").read_text(encoding="ascii"))["flavors"]
    require("pytorch" in flavors, f"it is of the flavor {', '.join(map(str, flavors))}")
    for flavor, settings in flavors.items():
        require(flavor in SETTINGS, f"it is of the flavor {flavor}")
        for key, values in SETTINGS[flavor].items():
            value = settings.get(key)
            shown = value[:50] if isinstance(value, str) else type(value).__name__
            require(value in values, f"MLmodel has {key}: {shown}")
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        known = FILES.fullmatch(name) and path.is_file() or name == "data" and path.is_dir()
        require(known, f"{name} is no part of MLflow's format pt2")


def _check_records(path):
    try:
        reader = PyTorchFileReader(str(path))
        records = set(reader.get_all_records())
    except RuntimeError:  # its words are PyTorch's own source code
        raise ValueError("its archive cannot be read") from None
    # If PyTorch's reader fails, torch.export.load reads the older format with Python's zipfile:
    # both have to see the same records, each once.
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    roots = {info.filename.partition("/")[0] for info in infos}
    names = [info.filename.partition("/")[2] for info in infos]
    require(len(roots) == 1 and sorted(records) == sorted(names), "its archive is ambiguous")
    for name, info in zip(names, infos, strict=True):
        require(layout.RECORDS.fullmatch(name), f"{name} does not belong there")
        require(info.compress_type == zipfile.ZIP_STORED, f"{name} is compressed")
        if not name.startswith(layout.TENSORS):
            require(info.file_size < layout.LARGEST, f"{name} is too large")
    for name in (layout.WEIGHTS_CONFIG, layout.CONSTANTS_CONFIG):
        check_config(json.loads(reader.get_record(name)))
    check_examples(reader.get_record(layout.EXAMPLE))
    check_program(json.loads(reader.get_record(layout.PROGRAM)))
