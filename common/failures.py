"""What MLflow raises when the server fails, said in one sentence with one cure and one exit code.

MLflow's own text for a refused key, a login page or an unplugged cable is a long traceback. Copy
this file and call `explain` first thing, if you only want short messages in your own job logs.
"""

import base64
import html
import json
import os
import re
import sys
import traceback
from typing import NamedTuple
from urllib.parse import urlsplit

import mlflow
import requests
from mlflow.exceptions import MlflowException, RestException
from mlflow.tracking.request_header import registry

# Exit codes, for job files: 16 to 25 may be gone on the next try, the others stay until something
# is changed. README, "Exit codes", lists them.
PROXY = 12
NAME = 13
NO_SERVER = 14
TLS = 15
TIMEOUT = 16
DROPPED = 17
REDIRECT = 18
WEB_PAGE = 19
UNAUTHENTICATED = 20
FORBIDDEN = 21
NO_MLFLOW = 22
TOO_MANY_REQUESTS = 23
SERVER_ERROR = 24
UNAVAILABLE = 25
TOO_LARGE = 26
OBJECT_STORE = 27

SECRETS = ("AM_SC_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")

# MLflow's names for HTTP statuses, where a server answers with them in JSON.
STATUS = {
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "CUSTOMER_UNAUTHORIZED": 403,
    "ENDPOINT_NOT_FOUND": 404,
    "REQUEST_LIMIT_EXCEEDED": 429,
    "TEMPORARILY_UNAVAILABLE": 503,
}


class Failure(NamedTuple):
    """One cause and one cure; as text, the two lines for stderr."""

    code: int  # exit code
    what: str
    advice: str

    def __str__(self):
        return f"error: {self.what}.\nhint:  {self.advice}"


def explain():
    """Print a server's failure that ends the script as a `Failure`, and exit with its code.

    Any other error keeps its traceback; the secrets in it, if any, are struck out.
    """
    sys.excepthook = _print_and_exit


def diagnose(error):
    """Return the `Failure` that `error` means, or None if it is not the server that failed."""
    if not isinstance(error, (MlflowException, requests.RequestException)):
        return None
    causes = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    text = without_secrets(" ".join(" ".join(str(cause) for cause in causes).split()))
    return _broken_connection(causes, text) or _bad_answer(causes, text)


def without_secrets(text):
    """Return `text` with every API key sent so far, the token and the password struck out.

    As they are, and as a server that repeats a request's headers in its answer may write them.
    """
    values = [os.environ.get(name, "") for name in SECRETS]
    for provider in registry._request_header_provider_registry:
        values += getattr(provider, "sent", [])  # see common/credentials.py
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    values.append(base64.b64encode(f"{user}:{values[2]}".encode()).decode() if user else "")
    for value in map(str.strip, values):
        if len(value) > 5:  # a shorter one protects nothing, and stands in many words
            for written in (value, html.escape(value), json.dumps(value)[1:-1]):
                text = text.replace(written, "<secret>")
    return text


def _print_and_exit(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):  # Python exits as a shell expects of Ctrl-C
        print("error: stopped by Ctrl-C.", file=sys.stderr, flush=True)
        return
    failure = diagnose(error)
    if failure is None:
        text = "".join(traceback.format_exception(kind, error, trace))
        print(without_secrets(text), end="", file=sys.stderr, flush=True)
        return
    print(failure, file=sys.stderr, flush=True)
    raise SystemExit(failure.code)  # Python takes the exit code from here, too


def _broken_connection(causes, text):
    """The `Failure` if no answer came at all."""

    def caused_by(*kinds):
        return any(isinstance(cause, kinds) for cause in causes)

    address = _address()
    # MLflow's words for a part that could not be sent, and for one that could not be fetched.
    if way := re.search(r"Failed to (?:(upload) at least one part|download \d+ chunk)", text):
        host = re.search(r"host='([^']+)'|https?://([^/'\"]+)", text)
        host = f" {host[1] or host[2]}" if host else ""
        variable = f"MLFLOW_ENABLE_PROXY_MULTIPART_{'UPLOAD' if way[1] else 'DOWNLOAD'}=false"
        return Failure(
            OBJECT_STORE,
            f"the object store{host}, which {address} leaves large files to, does not do its part",
            f"can this machine reach it, and is the clock right? With {variable} they go through "
            "the server instead.",
        )
    if caused_by(requests.exceptions.ProxyError):
        return Failure(
            PROXY,
            f"the proxy on the way to {address} does not let through: {_reason(text)}",
            "check http_proxy, https_proxy and no_proxy.",
        )
    if caused_by(requests.exceptions.SSLError):
        return _untrusted(address, text)
    # Before the name: a time limit may have struck while it was looked up.
    if caused_by(requests.exceptions.Timeout) or "ReadTimeoutError" in text:
        return Failure(
            TIMEOUT,
            f"{address} did not answer in time: {_reason(text)}",
            "check the address, and on a compute node whether it has a network at all.",
        )
    if "NameResolutionError" in text:
        return Failure(
            NAME,
            f"the name of {address} is unknown",
            "check the address, and whether this node has a network.",
        )
    if "BadStatusLine" in text:
        return Failure(
            NO_MLFLOW,
            f"what answers at {address} is no web server, and so no MLflow",
            "check the port of the address.",
        )
    if caused_by(requests.exceptions.ChunkedEncodingError) or re.search(
        r"RemoteDisconnected|IncompleteRead|ConnectionResetError|BrokenPipeError", text
    ):
        plain = address.startswith("http://")
        return Failure(
            DROPPED,
            f"{address} dropped the connection halfway",
            f"{'does it want https://? Else ' if plain else ''}try again; if it stays, ask those "
            "who run the server, or the gateway before it.",
        )
    if caused_by(requests.exceptions.ConnectionError) and "too many" not in text:
        return Failure(
            NO_SERVER,
            f"no server answers at {address}",
            "check the address and the network, and that the server runs.",
        )
    return None


