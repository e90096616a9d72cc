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
from pathlib import Path

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
    warn_of_other_owners(folder)
    with changing(folder):
        make_certificate(folder, host)
        keys = keys_in(folder)
        if not keys and not (folder / "gateway" / "keys.conf").exists():
            make_key(folder, "admin")
        else:  # the maps of an earlier version knew no bearer tokens
            # Those of a running server stay what its nginx knows: revoke_key goes by them.
            with contextlib.suppress(BlockingIOError), locked(folder):
                write_maps(folder, keys)


def warn_of_other_owners(folder):
    """Root may mean to make a server for somebody else, or have been given a prepared folder."""
    if os.geteuid() == 0:
        for path in (folder, *(folder / name for name in ("keys", "gateway", "logs", "run"))):
            if path.exists() and (owner := path.stat().st_uid):
                with contextlib.suppress(KeyError):  # an account that is gone has a number only
                    owner = path.owner()
                print(
                    f"warning: {path} belongs to {owner}, who can read or exchange the keys.",
                    file=sys.stderr,
                    flush=True,
                )


def add_key(folder, name):
    with changing(folder):
        make_key(folder, name)


def make_key(folder, name):
    path = keys_of(folder) / name
    if os.path.lexists(path):
        raise SystemExit(
            f"error: {name} has a key already, in {path}.\n"
            "hint:  revoke-key first, if it is to be replaced."
        )
    keys, key = keys_in(folder), secrets.token_hex(32)
    with contextlib.ExitStack() as undo:  # also if Ctrl-C ends it: nobody has seen the key
        undo.callback(write_maps, folder, keys)
        undo.callback(path.unlink, missing_ok=True)
        write_maps(folder, keys | {name: key})
        write_private(path, key + "\n")
        tried(folder, name, [key], let_in=True)
        undo.pop_all()
    print(f"key      {path}  (hand it over; it is printed nowhere)", flush=True)


def revoke_key(folder, name):
    """Take the key out of the maps, see that it is refused, and only then forget it.

    Its file may have been changed or removed: what nginx knows is the key of that name, too.
    """
    with changing(folder):
        path, keys, known = keys_of(folder) / name, keys_in(folder), keys_in_maps(folder)
        lost = {key_in(path), known.get(name, "")} - {""}
        if not lost:
            there = ", ".join(keys) or "none"
            raise SystemExit(
                f"error: {name} has no key in {folder / 'keys'}.\nhint:  there are: {there}"
            )
        if name in known and known[name] != key_in(path):
            write_private(path, known[name] + "\n")  # for the next try, if this one fails
        owners = {owner for found in (keys, known) for owner in found if found[owner] in lost}
        write_maps(folder, {owner: key for owner, key in keys.items() if key not in lost})
        refused = tried(folder, name, lost, let_in=False)
        for path in keys_of(folder).iterdir():
            if lost.intersection(text_in(path).split()[:1]):  # a copy would let it in again
                path.unlink()
    names = ", ".join(sorted(owners | {name}))
    print(f"revoked  {names}" + ("  nginx refuses it" if refused else ""), flush=True)
    if not refused and (folder / "compose.env").exists():
        print("containers let it in until their nginx is started again: restart nginx")


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
    found, known = {}, keys_in_maps(folder)
    keys = {path: key_in(path) for path in keys_of(folder).glob("[!.]*")}

    def order(path):
        """A copy after its original: `cp -p` gives it the same time, but nginx knows it not."""
        return known.get(path.name) != keys[path], path.lstat().st_mtime

    for path in sorted(keys, key=order):
        key = keys[path]
        if key and key not in found.values():
            found[path.name] = key
        else:
            print(f"warning: {path} is no key, and lets nobody in", file=sys.stderr, flush=True)
    return found


def key_in(path):
    """The key in a file, or "" if add_key has not made it."""
    key = text_in(path).strip()
    return key if re.fullmatch(NAME, path.name) and re.fullmatch(KEY, key) else ""


def text_in(path):
    """What a plain file begins with, or ""."""
    if path.is_symlink() or not path.is_file():
        return ""
    with path.open(errors="replace") as file:
        return file.read(10_000)


def keys_in_maps(folder):
    """{owner: key}: what nginx knows, or will know when it reads the maps."""
    maps = folder / "gateway" / "keys.conf"
    text = maps.read_text(errors="replace") if maps.exists() else ""
    return {owner: key for key, owner in re.findall(f'"({KEY})" "({NAME})";', text)}


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


def tried(folder, name, keys, let_in):
    """Have a running nginx read the maps again, and try the keys until all are let in, or refused.

    Then nothing is left that lets in a refused key: on connections that are open, workers go by
    what they knew when they started, so they are ended. Returns False if nothing of a server of
    this machine runs in the folder.
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
        earlier = children_of(process)
        os.kill(process, signal.SIGHUP)
        listen = re.search(r"listen (\S+):(\d+) ssl;", (folder / "run" / "nginx.conf").read_text())
        address = ("127.0.0.1" if listen[1] == "0.0.0.0" else listen[1], int(listen[2]))
        while time.monotonic() < deadline:
            try:
                for key in keys:
                    status = status_of(tls_socket(*address), "/health", {"X-Api-Key": key})
                    answers = answers + 1 if (status != 401) == let_in else 0
            except (OSError, http.client.HTTPException):
                answers = 0
            # For a moment, processes that know the earlier keys answer as well.
            if answers >= 5 * len(keys) and (let_in or ended(earlier & children_of(process))):
                return True
            time.sleep(0.1)
    raise SystemExit(
        f"error: nginx has not read the keys again; what it knew of {name} may still hold.\n"
        f"hint:  see {folder / 'logs' / 'error.log'}. If the server is just starting or stopping, "
        "try again."
    )


def children_of(process):
    return set(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def ended(workers):
    """Whether none is left; those that are, are told to end at once."""
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGTERM)
    return not workers


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
