"""The gateway in front of a tracking server, as the AmSC servers have one, with its bad days.

It forwards a request only if it carries the key, or a token, keeps a record of each, refuses bodies
that are too large, and can be told to fail in the ways that gateways do. Plain http, or https under
a certificate that the test made.
"""

import base64
import http.client
import json
import secrets
import socket
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

BODY_LIMIT = 16 * 1024 * 1024  # bytes
LOGIN_PAGE = b"<!doctype html><html><title>Sign in</title><body>Please sign in.</body></html>"
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}

# What `fault` can be, besides None.
FAULTS = (
    *("401", "403", "429", "500", "503", "json", "login", "redirect", "echo"),
    *("late", "hang", "drop", "down", "drip"),
)


class Request(NamedTuple):
    method: str
    path: str
    headers: dict  # names in lower case
    size: int  # bytes of the body
    status: int  # what was answered; 0 if nothing


def jwt(exp=None, **claims):
    """A token as the newer servers want it, for an hour if `exp` (Unix time) is not given."""
    claims = {"exp": time.time() + 3600 if exp is None else exp} | claims
    parts = [json.dumps(part).encode() for part in ({"alg": "RS256", "typ": "JWT"}, claims)]
    parts.append(secrets.token_bytes(64))  # the signature, which this gateway does not check
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def claims_of(token):
    """What a JWT says; nothing, if the token is none."""
    _, _, rest = token.partition(".")
    payload, dot, _ = rest.partition(".")
    return json.loads(base64.urlsafe_b64decode(payload + "==")) if dot else {}


def bearer_token(headers):
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token if scheme == "Bearer" else ""


