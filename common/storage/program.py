"""Is the JSON in a `.pt2` archive harmless? PyTorch writes Python source with its texts.

Only what PyTorch's schema knows may be there, and each text has to look as its field demands.
"""

import ast
import functools
import json
import re
import typing
from dataclasses import is_dataclass
from enum import IntEnum

import torch

# Private to PyTorch: the form of the JSON. Models in another form are refused.
from torch._export.serde import schema

from .damage import require
from .layout import PROGRAM_VERSION, STRIDED

NAME = re.compile(r"((?!__)[A-Za-z_]\w*)?", re.ASCII)
PATH = re.compile(r"((?!__)\w[\w-]*(\.(?!__)\w[\w-]*)*)?(@\d+)?", re.ASCII)
TEXTS = {  # by field; others are a NAME
    **dict.fromkeys(("parameter_name", "buffer_name", "tensor_constant_name", "fqn"), PATH),
    # Arguments such as "mean" and "bij,bjk->bik"; and what is stored and never evaluated.
    **dict.fromkeys(("as_string", "as_strings"), re.compile(r"[\w ,.>-]*", re.ASCII)),
    **dict.fromkeys(("metadata", "torch_version"), re.compile(r".*", re.DOTALL)),
    "path_name": re.compile(r"(weight|tensor)_\d+", re.ASCII),
    "type": re.compile(r"cpu|cuda|xpu|mps"),
}
METADATA = {"stack_trace", "nn_module_stack", "torch_fn"}  # PyTorch looks up what others name
FORBIDDEN = {"as_graph", "as_operator", "as_custom_obj", "custom_obj", "custom_obj_values"}
# Variables of the source that PyTorch writes, and attributes of the module that it builds: a tensor
# of that name would take their place, a weight of that path would be the attribute.
VARIABLES = {"self", "torch", "device", "inf", "nan", "math", "getattr", "pytree", "fx_pytree"}
ATTRIBUTES = set(dir(torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())))

# What a node may do: PyTorch's own operations on tensors and numbers, and arithmetic on sizes; but
# not what opens files, or trusts indices so that odd ones would read and write other memory.
OPERATION = re.compile(
    r"torch\.ops\.aten\.([a-z]\w*|_assert_tensor_metadata|_weight_norm|__(?:and|or|xor)__)"
    r"\.([A-Za-z]\w*)"
)
REFUSED = re.compile(
    r"from_file|save|\w*backward\w*|\w*ctc_loss|segment_reduce|\w*sparse\w*|to_dense|fbgemm_\w+|"
    r"\w*quant(?!ile)\w*|\w*mkldnn\w*|cudnn_\w+|miopen_\w+|native_batch_norm|data|set_|set_data|"
    r"shallow_copy_data_|(c?crow_|c?col_|row_)?indices\w*|values\w*|coalesce|hspmm|smm|sspaddmm|"
    r"convolution_overrideable|fractional_max_pool\dd"
)
PLAIN = re.compile(
    r"((Optional|List)\[)*(Tensor|number|int|float|bool|complex|str|Device|Generator)\]*"
)
OTHER_TARGETS = re.compile(
    r"math\.trunc|torch\.sym_(float|int|ite|max|min|not|sqrt)|"
    r"_operator\.(add|floordiv|mod|mul|neg|pos|sub|truediv|eq|ge|gt|le|lt|ne|and_|or_)"
)

# Sizes that depend on the input: "Mul(Integer(2), Symbol('s77', positive=True, integer=True))" in a
# tensor's shape, and "L['x'].size()[0] >= 2" in a guard.
FUNCTIONS = re.compile(
    r"Add|Mul|FloorDiv|CleanDiv|CeilDiv|Mod|PythonMod|ModularIndexing|Max|Min|Integer|And|Or|Not|"
    r"Equality|Unequality|(Strict)?(Greater|Less)Than|torch\.sym_(float|int|ite|max|min|not|sqrt)"
)
# PyTorch and sympy take out line breaks, say, before they evaluate; these keep their meaning.
CHARACTERS = re.compile(r"[\w .,()\[\]'<>=!+*/%-]{1,2000}", re.ASCII)
MOST_CALLS = 30  # in the size of a tensor; sympy takes minutes over a hundred
INPUT = re.compile(rf"L(\[(\d+|'{NAME.pattern}')\])*", re.ASCII)  # L['x'], L['x'][0]['y']
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.USub, ast.Not)
OPERATORS += (ast.boolop, ast.cmpop)

FIELDS = functools.cache(functools.partial(typing.get_type_hints, globalns=vars(schema)))
INFINITE = ("Infinity", "-Infinity", "NaN")
CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def check_config(config):
    """Raise unless an archive's list of weights or constants names tensors alone."""
    _check_json(schema.PayloadConfig, config)
    for name, entry in config["config"].items():
        plain = entry["use_pickle"] is False and entry["tensor_meta"] is not None
        require(plain, f"{name} is a pickle, or no tensor")


