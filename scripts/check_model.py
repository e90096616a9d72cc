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
from common.errors import UserError, of_system


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

    def of_s3():  # asked when something was raised: by then the package is imported
        found = sys.modules.get("botocore.exceptions")
        return (found.BotoCoreError, found.ClientError) if found else ()

    with tempfile.TemporaryDirectory() as parent:
        if Path(args.model).is_dir():
            folder = Path(args.model)
        else:
            connection.connect(args.tracking_uri, args.ca_bundle, workspace=args.workspace)
            try:
                # download_artifacts: all files of the model, into a folder that is removed again.
                folder = Path(mlflow.artifacts.download_artifacts(args.model, dst_path=parent))
            except (ImportError, MlflowException, OSError, ValueError, *of_s3()) as error:
                if found := problem(args.model, error):
                    raise found from error
                raise
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


def problem(model, error):
    """Return the UserError for a model that could not be fetched; None if the server failed."""
    from common import connection
    from common.storage.inspection import NO_FILE

    if found := NO_FILE.search(str(error)):
        what = f"the model {model} holds a link, or what is no file: {found[0]}."
        return UserError(what, "have its author train it again.")
    code = getattr(error, "error_code", "")
    if code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
        hint = "scripts/load_and_use_models.py list shows the registered models."
        return UserError(f"there is no model {model}: {error.message}", hint)
    if connection.diagnose(error) or of_system(error):
        return None
    what = f"the model {model} cannot be fetched: {str(error)[:300]}"
    hint = "is the address right, and every file there? A store such as s3:// needs its package "
    return UserError(what, f"{hint}and its login.")


if __name__ == "__main__":
    cli.run(main)
