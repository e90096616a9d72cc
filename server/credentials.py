"""What a server's folder holds before anything runs: API keys, certificate, passwords.

keys/NAME            the key of NAME, for handing over
gateway/             what nginx reads: the keys once more, server.pem, server.key
ca.pem, ca.key       the private authority that signed server.pem
*.env                for compose.yaml
"""

import base64
import contextlib
import fcntl
import http.client
import ipaddress
import os
import re
import secrets
import signal
import sys
import time

from processes import need, run, status_of, tls_socket

NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,31}"  # inside/owners.py has it, too
KEY = "[0-9a-f]{64}"  # secrets.token_hex(32)

CERTIFICATES = """
[req]
distinguished_name = name
[name]
[ca]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = {names}
"""


def prepare(folder, host):
    """Make the folders, the certificate and the first key; leave alone what is there."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    if (mode := folder.stat().st_mode) & 0o022:  # whoever writes in it could exchange all
        folder.chmod(mode & ~0o022)
    for name in ("keys", "gateway"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name).chmod(0o700)  # also if somebody made it, to put a certificate in
    make_certificate(folder, host)
    keys = keys_in(folder)
    if keys or (folder / "gateway" / "keys.conf").exists():
        write_maps(folder, keys)  # those of an earlier version knew no bearer tokens
    else:
        add_key(folder, "admin")


def add_key(folder, name):
    path = keys_of(folder) / name
    with changing(folder):
        if os.path.lexists(path):
            raise SystemExit(
                f"error: {name} has a key already, in {path}.\n"
                "hint:  revoke-key first, if it is to be replaced."
            )
        keys = keys_in(folder)
        key = secrets.token_hex(32)
        write_maps(folder, keys | {name: key})
        write_private(path, key + "\n")
        try:
            tried(folder, name, key, lambda status: status != 401)
        except SystemExit:
            path.unlink()  # nobody has seen it
            write_maps(folder, keys)
            raise
    print(f"key      {path}  (hand it over; it is printed nowhere)", flush=True)


def revoke_key(folder, name):
    """Take the key out of the maps, see that it is refused, and only then forget it."""
    with changing(folder):
        keys = keys_in(folder)
        key = keys.pop(name, None)
        if not key:
            there = ", ".join(keys) or "none"
            raise SystemExit(
                f"error: {name} has no key in {folder / 'keys'}.\nhint:  there are: {there}"
            )
        write_maps(folder, keys)
        refused = tried(folder, name, key, lambda status: status == 401)
        for path in keys_of(folder).iterdir():
            if key_in(path) == key:  # a copy would let it in again
                path.unlink()
    print(f"revoked  {name}" + ("  nginx refuses it" if refused else ""), flush=True)
    if not refused and (folder / "compose.env").exists():
        print("containers let it in until their nginx reads the keys again: nginx -s reload")


def keys_of(folder):
    keys = folder / "keys"
    if not keys.is_dir():
        raise SystemExit(
            f"error: {folder} is not the folder of a server.\n"
            "hint:  `start` or `prepare` makes one; --folder names it."
        )
    return keys


def keys_in(folder):
    """{owner: key}: what add_key made. Anything else in there, a copy too, lets nobody in."""
    found = {}
    oldest_first = sorted(keys_of(folder).glob("[!.]*"), key=lambda path: path.lstat().st_mtime)
    for path in oldest_first:
        key = key_in(path)
        if key and key not in found.values():
            found[path.name] = key
        else:
            print(f"warning: {path} is no key, and lets nobody in", file=sys.stderr, flush=True)
    return found


def key_in(path):
    """The key in a file, or "" if add_key has not made it."""
    made = re.fullmatch(NAME, path.name) and path.is_file() and not path.is_symlink()
    key = path.read_text(errors="replace").strip() if made and path.stat().st_size < 200 else ""
    return key if re.fullmatch(KEY, key) else ""


def write_maps(folder, keys):
    """Write the two maps that nginx includes."""
    maps = {"keys.conf": "", "passwords.conf": ""}
    for name, key in keys.items():
        basic = base64.b64encode(f"{name}:{key}".encode()).decode()
        maps["keys.conf"] += f'"{key}" "{name}";\n'
        for header in (f"Basic {basic}", f"Bearer {key}"):
            maps["passwords.conf"] += f'"{header}" "{name}";\n'
    for file, text in maps.items():
        write_private(folder / "gateway" / file, text)


def tried(folder, name, key, right):
    """Have a running nginx read the maps again, and try the key until the answer is `right`.

    Returns False if nothing of a server of this machine runs in the folder.
    """
    try:
        with locked(folder):
            return False
    except BlockingIOError:
        answers, deadline = 0, time.monotonic() + 10
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
        process = int((folder / "run" / "nginx.pid").read_text())
        if process < 2:  # 0 and -1 are whole groups of processes
            raise ValueError(process)
        os.kill(process, signal.SIGHUP)
        listen = re.search(r"listen (\S+):(\d+) ssl;", (folder / "run" / "nginx.conf").read_text())
        address = ("127.0.0.1" if listen[1] == "0.0.0.0" else listen[1], int(listen[2]))
        while time.monotonic() < deadline:
            try:
                status = status_of(tls_socket(*address), "/health", {"X-Api-Key": key})
                answers = answers + 1 if right(status) else 0
            except (OSError, http.client.HTTPException):
                answers = 0
            if answers == 5:  # for a moment, processes that know the earlier keys answer as well
                return True
            time.sleep(0.1)
    raise SystemExit(
        f"error: nginx has not read the keys again; what it knew of {name} may still hold.\n"
        f"hint:  see {folder / 'logs' / 'error.log'}. If the server is just starting or stopping, "
        "try again."
    )


def write_private(path, text):
    """Write a file that only its owner reads, whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    with open(private(new), "r+") as file:
        file.truncate(0)
        file.write(text)
    new.replace(path)