class Gateway:
    """Listens on 127.0.0.1; `uri` is its address, `requests` all that came in, in order.

    `key` is what it demands (None: nothing), `token` a bearer token that it takes instead. `users`
    are tokens too, until they expire, each with the (name, password) that MLflow's basic-auth app
    gets in its place (None: the token is passed on). `deny` is what a request without any gets:
    "login" (HTML with status 200), or a status code. Each may be changed at any time, and so may

    `fault`        what goes wrong: one of FAULTS, or (status, headers, body) for any other answer;
                   "json" is a 401 in JSON, but not MLflow's, "echo" a 403 whose text shows the
                   request's headers, "late" a 502 for what the server has done all the same,
                   "drip" the last kB of the server's answer at ten bytes a second
    `fault_on`     for which requests: a function of method and path
    `redirect_to`  where the fault "redirect" leads
    `clock_lead`   seconds that its clock is ahead
    """

    def __init__(
        self, upstream, key, tls=None, deny=401, token=None, users=None, body_limit=BODY_LIMIT
    ):
        self.upstream = urlsplit(upstream)
        self.key, self.token, self.users = key, token, users or {}
        self.deny, self.body_limit = deny, body_limit
        self.fault, self.redirect_to = None, "http://127.0.0.1:9/"
        self.fault_on = lambda method, path: True
        self.clock_lead, self.requests = 0, []
        self.on_request = lambda request: None
        self._tls, self._released = tls, threading.Event()
        self._listen(0)
        scheme = "http" if tls is None else "https"
        self.uri = f"{scheme}://127.0.0.1:{self._server.server_port}"

    def _listen(self, port):
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a client that goes away is no news
        if self._tls is not None:
            self._server.socket = self._tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info):
        self._released.set()
        self._server.shutdown()
        self._server.server_close()

    def die(self):
        """Stop listening; requests under way, and connections kept open, are cut."""
        self.fault = "down"
        self._server.shutdown()
        self._server.server_close()
        self._held = socket.socket()  # so that nobody else gets the port
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(self._server.server_address)

    def come_back(self):
        """Listen again, on the same port."""
        self.fault = None
        self._held.close()
        self._listen(self._server.server_port)
        self.__enter__()

    def artifact_uploads(self):
        return [r for r in self.requests if r.method == "PUT" and "/mlflow-artifacts/" in r.path]

    def _refusal(self, headers):
        """Why a request is refused; None if it may enter."""
        if self.key is None and not self.users:
            return None
        if self.key is not None and headers.get("x-api-key") == self.key:
            return None
        token = bearer_token(headers)
        if token and token == self.token:
            return None
        if not self.users:
            return b"no valid API key"
        if not token:
            return b"Bearer token required"
        now = time.time() + self.clock_lead
        if token not in self.users or claims_of(token).get("exp", now) < now:
            return b"Invalid Bearer Token"
        return None

    def _reply(self, fault, method, path, headers, body):
        """Return (status, headers, body)."""
        if isinstance(fault, tuple):
            return fault
        html, refusal = {"Content-Type": "text/html"}, self._refusal(headers)
        if fault == "login" or (self.deny == "login" and refusal):
            return 200, html, LOGIN_PAGE
        if fault == "redirect":
            return 307, {"Location": self.redirect_to}, b""
        if fault == "json":
            return 401, {"Content-Type": "application/json"}, b'{"message": "No API key found"}'
        if fault == "echo":
            shown = "; ".join(f"{n}: {v}" for n, v in sorted(headers.items(), reverse=True))
            return 403, {"Content-Type": "text/plain"}, f"forbidden for {shown}".encode()
        if fault in ("401", "403", "429", "500", "503"):
            after = {"Retry-After": "3600"} if fault in ("429", "503") else {}
            return int(fault), {"Content-Type": "text/plain"} | after, b"a bad day"
        if refusal:
            return self.deny, {"Content-Type": "text/plain"}, refusal
        answer = self._forward(method, path, headers, body)
        return (502, {}, b"too late") if fault == "late" else answer

    def _forward(self, method, path, headers, body):
        connection = http.client.HTTPConnection(self.upstream.netloc, timeout=60)
        forwarded = {name: value for name, value in headers.items() if name not in HOP_BY_HOP}
        if user := self.users.get(bearer_token(headers)):
            login = base64.b64encode(":".join(user).encode()).decode()
            forwarded["authorization"] = f"Basic {login}"
        connection.request(method, path, body=body, headers=forwarded)
        response = connection.getresponse()
        content = response.read()
        kept = {k: v for k, v in response.getheaders() if k.lower() not in HOP_BY_HOP | {"date"}}
        if method == "HEAD":  # an object store's answer to "how large is it?"
            kept["Content-Length"] = response.getheader("Content-Length", "0")
        connection.close()
        return response.status, kept, content

    def _handler(gateway):  # noqa: N805 (inside the handler, `self` is a request)
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                headers = {name.lower(): value for name, value in self.headers.items()}
                length = int(headers.get("content-length", 0))
                if length > gateway.body_limit:
                    self._refuse_body(headers, length)
                    return
                chunked = headers.get("transfer-encoding") == "chunked"
                body = self._read_chunks() if chunked else self.rfile.read(length)
                fault = gateway.fault if gateway.fault_on(self.command, self.path) else None
                if fault in ("hang", "drop", "down"):
                    self._record(headers, len(body), 0)
                    self.close_connection = True
                    if fault == "hang":
                        gateway._released.wait()
                    elif fault == "drop":  # in the middle of an answer
                        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
                    return
                status, reply_headers, content = gateway._reply(
                    fault, self.command, self.path, headers, body
                )
                self._record(headers, len(body), status)
                self._answer(status, reply_headers, content, slowly=fault == "drip")

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = handle_any  # noqa: N815

            def _record(self, headers, size, status):
                request = Request(self.command, self.path, headers, size, status)
                gateway.requests.append(request)
                gateway.on_request(request)

            def _answer(self, status, headers, content, slowly=False):
                self.send_response_only(status)
                self.send_header("Date", formatdate(time.time() + gateway.clock_lead, usegmt=True))
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if slowly:
                    self.wfile.write(content[:-1000])
                    content = content[-1000:]
                while slowly and content and not gateway._released.wait(0.1):
                    self.wfile.write(content[:1])
                    content = content[1:]
                if self.command != "HEAD":
                    self.wfile.write(content)

            def _refuse_body(self, headers, length):
                """At once, as nginx does; what still comes in is thrown away."""
                self._record(headers, length, 413)
                self._answer(413, {"Connection": "close"}, b"Request Entity Too Large")
                while length > 0 and (chunk := self.rfile.read(min(length, 1 << 20))):
                    length -= len(chunk)
                self.close_connection = True

            def _read_chunks(self):
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def log_message(self, *arguments):
                pass

        return Handler
