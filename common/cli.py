"""Flags that every script shares, checks of their values, and the result line.

Only the standard library is imported here, so `--help` and a mistyped flag answer at once.
If you only want the result line for your own batch jobs, copy `print_result`.
"""

import argparse
import json
import math
import re
import sys

DATASETS = ("mnist", "fashion_mnist", "digits")


def parser(doc):
    """Return a parser whose `--help` is the script's docstring, line breaks kept.

    Flags cannot be abbreviated: a job file that says `--reg` today would change its meaning on the
    day a second flag starts with those letters.
    """
    return argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_server_arguments(parser, experiment=None):
    """Add the flags that say which tracking server; with `experiment`, also `--experiment`."""
    group = parser.add_argument_group("tracking server")
    group.add_argument(
        "--tracking_uri",
        metavar="URI",
        help="where to log (default: $MLFLOW_TRACKING_URI, else the AmSC server if $AM_SC_API_KEY "
        "is set, else sqlite:///mlflow.db)",
    )
    group.add_argument(
        "--ca_bundle",
        metavar="FILE",
        help="PEM file of the certificate authority that signed the server's certificate "
        "(default: $MLFLOW_TRACKING_SERVER_CERT_PATH, else the public authorities)",
    )
    if experiment:
        group.add_argument(
            "--experiment",
            type=not_empty,
            default=experiment,
            metavar="NAME",
            help="experiment to log into, created if it does not exist (default: %(default)s)",
        )


def add_data_arguments(parser, dataset="mnist"):
    """Add `--dataset` and `--data_dir`. With `dataset=None` the run says what it was trained on."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        choices=DATASETS,
        default=dataset,
        help="data set; digits needs no download "
        + (
            "(default: %(default)s)"
            if dataset
            else "(default: the one that the run was trained on)"
        ),
    )
    group.add_argument(
        "--data_dir",
        default="./data",
        metavar="DIR",
        help="folder for the data set's files, downloaded if missing (default: %(default)s)",
    )


def add_config_argument(parser):
    """Add `--config`; `parse_with_config` reads the file."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of flags, such as `epochs: 5`; those typed here win (default: none)",
    )


def parse_with_config(parser, argv=None):
    """Parse the flags; those in the YAML file of `--config` count as if typed before all others."""
    args = parser.parse_args(argv)
    if not args.config:
        return args
    import yaml  # 0.1 s, and not needed without a file

    try:
        with open(args.config, encoding="utf-8") as file:
            settings = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"argument --config: {' '.join(str(error).split())}")
    if not isinstance(settings, dict):
        parser.error(f"argument --config: {args.config} must hold lines of the form `name: value`")
    known = {action.dest for action in parser._actions} - {"help", "config"}
    if unknown := sorted(map(str, settings.keys() - known)):
        parser.error(f"argument --config: {args.config} sets {', '.join(unknown)}: no such flag")
    typed = sys.argv[1:] if argv is None else argv
    return parser.parse_args([*(f"--{name}={value}" for name, value in settings.items()), *typed])


def whole_number(minimum):
    """Return an argument type: a whole number from `minimum` to what torch takes as a seed."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value < 2**63:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {minimum}, not {text!r}"
            )
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


def fraction(text):
    """Argument type: a number from 0 to below 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:  # false for nan
        raise argparse.ArgumentTypeError(f"must be a number from 0 to below 1, not {text!r}")
    return value


def not_empty(text):
    """Argument type: any text but an empty one, which a job file makes of an unset variable."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must not be empty, not {text!r}")
    return text.strip()


def model_name(text):
    """Argument type: a name that the registry accepts, and that fits into a `models:/` address."""
    if not re.fullmatch(r"[\w.+-]([\w.+ -]{0,253}[\w.+-])?", text):
        raise argparse.ArgumentTypeError(
            f"must be letters, digits, blanks within, and any of _ . + -, not {text!r}"
        )
    return text


def alias(text):
    """Argument type: a registry alias. MLflow keeps `latest` and `v1`, `v2` ... to itself."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,255}", text) or re.fullmatch(
        r"latest|v\d+", text.lower()
    ):
        raise argparse.ArgumentTypeError(
            f"must be letters, digits, _ and -, but not 'latest' or 'v<number>': {text!r}"
        )
    return text


def print_result(**values):
    """Print one JSON object as the last line of stdout: what the next step of a job needs.

    A job reads it with `tail -n 1`. NaN and infinity, which JSON does not have, become null.
    """
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[name] = None
    print(json.dumps(values), flush=True)
