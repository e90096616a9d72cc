"""Flags that several scripts share, checks of their values, the end of a script, the result line.

Only the standard library is imported here, so `--help` and a mistyped flag answer at once.
"""

import argparse
import json
import math
import os
import re
import sys
import traceback

from common.errors import UserError

# What the scripts fail without, in ways that do not say so. Servers may be older.
NEEDED = {"mlflow": [3, 17], "torch": [2, 10]}
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
    add(
        "--phase", choices=phases, default=phases[0], help=f"value of the tag project.phase {shown}"
    )
    add("--register", action="store_true", help=register)
    add("--note", default="", help="description shown on the run's page (default: none)")
    add("--owner", help="value of the tag owner (default: your user name)")
    add("--model_name", type=model_name, default=default_name, help=name)
    add("--seed", type=whole_number(0), default=0, help=seed)
    add("--device", choices=devices, default=devices[0], help=where)
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=precision)
    keep = "folder that keeps the training after each epoch; the same command again goes on from it"
    add("--checkpoint", type=not_empty, metavar="DIR", help=f"{keep} (default: none)")


def add_server_arguments(parser, experiment=None, flag="--experiment"):
    """Add the flags that say which tracking server; with `experiment`, also `flag`.

    Its default is `experiment`, or what MLFLOW_EXPERIMENT_NAME says.
    """
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


def add_data_arguments(parser, dataset="mnist"):
    """Add `--dataset` and `--data_dir`. With `dataset=None` the run says what it was trained on."""
    default = "%(default)s" if dataset else "the one that the run was trained on"
    what = f"data set; digits needs no download (default: {default})"
    where = "folder for the data set's files, downloaded if missing (default: %(default)s)"
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default=dataset, help=what)
    add("--data_dir", default="./data", metavar="DIR", help=where)


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
    """Argument type: any text but an empty one, which a job file makes of an unset variable."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must not be empty, not {text!r}")
    return text.strip()


def model_name(text):
    """Argument type: a name that the registry accepts, and that fits into a `models:/` address."""
    if not re.fullmatch(r"[\w.+-]([\w.+ -]{0,253}[\w.+-])?", text):
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
    if not {"-h", "--help"} & set(sys.argv):
        check_packages()
    main()


def check_packages():
    """Raise UserError if a package is missing or too old, before anything heavy is imported."""
    from importlib import metadata, util

    for name, needed in NEEDED.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "" if util.find_spec(name) else "none"  # "": by another name, not judged
        if found and [int(n) for n in re.findall(r"\d+", found)[:2]] < needed:
            what = f"{name} {needed[0]}.{needed[1]} or newer is needed, and {found} is installed."
            raise UserError(what, "pip install -r requirements.txt, in this Python's environment.")


def print_result(**values):
    """Print one JSON object as the last line of stdout, which a job reads with `tail -n 1`.

    NaN and infinity, which JSON does not have, become null.
    """
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[name] = None
    print(json.dumps(values), flush=True)


def print_and_exit(kind, error, trace):
    """The hook that `run` sets: print what ended the script, and exit if it is a UserError."""
    if issubclass(kind, KeyboardInterrupt):  # Python exits as a shell expects of Ctrl-C
        print("error: stopped by Ctrl-C.", file=sys.stderr, flush=True)
        return
    failure, text = error, "".join(traceback.format_exception(kind, error, trace))
    if "mlflow" in sys.modules:  # else there has been no server to fail, and no secret to hide
        from common import connection

        failure, text = connection.diagnose(error) or error, connection.without_secrets(text)
    kept = getattr(error, "kept", "")  # what `training.Checkpoint` says of the finished epochs
    if not isinstance(failure, UserError):
        print(f"{text}{kept}", file=sys.stderr, flush=True)
        return
    print(f"{failure} {kept}".rstrip(), file=sys.stderr, flush=True)
    raise SystemExit(failure.code)  # Python takes the exit code from here, too
