"""README and docs/ are true: commands run; outputs, flags, messages, links and tree are real."""

import argparse
import ast
import contextlib
import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import mlflow
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
from gateway import jwt

from common.connection import credential
from common.connection.address import AMSC_TOKEN_URIS
from common.connection.failures import LATER, MESSAGES
from common.errors import TRY_AGAIN, UserError
from scripts import check_connection

LONGEST = 320  # lines of a page
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TEST_COMMAND = "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest\n"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def read(page):
    return (ROOT / page).read_text()


def section(page, title):
    """The text under a heading, up to the next heading of the same or a higher level."""
    found = re.search(rf"^(#+) {re.escape(title)}\n", read(page), flags=re.MULTILINE)
    rest = read(page)[found.end() :]
    return re.split(rf"^#{{1,{len(found[1])}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def test_pages_can_be_read_in_one_sitting():
    assert len(PAGES) >= 4
    for page in PAGES:
        assert len(read(page).splitlines()) <= LONGEST, page


# Commands and outputs


class Block(NamedTuple):
    language: str  # "bash" or "python"
    command: str
    shown: str | None  # the output that the page has directly below


def blocks_of(page):
    """What there is to type on a page, in order."""
    text, found = read(page), []
    for match in FENCE.finditer(text):
        language, command = match.groups()
        if language in ("bash", "python"):
            output = re.match(r"\n\n```text\n(.*?)^```$", text[match.end() :], re.M | re.S)
            found.append(Block(language, command, output and output[1]))
    return found


def needs_server(block):
    """What is worth going through the box; tests/scripts takes all the scripts there."""
    return re.search(r"check_connection|common\.connection|score_rest", block.command)


def starts_server(block):
    return re.search(r"^(mlflow|python -m common\.connection) (ui|models serve)", block.command)


QUICKSTART = blocks_of("README.md")[0]
READINGS = [(page, "local") for page in PAGES] + [
    (page, "box") for page in PAGES if any(map(needs_server, blocks_of(page)))
]


def shape(output):
    """What stays the same from run to run: the words of each line, the names in the JSON line."""
    begin = re.search(r"^(meet|tracking|address) ", output, flags=re.MULTILINE)
    lines = []
    for line in output[begin.start() if begin else 0 :].strip().splitlines():  # pip prints before
        if line.startswith("{"):
            lines.append(list(json.loads(line)))
            continue
        if begin and begin[1] == "address":  # findings about a machine
            lines.append(line[:12])
            continue
        word = line.split()[0] if line.strip() else ""
        if word == "store":  # where there is none yet
            continue
        if word in ("tracking", "run", "weights") or line.startswith("file     /"):
            line = word  # addresses and paths follow
        line = re.sub(r"\d(\.\d+)?e-\d+|(?<=version )none", "N", line)
        line = re.sub(r"[0-9a-f]{32}", "ID", line)
        line = re.sub(r"^(device .*)(fp32|bf16)", r"\1PRECISION", line)  # as the CPU has it
        line = re.sub(r" by \S+  ID", " by USER  ID", line)
        lines.append(re.sub(" {2,}", "  ", re.sub(r"\d+(\.\d+)?", "N", line)))
    return lines


def assert_printed(shown, printed):
    """The lines shown are among those printed, up to the last one; "..." stands for any lines."""
    parts, printed = [[]], shape(printed)
    for line in shape(shown):
        if line == "...":
            parts.append([])
        else:
            parts[-1].append(line)
    at = 0
    for part in filter(None, parts):
        places = range(at, len(printed) - len(part) + 1)
        if part is parts[-1]:
            places = places[-1:]
        found = [place for place in places if printed[place : place + len(part)] == part]
        assert found, f"shown: {part}\nprinted: {printed[at:]}"
        at = found[0] + len(part)


class Reader:
    """Somebody who goes through a page in a copy of the project and types each command."""

    def __init__(self, folder, variables, stack):
        self.folder, self.stack = folder, stack
        self.environment = clean_environment(HOME=str(folder), USER="8cf", **variables)
        self.run_ids = {}
        self.port = free_port()

    def fill_in(self, command):
        """Replace the placeholders; an unknown one fails."""
        large = "Modify_" in command
        table = {
            "<RUN_ID>": self.run_ids.get("large" if large else "standard", "no run yet"),
            "<shared folder>": str(self.folder / "shared"),
            "<model name>": "IN_PLACE" if "--in_place" in command else "LARGE_CNN",
            "<weights on a shared filesystem>": str(self.folder / "my_local_mnist_model.pth"),
        }
        for placeholder, value in table.items():
            command = command.replace(placeholder, value)
        assert not re.search(r"<[A-Za-z_ ]+>", command), f"unknown placeholder in: {command}"
        return command.replace("5001", str(self.port))

    def arguments(self, block):
        if block.language == "python":
            return ["python", "-c", block.command]
        return ["bash", "-euo", "pipefail", "-c", self.fill_in(block.command)]

    def type(self, block):
        """Run one block, and return its stdout."""
        process = subprocess.run(
            self.arguments(block),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        printed = process.stdout
        said = printed[-5000:] + process.stderr[-5000:]  # pip says a lot
        assert process.returncode == 0, f"{block.command}\n{said}"
        last = printed.rstrip().splitlines()[-1:]
        if last and last[0].startswith("{") and (run_id := json.loads(last[0]).get("run_id")):
            self.run_ids["large" if "Modify_" in block.command else "standard"] = run_id
        if block.shown is not None:
            assert_printed(block.shown, printed)
        return printed

    def start(self, block):
        """Start a block that ends in a server, and wait until it answers."""
        self.stack.close()
        self.port = free_port()
        url, log = f"http://127.0.0.1:{self.port}/health", self.folder / "server.log"
        arguments = self.arguments(block)
        self.stack.enter_context(serving(arguments, self.folder, self.environment, url, log))


@pytest.fixture
def reader(tmp_path, where, request):
    """In a copy of the project, with a small MNIST in ./data and weights from elsewhere."""
    import torch

    from common import training

    for name in (*SCRIPTS, "common", "scripts", "tests", "requirements.txt"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    write_mnist(tmp_path / "data")
    torch.save(training.MNISTCNN().state_dict(), tmp_path / "my_local_mnist_model.pth")
    variables = request.getfixturevalue("box_variables") if where == "box" else {}
    with contextlib.ExitStack() as stack:
        yield Reader(tmp_path, variables, stack)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "where"), READINGS)
def test_every_command_runs_and_prints_what_is_shown(page, where, reader):
    """After the quickstart, whose commands the reader of any page has typed."""
    blocks = blocks_of(page)
    assert blocks, page
    if where == "box":
        blocks = list(filter(needs_server, blocks))
    else:  # with nothing set up there is no server to check
        blocks = [block for block in blocks if "check_connection" not in block.command]
    if QUICKSTART not in blocks:
        _, trains = QUICKSTART.command.splitlines()
        blocks.insert(0, QUICKSTART._replace(command=trains))
    for block in blocks:
        if block.command == TEST_COMMAND:
            continue
        if starts_server(block):
            reader.start(block)
        else:
            reader.type(block)


def test_no_block_is_left_out():
    """What is no command is an output or a scheduler's command, which test_jobs.py runs."""
    count = 0
    for page in PAGES:
        for language, text in FENCE.findall(read(page)):
            assert language in ("bash", "python", "text", "sh"), page
            if language == "sh":
                assert all(line.startswith(("sbatch ", "qsub ")) for line in text.splitlines())
            count += language == "bash"
    assert count == text_count("```bash\n") > 0
    assert QUICKSTART.command.splitlines()[0] == "pip install -r requirements.txt"


def text_count(words):
    return sum(read(page).count(words) for page in PAGES)


def test_the_test_command_is_what_ci_runs():
    assert TEST_COMMAND in [block.command for block in blocks_of("README.md")]
    assert TEST_COMMAND.strip() in (ROOT / ".ci" / "run").read_text()


def parser_of(script):
    name = script.removesuffix(".py").replace("/", ".")
    return importlib.import_module(name).build_parser()


@pytest.mark.parametrize("script", SCRIPTS + FURTHER_SCRIPTS)
def test_docstring_commands_have_flags_that_exist(script):
    """Each script's docstring starts with commands."""
    parser = parser_of(script)
    lines = re.findall(r"^    python (\S+\.py.*)$", parser.description, flags=re.MULTILINE)
    assert lines
    for line in lines:
        name, *arguments = re.sub(r"<[^>]*>", "x", line).replace('"', "").split(" --")
        assert name.split()[0] == script
        known = parser._option_string_actions
        if parser._subparsers:  # the words are COMMAND ARGUMENT ...
            known = parser._subparsers._group_actions[0].choices[name.split()[1]]
            known = known._option_string_actions
        assert {f"--{argument.split()[0]}" for argument in arguments} <= set(known), line


# Flags


def flags_in(text):
    """{flag: default} in tables, `| --flag | default |`, and in sentences, `--flag` (default)."""
    found = dict(re.findall(r"^\| `(--\w+)` \| (.*?) \|", text, flags=re.MULTILINE))
    in_text = r"((?:`--\w+`(?:, | and ))*`--\w+`)\s\(((?:[^()]|\([^()]*\))+)\)"
    for flags, default in re.findall(in_text, text):
        found |= dict.fromkeys(re.findall(r"--\w+", flags), re.split("[;,]", default)[0])
    return {flag: default.strip("`") for flag, default in found.items()}


def default_of(action):
    """How the README words a parser's default."""
    if action.required:
        return {"required"}
    if isinstance(action, argparse._StoreTrueAction):
        return {"off"}
    if action.default in (None, ""):
        return {"none", "your user name", "the run's", "see [Connect](#connect)"}
    return {str(action.default)}


SHARED = {"--tracking_uri", "--workspace", "--ca_bundle", "--dataset", "--data_dir"}
SECTIONS = {
    "train_mnist_mlflow.py": ["Train, track, register"],
    "register_and_inference.py": ["Register a finished run"],
    "upload_external_model.py": ["Upload a model from elsewhere"],
    "Modify_artifact_location.py": [
        "Train, track, register",
        "Train with the files on a shared filesystem",
    ],
    "Modify_artifact_location_register_inference.py": [
        "Register a finished run",
        "Register and load them there",
    ],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_and_defaults_are_those_of_the_parser(script):
    documented = flags_in(section("README.md", "The scripts").split("\n### ")[0])
    assert set(documented) == SHARED
    for title in SECTIONS[script]:
        found = flags_in(section("README.md", title))
        assert found, title
        documented |= found
        for flag in re.findall(r"but `(--\w+)`", section("README.md", title)):
            del documented[flag]  # "those of another script, but this one"
    actions = {
        action.option_strings[0]: action
        for action in parser_of(script)._actions
        if action.option_strings[0] != "-h"
    }
    assert set(documented) == set(actions)
    for flag, default in documented.items():
        assert default in default_of(actions[flag]), flag


def test_the_line_tracking_with_a_token(monkeypatch):
    """As "Connect" quotes it, for the variables that it says to export."""
    text = section("README.md", "Connect")
    exported = dict(re.findall(r'(MLFLOW_\w+)="([^"]+)"', text))
    assert exported["MLFLOW_TRACKING_URI"] == AMSC_TOKEN_URIS[0]
    (words,) = re.findall(r"`(bearer token from .*?); workspace (?:.*?)`", text)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", jwt())
    mlflow.set_tracking_uri(exported["MLFLOW_TRACKING_URI"])
    date = r"\d{4}(-\d\d){2} \d\d:\d\d [+\w]+"
    assert re.sub(date, "DATE", credential()) == re.sub(date, "DATE", words)
    assert f"{words}; workspace {exported['MLFLOW_WORKSPACE']}`" in text


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


def sources():
    """{path: syntax tree} of everything that a user runs."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *(ROOT / "common").rglob("*.py")]
    return {path.relative_to(ROOT): ast.parse(path.read_text()) for path in sorted(paths)}


def quoted():
    """The fragments of messages in the tables of the page."""
    rows = re.findall(
        r"^\| (?:\d+ \| [^|]*\| )?(`.*?) \|", read("docs/troubleshooting.md"), flags=re.MULTILINE
    )
    return [fragment for row in rows for fragment in re.findall(r"`([^`]+)`", row)]


def messages():
    """{where: text} of each UserError and each failure of a server, with {} for values."""
    found = {f"MESSAGES[{kind!r}]": text.split("\n")[0] for kind, text in MESSAGES.items()}
    for path, tree in sources().items():
        for function in filter(lambda node: isinstance(node, ast.FunctionDef), ast.walk(tree)):
            assigned = {
                node.targets[0].id: node.value
                for node in ast.walk(function)
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            }
            for node in filter(lambda node: isinstance(node, ast.Call), ast.walk(function)):
                if getattr(node.func, "id", "") in ("UserError", "Failure"):
                    what = assigned.get(getattr(node.args[0], "id", ""), node.args[0])
                    found[f"{path}:{node.lineno}"] = "".join(Strings.of(what))
    return found


# Messages that are somebody else's: those of MESSAGES, of the server, of MLflow, of the system.
PASSED_ON = ("common/connection/failures.py", "common/errors.py", "check_connection.py")


def test_troubleshooting_quotes_real_messages():
    texts = [text for tree in sources().values() for text in Strings.of(tree)]
    texts += [text.replace("{}", kind, 1) for text in texts for kind in ("key", "token")]
    assert quoted()
    for fragment in quoted():
        assert any(fragment in text for text in texts), fragment


def test_troubleshooting_quotes_all_messages():
    found = messages()
    assert len(found) > len(MESSAGES)
    for where, text in found.items():
        if not re.search("[a-z]{3}", text):
            assert where.partition(":")[0].endswith(PASSED_ON), where
            continue
        parts = [text]
        if len(re.findall("[a-z]{3}", text)) < 2:  # put together from others of the file
            parts = Strings.of(sources()[Path(where.partition(":")[0])])
        assert any(fragment in part for fragment in quoted() for part in parts), (where, text)


def test_exit_codes_are_those_of_the_code():
    rows = re.findall(r"^\| (\d+) \| ([^|`]+) \|$", read("docs/troubleshooting.md"), re.MULTILINE)
    assert [int(code) for code, _ in rows] == [0, UserError("", "").code, 2, TRY_AGAIN, 130, 143]


def test_the_finer_exit_codes_are_those_of_the_check():
    """And beside each failure of a server stands the code that the other scripts exit with."""
    page = read("docs/troubleshooting.md")
    rows = re.findall(r"^\| (\d+) \|([^|]*)\| (`[^|]+`) \|", page, flags=re.MULTILINE)
    kinds = {}
    for kind, code in check_connection.CODES.items():
        kinds.setdefault(code, []).append(kind)
    code = re.compile(r"^([A-Z_]+) = (\d\d)$", flags=re.MULTILINE)
    own = {int(value) for _, value in code.findall(Path(check_connection.__file__).read_text())}
    assert own and {int(row[0]) for row in rows} == own | set(kinds)
    assert set(check_connection.CODES) == set(MESSAGES)
    for code, elsewhere, words in rows:
        expected = set()
        for kind in kinds.get(int(code), []):
            assert any(w in MESSAGES[kind] for w in re.findall("`([^`]+)`", words)), kind
            either = {1, TRY_AGAIN} if kind in ("proxy", "name") else set()
            expected |= either or {TRY_AGAIN if kind in LATER else 1}
        assert set(map(int, re.findall(r"\d+", elsewhere))) == expected, code


def tracked_files():
    git = ["git", "-C", str(ROOT), "ls-files"]
    process = subprocess.run(git, capture_output=True, text=True)
    if process.returncode:
        pytest.skip("not a git checkout")
    return process.stdout.split()


# Tree, links, images


def test_tree_is_that_of_the_repository():
    """All folders and files at the top but hidden ones, and the rooms of common/."""
    entries, folder = [], ""
    for line in FENCE.search(section("README.md", "Project tree"))[2].splitlines():
        names = re.match(r" *\S+(?:  ?[\w.]+/)*", line)[0].split()
        if line.startswith(" "):
            assert all(name.endswith("/") for name in names), line
            entries += [folder + name for name in names]
        else:
            entries += names
            folder = names[-1]
    parts = [path.split("/") for path in tracked_files() if not path.startswith(".")]
    there = {path[0] + ("/" if len(path) > 1 else "") for path in parts}
    there |= {f"common/{path[1]}/" for path in parts if path[0] == "common" and len(path) > 2}
    assert len(entries) == len(set(entries)) > 10
    assert set(entries) == there


LINKING = [*PAGES, *(f"{name}/README.md" for name in ("scripts", "server", "benchmarks"))]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them; headings within code do not count."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", read(page)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://)([^)\s]+)\)", FENCE.sub("", read(page)))
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(str(target.resolve().relative_to(ROOT))), link


def test_every_page_is_linked_from_the_readme():
    linked = re.findall(r"\]\(([^)#\s]+)", section("README.md", "Where the rest is"))
    assert {page for page in LINKING if page != "README.md"} <= set(linked)


def test_images_are_there_and_small_and_shown():
    shown = set()
    for page in LINKING:
        for link in re.findall(r"\]\((\S+?\.png)\)", read(page)):
            image = ((ROOT / page).parent / link).resolve()
            content = image.read_bytes()
            assert content.startswith(b"\x89PNG") and len(content) < 300_000
            shown.add(image)
    assert re.search(r"!\[[^\]]+\]\(images/run_page.png\)", read("README.md"))
    assert shown == set((ROOT / "images").glob("*"))
