"""Would loading a model run code that its author put there? Checked before it is loaded.

`mlflow.pytorch.load_model` runs what a model brings along: pickles, modules in a folder `code`, and
text in a `.pt2` archive that PyTorch hands to `eval`, `exec` or `import`. Forbidding pickles, as
MLflow can, stops these alone. Here a model passes only if everything in it is known to be harmless.
"""

import collections
import contextlib
import io
import json
import pickletools
import re
import sys
import tempfile
import zipfile
from pathlib import Path

import mlflow
import torch
import yaml
from mlflow.exceptions import MlflowException

# Private to PyTorch: the reader that loads an archive. If it goes, no model can be checked.
from torch._C import PyTorchFileReader

from common.errors import UserError, cure

from . import layout
from .damage import DAMAGED, reason, require
from .program import NAME, check_config, check_program

FILES = re.compile(
    r"MLmodel|registered_model_meta|(serving_)?input_example\.json|(conda|python_env)\.yaml|"
    r"(requirements|constraints)\.txt|uv\.lock|pyproject\.toml|\.python-version|"
    + re.escape(layout.MODEL_FILE)
)
# The settings in MLmodel that name files and modules, and the values that lead nowhere else.
SETTINGS = {
    "pytorch": {"model_data": ("data",), "code": (None,)},
    "python_function": {
        **{"data": ("data",), "code": (None,), "loader_module": ("mlflow.pytorch",)},
        "pickle_module_name": (None, "mlflow.pytorch.pickle_module"),
    },
}
# What the pickle of the example inputs may look up: how to rebuild a tensor. `weights_only=True`
# alone also takes what other packages have declared safe, some of which opens files.
GLOBALS = re.compile(r"torch \w+Storage|torch\._utils _rebuild_tensor_v2|collections OrderedDict")
REFUSED = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "BUILD"}
REFUSED |= {"DUP", "MEMOIZE"}
LEAVES = (torch.Tensor, bool, int, float, complex, str, type(None))

# What MLflow and Python say, when a model is copied from a folder of this machine.
NO_FILE = re.compile(
    r"path is outside the artifact directory|\S+ is a named pipe|Too many levels of .* links"
)