def _untrusted(address, text):
    found = re.search(r"certificate verify failed: [^(]+|\[SSL[^]]*\][^(]+", text)
    reason = found[0].strip() if found else _reason(text)
    if "has expired" in reason or "not yet valid" in reason:
        advice = "is this machine's clock right? Else ask those who run the server to renew it."
    elif "mismatch" in reason or "not valid for" in reason:
        advice = "use the name that the certificate is for."
    elif "WRONG_VERSION" in reason or "HTTP" in reason:
        advice = "the server speaks plain http there: correct the port, or give http://."
    else:
        advice = "if the server has a certificate of your institution, give --ca_bundle FILE."
    return Failure(TLS, f"no trusted TLS connection to {address}: {reason}", advice)


def _bad_answer(causes, text):
    """The `Failure` if there was an answer, and a bad one."""
    address, status = _address(), _status(causes, text)
    no_json = (requests.exceptions.JSONDecodeError, requests.exceptions.ContentDecodingError)
    if any(isinstance(cause, no_json) for cause in causes) or "valid JSON format" in text:
        return Failure(
            WEB_PAGE,
            f"{address} answers with a web page, not as an MLflow server: probably a login page",
            f"check the key (sent: {_sent() or 'none'}), and that the address is right and https.",
        )
    if status is None:
        return None
    if status == 400 and "HTTPS port" in text:  # nginx's words
        status = 301
    if 300 <= status < 400:
        return Failure(
            REDIRECT,
            f"{address} redirects to another address, which is not followed, to protect the key",
            "use the address that it redirects to; mostly https:// in place of http://.",
        )
    if status == 401:
        sent = _sent()
        return Failure(
            UNAUTHENTICATED,
            f"{address} refuses access (error 401){_said(text)}",
            f"is it the right key, and still valid? (sent: {sent})"
            if sent
            else "it wants a key, and none was sent: export AM_SC_API_KEY, and use https.",
        )
    if status == 403:
        return Failure(
            FORBIDDEN,
            f"{address} forbids the request (error 403){_said(text)}",
            f"ask those who run the server whether you may do this (sent: {_sent() or 'no key'}).",
        )
    if status in (404, 405, 410):
        return Failure(
            NO_MLFLOW,
            f"there is a web server at {address}, but no MLflow",
            "check the path of the address.",
        )
    if status == 413:
        return _too_large(causes, address)
    if status == 429:
        return Failure(
            TOO_MANY_REQUESTS,
            f"{address} gets too many requests (error 429)",
            "try again later; start fewer jobs at a time.",
        )
    if status in (408, 502, 503, 504):
        return Failure(
            UNAVAILABLE,
            f"{address} is not available (error {status})",
            "try again in a minute; if it stays, ask those who run the server.",
        )
    return Failure(
        SERVER_ERROR,
        f"{address} answers with an error of its own (error {status}){_said(text)}",
        "ask those who run the server, or the gateway before it; its log says why.",
    )


def _too_large(causes, address):
    responses = [cause.response for cause in causes if getattr(cause, "response", None) is not None]
    size = next((r.request.headers.get("Content-Length") for r in responses), None)
    body = f"a request of {int(size) / 1e6:.1f} MB" if size else "so large a request"
    return Failure(
        TOO_LARGE,
        f"{address} does not take {body} (error 413): the gateway's limit is lower, and there was "
        "no multipart upload around it",
        "scripts/check_connection.py measures the limit. Large models are better kept on a shared "
        "filesystem: Modify_artifact_location.py.",
    )


def _status(causes, text):
    """The HTTP status of a bad answer, or None if it is no matter of the server's."""
    for cause in causes:
        response = getattr(cause, "response", None)
        if response is not None:
            return response.status_code
        if isinstance(cause, RestException) and "error_code" not in cause.json:
            return 403  # a gateway's refusal in JSON; MLflow has dropped the number
        if status := STATUS.get(getattr(cause, "error_code", None)):
            return status
    found = re.search(
        r"error code (\d{3})|too many (\d{3}) error|(\d{3}) (?:Client|Server) Error", text
    )
    return int(next(filter(None, found.groups()))) if found else None


def _reason(text):
    """The innermost reason that urllib3 gives, in the operating system's words if it has any."""
    found = re.search(
        r"nothing within \d+ s|Tunnel connection failed: [^'\")]+|\[Errno -?\d+\] [^'\")]+"
        r"|(?:Read|Connection|Connect) (?:to \S+ )?timed out",
        text,
    )
    return found[0] if found else text[:160]


def _said(text):
    """What the server wrote into its answer, unless that is a web page."""
    found = re.search(
        r"(?:Response (?:body|text)|PERMISSION_DENIED|UNAUTHENTICATED|INTERNAL_ERROR):\s*'?"
        r"(?![<'])(\S[^']*)",
        text,
    )
    return f", and says: {found[1].strip()[:150].rstrip('.')}" if found else ""


def _sent():
    """What the server was shown, in words; nothing of its value."""
    providers = registry._request_header_provider_registry
    try:
        return ", ".join(p.describe() for p in providers if hasattr(p, "describe"))
    except SystemExit:  # a key file that has become unreadable: the last key was sent
        return "X-Api-Key"


def _address():
    """The tracking address without a user name or password in it."""
    parts = urlsplit(mlflow.get_tracking_uri())
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
