"""Programs of the server: find them, run them, wait until they answer, stop them."""

import contextlib
import http.client
import os
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
    """The running programs. Each writes to LOGS/NAME.log; on leaving they end, last one first."""

    def __init__(self, folder, logs):
        self.folder, self.logs, self.running = folder, logs, {}

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for process, number in reversed(self.running.values()):
            end(process, number)

    def launch(self, name, command, stop_by=signal.SIGTERM, **options):
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C reaches serve.py alone, which stops in order
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


def status_of(sock, path):
    """The status that a GET over a connected socket is answered with."""
    with sock:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = sock
        connection.request("GET", path)
        return connection.getresponse().status


def http_status(address, port, path):
    """The status that a GET over plain http is answered with."""
    return status_of(socket.create_connection((address, port), timeout=5), path)


def unix_socket(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(str(path))
    return sock


def tls_socket(address, port, host, ca_bundle):
    """A connection to address:port that must show a certificate for `host`."""
    context = ssl.create_default_context(cafile=ca_bundle)
    sock = socket.create_connection((address, port), timeout=5)
    return context.wrap_socket(sock, server_hostname=host)
