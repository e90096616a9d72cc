"""What a server's folder holds before anything runs: API keys, certificate, passwords.

keys/NAME            the key of NAME, for handing over
gateway/             what nginx reads: the keys once more, server.pem, server.key
ca.pem, ca.key       the private authority that signed server.pem
*.env                for compose.yaml
"""

import base64
import contextlib
import fcntl
import ipaddress
import os
import re
import secrets
import signal
import sys

from processes import need, run

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
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("keys", "gateway"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name).chmod(0o700)  # also if somebody made it, to put a certificate in
    make_certificate(folder, host)
    if (folder / "gateway" / "keys.conf").exists():
        write_maps(folder)  # an earlier version made the folder: its maps knew no bearer tokens
    else:
        add_key(folder, "admin")


def add_key(folder, name):
    path = keys_of(folder) / name
    if path.exists():
        raise SystemExit(
            f"error: {name} has a key already, in {path}.\n"
            "hint:  revoke-key first, if it is to be replaced."
        )
    write_private(path, secrets.token_hex(32) + "\n")
    write_maps(folder)
    print(f"key      {path}  (hand it over; it is printed nowhere)", flush=True)


def revoke_key(folder, name):
    path = keys_of(folder) / name
    if not path.exists():
        there = ", ".join(sorted(key.name for key in path.parent.glob("[!.]*"))) or "none"
        raise SystemExit(f"error: {name} has no key in {path.parent}.\nhint:  there are: {there}")
    path.unlink()
    write_maps(folder)
    print(f"revoked  {name}", flush=True)


def keys_of(folder):
    keys = folder / "keys"
    if not keys.is_dir():
        raise SystemExit(
            f"error: {folder} is not the folder of a server.\n"
            "hint:  `start` or `prepare` makes one; --folder names it."
        )
    return keys


def write_maps(folder):
    """Write the two maps that nginx includes, and have a running nginx read them again."""
    maps = {"keys.conf": "", "passwords.conf": ""}
    for path in sorted(keys_of(folder).glob("[!.]*")):
        key = path.read_text(errors="replace").strip() if path.is_file() else ""
        if not re.fullmatch("[0-9A-Za-z]{16,}", key):  # an empty one would let all in
            print(f"warning: {path} holds no key, and lets nobody in", file=sys.stderr, flush=True)
            continue
        basic = base64.b64encode(f"{path.name}:{key}".encode()).decode()
        maps["keys.conf"] += f'"{key}" "{path.name}";\n'
        for header in (f"Basic {basic}", f"Bearer {key}"):
            maps["passwords.conf"] += f'"{header}" "{path.name}";\n'
    for file, text in maps.items():
        write_private(folder / "gateway" / file, text)
    try:
        with locked(folder):
            return  # no server of this machine runs in the folder
    except BlockingIOError:
        with contextlib.suppress(FileNotFoundError):  # it is about to start, or to end
            os.kill(int((folder / "run" / "nginx.pid").read_text()), signal.SIGHUP)


def write_private(path, text):
    """Write a file that only its owner reads, whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    new.replace(path)


@contextlib.contextmanager
def locked(folder):
    """Hold the folder's lock; BlockingIOError if a running server holds it."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


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
