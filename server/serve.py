"""Run a tracking server of your own: TLS, API keys, PostgreSQL, artifacts in S3 or a folder.

    python server/serve.py start --folder ~/mlflow-server
    python server/serve.py add-key alice --folder ~/mlflow-server
    python server/serve.py revoke-key alice --folder ~/mlflow-server

`start` runs nginx, PostgreSQL and MLflow until Ctrl-C, prints what a client exports, and keeps
everything in the folder, where the next start finds it. `prepare` makes keys, passwords and
certificate for the containers of compose.yaml instead, and starts nothing. See server/README.md.
"""

import argparse
import contextlib
import grp
import importlib.util
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import credentials
from processes import (
    Processes,
    account,
    check_port,
    need,
    port_number,
    run,
    status_of,
    tls_socket,
    unix_socket,
)

HERE = Path(__file__).resolve().parent

# Who runs what if root starts it. They are for this alone: what another service shares with MLflow
# gets at its socket, past the gateway, and what MLflow shares with nginx, at the keys.
MLFLOW, GATEWAY = "mlflow", "mlflow-gateway"

MLFLOW_SETTINGS = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a dozen processes that tracking has no use for
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE": "path",  # HOST/BUCKET: one name, one certificate
}

# MLflow's own users, of whom owners.py tells it. Without workspaces, the last line says nothing.
OWNERS = """[mlflow]
database_uri = {database}
authorization_function = owners:owner_of_the_key
default_permission = READ
grant_default_workspace_access = true
"""


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text):
        one = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        one.add_argument("--folder", type=folder, required=True, help="everything lies in here")
        return one

    start = command("start", "run the server until Ctrl-C")
    for one in (start, command("prepare", "make keys, passwords, certificate for compose.yaml")):
        one.add_argument(
            "--host", default="127.0.0.1", help="name that clients use (default: %(default)s)"
        )
        one.add_argument(
            "--port",
            type=port_number,
            default=8443,
            help="of the tracking server (default: %(default)s)",
        )
        one.add_argument(
            "--store_port",
            type=port_number,
            default=8444,
            help="where clients reach the object store (default: %(default)s)",
        )
        one.add_argument(
            "--workspaces",
            action="store_true",
            help="MLflow's workspaces: each team sees its own experiments and models",
        )
    start.add_argument(
        "--listen",
        default="127.0.0.1",
        help="address to listen on, 0.0.0.0 for all (default: %(default)s)",
    )
    start.add_argument(
        "--artifacts",
        type=matching(r"s3://[a-z0-9][a-z0-9.-]{2,62}(/.*)?", "s3://BUCKET or s3://BUCKET/PATH"),
        metavar="S3_URI",
        help="s3://BUCKET[/PATH] in the object store (default: the folder artifacts/)",
    )
    start.add_argument(
        "--store",
        type=matching(r"[\w.-]+:\d{1,5}", "HOST:PORT"),
        metavar="HOST:PORT",
        help="where the S3-compatible object store listens, in plain http: nginx brings the TLS",
    )
    start.add_argument(
        "--owners",
        action="store_true",
        help="experiments and models belong to who created them, others may read; "
        "the key admin may do everything",
    )
    start.add_argument(
        "--workers", type=int, default=2, help="processes of MLflow (default: %(default)s)"
    )
    command("upgrade", "change the database's tables to those of the installed MLflow")
    for name, text in (("add-key", "make a key"), ("revoke-key", "make a key invalid")):
        command(name, f"{text}; a running server takes notice without a restart").add_argument(
            "name",
            type=matching(credentials.NAME, "up to 32 letters, digits and any of . _ @ -"),
            help="whose key: a person, a project, a machine",
        )
    return parser


def matching(pattern, words):
    """Return an argument type: a text of that pattern."""

    def parse(text):
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"must be {words}, not {text!r}")
        return text

    return parse


def folder(text):
    """Argument type: a path that nginx's files can hold, short enough for the sockets in it."""
    path = Path(text).expanduser().absolute()
    if re.search(r"[\s\"';{}$\\]", str(path)):
        raise argparse.ArgumentTypeError(f"must not hold blanks, quotes or any of ;{{}}$\\: {path}")
    if len(os.fsencode(path / "database" / ".s.PGSQL.5432")) > 107:  # the kernel's limit
        raise argparse.ArgumentTypeError(f"is too long a path for sockets: {path}")
    return path


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command == "start" and bool(args.artifacts) != bool(args.store):
        parser.error("--artifacts and --store go together: the bucket, and where its store is")
    try:
        execute(args)
    except OSError as error:
        raise SystemExit(
            f"error: {error.filename or args.folder}: {error.strerror or error}.\n"
            "hint:  --folder must be one that you own or can make."
        ) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def execute(args):
    if args.command == "start":
        start(args)
    elif args.command == "prepare":
        credentials.prepare(args.folder, args.host)
        addresses = {
            "SERVER_FOLDER": args.folder,
            "SERVER_HOST": args.host,
            "SERVER_PORT": args.port,
            "SERVER_STORE_PORT": args.store_port,
            "SERVER_AUTHORITY": authority(args),
            "SERVER_WORKSPACES": str(args.workspaces).lower(),
        }
        credentials.write_environments(args.folder, addresses)
    elif args.command == "upgrade":
        upgrade(args.folder)
    elif args.command == "add-key":
        credentials.add_key(args.folder, args.name)
    else:
        credentials.revoke_key(args.folder, args.name)


