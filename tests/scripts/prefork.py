"""Starts scripts as processes that are forked from one that has imported torch and MLflow already.

Each has a working directory, an environment, an output and an exit code of its own, like one that a
shell starts; the imports, which take most of a short script's time, are made once. One order a
line on stdin, as JSON; the answers are lines, too: its process id, and in the end its exit code.
"""

import atexit
import json
import os
import runpy
import sys
import tempfile


def import_what_the_scripts_import():
    import matplotlib.backends.backend_agg  # noqa: F401
    import mlflow.pytorch
    import mlflow.sklearn  # noqa: F401
    import optuna  # noqa: F401
    import sklearn.ensemble  # noqa: F401
    import skops.io  # noqa: F401
    import torch
    import torchvision.datasets  # noqa: F401

    # Much of torch is imported at the first export, and at the first load.
    with tempfile.TemporaryDirectory() as folder:
        example = torch.zeros(2, 1, 28, 28)
        network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3), torch.nn.Flatten()).eval()
        torch.optim.Adam(network.parameters())
        mlflow.pytorch.save_model(
            network, f"{folder}/model", input_example=example.numpy(), pip_requirements=[]
        )
        mlflow.pytorch.load_model(f"{folder}/model")(example)


def become(order):
    """Make this process the one that was ordered."""
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    tempfile.tempdir = None  # found anew, where this TMPDIR says
    for number, path in enumerate((os.devnull, order["out"], order["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.argv = order["arguments"]
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:1] = [os.path.dirname(sys.argv[0]), *paths]


def run(order):
    """Run the script, and end as the interpreter would; but at once, with nothing taken down."""
    become(order)
    code = None
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ending:
        code = ending.code
    except BaseException:  # noqa: BLE001 (it is said)
        code = 1
        try:
            sys.excepthook(*sys.exc_info())
        except SystemExit as ending:
            code = ending.code
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code or 0)


import_what_the_scripts_import()
for line in iter(sys.stdin.readline, ""):
    process = os.fork()
    if process == 0:
        run(json.loads(line))
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
