"""Start MLflow's own server on this machine, for yourself, and stop it again.

    python server/local.py start
    python server/local.py start --backend-store-uri sqlite:///mlflow.db --port 5001
    python server/local.py stop

The flags and defaults are those of the guides' `mlflow server` and `mlflow ui` commands. You will
see the line to export, once the server answers; its pages are at that address. It goes on in the
background; `stop`, from the same folder, ends it. There is no key and no TLS, so it listens on this
machine only: for colleagues, see serve.py.
"""

import argparse
import contextlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

from processes import Processes, check_port, end, http_status, port_number

STORE = "sqlite:///mlflow.db"  # what the scripts use without a server, so the runs are the same
ARTIFACTS = "./mlruns"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="start the server", allow_abbrev=False)
    start.add_argument(
        "--backend-store-uri",
        default=STORE,
        metavar="URI",
        help="database of runs and models: SQLite, postgresql://, mysql:// (default: %(default)s)",
    )
    start.add_argument(
        "--default-artifact-root",
        default=ARTIFACTS,
        metavar="URI",
        help="folder, or s3://BUCKET/PATH, of the artifacts, which go through the server "
        "(default: %(default)s)",
    )
    start.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets anyone in who reaches it (default: %(default)s)",
    )
    start.add_argument(
        "--allowed-hosts",
        metavar="NAMES",
        help="names by which it may be called (default: this machine's, and private addresses)",
    )
    stop = commands.add_parser("stop", help="stop the server", allow_abbrev=False)
    for one in (start, stop):
        one.add_argument("--port", type=port_number, default=5000, help="(default: %(default)s)")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if not fcntl:
        what = "in its window, Ctrl-C ends MLflow's server."
        if args.command == "start":
            what = "in a window of its own, which Ctrl-C ends: "
            what += subprocess.list2cmdline(["python", *mlflow_server(args)])
        raise SystemExit(
            f"error: Windows cannot keep a server in the background for local.py.\nhint:  {what}"
        )
    with contextlib.suppress(KeyboardInterrupt):
        (start if args.command == "start" else stop)(args)


def pid_file(port):
    """Beside the store, in the folder that both commands are given in."""
    return Path(f"mlflow-server-{port}.pid").absolute()


def mlflow_server(args):
    # --artifacts-destination in place of the guides' --default-artifact-root: with that one,
    # each client would write to the path itself, on whatever machine it runs.
    return [
        *("-m", "mlflow", "server"),
        *("--backend-store-uri", args.backend_store_uri),
        *("--artifacts-destination", args.default_artifact_root),
        *("--host", args.host, "--port", str(args.port), "--workers", "1"),
        *(("--allowed-hosts", args.allowed_hosts) if args.allowed_hosts else ()),
    ]


def start(args):
    path, name = pid_file(args.port), f"mlflow-server-{args.port}"
    with open(own_file(path, os.O_RDWR | os.O_CREAT), "r+") as file:
        # Whoever holds the lock runs: the server inherits it. A pid alone may be another's by now.
        if not locked(file):
            raise SystemExit(
                f"error: a server on port {args.port} runs from this folder already.\n"
                f"hint:  python server/local.py stop --port {args.port}"
            )
        check_port(args.host, args.port)
        if args.host not in LOOPBACK:
            print(
                f"warning: no key is asked for: whoever reaches {args.host}:{args.port} can read, "
                "change and delete everything. server/serve.py asks for one.",
                file=sys.stderr,
            )
        command = [sys.executable, *mlflow_server(args)]
        environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # a dozen idle processes
        with contextlib.ExitStack() as stack:
            stack.callback(path.unlink)
            processes = stack.enter_context(Processes(Path.cwd(), Path.cwd(), file))
            log = own_file(path.with_suffix(".log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            processes.launch(name, command, stays=True, log=log, env=environment | os.environ)
            (process, _) = processes.running[name]
            file.truncate(0)
            print(process.pid, file=file, flush=True)
            address = "127.0.0.1" if args.host == "0.0.0.0" else args.host
            processes.wait_until(lambda: http_status(address, args.port, "/health") == 200)
            stack.pop_all()  # it answers, and stays
        print(f"server   {args.backend_store_uri}  artifacts {args.default_artifact_root}")
        print(f"log      {name}.log  process {process.pid}\n")
        shown = f"[{address}]" if ":" in address else address
        print(f"export MLFLOW_TRACKING_URI=http://{shown}:{args.port}", flush=True)


def stop(args):
    path = pid_file(args.port)
    try:
        with open(own_file(path, os.O_RDWR), "r+") as file:
            pid = int(file.read(20))
            if locked(file) or not 1 < pid < 2**31:  # 0, 1, -1 are other groups, or everybody
                raise FileNotFoundError
            end(SimpleNamespace(pid=pid, poll=lambda: None), signal.SIGTERM)
    except (FileNotFoundError, ValueError):
        path.unlink(missing_ok=True)
        raise SystemExit(
            f"error: no server on port {args.port} was started from this folder.\n"
            "hint:  change to the folder where it was started, or give its --port."
        ) from None
    path.unlink()
    print(f"stopped  port {args.port}; what was stored stays")


def own_file(path, flags):
    """A descriptor of a file that others cannot have put there, in a folder where they may write.

    Nobody else opens it: who can, can hold the lock.
    """
    hint = "hint:  it must be a plain file of your own. Remove it, or use a folder of your own."
    try:  # without waiting for who would write into a pipe
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SystemExit(f"error: {path}: {error.strerror}.\n{hint}") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
        os.close(descriptor)
        raise SystemExit(f"error: {path} is a link, or no file, or another user's.\n{hint}")
    return descriptor


def locked(file):
    """Lock the file, and return whether that worked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    main()
