"""The credentials, on every request to the tracking server, and on no other.

MLflow hands each request, ready to be sent, to the request-auth provider that MLFLOW_TRACKING_AUTH
names. Here that is `CREDENTIALS`: it sees where the request goes, and so decides in one place.
"""

import base64
import collections
import functools
import io
import logging
import math
import os
import re
import sys
import time
from urllib.parse import urlsplit

import mlflow
import requests
from mlflow.tracking.request_auth.abstract_request_auth_provider import RequestAuthProvider

from common.errors import UserError

from . import undocumented
from .address import AMSC, belongs_to_server, keeps_secrets, lie_elsewhere, origin
from .secret import KEY, TOKEN, check_header, secret, source, validity

AUTH, NAME = "MLFLOW_TRACKING_AUTH", "x-api-key"  # the variable, and what it holds
SECRETS = (KEY, TOKEN, "MLFLOW_TRACKING_PASSWORD")


class Credentials(RequestAuthProvider, requests.auth.AuthBase):
    """Adds key and token to requests to the tracking server, and lets no credential go elsewhere.

    Both are read anew for each request: they may change during a job. `requests` does not look into
    ~/.netrc, whose password it would send in place of the token, as it is given an auth object.
    """

    def __init__(self):
        self.sent = {}  # every secret so far, to be struck out wherever a server repeats one
        self.last = {}  # of each kind, to go on with if its file becomes unreadable
        self.experiment = None  # the one that `connect` was told, for `diagnose`
        self.said = None  # what is wrong with such a file, if that has been said
        self.stopped = collections.deque(maxlen=4)  # errors raised here, which MLflow may lose
        self.refusals = {}  # {JSON: (status, path)} of answers; MLflow drops both

    def register(self):
        """Have MLflow ask this object. The variable is inherited by the processes of a job."""
        for name in (AUTH, "MLFLOW_TRACKING_AWS_SIGV4"):
            if os.environ.get(name, "").lower() not in ("", "0", "false", NAME):
                what = f"{name} is set, and with it MLflow would not send key or token."
                raise UserError(what, f"unset {name}")
        os.environ[AUTH] = NAME
        undocumented.register(self)
        for handler in logging.getLogger("mlflow").handlers:
            handler.addFilter(_strike_out)  # of a server's words that MLflow's threads log

    def get_name(self):
        return NAME

    def get_auth(self):
        return self

    def __call__(self, request):
        key, token = self._read(KEY), self._read(TOKEN)
        if not belongs_to_server(request.url):
            if key or token or "Authorization" in request.headers:
                self._stop(lie_elsewhere("{}://{}:{}".format(*origin(request.url))))
            return request
        safe = keeps_secrets(request.url)
        # MLflow has put in the variable's token; or user and password, which come first.
        if request.headers.get("Authorization", "Bearer ").startswith("Bearer "):
            if not safe:
                request.headers.pop("Authorization", None)
            elif token:
                request.headers["Authorization"] = f"Bearer {token}"
        if key and safe:
            request.headers["X-Api-Key"] = key
        sent = (key, token, request.headers.get("Authorization", "").partition(" ")[2])
        self.sent |= dict.fromkeys(filter(None, sent))
        request.register_hook("response", self._remember)
        return request

    def _read(self, name):
        try:
            self.last[name] = secret(name)
        except UserError as problem:
            # The file was there when the job started. The server decides about the last value.
            if not self.last.get(name):
                self._stop(problem)
            if str(problem) != self.said:
                self.said = str(problem)
                print(f"{problem}\nThe last one is used.", file=sys.stderr, flush=True)
        return self.last[name]

    def _stop(self, error):
        self.stopped.append(error)
        raise error

    def _remember(self, response, stream=False, **_):
        longest = math.inf if stream else 2**28  # bytes; files may have more
        response.raw.stream = functools.partial(self._pieces, response.raw, longest)
        path = urlsplit(response.url).path
        # MLflow takes any answer below 400 for success, and what was sent would be lost.
        if response.ok and response.status_code >= 300 and "/mlflow-artifacts/" in path:
            self._stop(requests.HTTPError("a redirect", response=response))
        if stream:
            return None
        answer = undocumented.json_of(response)
        # Newer servers answer an upload by an empty 200; redirects and errors are MLflow's to tell.
        code = answer.get("error_code", "") if isinstance(answer, dict) else ""
        known = isinstance(answer, dict) and code == ""
        known |= response.status_code >= 300 and isinstance(code, str)
        known |= "/mlflow-artifacts/" in path and (response.status_code, response.text) == (200, "")
        if "/api/" in path and "/mlflow" in path and not known:
            raise requests.exceptions.ContentDecodingError(undocumented.NOT_JSON)
        if not response.ok and answer is not None:
            self.refusals[str(answer)] = response.status_code, path
            # The response was lost, and MLflow has sent the request again: the row is there.
            if path.endswith("/runs/outputs") and undocumented.TWICE.search(str(answer)):
                done = requests.Response()
                done.status_code, done.raw = 200, io.BytesIO(b"{}")
                return done
        return None

    def _pieces(self, raw, longest, size, decode_content=True):
        """Yield an answer; Timeout below 1 kB/s: `requests` begins anew with each byte."""
        patience = mlflow.environment_variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get()
        waited, count, start = 0, 0, time.monotonic()
        while piece := raw.read1(size, decode_content=decode_content):  # what has come so far
            waited, count = waited + time.monotonic() - start, count + len(piece)
            longest -= len(piece)
            if longest < 0:
                raise requests.exceptions.ContentDecodingError(undocumented.NOT_JSON)
            if waited > patience:
                if count < 1000 * waited:
                    slow = f"{count} bytes of an answer in {waited:.0f} s"
                    self._stop(requests.exceptions.Timeout(slow))
                waited = count = 0
            yield piece
            start = time.monotonic()


