"""AmSC in a box: a tracking server behind an API key, TLS and a body limit, on this machine.

    python tests/box.py

You will see the variables to export in another terminal, and then each request as it comes. Type
the name of a fault and Enter to break the server in that way, "ok" to mend it; Ctrl-C ends it all.
"""

import argparse
import contextlib
import secrets
import signal
import sys
import tempfile
from pathlib import Path

from conftest import certificate, mlflow_server
from gateway import BODY_LIMIT, FAULTS, Gateway


def show(request):
    key = "key" if "x-api-key" in request.headers else "no key"
    print(
        f"{request.status:>3}  {key:>6}  {request.size:>10} bytes  {request.method} {request.path}"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--body_limit",
        type=int,
        default=BODY_LIMIT,
        help="bytes that a request may carry (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        key, key_file = secrets.token_urlsafe(24), folder / "key"
        key_file.touch(mode=0o600)
        key_file.write_text(key)
        context, ca_bundle = certificate(folder)
        server = stack.enter_context(mlflow_server(folder))
        gateway = Gateway(server, key, tls=context, body_limit=args.body_limit)
        gateway.on_request = show
        stack.enter_context(gateway)
        print(f"export MLFLOW_TRACKING_URI={gateway.uri}")
        print(f"export MLFLOW_TRACKING_SERVER_CERT_PATH={ca_bundle}")
        print(f"export AM_SC_API_KEY_FILE={key_file}")
        print(f"faults: {' '.join(FAULTS)}, ok")
        for line in sys.stdin:
            control(gateway, line.strip())
        signal.pause()  # standard input is at its end, as in the background


def control(gateway, word):
    if gateway.fault == "down" and word in ("ok", *FAULTS):
        gateway.come_back()
    if word == "down":
        gateway.die()
    elif word in ("ok", *FAULTS):
        gateway.fault = None if word == "ok" else word
    elif word:
        print(f"no such fault: {word}")
        return
    print(f"now: {gateway.fault or 'ok'}")


if __name__ == "__main__":
    main()
