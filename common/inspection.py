"""Would loading a model run code that its author put there? Checked before it is loaded.

`mlflow.pytorch.load_model` runs what a model brings along: pickles, modules in a folder `code`, and
text in a `.pt2` archive that PyTorch hands to `eval`, `exec` or `import`. MLflow's own switch,
MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false, stops the pickles alone. Here a model passes only if
everything in it is known to be harmless. Copy this file, and load with
`with checked_copy(model_uri) as folder:`, if you load models that other people have logged.
"""

import ast
import contextlib
import functools
import io
import json
import os
import pickle
import re
import sys
import tempfile
import typing
import zipfile
from dataclasses import is_dataclass
from enum import IntEnum
from pathlib import Path

import mlflow
import torch
import yaml
from mlflow.exceptions import MlflowException

# Private to PyTorch: the reader that loads an archive, and the form of the JSON in it. If either
# changes, models are refused, and this file has to learn the new form.
from torch._C import PyTorchFileReader
from torch._export.serde import schema

SCHEMA = 8  # the version of that form which is known here
ARCHIVE = "data/model.pt2"
FILES = re.compile(
    r"MLmodel|registered_model_meta|(serving_)?input_example\.json|(conda|python_env)\.yaml|"
    r"(requirements|constraints)\.txt|uv\.lock|pyproject\.toml|\.python-version|data/model\.pt2"
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
RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|"
    r"models/model\.json|data/sample_inputs/model\.pt|"
    r"data/weights/(weight_\d+|model_weights_config\.json)|"
    r"data/constants/(tensor_\d+|model_constants_config\.json)"
)
LARGEST = 2**28  # bytes of JSON

# Text in the archive, by field. PyTorch writes Python source with the names, and runs it.
NAME = re.compile(r"((?!__)[A-Za-z_]\w*)?", re.ASCII)
PATH = re.compile(r"((?!__)\w+(\.(?!__)\w+)*)?(@\d+)?", re.ASCII)
WORDS = re.compile(r"[\w ,.>-]*", re.ASCII)  # arguments such as "mean" and "bij,bjk->bik"
ANYTHING = re.compile(r".*", re.DOTALL)  # stored beside a node, and never evaluated
TEXTS = {
    **dict.fromkeys(("parameter_name", "buffer_name", "tensor_constant_name", "fqn"), PATH),
    **dict.fromkeys(("as_string", "as_strings"), WORDS),
    **dict.fromkeys(("metadata", "torch_version"), ANYTHING),
    "path_name": re.compile(r"(weight|tensor)_\d+", re.ASCII),
}
METADATA = {"stack_trace", "nn_module_stack", "torch_fn"}  # PyTorch looks up what others name
FORBIDDEN = {"as_operator", "as_custom_obj", "custom_obj", "custom_obj_values"}

# What a node may do: PyTorch's own operations on tensors and numbers, but for those that open
# files, and arithmetic on sizes.
OPERATION = re.compile(r"torch\.ops\.aten\.([a-z]\w*|_assert_tensor_metadata)\.([A-Za-z]\w*)")
OPENS_FILES = ("from_file", "save")
PLAIN = re.compile(
    r"((Optional|List)\[)*(Tensor|number|int|float|bool|complex|str|Device|Generator)\]*"
)
OTHER_TARGETS = {
    *("math.trunc", "torch.ops.higher_order.wrap_with_autocast"),
    "torch.ops.higher_order.wrap_with_set_grad_enabled",  # torch.no_grad() in `forward`
    *(f"torch.sym_{name}" for name in ("float", "int", "ite", "max", "min", "not", "sqrt")),
    *(f"_operator.{name}" for name in ("add", "floordiv", "mod", "mul", "neg", "pos", "sub")),
    *(f"_operator.{name}" for name in ("truediv", "eq", "ge", "gt", "le", "lt", "ne", "and_")),
    "_operator.or_",
}

# Sizes that depend on the input: "Mul(Integer(2), Symbol('s77', positive=True, integer=True))" in a
# tensor's shape, and "L['x'].size()[0] >= 2" in a guard.
FUNCTIONS = {
    *("Add", "Mul", "FloorDiv", "CleanDiv", "CeilDiv", "Mod", "PythonMod", "ModularIndexing"),
    *("Max", "Min", "Integer", "Equality", "Unequality", "GreaterThan", "LessThan"),
    *("StrictGreaterThan", "StrictLessThan", "And", "Or", "Not"),
}
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.USub, ast.Not, ast.boolop)

CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")

# What was seen when a file is damaged, or was made to do harm; the second when it is loaded.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError)
MALFORMED += (OSError, RuntimeError, EOFError, SyntaxError, NotImplementedError, OverflowError)
MALFORMED += (zipfile.BadZipFile, pickle.UnpicklingError, yaml.YAMLError)
NOT_LOADABLE = (*MALFORMED, AssertionError, MlflowException)


