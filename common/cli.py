"""Flags that several scripts share, checks of their values, the end of a script, the result line.

Only the standard library is imported here, so `--help` and a mistyped flag answer at once.
"""

import argparse
import atexit
import json
import math
import os
import platform
import re
import sys

from common.errors import NEEDED, Printed, check_packages, print_and_exit, version

DATASETS = ("mnist", "fashion_mnist", "digits")


def parser(doc):
    """Return a parser whose `--help` is the script's docstring, line breaks kept."""
    # Not abbreviated: a job file's `--reg` would change its meaning when a second flag begins so.
    keep = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=keep, allow_abbrev=False)


def add_training_arguments(parser, default_name, alias):
    """Add the flags of the two training scripts, which differ only in where the files go."""
    shown = "(default: %(default)s)"
    phases, devices = ("development", "tuning", "production"), ("auto", "cpu", "cuda", "xpu", "mps")
    size = f"global batch size, over all processes {shown}"
    where = f"where to train; auto: a GPU if there is one {shown}"
    precision = f"arithmetic precision; auto: bf16 where it is faster {shown}"
    register = f"register the model and point the alias {alias} at it (default: only track)"
    name, seed = f"name in the registry {shown}", f"seed of weights and image order {shown}"

    add = parser.add_argument
    add("--batch_size", type=whole_number(1), default=64, help=size)
    add("--epochs", type=whole_number(1), default=1, help=f"passes over the training set {shown}")
    add("--lr", type=learning_rate, default=0.001, help=f"learning rate of Adam {shown}")
    add("--phase", choices=phases, default=phases[0], help=f"the tag project.phase {shown}")
    add("--register", action="store_true", help=register)
    add("--note", default="", help="description shown on the run's page (default: none)")
    add("--owner", help="value of the tag owner (default: your user name)")
    add("--model_name", type=model_name, default=default_name, help=name)
    add("--seed", type=whole_number(0), default=0, help=seed)
    add("--device", choices=devices, default=devices[0], help=where)
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=precision)
    keep = "folder that keeps the training after each epoch; the same command again goes on from it"
    add("--checkpoint", type=path, metavar="DIR", help=f"{keep} (default: none)")


def add_server_arguments(parser, experiment=None, flag="--experiment"):
    """Add the flags that say which tracking server; with `experiment`, its default, also `flag`."""
    where = "$MLFLOW_TRACKING_URI, else the AmSC server if $AM_SC_API_KEY is set, else a local file"
    whom = "$MLFLOW_TRACKING_SERVER_CERT_PATH, else the public authorities"
    what = "experiment to log into, created if it does not exist (default: %(default)s)"
    add = parser.add_argument_group("tracking server").add_argument
    add("--tracking_uri", metavar="URI", help=f"where to log (default: {where})")
    add("--ca_bundle", metavar="FILE", help=f"PEM file of the authority to trust (default: {whom})")
    group = "workspace of the server (default: $MLFLOW_WORKSPACE, else the server's default)"
    own = os.environ.get("MLFLOW_WORKSPACE", "").strip() or None
    add("--workspace", type=not_empty, default=own, metavar="NAME", help=group)
    if experiment:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "").strip() or experiment
        add(flag, type=not_empty, default=experiment, metavar="NAME", help=what)


def add_data_arguments(parser, dataset="mnist", more=()):
    """Add `--dataset` and `--data_dir`. With `dataset=None` the run says what it was trained on."""
    default = "%(default)s" if dataset else "the one that the run was trained on"
    what = f"data set; digits needs no download (default: {default})"
    where = "folder for the data set's files, downloaded if missing (default: %(default)s)"
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=(*DATASETS, *more), default=dataset, help=what)
    add("--data_dir", type=path, default="./data", metavar="DIR", help=where)


