"""Show what is in a model, and whether anything in it would run if it were loaded; load nothing.

    python scripts/check_model.py models:/MNIST_CNN@production
    python scripts/check_model.py <folder of a model>

For models that other people have made, before `mlflow models serve`, `mlflow.pyfunc.load_model` or
a program of your own loads them. You will see the model's flavors and files, one line with the
verdict, and a JSON object as the last line. The exit code is 0 if nothing in it would run, else 1.
Needs common/cli.py and the rooms connection and storage of common/.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common/ is

from common import cli
from common.errors import UserError


def build_parser():
    parser = cli.parser(__doc__)
    parser.add_argument(
        "model", type=cli.path, help="a folder, or an address: models:/NAME@ALIAS, runs:/..."
    )
    cli.add_server_arguments(parser)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    import tempfile

    import mlflow
    from mlflow.exceptions import MlflowException

    from common import connection, storage

    with tempfile.TemporaryDirectory() as parent:
        if Path(args.model).is_dir():
            folder = Path(args.model)
        else:
            connection.connect(args.tracking_uri, args.ca_bundle, workspace=args.workspace)
            try:
                # download_artifacts: all files of the model, into a folder that is removed again.
                folder = Path(mlflow.artifacts.download_artifacts(args.model, dst_path=parent))
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                raise UserError(
                    f"there is no model {args.model}: {error.message}",
                    "scripts/load_and_use_models.py list shows the registered models.",
                ) from error
        if not (folder / "MLmodel").exists():
            raise UserError(
                f"{args.model} is no model: there is no file MLmodel in it.",
                "give the folder that MLmodel lies in, or an address such as models:/NAME/1.",
            )
        files = sorted(path for path in folder.rglob("*") if not path.is_dir())
        for path in files:
            name = str(path.relative_to(folder))
            shown = name if name.isprintable() else ascii(name)  # without escape codes
            print(f"file     {shown}  {path.lstat().st_size} bytes", flush=True)
        storage.check_model(folder, args.model)
    print(f"safe     {args.model}  nothing in it runs when it is loaded", flush=True)
    cli.print_result(model=args.model, files=len(files), runs_code=False)


if __name__ == "__main__":
    cli.run(main)