@contextlib.contextmanager
def checked_copy(model_uri):
    """Download the model to a temporary folder, check it, and yield the folder to load it from.

    What is loaded is the copy that was checked, so nobody can change it in between. It is removed
    at the end of the block; the loaded model does not need it. Raises SystemExit if the model may
    run code, if it cannot be loaded in the block, or if there are no files of it.
    """
    # In a folder that is removed: MLflow would leave a full copy of each model in TMPDIR.
    with tempfile.TemporaryDirectory() as parent:
        folder = mlflow.artifacts.download_artifacts(model_uri, dst_path=parent)
        if not os.path.exists(f"{folder}/MLmodel"):
            raise SystemExit(
                f"error: no files of the model {model_uri} are where the tracking server says.\n"
                "hint:  were they deleted, or moved? For models on a shared filesystem: is it "
                "mounted on this machine?"
            )
        if mlflow.environment_variables.MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get():
            print(
                "warning: the model is not checked, and code in it runs with your permissions "
                "(MLFLOW_ALLOW_PICKLE_DESERIALIZATION=true)",
                file=sys.stderr,
                flush=True,
            )
        else:
            check(folder, model_uri)
        try:
            yield folder
        except NOT_LOADABLE as error:
            raise SystemExit(
                f"error: the model {model_uri} cannot be loaded: {_reason(error)}.\n"
                "hint:  it is damaged, or of a newer PyTorch or MLflow than the ones here."
            ) from error


def check(folder, name=None):
    """Raise SystemExit unless loading the model in `folder` runs no code of its author's.

    `name` is what the message calls it. Passes models of the flavor `pytorch` in MLflow's format
    `pt2`, of tensors, PyTorch's own operations, and sizes that follow from the input by integer
    arithmetic. Nothing of the model is imported, unpickled or evaluated.
    """
    folder = Path(folder)
    try:
        _check_folder(folder)
        _check_archive(folder / ARCHIVE)
    except MALFORMED as error:
        raise SystemExit(
            f"error: the model {name or folder} may run code when it is loaded: {_reason(error)}.\n"
            "hint:  its author may train again with a script of this project and log that. To run "
            "whatever is in it, as you and with your keys: "
            "export MLFLOW_ALLOW_PICKLE_DESERIALIZATION=true"
        ) from error


def _check_folder(folder):
    for path in (folder, *folder.rglob("*")):
        _require(not path.is_symlink(), f"{path.name} is a link")
    _require(os.path.getsize(folder / "MLmodel") < 2**20, "MLmodel is too large")
    flavors = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))["flavors"]
    _require("pytorch" in flavors, f"it is of the flavor {', '.join(map(str, flavors))}")
    for flavor, settings in flavors.items():
        _require(flavor in SETTINGS, f"it is of the flavor {flavor}")
        for key, values in SETTINGS[flavor].items():
            _require(settings.get(key) in values, f"MLmodel has {key}: {settings.get(key)}")
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        known = FILES.fullmatch(name) and path.is_file() or name == "data" and path.is_dir()
        _require(known, f"{name} is no part of MLflow's format pt2")


def _check_archive(path):
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
    _require(len(roots) == 1 and sorted(records) == sorted(names), "its archive is ambiguous")
    for name, info in zip(names, infos, strict=True):
        _require(RECORDS.fullmatch(name), f"{name} does not belong there")
        _require(info.compress_type == zipfile.ZIP_STORED, f"{name} is compressed")
        if not name.startswith(("data/weights/weight_", "data/constants/tensor_")):
            _require(info.file_size < LARGEST, f"{name} is too large")
    for kind in ("weights", "constants"):
        config = json.loads(reader.get_record(f"data/{kind}/model_{kind}_config.json"))
        _check_json(schema.PayloadConfig, config)
        for name, entry in config["config"].items():
            _require(entry["use_pickle"] is False, f"{name} is a pickle")
            _require(entry["tensor_meta"] is not None, f"{name} is no tensor")
    # The example inputs are a pickle. PyTorch reads them as here, and if that fails without the
    # restriction to tensors and plain containers.
    try:
        torch.load(io.BytesIO(reader.get_record("data/sample_inputs/model.pt")), weights_only=True)
    except pickle.UnpicklingError:  # its words advise to drop the restriction
        raise ValueError("its example inputs are a pickle that could run code") from None
    program = json.loads(reader.get_record("models/model.json"))
    version = program["schema_version"]["major"]
    _require(version == SCHEMA == schema.SCHEMA_VERSION[0], f"its schema {version} is not known")
    _check_json(schema.ExportedProgram, program)


