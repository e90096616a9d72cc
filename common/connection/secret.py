"""API key and bearer token, each from a variable or from a file that only its owner may read."""

import base64
import json
import os
import sys
import time
from shlex import quote

from common.errors import UserError

KEY, TOKEN = "AM_SC_API_KEY", "MLFLOW_TRACKING_TOKEN"


def source(name):
    """Return which variable the secret `name` comes from: NAME_FILE, NAME, or None."""
    names = (f"{name}_FILE", name)
    return next((name for name in names if os.environ.get(name, "").strip()), None)


def secret(name):
    """Return the secret `name`, or "". A file is read anew each time.

    Raises UserError if others may read the file, or if it holds nothing that a header can carry.
    """
    where = source(name)
    if not where:
        return ""
    value = os.environ[where].strip()
    value = value if where == name else _read(os.path.expanduser(value), where)
    check_header(where, value)
    return value


def check_header(name, value):
    """Raise UserError if no header can carry the value: MLflow would print it in its message."""
    if not value.isascii() or not value.isprintable() or set(" \"'") & set(value):
        what = f"{name} holds a space, a line break, a quotation mark or a letter outside ASCII"
        raise UserError(f"{what}: no header can carry it.", "set it exactly as it was given.")


def _read(path, name):
    """Return what stands in the file. One that is being replaced gets a second chance."""
    kind = "key" if name.startswith(KEY) else "token"
    for pause in (0.5, 0):
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                problem = "it is not a file"  # but a pipe, say, which would be waited for
                break
            with open(path, encoding="ascii", errors="replace") as file:
                if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
                    hint = f"chmod 600 {quote(path)}; and if others were here, get a new {kind}."
                    what = f"the {kind} file {path} is open to others than its owner."
                    raise UserError(what, hint)
                if value := file.read().strip():
                    return value
            problem = "it is empty"
        except OSError as error:
            problem = error.strerror
        time.sleep(pause)
    what = f"there is no {kind} in {name}, {path}: {problem}."
    raise UserError(what, "write it there, alone; to renew it, write a file beside it, and mv.")


def validity(token):
    """Return in words until when a token is valid, or "". A JWT says so; others do not."""
    expiry = _claims(token).get("exp")
    if not isinstance(expiry, int | float) or not 1e8 < expiry < 1e11:  # 1973, the year 5138
        return ""
    return f"{'valid until' if expiry > time.time() else 'expired at'} {_clock(expiry)}"


def check_token():
    """Raise UserError if the token has expired; warn if it will, or is of the wrong kind.

    What it says of itself is not verified: that is the server's part.
    """
    token, name = secret(TOKEN), source(TOKEN)
    words, claims = validity(token), _claims(token)
    renew = "get a new access token"
    if words.startswith("expired"):
        where = "put it into that variable" if name == TOKEN else "write it to that file"
        raise UserError(f"the token in {name} {words}.", f"{renew}, and {where}.")
    # Keycloak and Cognito name the kind; only ID tokens hold the hash of an access token.
    if "ID" in (claims.get("typ"), str(claims.get("token_use")).upper()) or "at_hash" in claims:
        what = f"warning: {name} seems to hold an ID token; servers take the access token."
        print(what, file=sys.stderr, flush=True)
    try:  # Slurm says when the job ends, Torque and some PBS how long it takes from its start
        end = float(os.environ.get("SLURM_JOB_END_TIME") or 0)
        end = end or time.time() + float(os.environ.get("PBS_WALLTIME") or 0)
    except ValueError:
        return
    if words and claims["exp"] < end < 1e11:
        what = f"warning: the token is {words}, and this job may last until {_clock(end)}."
        hint = f"With {TOKEN}_FILE it can be renewed meanwhile."
        print(what, hint, file=sys.stderr, flush=True)


def _claims(token):
    """Return what a JWT says of itself; {} if it is none."""
    try:
        text = token.split(".")[1]
        said = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (IndexError, ValueError, RecursionError):  # base64, JSON and Unicode have ValueErrors
        return {}
    return said if isinstance(said, dict) else {}


def _clock(seconds):
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds))
