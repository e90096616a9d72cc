"""An API-key gateway in front of a tracking server, as the AmSC server has one.

It forwards a request only if it carries the key, keeps a record of each, and can be told to refuse
in the ways that gateways do. Plain http, or https under a certificate that the test made.
"""

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

LOGIN_PAGE = b"<!doctype html><html><title>Sign in</title><body>Please sign in.</body></html>"
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


class Request(NamedTuple):
    method: str
    path: str
    headers: dict  # names in lower case
    size: int  # bytes of the body
    status: int  # what was answered


class Gateway:
    """Listens on 127.0.0.1; `uri` is its address, `requests` all that came in, in order.

    `deny` is what a request without the key gets: "login" (HTML with status 200), or a status code.
    `answer`, if set, is given to every request in place of forwarding it: (status, headers, body).
    """

    def __init__(self, upstream, key, tls=None, deny=401):
        self.upstream = urlsplit(upstream)
        self.key, self.deny, self.answer = key, deny, None
        self.requests = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        scheme = "http"
        if tls is not None:
            scheme = "https"
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.uri = f"{scheme}://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._server.shutdown()
        self._server.server_close()

    def artifact_uploads(self):
        return [r for r in self.requests if r.method == "PUT" and "/mlflow-artifacts/" in r.path]

    def _reply(self, method, path, headers, body):
        """Return (status, headers, body)."""
        if self.answer is not None:
            return self.answer
        if headers.get("x-api-key") != self.key:
            if self.deny == "login":
                return 200, {"Content-Type": "text/html"}, LOGIN_PAGE
            return self.deny, {"Content-Type": "text/plain"}, b"no valid API key"
        connection = http.client.HTTPConnection(self.upstream.netloc, timeout=60)
        forwarded = {name: value for name, value in headers.items() if name not in HOP_BY_HOP}
        connection.request(method, path, body=body, headers=forwarded)
        response = connection.getresponse()
        content = response.read()
        reply_headers = {k: v for k, v in response.getheaders() if k.lower() not in HOP_BY_HOP}
        connection.close()
        return response.status, reply_headers, content

    def _handler(gateway):  # noqa: N805 (inside the handler, `self` is a request)
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                headers = {name.lower(): value for name, value in self.headers.items()}
                if headers.get("transfer-encoding") == "chunked":
                    body = self._read_chunks()
                else:
                    body = self.rfile.read(int(headers.get("content-length", 0)))
                reply = gateway._reply(self.command, self.path, headers, body)
                status, reply_headers, content = reply
                gateway.requests.append(
                    Request(self.command, self.path, headers, len(body), status)
                )
                self.send_response(status)
                for name, value in reply_headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = handle_any  # noqa: N815

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