def _check_json(kind, value, field=""):
    """Raise unless `value` has the type `kind` of PyTorch's schema, and harmless texts in it."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        known = _fields(kind)
        for name, inner in _typed(value, dict, field).items():
            _require(name in known, f"it has an unknown field {name!r}")
            _require(name not in FORBIDDEN or not inner, f"it uses {name}")
            _check_json(known[name], inner, name)
    elif type(None) in parts:
        if value is not None:
            _check_json(next(part for part in parts if part is not type(None)), value, field)
    elif origin is list:
        for inner in _typed(value, list, field):
            _check_json(parts[0], inner, field)
    elif origin is dict:
        for key, inner in _typed(value, dict, field).items():
            allowed = key in METADATA if field == "metadata" else PATH.fullmatch(key)
            _require(allowed, f"it has an unknown entry {key!r} in {field}")
            _check_json(parts[1], inner, field)
    elif kind is str:
        _check_text(_typed(value, str, field), field)
    elif issubclass(kind, IntEnum):
        kind(_typed(value, int, field))
    else:
        _require(type(value) is kind or (kind is float and type(value) is int), f"{field} is odd")


@functools.cache
def _fields(kind):
    return typing.get_type_hints(kind, vars(schema))


def _check_text(text, field):
    if field in ("expr_str", "guards_code"):
        _require(len(text) < 10_000 and _arithmetic(ast.parse(text, mode="eval").body), text)
    elif field in ("in_spec", "out_spec"):
        version, spec = json.loads(text)
        _require(version == 1, "its containers are of an unknown kind")
        _check_container(spec)
    elif field == "target":
        _require(text in OTHER_TARGETS or _on_tensors(text), f"it calls {text}")
    else:
        _require(TEXTS.get(field, NAME).fullmatch(text), f"{field} is {text!r}")


def _check_container(spec):
    """Raise unless inputs or outputs come as nested tuples, lists and dicts with plain keys."""
    _require(spec["type"] is None or spec["type"] in CONTAINERS, f"it holds {spec['type']}")
    keys = json.loads(spec["context"]) if spec["context"] is not None else None
    for key in keys if keys is not None else []:
        _require(type(key) is int or NAME.fullmatch(key), f"it has a key {key!r}")
    for child in spec["children_spec"]:
        _check_container(child)


def _on_tensors(target):
    found = OPERATION.fullmatch(target)
    if not found or found[1] in OPENS_FILES:
        return False
    operation = getattr(getattr(torch.ops.aten, found[1]), found[2])
    types = [str(argument.type) for argument in operation._schema.arguments]
    return all(map(PLAIN.fullmatch, types))


def _arithmetic(node):
    """Return whether an expression is integer arithmetic on the sizes of the input."""
    match node:
        case ast.Constant():
            return type(node.value) in (int, bool)
        case ast.Name():
            return NAME.fullmatch(node.id) is not None
        case ast.Call(ast.Name("Symbol"), [ast.Constant(str(name))], keywords):
            values = [keyword.value for keyword in keywords]
            return bool(NAME.fullmatch(name)) and all(map(_arithmetic, values))
        case ast.Call(ast.Name(name), arguments, []):
            return name in FUNCTIONS and all(map(_arithmetic, arguments))
        case ast.Call(ast.Attribute(ast.Name("torch"), name), arguments, []):
            return f"torch.{name}" in OTHER_TARGETS and all(map(_arithmetic, arguments))
        case ast.Subscript(ast.Call(ast.Attribute(tensor, "size"), [], []), ast.Constant(int())):
            return _is_input(tensor)
        case ast.BinOp(left, operator, right):
            return isinstance(operator, OPERATORS) and _arithmetic(left) and _arithmetic(right)
        case ast.UnaryOp(operator, operand):
            return isinstance(operator, OPERATORS) and _arithmetic(operand)
        case ast.BoolOp(_, values):
            return all(map(_arithmetic, values))
        case ast.Compare(left, _, others):
            return all(map(_arithmetic, (left, *others)))
    return False


def _is_input(node):
    """Return whether `node` is an input, such as L['x'] or L['x'][0]['y']."""
    match node:
        case ast.Name("L"):
            return True
        case ast.Subscript(outer, ast.Constant(key)):
            return (type(key) is int or NAME.fullmatch(key) is not None) and _is_input(outer)
    return False


def _typed(value, kind, field):
    _require(type(value) is kind, f"{field or 'it'} is no {kind.__name__}")
    return value


def _require(condition, problem):
    if not condition:
        raise ValueError(problem)


def _reason(error):
    text = " ".join((error.message if isinstance(error, MlflowException) else str(error)).split())
    return text[:200].rstrip(".") if text.isprintable() and text else type(error).__name__