def check_program(program):
    """Raise unless an archive's program calls nothing but operations on tensors and sizes."""
    version = program["schema_version"]["major"]
    known = version == PROGRAM_VERSION == schema.SCHEMA_VERSION[0]
    require(known, f"its schema {version} is not known")
    _check_json(schema.ExportedProgram, program)


def _check_json(kind, value, field=""):
    """Raise unless `value` has the type `kind` of PyTorch's schema, and harmless texts in it."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in parts:
        if value is not None:
            _check_json(next(part for part in parts if part is not type(None)), value, field)
    elif is_dataclass(kind):
        for name, inner in _typed(value, dict, field).items():
            require(name in FIELDS(kind), f"it has an unknown field {name!r}")
            require(name not in FORBIDDEN or not inner, f"it uses {name}")
            _check_json(FIELDS(kind)[name], inner, name)
    elif origin is list:
        for inner in _typed(value, list, field):
            _check_json(parts[0], inner, field)
    elif origin is dict:
        for key, inner in _typed(value, dict, field).items():
            require(_allowed(key, field), f"it has an unknown entry {key!r} in {field}")
            _check_json(parts[1], inner, field)
    elif kind is str:
        _check_text(_typed(value, str, field), field)
    elif issubclass(kind, IntEnum):
        kind(_typed(value, int, field))
        require(kind is not schema.Layout or value == STRIDED, f"{field} is not dense")
    elif kind is float:
        require(type(value) in (int, float) or value in INFINITE, f"{field} is odd")
    else:
        _typed(value, kind, field)


def _typed(value, kind, field):
    require(type(value) is kind, f"{field or 'it'} is no {kind.__name__}")
    return value


def _allowed(key, field):
    if field == "metadata":
        return key in METADATA
    if field == "range_constraints":
        return re.fullmatch(r"[a-z]{1,4}\d{1,5}", key)
    if field == "config":
        return PATH.fullmatch(key) and not ATTRIBUTES & set(key.split("."))
    return PATH.fullmatch(key) and not (field.endswith("_values") and key in VARIABLES)


def _check_text(text, field):
    if field in ("expr_str", "guards_code"):
        short = field == "guards_code" or text.count("(") <= MOST_CALLS
        require(short and CHARACTERS.fullmatch(text), f"{field} is {text!r}")
        require(_arithmetic(ast.parse(text, mode="eval").body), f"{field} is {text!r}")
    elif field in ("in_spec", "out_spec"):
        version, spec = json.loads(text)
        require(version == 1, "its containers are of an unknown kind")
        _check_container(spec)
    elif field == "target":
        require(OTHER_TARGETS.fullmatch(text) or _on_tensors(text), f"it calls {text}")
    else:
        require(TEXTS.get(field, NAME).fullmatch(text), f"{field} is {text!r}")


def _check_container(spec):
    """Raise unless inputs or outputs come as nested tuples, lists and dicts with plain keys."""
    require(spec["type"] in CONTAINERS, f"it holds {spec['type']}")
    keys = json.loads("null" if spec["context"] is None else spec["context"])
    for key in _typed([] if keys is None else keys, list, "context"):
        require(type(key) is int or NAME.fullmatch(key), f"it has a key {key!r}")
    for child in spec["children_spec"]:
        _check_container(child)


def _on_tensors(target):
    found = OPERATION.fullmatch(target)
    if not found or REFUSED.fullmatch(found[1]):
        return False
    operation = getattr(getattr(torch.ops.aten, found[1]), found[2])
    return all(PLAIN.fullmatch(str(argument.type)) for argument in operation._schema.arguments)


def _arithmetic(node):
    """Return whether an expression is integer arithmetic on the sizes of the input."""
    match node:
        case ast.Constant():
            return type(node.value) in (int, bool)
        case ast.Name(name):
            return NAME.fullmatch(name)
        case ast.Call(ast.Name("Symbol"), [ast.Constant(str(name))], keywords):
            return NAME.fullmatch(name) and all(_arithmetic(keyword.value) for keyword in keywords)
        case ast.Call(ast.Name() | ast.Attribute(ast.Name("torch")) as function, arguments, []):
            known = FUNCTIONS.fullmatch(ast.unparse(function))
            return known and all(map(_arithmetic, arguments))
        case ast.Subscript(ast.Call(ast.Attribute(tensor, "size"), [], []), ast.Constant(int())):
            return INPUT.fullmatch(ast.unparse(tensor))
        case ast.BinOp() | ast.UnaryOp() | ast.BoolOp() | ast.Compare():
            return all(map(_arithmetic, ast.iter_child_nodes(node)))
    return isinstance(node, OPERATORS)
