"""Flags from a YAML file, for scripts with many settings."""

import argparse
import math
import sys

from common import cli


def add_config_argument(parser):
    """Add `--config`; `parse_with_config` reads the file."""
    parser.add_argument(
        "--config",
        type=cli.path,
        metavar="FILE",
        help="YAML file of flags, such as `epochs: 5`; typed flags win (default: none)",
    )


def parse_with_config(parser, argv=None):
    """Parse the flags. Those in the YAML file of `--config` come first, so typed ones win."""
    args = parser.parse_args(argv)
    if not args.config:
        return args
    import yaml  # 0.1 s, and not needed without a file

    try:
        with open(args.config, encoding="utf-8") as file:
            if len(text := file.read(2**20)) == 2**20:
                raise ValueError(f"{args.config} is too long")
        settings = yaml.load(text, yaml.BaseLoader)  # texts: a 010 stays 010
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        parser.error(f"argument --config: {' '.join(str(error).split())}")
    if not isinstance(settings, dict) or any(isinstance(v, dict | list) for v in settings.values()):
        parser.error(f"argument --config: {args.config} must hold lines of the form `name: value`")
    known = {action.dest for action in parser._actions} - {"help", "config"}
    if unknown := sorted(map(str, settings.keys() - known)):
        parser.error(f"argument --config: {args.config} sets {', '.join(unknown)}: no such flag")
    typed = sys.argv[1:] if argv is None else argv
    given = {name: value for name, value in settings.items() if value not in ("", "null", "~")}
    return parser.parse_args([*(f"--{name}={value}" for name, value in given.items()), *typed])


def fraction(text):
    """Argument type: a number from 0 to below 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:  # false for nan
        raise argparse.ArgumentTypeError(f"must be a number from 0 to below 1, not {text!r}")
    return value
