"""What MLflow raises when the server fails, told apart: one sentence, one cure, one exit code."""

import os
import re
from shlex import quote
from urllib.parse import urlsplit

import mlflow
import requests
from mlflow.exceptions import MlflowException

from common.errors import TRY_AGAIN, UserError, plain

from . import undocumented
from .address import printable
from .credentials import CREDENTIALS, credential, without_secrets

# What each kind of failure is called, and its two lines: what happened, and what to do.
MESSAGES = {
    "object_store": "the object store{host}, for {address}'s large files, does not do its part.\n"
    "can this machine reach it? If not, the server can pass files on: export "
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD=false MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD=false",
    "proxy": "the proxy on the way to {address} does not let through: {reason}.\n"
    "check http_proxy, https_proxy and no_proxy.",
    "tls": "no trusted TLS connection to {address}: {reason}.\nsigned by your institution: give "
    "--ca_bundle FILE; expired, or of another host: ask those who run it; no TLS there: http://.",
    "timeout": "{address} did not answer in time: {reason}.\n"
    "check the address, and on a compute node whether it has a network at all.",
    "name": "the name of {address} is unknown: {reason}.\n"
    "check the address, and whether this node has a network.",
    "no_server": "no server answers at {address}.\n"
    "check the address and the network, and that the server runs.",
    "dropped": "{address} dropped the connection halfway.\n"
    "does it want https://? Else try again; if it stays, ask those who run the server.",
    "web_page": "{address} answers with a web page, not as an MLflow server: perhaps a login.\n"
    "check key or token (sent: {sent}), and that the address is right and https.",
    "redirect": "{address} redirects to another address, and no credential must be taken there.\n"
    "use the address that it redirects to; mostly https:// in place of http://.",
    "unauthenticated": "{address} refuses access (error 401){said}.\n"
    "is the key or token exported, the right one for this server, and still valid? Of tokens it is "
    "the access token. (sent: {sent})",
    "forbidden": "{address} forbids the request (error 403){said}.\n"
    "ask those who run the server whether you may do this (sent: {sent}).",
    "experiment": "{address} does not let you write to the experiment {experiment} (error 403)"
    "{said}.\nit is somebody else's, perhaps: --experiment {experiment}_$USER, or ask its owner"
    "{role} (sent: {sent}).",
    "workspace": "{address}: the workspace {workspace} cannot be used{said}.\n"
    "correct --workspace or MLFLOW_WORKSPACE, or unset it; or ask for the role USE there.",
    "no_mlflow": "something answers at {address}, but no MLflow.\n"
    "check the port and the path of the address.",
    "too_large": "{address} does not take {body} (error 413): the gateway's limit is lower.\n"
    "keep large models on a shared filesystem, as Modify_artifact_location.py does.",
    "too_many_requests": "{address} gets too many requests (error 429).\n"
    "try again later; start fewer jobs at a time.",
    "unavailable": "{address} is not available (error {status}).\n"
    "try again in a minute; if it stays, ask those who run the server.",
    "server_error": "{address} answers with an error of its own (error {status}){said}.\n"
    "ask those who run the server, or the gateway before it; its log says why.",
    "refused": "{address} does not accept the request (error {status}){said}.\n"
    "if that does not say what to change, show it to those who run the server.",
}
LATER = ("no_server", "timeout", "dropped", "too_many_requests", "unavailable", "server_error")
DATABASE = {  # what a database says (SQLite, mostly), and what helps
    "locked": "another process is writing: try again; of many jobs, give each a file of its own.",
    "readonly|unable to open": "you have to be allowed to write to both the file and its folder.",
    "full|disk I/O": "make room there: the filesystem is full, or your quota used up.",
    "": "is it damaged, of another version of MLflow, or, on a server, away?",
}
STATUS = {413: "too_large", 429: "too_many_requests", 401: "unauthenticated", 403: "forbidden"}
STATUS |= dict.fromkeys((404, 405, 410), "no_mlflow")
STATUS |= dict.fromkeys((408, 502, 503, 504), "unavailable")


class Failure(UserError):  # noqa: N818 (what a server does; not every one is an error here)
    """The failure of a server; `kind` is its name in `MESSAGES`."""

    def __init__(self, what, hint, code=1, kind=None):
        super().__init__(what, hint, code)
        self.kind = kind


def diagnose(error):
    """Return the `Failure`, or wrapped UserError, that `error` means; None if no server failed."""
    # SQLAlchemy's exceptions, which MLflow may wrap, hold the database driver's own as `orig`.
    wrapped = error.__cause__ if isinstance(error, MlflowException) else error
    if said := _plain(getattr(wrapped, "orig", None) or "")[:300].rstrip("."):
        what = f"the database {printable(mlflow.get_tracking_uri())} cannot be used: {said}."
        hint = next(DATABASE[words] for words in DATABASE if re.search(words, said))
        later = re.search("locked|refused|timed? ?out|closed|starting", said)
        return Failure(what, hint, TRY_AGAIN if later else 1, "database")
    if type(error).__module__ == "google.protobuf.json_format":  # MLflow lets it through
        error = requests.JSONDecodeError(undocumented.NOT_JSON, "", 0)
    if not isinstance(error, (MlflowException, requests.RequestException)):
        return error if isinstance(error, UserError) else None
    causes = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    text = _plain(" ".join(str(cause) for cause in causes))
    # MLflow fetches files in threads, and keeps no more than the text of what goes wrong there.
    causes += [e for e in CREDENTIALS.stopped if _plain(getattr(e, "what", e)) in text]
    if undocumented.SWALLOWED in text:
        causes += list(CREDENTIALS.stopped)[-1:]
    told = [cause for cause in causes if isinstance(cause, UserError)]
    return told[0] if told else _broken_connection(causes, text) or _bad_answer(causes, text)