def private(path):
    """A descriptor of a file that its folder's owner alone may open, also if root makes it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    os.fchmod(descriptor, 0o600)
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
    return descriptor


@contextlib.contextmanager
def locked(folder):
    """Hold the folder's lock; BlockingIOError if a server, or what is left of it, holds it."""
    with open(private(folder / "lock"), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file


@contextlib.contextmanager
def changing(folder):
    """Wait for others that add and revoke keys: each writes the maps from what it has read."""
    keys = os.open(keys_of(folder), os.O_RDONLY)
    try:
        fcntl.flock(keys, fcntl.LOCK_EX)
        yield
    finally:
        os.close(keys)


def make_certificate(folder, host):
    """A private authority, and the server's certificate: to try it out, and behind a firewall.

    An institute puts its own into their place; nothing is made where a certificate is.
    """
    pem = folder / "gateway" / "server.pem"
    if pem.exists():
        return
    try:
        names = f"IP:{ipaddress.ip_address(host)}"
    except ValueError:
        names = f"DNS:{host}"
    make = [need("openssl"), "req", "-x509", "-config", "/dev/stdin"]
    make += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    text = CERTIFICATES.format(names=f"{names}, DNS:localhost").encode()
    ca_key, ca_pem = folder / "ca.key", folder / "ca.pem"
    if not ca_key.exists():
        what = ["-extensions", "ca", "-subj", "/CN=MLflow server's own authority", "-days", "3650"]
        run([*make, *what, "-keyout", ca_key, "-out", ca_pem], input=text)
    what = ["-extensions", "server", "-subj", f"/CN={host}", "-days", "825"]
    signed = ["-CA", ca_pem, "-CAkey", ca_key]
    run([*make, *what, *signed, "-keyout", pem.with_suffix(".key"), "-out", pem], input=text)


def write_environments(folder, addresses):
    """What compose.yaml reads: addresses, and passwords that nobody has to think up."""
    password, secret = secrets.token_hex(24), secrets.token_hex(24)
    files = {
        "postgres.env": {"POSTGRES_PASSWORD": password},
        "store.env": {"ROOT_ACCESS_KEY_ID": "mlflow", "ROOT_SECRET_ACCESS_KEY": secret},
        "mlflow.env": {
            "PGPASSWORD": password,
            "AWS_ACCESS_KEY_ID": "mlflow",
            "AWS_SECRET_ACCESS_KEY": secret,
        },
    }
    for name, values in files.items():
        if not (folder / name).exists():  # a database keeps the password that it was made with
            write_private(folder / name, as_lines(values))
    (folder / "compose.env").write_text(as_lines(addresses))
    print(f"compose  {folder / 'compose.env'}", flush=True)


def as_lines(values):
    return "".join(f"{name}={value}\n" for name, value in values.items())
