"""The README is true: its commands run, its outputs, flags, messages and tree are the real ones."""

import argparse
import ast
import contextlib
import importlib
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import (
    FURTHER_SCRIPTS,
    ROOT,
    SCRIPTS,
    clean_environment,
    free_port,
    serving,
    write_mnist,
)

README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
TEST_COMMAND = "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest\n"


def section(title):
    """The text under a heading, up to the next heading of the same or a higher level."""
    match = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,2}} |\Z)", README, re.M | re.S)
    if match.group(1) == "###":
        match = re.search(rf"^### {re.escape(title)}\n(.*?)(?=^##|\Z)", README, re.M | re.S)
        return match.group(1)
    return match.group(2)


# Commands and outputs


def bash_blocks():
    """[(command, the output that the README shows under it, or None)], in order."""
    blocks = BLOCK.findall(README)
    pairs = []
    for i, (language, text) in enumerate(blocks):
        if language == "bash":
            follows = blocks[i + 1] if i + 1 < len(blocks) else ("", "")
            directly = f"```bash\n{text}```\n\n```text\n{follows[1]}" in README
            pairs.append((text, follows[1] if directly else None))
    return pairs


def shape(output):
    """What stays the same from run to run: the words of each line, the names in the JSON line."""
    lines = []
    start = re.search(r"^(tracking|address) ", output, flags=re.MULTILINE).start()
    for line in output[start:].strip().splitlines():  # pip has printed before that
        if line.startswith("{"):
            lines.append(list(json.loads(line)))
            continue
        if output[start:].startswith("address"):  # findings about a machine
            lines.append(line[:12])
            continue
        word = line.split()[0]
        if word in ("tracking", "run", "weights"):  # addresses and paths follow
            line = word
        line = re.sub(r"/\S+/models/m-[0-9a-f]{32}/artifacts", "PATH", line)
        line = re.sub(r"\d(\.\d+)?e-\d+", "N", line)
        line = re.sub(r"[0-9a-f]{32}", "ID", line)
        lines.append(re.sub(r"\d+(\.\d+)?", "N", line))
    return lines


class Reader:
    """Somebody who goes through the README in a copy of the project and types each command."""

    def __init__(self, folder, variables, stack):
        self.folder, self.stack = folder, stack
        self.environment = clean_environment(HOME=str(folder), **variables)
        self.run_ids = {}
        self.port = free_port()

    def fill_in(self, command):
        """Replace the placeholders; an unknown one fails."""
        large = "Modify_" in command
        name = "IN_PLACE" if "--in_place" in command else "LARGE_CNN"
        table = {
            "<RUN_ID>": self.run_ids.get("large" if large else "standard", "no run yet"),
            "<shared folder>": str(self.folder / "shared"),
            "<model name>": name,
            "<weights on a shared filesystem>": str(self.folder / "my_local_mnist_model.pth"),
        }
        for placeholder, value in table.items():
            command = command.replace(placeholder, value)
        assert not re.search(r"<[A-Za-z_ ]+>", command), f"unknown placeholder in: {command}"
        return command.replace("5001", str(self.port))

    def type(self, command):
        """Run one block, and return its stdout."""
        process = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.fill_in(command)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert process.returncode == 0, f"{command}\n{process.stdout}{process.stderr}"
        last = process.stdout.rstrip().splitlines()[-1:]
        if last and last[0].startswith("{") and "run_id" in last[0]:
            kind = "large" if "Modify_" in command else "standard"
            self.run_ids[kind] = json.loads(last[0])["run_id"]
        return process.stdout

    def start(self, command):
        """Start a block that ends in a server, and wait until it answers."""
        self.stack.close()
        self.port = free_port()
        command = ["bash", "-euo", "pipefail", "-c", self.fill_in(command)]
        url, log = f"http://127.0.0.1:{self.port}/health", self.folder / "server.log"
        self.stack.enter_context(serving(command, self.folder, self.environment, url, log))