def start(args):
    if args.owners and not importlib.util.find_spec("flask_wtf"):
        raise SystemExit(
            "error: --owners needs Flask-WTF, which is not installed.\n"
            "hint:  pip install -r server/requirements.txt"
        )
    for program in ("nginx", "postgres", "initdb"):
        need(program)
    account_of_mlflow()  # an error, if there is none
    account(GATEWAY)
    for port in (args.port, args.store_port):
        check_port(args.listen, port)
    credentials.prepare(args.folder, args.host)
    with running(args.folder) as processes:
        # In the order in which mistakes show the fastest.
        start_nginx(args, processes)
        if args.store:
            check_store(args)
        start_postgres(args.folder, processes)
        start_mlflow(args, processes)
        print_exports(args)
        while True:
            processes.check()
            time.sleep(0.5)


def upgrade(folder):
    """Change the tables to what the MLflow that is now installed expects."""
    credentials.keys_of(folder)
    with running(folder) as processes:
        start_postgres(folder, processes)
        command = [sys.executable, "-m", "mlflow", "db", "upgrade", database_uri(folder)]
        print(run(command, cwd=folder, **account_of_mlflow()))


def account_of_mlflow():
    """The account of MLflow and its database, which has to get at the installed packages."""
    found = importlib.util.find_spec("mlflow")
    return account(MLFLOW, sys.executable, *(found.submodule_search_locations if found else ()))


def belongs_to(owner, path):
    """Give a folder, and what an earlier version left in it, to an account that alone enters it."""
    path.mkdir(exist_ok=True)
    path.chmod(0o700)
    if owner:
        if path.stat().st_uid != owner["user"]:
            run(["chown", "-R", f"{owner['user']}:{owner['group']}", path])
        account(MLFLOW, path)
    return path


@contextlib.contextmanager
def running(folder):
    """The one server of a folder: what is launched in here ends with it, also by Ctrl-C."""
    for name in ("logs", "run"):
        (folder / name).mkdir(mode=0o700, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        with (
            credentials.locked(folder) as lock,
            Processes(folder, folder / "logs", lock) as processes,
        ):
            (folder / "run" / "nginx.pid").unlink(missing_ok=True)  # of one that was killed
            try:
                yield processes
            except KeyboardInterrupt:
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)
                print("stopping; what was stored stays", flush=True)
    except BlockingIOError:
        raise SystemExit(
            f"error: a server runs in {folder} already.\nhint:  stop it first."
        ) from None


def start_nginx(args, processes):
    """Fill in the templates, have nginx check them, and wait until it refuses a keyless request."""
    run_folder, gateway, user = args.folder / "run", account(GATEWAY), ""
    run_folder.chmod(0o711 if gateway else 0o700)
    if gateway:  # its workers, and MLflow, pass through to what is theirs
        user = f" user {GATEWAY} {grp.getgrgid(gateway['group']).gr_name};"
    values = {
        "GATEWAY_FOLDER": args.folder / "gateway",
        "GATEWAY_RUN": run_folder,
        "GATEWAY_LOGS": args.folder / "logs",
        "GATEWAY_LISTEN": f"{args.listen}:{args.port}",
        "GATEWAY_MLFLOW": f"unix:{run_folder}/mlflow/mlflow.sock",
        "GATEWAY_STORE_LISTEN": f"{args.listen}:{args.store_port}",
        "GATEWAY_STORE": args.store,
    }
    (run_folder / "store.conf").unlink(missing_ok=True)
    for name in ["nginx.conf", "store.conf"] if args.store else ["nginx.conf"]:
        text = (HERE / f"{name}.template").read_text()
        # As envsubst does it for the names it is told: nginx's own $variables stay.
        text = re.sub(r"\$\{(GATEWAY_\w+)\}", lambda match: str(values[match[1]]), text)
        (run_folder / name).write_text(text)

    nginx = [need("nginx"), "-e", args.folder / "logs" / "error.log"]
    nginx += ["-c", run_folder / "nginx.conf", "-g", f"daemon off;{user}"]
    run([*nginx, "-t"])
    processes.launch("nginx", nginx)
    address = "127.0.0.1" if args.listen == "0.0.0.0" else args.listen
    connection = (address, args.port, args.host, args.folder / "ca.pem")
    processes.wait_until(lambda: status_of(tls_socket(*connection), "/health") == 401)


