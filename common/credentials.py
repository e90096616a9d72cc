"""The API key of the tracking server, on every request that MLflow makes, and on no other.

Copy this file and call `send_api_key` if you want that in your own project: MLflow asks a
registered header provider at every request, so metrics, artifacts and the registry all carry it.
"""

import os
import stat
import sys
import time
from urllib.parse import urlsplit

import mlflow
import requests
from mlflow.tracking.request_header import registry
from mlflow.tracking.request_header.abstract_request_header_provider import RequestHeaderProvider

LOOPBACK = ("localhost", "127.0.0.1", "::1")
LONGEST_KEY = 8000  # bytes; servers take no longer headers


class ApiKeyHeader(RequestHeaderProvider):
    """Adds `X-Api-Key` to MLflow's requests, read anew each time: it may change during a job.

    MLflow asks for headers without saying where they go. That this is the tracking server alone is
    seen to in common/tracking.py, which follows no redirect and refuses artifacts elsewhere.
    """

    def __init__(self):
        self.sent = []  # every key so far, to be struck out wherever a server repeats one
        self.said = None  # what is wrong with the key file, if that has been said

    def describe(self):
        """Return in words, never in values, what the server will be shown; "" if nothing.

        Raises SystemExit if the key or the token cannot be used.
        """
        uri = mlflow.get_tracking_uri()
        key, name = api_key()
        safe = keeps_secrets(uri)
        sent = [f"X-Api-Key from {name}"] if key and safe else []
        unencrypted = "" if safe else ", unencrypted"
        # The line break that comes along from a file is no part of it.
        if token := os.environ.pop("MLFLOW_TRACKING_TOKEN", "").strip():
            os.environ["MLFLOW_TRACKING_TOKEN"] = token
            _check_header("MLFLOW_TRACKING_TOKEN", token)
        if all(os.environ.get(f"MLFLOW_TRACKING_{part}") for part in ("USERNAME", "PASSWORD")):
            sent.append(f"user and password{unencrypted}")  # MLflow prefers these to the token
        elif token:
            sent.append(f"bearer token{unencrypted}")
        if key and not safe:
            sent.append("X-Api-Key withheld: plain http")
        return ", ".join(sent)

    def in_context(self):
        return keeps_secrets(mlflow.get_tracking_uri())

    def request_headers(self):
        try:
            key, _ = api_key()
        except SystemExit as problem:
            # The file was there when the job started. The server decides about the last key.
            if not self.sent:
                raise
            key = self.sent[-1]
            if problem.code != self.said:
                self.said = problem.code
                print(f"{problem.code}\nThe last key is used.", file=sys.stderr, flush=True)
        if key and key not in self.sent:
            self.sent.append(key)
        return {"X-Api-Key": key} if key else {}


def api_key():
    """Return (the key or "", the variable that it comes from).

    AM_SC_API_KEY_FILE names a file that is read each time; else AM_SC_API_KEY holds the key. Raises
    SystemExit if the file is none, or may be read by others, or if no header can carry the key.
    """
    name = "AM_SC_API_KEY_FILE"
    if path := os.environ.get(name, "").strip():
        key = _read_key(os.path.expanduser(path))
    else:
        name = "AM_SC_API_KEY"
        key = os.environ.get(name, "").strip()
    _check_header(name, key)
    return key, name


def keeps_secrets(uri):
    """Return whether a key may be sent there: over https, or to this machine itself.

    Not to this machine by way of a proxy, which would read it.
    """
    parts = urlsplit(uri)
    if parts.scheme == "https":
        return True
    proxy = requests.utils.select_proxy(uri, requests.utils.get_environ_proxies(uri))
    return parts.scheme == "http" and parts.hostname in LOOPBACK and not proxy


def send_api_key():
    """Register `ApiKeyHeader`, once: MLflow joins the values of two providers into "key key"."""
    providers = registry._request_header_provider_registry
    if not any(isinstance(provider, ApiKeyHeader) for provider in providers):
        providers.register(ApiKeyHeader)


def _check_header(name, value):
    """Raise SystemExit if no header can carry the value: MLflow would print it in its message."""
    if not value.isascii() or not value.isprintable() or set(" \"'") & set(value):
        raise SystemExit(
            f"error: {name} holds a space, a line break, a quotation mark or a letter outside "
            "ASCII: no header can carry it.\n"
            "hint:  set it again, exactly as you were given it; in a file, as plain text."
        )


def _read_key(path):
    """Return what stands in the key file. One that is being replaced gets a second chance."""
    for pause in (0.5, 0):
        try:
            # O_NONBLOCK, because opening a pipe would wait for somebody to write into it.
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            with open(descriptor, encoding="ascii", errors="replace") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or status.st_size > LONGEST_KEY:
                    problem = "it is no file of one key"
                    break
                if os.name == "posix" and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                    raise SystemExit(
                        f"error: the key file {path} is open to others than its owner.\n"
                        f"hint:  chmod 600 {path}; and if others use this machine, ask for a new "
                        "key."
                    )
                if key := file.read().strip():
                    return key
            problem = "it is empty"
        except OSError as error:
            problem = error.strerror
        time.sleep(pause)
    raise SystemExit(
        f"error: there is no key in AM_SC_API_KEY_FILE, {path}: {problem}.\n"
        "hint:  write the key into it, and nothing else; renew it by writing a new file beside it, "
        "and mv."
    )
