"""Which server: the tracking address and the proxy on the way, checked before anything is sent."""

import importlib.util
import os
import re
from urllib.parse import urlsplit

import mlflow
import requests

from common.errors import UserError

from .secret import KEY, TOKEN, source
from .settings import FIRST_REQUESTS

AMSC_URI = "https://mlflow.american-science-cloud.org"
# Its newer servers take a token instead; the second one is reached from inside only.
AMSC_TOKEN_URIS = (
    "https://mlflow-staging.american-science-cloud.org",
    "https://mlflow.ms.dev.american-science-cloud.org",
)
AMSC = {AMSC_URI: KEY} | dict.fromkeys(AMSC_TOKEN_URIS, TOKEN)  # what each server demands
LOCAL_URI = "sqlite:///mlflow.db"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Of SQLite a file: a store in memory, or in no file, would be lost at the end.
USABLE = re.compile(r"https?://|sqlite(\+\w+)?:///(?!file:)[^:?]|(postgre|my|ms)sql(\+\w+)?://")


def address(tracking_uri=None):
    """Return (the tracking address, where it comes from). Raises UserError if it cannot be used."""
    uri, reason = _choose(tracking_uri)
    uri = re.sub("(?<=:///)~[^/]*", lambda home: os.path.expanduser(home[0]), uri)
    if not _is_usable(uri):  # and not printed: it may hold a password anywhere
        what = f"the tracking address ({reason}) is impossible, or holds a password or a query."
        hint = f"use https://HOST[:PORT] or {LOCAL_URI}; a login goes into "
        raise UserError(what, f"{hint}MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.")
    _check_variables(uri)
    if uri.startswith("http"):
        _check_proxy(uri)
    return uri, reason


def printable(uri):
    """Return the address without its secrets; with "..." if nobody can tell where one ends."""
    if found := re.match("(.*?://)([^/@]*:.*|[^/]*)@(.*)", uri, re.DOTALL):
        uri = found[1] + ("..." if set("@?#") & set(found[2]) else found[3])
    return re.split("[?#]", uri)[0]


def proxy_of(uri):
    """Return the URL of the proxy that `requests` takes on the way to `uri`, or None."""
    chosen = requests.utils.select_proxy(uri, requests.utils.get_environ_proxies(uri))
    return chosen if not chosen or "://" in chosen or "@" in chosen else f"http://{chosen}"


def origin(uri):
    """Return (scheme, host, port), spelled as `requests` spells them in what it sends."""
    if uri.startswith("http"):
        uri = requests.Request("GET", uri).prepare().url
    parts = urlsplit(uri)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def belongs_to_server(url):
    """Return whether an address is on the tracking server: the same scheme, host and port."""
    return origin(url) == origin(mlflow.get_tracking_uri())


def lie_elsewhere(location):
    where = printable(location)
    what = f"the artifacts lie on another server, {where}, and no credential must go there."
    return UserError(what, "choose an --experiment, or a run of one, with its artifacts here.")


def keeps_secrets(url):
    """Return whether a key may go there: over https, or to this machine and through no proxy."""
    parts = urlsplit(url)
    local = parts.scheme == "http" and parts.hostname in LOOPBACK
    return parts.scheme == "https" or (local and not proxy_of(url))


def _choose(tracking_uri):
    if tracking_uri is not None:
        return tracking_uri.strip(), "from --tracking_uri"
    if uri := os.environ.get("MLFLOW_TRACKING_URI", "").strip():
        return uri, "from MLFLOW_TRACKING_URI"
    if name := source(TOKEN):  # to guess would send it to the wrong server, or log to a local file
        what = f"{name} is set, and no tracking address: a token belongs to one server."
        known = f"{', '.join(AMSC_TOKEN_URIS)}, or your institution's"
        hint = f"export MLFLOW_TRACKING_URI=https://HOST ({known}), or --tracking_uri {LOCAL_URI}"
        raise UserError(what, hint)
    if name := source(KEY):
        return AMSC_URI, f"the AmSC server, because {name} is set"
    return LOCAL_URI, "local, because neither MLFLOW_TRACKING_URI nor AM_SC_API_KEY is set"


def _is_usable(uri):
    try:
        parts = urlsplit(uri)
        host, port = (parts.hostname or "").encode("idna"), parts.port
    except ValueError:  # a port that is no number, brackets that are not closed, a label too long
        return False
    if not USABLE.match(uri) or not uri.isprintable() or " " in parts.netloc or port == 0:
        return False
    extra = "@" in parts.netloc or parts.query or parts.fragment
    return not uri.startswith("http") or (host and not extra)


def _check_variables(uri):
    """Refuse MLflow variables that would lead a script elsewhere than its first line says."""
    if os.environ.get("MLFLOW_REGISTRY_URI", uri).rstrip("/") != uri.rstrip("/"):
        what = "MLFLOW_REGISTRY_URI names another server, and no credential must go there."
        raise UserError(what, "unset it; models are registered on the tracking server.")
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        what = f"MLFLOW_RUN_ID is set, so MLflow would write into the run {run_id} again."
        raise UserError(what, "unset MLFLOW_RUN_ID")
    for name in filter(re.compile("_?MLFLOW_").match, list(os.environ)):
        try:
            variable = vars(mlflow.environment_variables).get(name)
            value = variable and variable.get()  # MLflow reads some only after the training
            if name in FIRST_REQUESTS and not name.endswith("TIMEOUT") <= value < 1e6:
                raise ValueError(f"{value} is too small or too large")
        except ValueError as error:
            raise UserError(f"{name} has an impossible value: {error}.", f"unset {name}") from error


def _check_proxy(uri):
    """Refuse a proxy that cannot be used, and bypass it on the way to this machine itself."""
    parts = urlsplit(uri)
    if parts.scheme == "http" and parts.hostname in LOOPBACK:  # an ssh tunnel, say
        own = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        os.environ["no_proxy"] = ",".join(filter(None, [own, *LOOPBACK]))
    proxy = proxy_of(uri)
    if not proxy:
        return
    try:
        parts = urlsplit(proxy)
        usable = parts.hostname and re.match("https?$|socks", parts.scheme) and (parts.port or 1)
    except ValueError:
        usable = False
    if not usable or (parts.scheme.startswith("socks") and not importlib.util.find_spec("socks")):
        what = "the proxy in http_proxy, https_proxy or all_proxy is no address of use here."
        hint = "write %23 for a # in a password; for socks5://HOST:PORT, pip install pysocks"
        raise UserError(what, hint)