def check_store(args):
    """Reach the bucket as MLflow will: by its public address, with the credentials at hand."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    store = boto3.client("s3", endpoint_url=store_uri(args), verify=str(args.folder / "ca.pem"))
    bucket = args.artifacts.split("/")[2]
    try:
        store.head_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError) as error:
        raise SystemExit(
            f"error: the bucket {bucket} cannot be reached at {store_uri(args)}: {error}.\n"
            "hint:  it must exist, and AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must open it."
        ) from None


def start_postgres(folder, processes):
    """PostgreSQL without a port: only a socket, in a folder of mode 0700."""
    owner = account_of_mlflow()
    database = belongs_to(owner, folder / "database")
    if not (database / "PG_VERSION").exists():
        # "trust" concerns the socket: whoever gets into the folder could read the files anyway.
        initdb = [need("initdb"), "-D", database, "-U", "postgres", "--auth-local=trust"]
        initdb += ["--auth-host=reject", "--encoding=UTF8", "--locale=C", "--no-instructions"]
        run(initdb, cwd=database, **owner)
    processes.launch(
        "postgres",
        [need("postgres"), "-D", database, "-k", database, "-c", "listen_addresses="],
        stop_by=signal.SIGINT,  # "fast": sessions end, what was committed stays
        **owner,
    )
    ready = [need("pg_isready"), "-q", "-h", database]
    processes.wait_until(lambda: subprocess.run(ready).returncode == 0)
    psql = [need("psql"), "-h", database, "-U", "postgres", "-d", "postgres", "-tAc"]
    if not run([*psql, "SELECT 1 FROM pg_database WHERE datname = 'mlflow'"]):
        run([*psql, "CREATE ROLE mlflow LOGIN"])
        run([*psql, "CREATE DATABASE mlflow OWNER mlflow"])


def start_mlflow(args, processes):
    """MLflow on a socket too, so that the gateway is the only way in on a shared machine."""
    owner, gateway = account_of_mlflow(), account(GATEWAY)
    own = args.folder / "run" / "mlflow"  # its socket, and our modules, which it imports
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(HERE / "inside", own)
    command = [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--uvicorn-opts", f"--uds {shlex.quote(str(own / 'mlflow.sock'))}"),
        *("--workers", args.workers),
        *("--backend-store-uri", database_uri(args.folder)),
        *("--artifacts-destination", args.artifacts or args.folder / "artifacts"),
        *("--allowed-hosts", authority(args)),
        *("--cors-allowed-origins", f"https://{authority(args)}"),
    ]
    settings = dict(MLFLOW_SETTINGS)
    settings |= {"MLFLOW_ENABLE_WORKSPACES": str(args.workspaces).lower()}
    if args.store:
        # MLflow signs addresses for clients and goes to the store itself, by this one address.
        settings |= {"MLFLOW_S3_ENDPOINT_URL": store_uri(args)}
        settings |= {"AWS_CA_BUNDLE": str(args.folder / "ca.pem")}
    others = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = os.environ | settings | {"PYTHONPATH": os.pathsep.join([str(own), *others])}
    environment.pop("MLFLOW_WORKSPACE", None)  # a client's: MLflow's server refuses it
    if not args.artifacts:
        environment["ARTIFACTS_FOLDER"] = str(belongs_to(owner, args.folder / "artifacts"))
    if args.owners:
        command += ["--app-name", "basic-auth"]
        environment |= settings_of_owners(args.folder, own)
    belongs_to(owner, own)
    if gateway:
        environment["HOME"] = str(own)
        os.chown(own, -1, gateway["group"])
        own.chmod(0o710)
    processes.launch("mlflow", command, env=environment, **owner)
    processes.wait_until(lambda: status_of(unix_socket(own / "mlflow.sock"), "/health") == 200)


def settings_of_owners(folder, own):
    """Users and permissions lie in the same database; no password is kept, or asked for."""
    path = own / "basic_auth.ini"
    database = database_uri(folder).replace("%", "%%")  # as such a file wants it
    credentials.write_private(path, OWNERS.format(database=database))
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(path),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": secrets.token_hex(32),  # MLflow starts only with one
        "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),  # of a form that nobody needs
    }


def database_uri(folder):
    # The driver is named, because which one is the default depends on SQLAlchemy's version.
    return f"postgresql+psycopg2://mlflow@/mlflow?host={folder}/database"


def authority(args):
    """HOST:PORT as a client's Host header has it."""
    return args.host if args.port == 443 else f"{args.host}:{args.port}"


def store_uri(args):
    return f"https://{args.host}:{args.store_port}"


def print_exports(args):
    """What a client exports. The key is not printed: what a terminal shows ends up in a log."""
    print(f"server   https://{authority(args)}  artifacts {args.artifacts or 'in the folder'}\n")
    print(f"export MLFLOW_TRACKING_URI=https://{authority(args)}")
    print(f"export MLFLOW_TRACKING_SERVER_CERT_PATH={args.folder}/ca.pem")
    print(f"export AM_SC_API_KEY_FILE={args.folder}/keys/admin")
    if args.workspaces:
        print("export MLFLOW_WORKSPACE=default")
    if args.store:  # large files go there by `requests`, which looks at this variable
        print(f"export REQUESTS_CA_BUNDLE={args.folder}/ca.pem")
    print("\nThose are for a client on this machine. Ctrl-C stops the server.", flush=True)


if __name__ == "__main__":
    # What was begun is taken back, as by Ctrl-C.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    main()