def whole_number(minimum):
    """Return an argument type: a whole number from `minimum` to what torch takes as a seed."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value < 2**63:
            what = f"must be a whole number of at least {minimum}, not {text!r}"
            raise argparse.ArgumentTypeError(what)
        return value

    return parse


def learning_rate(text):
    """Argument type: a finite number above 0. With `nan`, training would run and learn nothing."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e38:  # false for nan; above, it does not fit into torch's float32
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, not {text!r}")
    return value


def not_empty(text):
    """Argument type: a line that MLflow takes as a name. An unset variable makes an empty one."""
    if not text.strip() or not text.isprintable() or len(text) > 500:
        raise argparse.ArgumentTypeError(f"must be 1 to 500 printable characters, not {text!r}")
    return text.strip()


def path(text):
    """Argument type: a path, or a file's address, with a `~` as shells leave it in `--flag=~`.

    Refuses a pipe or a device: to open one could take for ever.
    """
    start, slashes, rest = text.rpartition(":///")
    found = os.path.expanduser(rest if slashes else not_empty(text))
    if os.path.exists(found) and not (os.path.isfile(found) or os.path.isdir(found)):
        raise argparse.ArgumentTypeError(f"must be a file, not a pipe or a device: {text!r}")
    return start + slashes + found


def model_name(text):
    """Argument type: a name that the registry accepts, and that fits into a `models:/` address."""
    if text in (".", "..") or not re.fullmatch(r"[\w.+-]([\w.+ -]{0,253}[\w.+-])?", text):
        what = f"must be letters, digits, blanks within, and any of _ . + -, not {text!r}"
        raise argparse.ArgumentTypeError(what)
    return text


def alias(text):
    """Argument type: a registry alias. MLflow keeps `latest` and `v1`, `v2` ... to itself."""
    reserved = re.fullmatch(r"latest|v\d+", text.lower())
    if reserved or not re.fullmatch(r"[A-Za-z0-9_-]{1,255}", text):
        what = f"must be letters, digits, _ and -, but not 'latest' or 'v<number>': {text!r}"
        raise argparse.ArgumentTypeError(what)
    return text


def run(main):
    """Run a script's `main`; what the user or a server did wrong is two lines and an exit code.

    Any other error keeps its traceback; secrets in it are struck out.
    """
    sys.excepthook = print_and_exit
    os.environ["MPLBACKEND"] = "agg"  # figures go to files; a notebook's may not be known here
    sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal or locale cannot show
    names = [os.environ.get(name, "") for name in ("LOGNAME", "USER")]  # which MLflow logs
    if re.search("[\ud800-\udfff]", " ".join([*sys.argv, *names])):  # how Python shows such bytes
        argparse.ArgumentParser().error("a flag, LOGNAME or USER holds bytes that are no text")
    if not {"-h", "--help"} & set(sys.argv):
        check_packages()
        guard()
    done = []
    atexit.register(_end, done)  # the first to be registered runs last
    main()
    done.append(True)


def guard():
    """Keep secrets and control characters out of what this process prints from now on."""
    sys.stdout, sys.stderr = Printed(sys.stdout), Printed(sys.stderr, one_line=False)


def _end(done):
    """After a success, spare the 2 s in which the interpreter takes torch and MLflow apart."""
    if done:
        sys.stdout.flush()
        os._exit(0)


def say_imports():
    """Say what is imported next, which takes seconds; of several processes, only the first."""
    ranks = [value for name, value in os.environ.items() if re.search("RANK(ID)?$|PROCID$", name)]
    if not any(rank.strip("0") for rank in ranks):
        names = [f"{name} {version(name)}" for name in NEEDED]
        print(f"import   {'  '.join(names)}  Python {platform.python_version()}", flush=True)


def print_result(**values):
    """Print one JSON object, NaN as null, as the last line of stdout: for `tail -n 1` in a job."""
    finite = json.loads(json.dumps(values), parse_constant=lambda name: None)
    print(json.dumps(finite), flush=True)