CREDENTIALS = Credentials()


def credential():
    """Return in words, never in values, what the server will be sent; or raise UserError."""
    uri = mlflow.get_tracking_uri()
    safe = keeps_secrets(uri)
    if TOKEN in os.environ:  # MLflow puts it into a header as it is, with a file's line break
        os.environ[TOKEN] = os.environ[TOKEN].strip()
        check_header(TOKEN, os.environ[TOKEN])
    key, token, words = secret(KEY), secret(TOKEN), []
    if key:
        words.append(f"X-Api-Key from {source(KEY)}" if safe else "X-Api-Key withheld: plain http")
    login = undocumented.get_default_host_creds(uri)
    if login.username and login.password:  # MLflow prefers these to the token
        own = all(os.environ.get(f"MLFLOW_TRACKING_{part}") for part in ("USERNAME", "PASSWORD"))
        where = "" if own else " from ~/.mlflow/credentials"
        where += ", in place of the token" if token else ""
        words.append(f"user and password{where}" + ("" if safe else ", unencrypted"))
    elif token:
        known = f"bearer token from {source(TOKEN)} {validity(token)}".rstrip()
        words.append(known if safe else "bearer token withheld: plain http")
    for server, name in AMSC.items():
        if not words and urlsplit(uri).hostname == urlsplit(server).hostname:
            what = f"{name} is not set, so the AmSC server would refuse every request."
            kind = "key" if name == KEY else "access token"
            raise UserError(what, f'export {name}="<your {kind}>"')
    return ", ".join(words) or "no credentials"


def without_secrets(text):
    """Return `text` without the secrets in variables or sent so far, however servers write them."""
    values = [*CREDENTIALS.sent, *(os.environ.get(name, "") for name in SECRETS)]
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    values.append(base64.b64encode(f"{user}:{values[-1]}".encode()).decode() if user else "")
    for value in map(str.strip, values):
        if len(value) > 5:  # a shorter one protects nothing, and stands in many words
            text = re.sub("".join(map(_written, value)), "<secret>", text, flags=re.IGNORECASE)
    return text


def _written(sign):
    """Return a pattern of what a sign can be in JSON, HTML and addresses."""
    coded = rf"(%|&#x0*|\\u00){ord(sign):x};?|&(#0*{ord(sign)}|[a-z]+);"
    return sign if sign.isalnum() else rf"(\\?{re.escape(sign)}|{coded})"


def _strike_out(record):
    record.msg, record.args = without_secrets(record.getMessage()), ()
    return True
