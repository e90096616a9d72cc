"""Programs of the server: find them, run them, wait until they answer, stop them."""

import argparse
import contextlib
import ctypes
import http.client
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path


def need(program):
    """The path of a program. Debian keeps PostgreSQL's off the PATH, and nginx off a user's."""
    versions = Path("/usr/lib/postgresql").glob("*/bin")
    newest_first = sorted(map(str, versions), key=lambda path: -float(path.split("/")[4]))
    folders = [os.environ.get("PATH", ""), "/usr/sbin", *newest_first]
    found = shutil.which(program, path=os.pathsep.join(folders))
    if not found:
        raise SystemExit(
            f"error: there is no {program} on this machine.\n"
            "hint:  apt-get install nginx postgresql openssl"
        )
    return found


def run(command, **options):
    """Run a command that must succeed, and return what it printed."""
    process = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )
    printed = process.stdout if isinstance(process.stdout, str) else process.stdout.decode()
    if process.returncode:
        raise SystemExit(f"error: {command[0]} failed.\nhint:  it says:\n{printed.strip()}")
    return printed.strip()


def account(name, *paths):
    """What Popen takes to run a program under that account, if root starts it: as who it is, else.

    `paths` are programs and folders that it has to get at.
    """
    if os.geteuid() != 0:
        return {}
    import pwd  # there is none on Windows, for which local.py has a message

    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise SystemExit(
            f"error: started by root, the server needs the account {name}, and there is none.\n"
            f"hint:  useradd --system {name}"
        ) from None
    options = {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}
    for path in paths:
        if subprocess.run(["test", "-x", path], **options).returncode:
            raise SystemExit(
                f"error: the account {name}, under which root runs it, cannot get at {path}.\n"
                "hint:  choose a place that others may pass through, or start it as a user."
            )
    return options


def port_number(text):
    """Argument type."""
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"must be a port, 1 to 65535, not {text!r}")
    return int(text)


def check_port(address, port):
    """Raise SystemExit unless a server can listen there."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as nginx does
        try:
            probe.bind((address, port))
        except OSError as error:
            raise SystemExit(
                f"error: {address}:{port} cannot be listened on: {error.strerror}.\n"
                "hint:  another program listens there, or the address is not this machine's; "
                "--help names the flags to choose another."
            ) from None


class Processes:
    """The running programs. Each writes to LOGS/NAME.log; on leaving they end, last one first.

    They inherit the lock, a file: as long as one of them runs, it is held.
    """

    def __init__(self, folder, logs, lock):
        self.folder, self.logs, self.lock, self.running = folder, logs, lock, {}

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for process, number in reversed(self.running.values()):
            end(process, number)

    def launch(self, name, command, stop_by=signal.SIGTERM, stays=False, log=None, **options):
        """Start a program. Unless it `stays`, it ends when this process does, however that ends."""
        with open(log or self.logs / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C reaches serve.py alone, which stops in order
                pass_fds=[self.lock.fileno()],
                preexec_fn=None if stays else ends_with_its_parent(stop_by),
                **options,
            )
        self.running[name] = (process, stop_by)

    def check(self):
        """Raise SystemExit, with the last lines of its log, if one has ended."""
        for name, (process, _) in self.running.items():
            if process.poll() is not None:
                lines = []
                for log in [f"{name}.log", "error.log"] if name == "nginx" else [f"{name}.log"]:
                    lines += (self.logs / log).read_text(errors="replace").splitlines()[-8:]
                raise SystemExit(
                    f"error: {name} ended ({process.returncode}).\n"
                    "hint:  it says:\n" + "\n".join(lines)
                )

    def wait_until(self, condition, seconds=180):
        """Wait for an answer; the first start of MLflow makes its tables, which takes a while."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.check()
            try:
                if condition():
                    return
            except ssl.SSLCertVerificationError as error:
                raise SystemExit(
                    f"error: clients would refuse the certificate: {error.verify_message}.\n"
                    "hint:  gateway/server.pem must be valid for --host and signed by ca.pem. "
                    "Delete it to have one made."
                ) from None
            except (OSError, http.client.HTTPException):
                pass  # not yet
            time.sleep(0.1)
        raise SystemExit(
            f"error: {list(self.running)[-1]} did not answer within {seconds} s.\n"
            f"hint:  see {self.logs}"
        )


def ends_with_its_parent(number):
    """What a child does first: it asks Linux for that signal when its parent is gone."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask():
        prctl(1, number)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # gone already
            os._exit(1)

    return ask


def end(process, number):
    """Stop a process and all that it started, by its own id: kindly, then not."""
    for signal_number, patience in ((number, 30), (signal.SIGKILL, 5)):
        deadline = time.monotonic() + patience
        with contextlib.suppress(ProcessLookupError):  # nobody of the group is left
            os.killpg(process.pid, signal_number)
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.05)
            continue
        return


def status_of(sock, path, headers=None):
    """The status that a GET over a connected socket is answered with."""
    with sock:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = sock
        connection.request("GET", path, headers=headers or {})
        return connection.getresponse().status


def http_status(address, port, path):
    """The status that a GET over plain http is answered with."""
    return status_of(socket.create_connection((address, port), timeout=5), path)


def unix_socket(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(str(path))
    return sock


def tls_socket(address, port, host=None, ca_bundle=None):
    """A connection to address:port, which must show a certificate for `host`, if that is given."""
    context = ssl.create_default_context(cafile=ca_bundle)
    if not host:  # nginx is asked about a key on its own machine, whatever its certificate says
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    sock = socket.create_connection((address, port), timeout=5)
    return context.wrap_socket(sock, server_hostname=host)