@contextlib.contextmanager
def checked_copy(model_uri):
    """Download the model to a temporary folder, check it, and yield the folder to load it from.

    What is loaded is the copy that was checked, so nobody can change it in between. It is removed
    at the end of the block; the loaded model does not need it. What fails in the block is reported.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as parent:
        try:
            folder = mlflow.artifacts.download_artifacts(model_uri, dst_path=parent)
        except (MlflowException, OSError) as error:
            if found := NO_FILE.search(str(error)):
                what = f"the model {model_uri} holds a link, or what is no file: {found[0]}."
                raise UserError(what, "have its author train it again.") from error
            raise
        if not Path(folder, "MLmodel").exists():
            what = f"no files of the model {model_uri} are where the tracking server says."
            raise UserError(what, "were they deleted, or is a shared filesystem not mounted here?")
        if mlflow.environment_variables.MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get():
            text = "warning: the model is not checked, and code in it runs with your permissions"
            print(f"{text} (MLFLOW_ALLOW_PICKLE_DESERIALIZATION=true)", file=sys.stderr, flush=True)
        else:
            check_model(folder, model_uri)
        try:
            yield folder
        except (*DAMAGED, OSError, ImportError, MlflowException) as error:
            what = f"the model {model_uri} cannot be loaded or used here: {reason(error)}."
            hint = "it is damaged, of a newer PyTorch or MLflow, or --dataset is not its own; "
            hint += "or a package is not installed."
            raise UserError(what, cure(error, hint)) from error


def check_model(path, name=None):
    """Raise UserError unless loading the model at `path` runs no code of its author's.

    Passes MLflow's format `pt2`: tensors, PyTorch's own operations, and sizes that follow from the
    input by integer arithmetic. `name` is what the message calls it.
    """
    path = Path(path)
    try:
        if path.is_dir():
            _check_folder(path)
        _check_records(path / layout.MODEL_FILE if path.is_dir() else path)
    except OSError as error:
        what = f"the model {name or path} cannot be read: {error.strerror or error}."
        raise UserError(what, cure(error, "is a part of it gone, or a filesystem away?")) from error
    except (*DAMAGED, yaml.YAMLError) as error:
        what = f"the model {name or path} may run code when it is loaded: {reason(error)}."
        hint = "have its author train it again with a script of this project"
        if (path / "data" / "model.pth").exists():  # a pickle, as MLflow stores it
            hint += ". To run it, as you: export MLFLOW_ALLOW_PICKLE_DESERIALIZATION=true"
        raise UserError(what, f"{hint} (docs/troubleshooting.md has more).") from error


def _check_folder(folder):
    for path in (folder, *folder.rglob("*")):
        plain = not path.is_symlink() and (path.is_file() or path.is_dir())
        require(plain, f"{path.name} is a link, or no file")
    require((folder / "MLmodel").stat().st_size < 2**17, "MLmodel is too large")
    # MLflow reads it in the encoding of the locale, which does not matter for ASCII.
    description = yaml.safe_load((folder / "MLmodel").read_text(encoding="ascii"))
    require(not description.get("resources"), "MLmodel names resources, which may be a file")
    flavors = description["flavors"]
    require(type(flavors) is dict, "its flavors are no dict")  # aliases can make lists of GB
    if "pytorch" not in flavors:
        names = ", ".join(filter(str.isprintable, map(str, flavors)))[:200]
        what = f"the model is not one of PyTorch's: it is of the flavor {names}."
        raise UserError(what, "mlflow.FLAVOR.load_model loads it, and runs what is in it.")
    for flavor, settings in flavors.items():
        require(flavor in SETTINGS, f"it is of the flavor {flavor}")
        for key, values in SETTINGS[flavor].items():
            value = settings.get(key)
            shown = value[:50] if isinstance(value, str) else type(value).__name__
            require(value in values, f"MLmodel has {key}: {shown}")
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        known = name == "data" if path.is_dir() else FILES.fullmatch(name)
        require(known, f"{name} is no part of MLflow's format pt2")


def _check_records(path):
    try:
        reader = PyTorchFileReader(str(path))
        records = set(reader.get_all_records())
    except RuntimeError:  # its words are PyTorch's own source code
        with path.open("rb") as file:  # if it is gone, or somebody else's, that is the reason
            if zipfile.is_zipfile(file):
                raise ValueError("its archive is of another kind") from None
        raise OSError("its archive is cut short, or damaged") from None
    # If PyTorch's reader fails, torch.export.load reads the older format with Python's zipfile:
    # both have to see the same records, each once.
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    roots, _, names = zip(*(info.filename.partition("/") for info in infos), strict=True)
    require(len(set(roots)) == 1 and sorted(records) == sorted(names), "its archive is ambiguous")
    for name, info in zip(names, infos, strict=True):
        require(layout.RECORDS.fullmatch(name), f"{name} does not belong there")
        require(info.compress_type == zipfile.ZIP_STORED, f"{name} is compressed")
        fits = name.startswith(layout.TENSORS) or info.file_size < layout.LARGEST
        require(fits, f"{name} is too large")
    for name in (layout.WEIGHTS_CONFIG, layout.CONSTANTS_CONFIG):
        check_config(json.loads(reader.get_record(name)))
    _check_examples(reader.get_record(layout.EXAMPLE))
    check_program(json.loads(reader.get_record(layout.PROGRAM)))


def _check_examples(content):
    """Raise unless the example inputs, a pickle, are tensors in plain containers with plain keys.

    PyTorch loads any pickle if that of tensors fails, and writes the keys into Python source.
    """
    require(content.startswith(layout.SIGNATURE), "its example inputs are in an older format")
    reader = PyTorchFileReader(io.BytesIO(content))
    sizes = {name: reader.get_record_size(name) for name in reader.get_all_records()}
    fits = sizes["data.pkl"] < 2**15 and sum(sizes.values()) < layout.LARGEST
    require(fits, "its example inputs are too large")
    before, plain = "", set()  # where names and texts are kept, to be used again
    for operation, argument, _ in pickletools.genops(reader.get_record("data.pkl")):
        name = operation.name
        usual = name not in REFUSED and (name != "GLOBAL" or GLOBALS.fullmatch(argument))
        # Tuples of one tuple twice, forty deep, are more than there is time for.
        usual = usual and (argument in plain or not name.endswith("GET"))
        require(usual, f"its example inputs are an unusual pickle ({name} {argument})")
        if name.endswith("PUT"):
            (plain.add if before in ("GLOBAL", "BINUNICODE") else plain.discard)(argument)
        before = name
    _check_example(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))


def _check_example(value):
    if type(value) in (dict, collections.OrderedDict):
        for key in value:
            plain = type(key) is int or (type(key) is str and NAME.fullmatch(key))
            require(plain, f"its example inputs have a key {key!r}")
        value = [*value.values()]
    if type(value) in (tuple, list):
        for inner in value:
            _check_example(inner)
    else:
        require(type(value) in LEAVES, f"its example inputs hold {type(value).__name__}")