def _failure(kind, code=None, **words):
    address, workspace = printable(mlflow.get_tracking_uri()), os.environ.get("MLFLOW_WORKSPACE")
    words |= {"address": address, "workspace": workspace}
    words |= {"experiment": quote(CREDENTIALS.experiment or "")}
    words |= {"role": f", or for a role in the workspace {workspace}" if workspace else ""}
    what, hint = (line.format(**words) for line in MESSAGES[kind].split("\n"))
    return Failure(what, hint, code or (TRY_AGAIN if kind in LATER else 1), kind)


def _broken_connection(causes, text):
    """The `Failure` if no answer came at all."""

    def caused_by(*kinds):
        return any(isinstance(cause, kinds) for cause in causes)

    if undocumented.PARTS.search(text):
        host = re.search(r"host='([^']+)'|https?://([^/'\"]+)", text)
        return _failure("object_store", host=f" {host[1] or host[2]}" if host else "")
    # The innermost reason that urllib3 gives, in the operating system's words if there are any.
    found = re.search(
        r"nothing within \d+ s|\d{1,12} bytes of an answer in \d+ s"
        r"|Tunnel connection failed: [^'\")]+|\[Errno -?\d+\] [^'\")]+"
        r"|certificate verify failed: [^(]+|\[SSL[^]]*\][^(]+"
        r"|(?:Read|Connection|Connect) (?:to \S+ )?timed out",
        text,
    )
    reason = found[0].strip() if found else text[:160]
    if caused_by(requests.exceptions.ProxyError):
        refused = "Tunnel connection failed: 4" in text
        return _failure("proxy", 1 if refused else TRY_AGAIN, reason=reason)
    if caused_by(requests.exceptions.SSLError):
        return _failure("tls", reason=reason)
    # Before the name: a time limit may have struck while it was looked up.
    if caused_by(requests.exceptions.Timeout) or "ReadTimeoutError" in text:
        return _failure("timeout", reason=reason)
    if "NameResolutionError" in text:
        code = TRY_AGAIN if "Temporary failure in name resolution" in text else 1
        return _failure("name", code, reason=reason)
    if "BadStatusLine" in text:
        return _failure("no_mlflow")  # nor any web server
    dropped = r"RemoteDisconnected|IncompleteRead|ConnectionResetError|BrokenPipeError"
    if caused_by(requests.exceptions.ChunkedEncodingError) or re.search(dropped, text):
        return _failure("dropped")
    if caused_by(requests.exceptions.ConnectionError) and "too many" not in text:
        return _failure("no_server")
    return None


def _bad_answer(causes, text):
    """The `Failure` if there was an answer, and a bad one."""
    try:
        sent = credential()
    except UserError:  # a file that has become unreadable: what it held last was sent
        sent = "the last key or token"
    no_json = (requests.JSONDecodeError, requests.exceptions.ContentDecodingError)
    if any(isinstance(cause, no_json) for cause in causes) or undocumented.NOT_JSON in text:
        return _failure("web_page", sent=sent)
    if none := undocumented.NO_WORKSPACES.search(text):
        or_else = ", or is no MLflow" if "determine" in none[0] else ""
        return _failure("workspace", said=f": the server has no workspaces{or_else}")
    responses = [cause.response for cause in causes if getattr(cause, "response", None) is not None]
    bodies = list(filter(None, map(undocumented.answered, causes)))
    found = undocumented.STATUS.search(text)
    said = next(filter(None, (undocumented.SAID.search(str(cause)) for cause in causes)), None)
    said = _plain(bodies[0].get("message") or bodies[0]) if bodies else said and _plain(said[1])
    path = (undocumented.ENDPOINT.search(text) or ["", ""])[1]
    if responses:
        status, path = responses[0].status_code, urlsplit(responses[0].url).path
    elif bodies:
        status, path = CREDENTIALS.refusals.get(str(bodies[0]), (403, path))
    elif found:
        status = int(next(filter(None, found.groups())))
    else:
        return None
    kind = STATUS.get(status) or ("server_error" if status >= 500 else "refused")
    if 300 <= status < 400 or (status == 400 and "HTTPS port" in text):  # nginx's words
        kind = "redirect"
    elif os.environ.get("MLFLOW_WORKSPACE") and undocumented.WORKSPACE.search(said or ""):
        kind = "workspace"
    elif status == 403 and CREDENTIALS.experiment and undocumented.OWNED.search(path):
        kind = "experiment"
    elif kind == "no_mlflow" and bodies and "error_code" in bodies[0]:  # MLflow's own 404
        kind = "refused"
    size = responses and responses[0].request.headers.get("Content-Length")
    body = f"a request of {int(size) / 1e6:.1f} MB" if size else "so large a request"
    said = f", and says: {said[:500].rstrip('.')}" if said else ""
    return _failure(kind, status=status, said=said, sent=sent, body=body)


def _plain(text):
    """Return a server's words in one line, without secrets, escape codes, control characters."""
    return without_secrets(" ".join(plain(str(text), len(str(text))).split()))
