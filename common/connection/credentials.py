"""The credentials, on every request to the tracking server, and on no other.

MLflow hands each request, ready to be sent, to the request-auth provider that MLFLOW_TRACKING_AUTH
names. Here that is `CREDENTIALS`: it sees where the request goes, and so decides in one place.
"""

import base64
import collections
import contextlib
import html
import io
import json
import os
import sys
from urllib.parse import urlsplit

import mlflow
import requests
from mlflow.tracking.request_auth.abstract_request_auth_provider import RequestAuthProvider

from common.errors import UserError

from . import undocumented
from .address import AMSC_URI, LOOPBACK, origin, printable, proxy_of
from .key import api_key, check_header

AUTH, NAME = "MLFLOW_TRACKING_AUTH", "x-api-key"  # the variable, and what it holds
SECRETS = ("AM_SC_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")


class Credentials(RequestAuthProvider, requests.auth.AuthBase):
    """Adds `X-Api-Key` to requests to the tracking server, and lets no credential go elsewhere.

    The key is read anew for each request: it may change during a job. `requests` does not look into
    ~/.netrc, whose password it would send in place of the token, as it is given an auth object.
    """

    def __init__(self):
        self.sent = []  # every secret so far, to be struck out wherever a server repeats one
        self.last_key = ""
        self.said = None  # what is wrong with the key file, if that has been said
        self.stopped = collections.deque(maxlen=4)  # errors raised here, which MLflow may lose
        self.refusals = {}  # {JSON: status} of answers; MLflow drops the status

    def register(self):
        """Have MLflow ask this object. The variable is inherited by the processes of a job."""
        for name in (AUTH, "MLFLOW_TRACKING_AWS_SIGV4"):
            if os.environ.get(name, "").lower() not in ("", "0", "false", NAME):
                what = f"{name} is set, and with it MLflow would not send the key."
                raise UserError(what, f"unset {name}")
        os.environ[AUTH] = NAME
        undocumented.register(self)

    def get_name(self):
        return NAME

    def get_auth(self):
        return self

    def __call__(self, request):
        key = self._key()
        if not belongs_to_server(request.url):
            if key or "Authorization" in request.headers:
                scheme, host, port = origin(request.url)
                self.stopped.append(lie_elsewhere(f"{scheme}://{host}:{port}"))
                raise self.stopped[-1]
            return request
        if not keeps_secrets(request.url):
            key = ""
            if request.headers.get("Authorization", "").startswith("Bearer "):
                del request.headers["Authorization"]
        if key:
            request.headers["X-Api-Key"] = key
        for secret in (key, request.headers.get("Authorization", "").partition(" ")[2]):
            if secret and secret not in self.sent:
                self.sent.append(secret)
        request.register_hook("response", self._remember)
        return request

    def _key(self):
        try:
            self.last_key = api_key()[0]
        except UserError as problem:
            # The file was there when the job started. The server decides about the last key.
            if not self.last_key:
                self.stopped.append(problem)
                raise
            if str(problem) != self.said:
                self.said = str(problem)
                print(f"{problem}\nThe last key is used.", file=sys.stderr, flush=True)
        return self.last_key

    def _remember(self, response, stream=False, **_):
        if not response.ok and not stream:
            answer = ""
            with contextlib.suppress(requests.JSONDecodeError):
                answer = str(response.json())
                self.refusals[answer] = response.status_code
            # The response was lost, and MLflow has sent the request again: the row is there.
            if response.url.endswith("/runs/outputs") and undocumented.TWICE.search(answer):
                done = requests.Response()
                done.status_code, done.raw = 200, io.BytesIO(b"{}")
                return done
        return None


CREDENTIALS = Credentials()


def credential():
    """Return in words, never in values, what the server will be sent; or raise UserError."""
    uri = mlflow.get_tracking_uri()
    safe = keeps_secrets(uri)
    key, name = api_key()
    # The line break that comes along from a file is no part of the token.
    if token := os.environ.pop("MLFLOW_TRACKING_TOKEN", "").strip():
        os.environ["MLFLOW_TRACKING_TOKEN"] = token
        check_header("MLFLOW_TRACKING_TOKEN", token)
    words = []
    if key:
        words.append(f"X-Api-Key from {name}" if safe else "X-Api-Key withheld: plain http")
    if all(os.environ.get(f"MLFLOW_TRACKING_{part}") for part in ("USERNAME", "PASSWORD")):
        # MLflow prefers these to the token.
        words.append("user and password" if safe else "user and password, unencrypted")
    elif token:
        words.append("bearer token" if safe else "bearer token withheld: plain http")
    if not words and urlsplit(uri).hostname == urlsplit(AMSC_URI).hostname:
        what = "AM_SC_API_KEY is not set, so the AmSC server would refuse every request."
        raise UserError(what, 'export AM_SC_API_KEY="<your key>"')
    return ", ".join(words) or "no credentials"


def belongs_to_server(url):
    """Return whether an address is on the tracking server: the same scheme, host and port."""
    return origin(url) == origin(mlflow.get_tracking_uri())


def lie_elsewhere(location):
    where = printable(location)
    what = f"the artifacts lie on another server, {where}, and the key must not go there."
    return UserError(what, "choose an --experiment, or a run of one, with its artifacts here.")


def keeps_secrets(url):
    """Return whether a key may go there: over https, or to this machine and through no proxy."""
    parts = urlsplit(url)
    local = parts.scheme == "http" and parts.hostname in LOOPBACK
    return parts.scheme == "https" or (local and not proxy_of(url))


def without_secrets(text):
    """Return `text` without the secrets in variables or sent so far, however servers write them."""
    values = CREDENTIALS.sent + [os.environ.get(name, "") for name in SECRETS]
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    values.append(base64.b64encode(f"{user}:{values[-1]}".encode()).decode() if user else "")
    for value in map(str.strip, values):
        if len(value) > 5:  # a shorter one protects nothing, and stands in many words
            for written in (value, html.escape(value), json.dumps(value)[1:-1]):
                text = text.replace(written, "<secret>")
    return text
