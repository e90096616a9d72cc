"""What MLflow raises when the server fails, said in one sentence with one cure and one exit code.

MLflow's own text for a refused key, a login page or an unplugged cable is a long traceback. Copy
this file and call `explain` first thing, if you only want short messages in your own job logs.
"""

import os
import re
import sys
import traceback
from typing import NamedTuple
from urllib.parse import urlsplit

import mlflow
import requests
from mlflow.exceptions import MlflowException
from mlflow.tracking.request_header.registry import resolve_request_headers

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
    """Return `text` with the API key, the token and the password in use struck out."""
    try:
        headers = resolve_request_headers()
    except SystemExit:  # a key file that has become unreadable
        headers = {}
    secrets = [headers.get("X-Api-Key")]
    secrets += [os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("TOKEN", "PASSWORD")]
    for secret in filter(None, secrets):
        text = text.replace(secret.strip(), "<secret>")
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
        found = re.search(r"certificate verify failed: [^(]+|\[SSL[^]]*\][^(]+", text)
        reason = found[0].strip() if found else _reason(text)
        return Failure(
            TLS,
            f"no trusted TLS connection to {address}: {reason}",
            "if the server has a certificate of your institution, give --ca_bundle FILE; "
            "if it has none, its address starts with http://.",
        )
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
    if caused_by(requests.exceptions.ChunkedEncodingError) or re.search(
        r"RemoteDisconnected|IncompleteRead|ConnectionResetError|BrokenPipeError", text
    ):
        return Failure(
            DROPPED,
            f"{address} dropped the connection halfway",
            "try again; if it stays, ask those who run the server, or the gateway before it.",
        )
    if caused_by(requests.exceptions.ConnectionError) and "too many" not in text:
        return Failure(
            NO_SERVER,
            f"no server answers at {address}",
            "check the address and the network, and that the server runs.",
        )
    return None


def _bad_answer(causes, text):
    """The `Failure` if there was an answer, and a bad one."""
    address, status = _address(), _status(causes, text)
    no_json = any(isinstance(cause, requests.exceptions.JSONDecodeError) for cause in causes)
    if no_json or "valid JSON format" in text:
        return Failure(
            WEB_PAGE,
            f"{address} answers with a web page, not as an MLflow server: probably a login page",
            f"check the key (sent: {_sent() or 'none'}), and that the address is right and https.",
        )
    if status is None:
        return None
    if 300 <= status < 400:
        return Failure(
            REDIRECT,
            f"{address} redirects to another address, which is not followed, to protect the key",
            "use the address that it redirects to; often https:// in place of http://.",
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
    if status == 404 and any(
        getattr(cause, "error_code", "") == "ENDPOINT_NOT_FOUND" for cause in causes
    ):
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
    if status >= 500:
        return Failure(
            SERVER_ERROR,
            f"{address} answers with an error of its own (error {status}){_said(text)}",
            "ask those who run the server; its log says why.",
        )
    return None


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
    """The HTTP status of the answer, or None."""
    for cause in causes:
        response = getattr(cause, "response", None)
        if response is not None:
            return response.status_code
        if status := STATUS.get(getattr(cause, "error_code", None)):
            return status
    found = re.search(
        r"error code (\d{3})|too many (\d{3}) error|(\d{3}) (?:Client|Server) Error", text
    )
    return int(next(filter(None, found.groups()))) if found else None


def _reason(text):
    """The innermost reason that urllib3 gives, without the object addresses before it."""
    found = re.search(r"Caused by \w+\((.*)", text)
    reason = found[1] if found else text
    return re.sub(r"<[^>]*>:? ?", "", reason).strip("'\")( ")[:160]


def _said(text):
    """What the server wrote into its answer, unless that is a web page."""
    found = re.search(
        r"(?:Response (?:body|text)|PERMISSION_DENIED|UNAUTHENTICATED|INTERNAL_ERROR):\s*'?"
        r"(?![<'])(\S[^']*)",
        text,
    )
    return f", and says: {found[1].strip()[:150]}" if found else ""


def _sent():
    """What the server was shown, in words; nothing of its value."""
    sent = ["X-Api-Key"] if "X-Api-Key" in resolve_request_headers() else []
    if os.environ.get("MLFLOW_TRACKING_USERNAME"):
        sent.append("user and password")
    elif os.environ.get("MLFLOW_TRACKING_TOKEN"):
        sent.append("bearer token")
    return ", ".join(sent)


def _address():
    """The tracking address without a user name or password in it."""
    parts = urlsplit(mlflow.get_tracking_uri())
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
