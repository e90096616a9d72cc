"""The API key, from a variable or from a file that only its owner may read."""

import os
import time

from common.errors import UserError


def api_key():
    """Return (the key or "", the variable that it comes from).

    AM_SC_API_KEY_FILE names a file that is read each time; else AM_SC_API_KEY holds the key.
    Raises UserError if others may read the file, or if it holds no key that a header can carry.
    """
    name = "AM_SC_API_KEY_FILE"
    if path := os.environ.get(name, "").strip():
        key = _read_key(os.path.expanduser(path))
    else:
        name = "AM_SC_API_KEY"
        key = os.environ.get(name, "").strip()
    check_header(name, key)
    return key, name


def check_header(name, value):
    """Raise UserError if no header can carry the value: MLflow would print it in its message."""
    if not value.isascii() or not value.isprintable() or set(" \"'") & set(value):
        what = f"{name} holds a space, a line break, a quotation mark or a letter outside ASCII"
        raise UserError(f"{what}: no header can carry it.", "set it exactly as it was given.")


def _read_key(path):
    """Return what stands in the key file. One that is being replaced gets a second chance."""
    for pause in (0.5, 0):
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                problem = "it is not a file"  # but a pipe, say, which would be waited for
                break
            with open(path, encoding="ascii", errors="replace") as file:
                if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
                    hint = f"chmod 600 {path}; and if others use this machine, ask for a new key."
                    raise UserError(f"the key file {path} is open to others than its owner.", hint)
                if key := file.read().strip():
                    return key
            problem = "it is empty"
        except OSError as error:
            problem = error.strerror
        time.sleep(pause)
    what = f"there is no key in AM_SC_API_KEY_FILE, {path}: {problem}."
    raise UserError(what, "write it there, alone; to renew it, write a file beside it, and mv.")