@pytest.fixture
def reader(tmp_path, request):
    """In a copy of the project, with a small MNIST in ./data and weights from elsewhere."""
    import torch

    from common import model

    for name in (*SCRIPTS, "common", "scripts", "tests", "requirements.txt"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    write_mnist(tmp_path / "data")
    torch.save(model.MNISTCNN().state_dict(), tmp_path / "my_local_mnist_model.pth")
    with contextlib.ExitStack() as stack:
        variables = {}
        if request.param == "box":
            yield Reader(tmp_path, request.getfixturevalue("box_variables"), stack)
        else:
            yield Reader(tmp_path, variables, stack)


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["local", "box"], indirect=True)
def test_every_command_runs_and_prints_what_is_shown(reader, request):
    """Nothing set up, as in the quickstart; and what asks for a server, with a key exported."""
    remote = "box" in request.node.name
    blocks = bash_blocks()
    compared, answered = 0, False
    for command, shown in blocks:
        # tests/test_server.py takes the other scripts through the box.
        needs_server = "check_connection" in command or "tracking.connect()" in command
        trains_first = command.startswith("pip install -r requirements.txt\n")
        needed = needs_server or trains_first if remote else "check_connection" not in command
        if command == TEST_COMMAND or not needed:
            continue
        if re.search(r"^mlflow (ui|models serve)", command, flags=re.MULTILINE):
            reader.start(command)
            continue
        printed = reader.type(command)
        if shown is not None:
            assert shape(printed) == shape(shown), command
            compared += 1
        if "curl" in command:
            rows = json.loads(printed)["predictions"]
            assert [len(row) for row in rows] == [10, 10]
            answered = True
    assert len(blocks) == 18
    assert compared == (2 if remote else 8)
    assert answered or remote


@pytest.mark.slow
def test_python_blocks_run(tmp_path):
    """With the data at hand, torchvision downloads nothing."""
    write_mnist(tmp_path / "data")
    blocks = [text for language, text in BLOCK.findall(README) if language == "python"]
    assert len(blocks) == 1
    for block in blocks:
        command = [sys.executable, "-c", block]
        subprocess.run(command, cwd=tmp_path, env=clean_environment(), check=True)


def test_the_test_command_is_what_ci_runs():
    assert TEST_COMMAND in [command for command, _ in bash_blocks()]
    assert TEST_COMMAND.strip() in (ROOT / ".ci" / "run").read_text()


def test_docstring_commands_are_those_of_the_readme():
    """Each script's docstring starts with commands; the flags in them exist."""
    count = 0
    for script in SCRIPTS + FURTHER_SCRIPTS:
        parser = parser_of(script)
        for line in re.findall(r"^    python (\S+\.py.*)$", parser.description, flags=re.M):
            name, *arguments = re.sub(r"<[^>]*>", "x", line).replace('"', "").split(" --")
            assert name.split()[0] == script
            flags = {f"--{argument.split()[0]}" for argument in arguments}
            if parser._subparsers:  # the words are COMMAND ARGUMENT ...
                parser_of_command = parser._subparsers._group_actions[0].choices
                known = parser_of_command[name.split()[1]]._option_string_actions
            else:
                known = parser._option_string_actions
            assert flags <= set(known), line
            count += 1
    assert count == 40


# Flags


def parser_of(script):
    name = script.removesuffix(".py").replace("/", ".")
    return importlib.import_module(name).build_parser()


def flags_in(text):
    """{flag: default} of the flag tables in a text."""
    rows = re.findall(r"^\| `(--\w+)` \| (.*?) \|", text, flags=re.MULTILINE)
    return {flag: default.strip("`") for flag, default in rows}


def default_of(action):
    """How the README words a parser's default."""
    if action.required:
        return {"required"}
    if isinstance(action, argparse._StoreTrueAction):
        return {"off"}
    if action.default in (None, ""):
        return {"none", "your user name", "the run's", "see [Connect](#connect)"}
    return {str(action.default)}


SECTIONS = {
    "train_mnist_mlflow.py": ["Train, track, register"],
    "register_and_inference.py": ["Register a finished run"],
    "upload_external_model.py": ["Upload a model from elsewhere"],
    "Modify_artifact_location.py": [
        "Train, track, register",
        "Write once",
    ],
    "Modify_artifact_location_register_inference.py": [
        "Register a finished run",
        "Register without moving, and map",
    ],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_and_defaults_are_those_of_the_parser(script):
    shared = flags_in(README[README.index("## The scripts") : README.index("### Train, track")])
    assert set(shared) == {"--tracking_uri", "--ca_bundle", "--dataset", "--data_dir"}
    documented = dict(shared)
    for title in SECTIONS[script]:
        found = flags_in(section(title))
        assert found, title
        documented |= found
    actions = {
        action.option_strings[0]: action
        for action in parser_of(script)._actions
        if action.option_strings[0] != "-h"
    }
    assert set(documented) == set(actions)
    for flag, default in documented.items():
        assert default in default_of(actions[flag]), flag


# Messages


class Strings(ast.NodeVisitor):
    """The strings in a syntax tree, with {} for each value that is filled in."""

    def __init__(self, tree):
        self.found = []
        self.visit(tree)

    @classmethod
    def of(cls, tree):
        return cls(tree).found

    def visit_JoinedStr(self, node):  # noqa: N802 (ast names it)
        parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
        self.found.append("".join(parts))

    def visit_Constant(self, node):  # noqa: N802
        if isinstance(node.value, str):
            self.found.append(node.value)


def test_troubleshooting_quotes_real_messages_and_all_of_them():
    rows = re.findall(r"^\| (?:\d+ \| )?(`.*?) \|", section("Troubleshooting"), flags=re.MULTILINE)
    fragments = [fragment for row in rows for fragment in re.findall(r"`([^`]+)`", row)]
    files = [ROOT / script for script in SCRIPTS + FURTHER_SCRIPTS]
    files += sorted((ROOT / "common").glob("*.py"))
    texts = [text for path in files for text in Strings.of(ast.parse(path.read_text()))]
    assert len(fragments) >= 74
    for fragment in fragments:
        assert any(fragment in text for text in texts), fragment
    # Some are put together from parts: "error: {}.". The parts are among the fragments.
    errors = [t for t in texts if re.match(r"error: .*[a-z]{3}", t.splitlines()[0] if t else "")]
    assert len(errors) >= 30
    for text in errors:
        assert any(fragment in text for fragment in fragments), text


def test_exit_codes_are_those_of_the_code():
    """Each code of a failing server is in the table, with the words of its message."""
    rows = re.findall(r"^\| (\d\d) \| `([^`]+)` \|", section("Troubleshooting"), re.MULTILINE)
    named = {}
    for path in (ROOT / "common" / "failures.py", ROOT / "scripts" / "check_connection.py"):
        constants = re.findall(r"^([A-Z_]+) = (\d\d)$", path.read_text(), re.MULTILINE)
        named |= {int(value): name for name, value in constants}
    assert [int(code) for code, _ in rows] == sorted(named)
    assert len(rows) == 23
    calls = {
        node.args[0].id: "".join(Strings.of(node.args[1]))
        for node in ast.walk(ast.parse((ROOT / "common" / "failures.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Failure"
    }
    assert len(calls) == 16
    for code, fragment in rows:
        if named[int(code)] in calls:
            assert fragment in calls[named[int(code)]]


# Tree and pictures


def tracked_files():
    git = ["git", "-C", str(ROOT), "ls-files"]
    process = subprocess.run(git, capture_output=True, text=True)
    if process.returncode:
        pytest.skip("not a git checkout")
    return process.stdout.split()


def test_tree_is_that_of_the_repository():
    """Each entry is a tracked file, or a folder (with /) that stands for all in it."""
    entries, parents = [], []
    for line in BLOCK.search(section("Project tree")).group(2).splitlines():
        indent = len(line) - len(line.lstrip())
        name = line.split()[0]
        parents = parents[: indent // 4]
        entries.append("".join(parents) + name)
        if name.endswith("/"):
            parents.append(name)
    assert len(entries) > 20
    opened = {e for e in entries if any(o != e and o.startswith(e) for o in entries)}
    tracked = tracked_files()
    covered = set()
    for entry in entries:
        inside = {f for f in tracked if f == entry or (entry.endswith("/") and f.startswith(entry))}
        assert inside, f"{entry} is in the tree and not in the repository"
        if entry not in opened:
            covered |= inside
    assert covered == set(tracked)


def test_pictures_are_there_and_small():
    pictures = re.findall(r"!\[[^\]]+\]\((\S+?)\)", README)
    assert len(pictures) == 2
    for picture in pictures:
        content = (ROOT / picture).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) < 300_000


def test_links_within_the_page_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]+)\)", README)
    assert len(links) >= 8
    assert set(links) <= anchors
