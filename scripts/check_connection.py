"""Check the way to the tracking server, step by step; the output is what a support ticket needs.

    python scripts/check_connection.py
    python scripts/check_connection.py --tracking_uri https://HOST --ca_bundle ca.pem

You will see a line for each finding: address, key, proxy, name, connection, certificate, time,
versions, permissions, the limit on request bodies. Each failure is one cause and one cure, on
stderr, and has an exit code of its own (README, "Exit codes"). No secret is printed. What is made
on the server for the check (an experiment, a run, files, a registered model) is deleted again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common/ is

from common import cli

# Exit codes of what only this script finds out; all others are those of common/failures.py.
ADDRESS = 10
CREDENTIAL = 11
CLOCK = 28
RUN = 30
ARTIFACT = 31
REGISTRY = 32
CLEAN_UP = 33

# For the time after a signal: a batch system leaves half a minute.
HASTE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
CLOCK_TOLERANCE = 300  # seconds; object stores refuse requests that are signed 15 minutes off


def build_parser():
    parser = cli.parser(__doc__)
    cli.add_server_arguments(parser)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)

    # Heavy imports wait until the arguments are known to be good, so --help answers at once.
    import contextlib
    import os
    import re
    import signal
    import uuid
    from types import SimpleNamespace

    import requests
    from mlflow.exceptions import MlflowException

    from common import failures

    failures.explain()
    received = []

    def stop(number, frame):
        """Clean up, quickly, and exit as shells expect; a second signal changes nothing."""
        received.append(number)
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, signal.SIG_IGN)
        os.environ.update(HASTE)
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    # (name, step, exit code if the step itself is what fails, whether the rest depends on it)
    steps = (
        ("address", address, ADDRESS, True),
        ("credential", credential, CREDENTIAL, True),
        ("CA bundle", ca_bundle, failures.TLS, True),
        ("proxy", proxy, None, False),
        ("DNS", addresses, None, False),
        ("TCP", connection, None, False),
        ("TLS", certificate, None, False),
        ("access", first_request, None, True),
        ("round trip", round_trip, None, False),
        ("clock", clock, CLOCK, False),
        ("versions", versions, None, False),
        ("run", new_run, RUN, True),
        ("artifact", artifact, ARTIFACT, True),
        ("body limit", body_limit, ARTIFACT, False),
        ("multipart", multipart, failures.OBJECT_STORE, False),
        ("registry", registry, REGISTRY, False),
    )
    findings, failed = {}, []

    def passes(name, step, code):
        """Run a step and print its line; return whether it passed."""
        failure = None
        try:
            finding = step(check)
        except (MlflowException, requests.RequestException, OSError, SystemExit) as error:
            failure = as_failure(error, code)
            failed.append(failure)
            finding = f"FAILED, exit code {failure.code}"
        findings[re.sub(r"\W", "_", name.lower())] = finding
        print(f"{name:<11} {finding}", flush=True)
        if failure:
            print(failure, file=sys.stderr, flush=True)
        return failure is None

    # What was made is deleted when the block is left, also by a signal.
    check = SimpleNamespace(args=args, name=f"connection_check_{uuid.uuid4().hex[:8]}")
    try:
        with contextlib.ExitStack() as check.cleanup:
            for name, step, code, needed in steps:
                if not passes(name, step, code) and needed:
                    break
            if "run" in findings:
                passes("clean-up", clean_up, CLEAN_UP)
    except (MlflowException, requests.RequestException):  # while cleaning up after a signal
        print(f"warning: {check.name} may be left on the server.", file=sys.stderr, flush=True)
    if received:
        sys.exit(128 + received[0])
    code = failed[0].code if failed else 0
    cli.print_result(**findings, failures=[failure.what for failure in failed], exit_code=code)
    sys.exit(code)


def as_failure(error, code):
    """Return the `Failure` that `error` is: the way there, or else the step with its `code`."""
    from common import failures

    if isinstance(error, SystemExit):
        if not isinstance(error.code, str):  # by a signal
            raise error
        what, _, advice = error.code.partition("\nhint:  ")
        return failures.Failure(code, what.removeprefix("error: ").removesuffix("."), advice)
    failure = failures.diagnose(error)
    if failure is None:
        text = failures.without_secrets(" ".join(str(error).split()))[:300].rstrip(".")
        return failures.Failure(code or 1, text, "show this to those who run the server.")
    # Whoever got this far is known to the server, and not allowed, or not offered, this one thing.
    if code and failure.code in (failures.FORBIDDEN, failures.NO_MLFLOW):
        offered = failure.code == failures.FORBIDDEN
        what = failure.what if offered else f"the server does not offer this: {error}"
        return failure._replace(code=code, what=failures.without_secrets(what)[:300].rstrip("."))
    return failure


# What would be used, and where it comes from. Nothing is sent yet.


def address(check):
    from common import tracking

    check.uri, reason = tracking.address(check.args.tracking_uri)
    if not check.uri.startswith("http"):
        raise SystemExit(
            f"error: there is no server to check: the tracking address is a database ({reason}).\n"
            "hint:  give --tracking_uri, or export MLFLOW_TRACKING_URI or AM_SC_API_KEY."
        )
    return f"{check.uri}  ({reason})"


def credential(check):
    import mlflow

    from common import credentials, tracking

    credentials.send_api_key()
    mlflow.set_tracking_uri(check.uri)
    return tracking.credential()


def ca_bundle(check):
    import os

    import mlflow
    import requests

    from common import tracking

    tracking.settle()
    tracking.trust(check.args.ca_bundle)
    if mlflow.environment_variables.MLFLOW_TRACKING_INSECURE_TLS.get():
        check.ca_bundle = requests.certs.where()
        return "not used: TLS is not verified"
    # In the order in which MLflow looks, and requests below it.
    for name in ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if path := os.environ.get(name):
            check.ca_bundle = path
            return f"{path}  (from {'--ca_bundle' if path == check.args.ca_bundle else name})"
    check.ca_bundle = requests.certs.where()
    return "the public authorities"


# The way there. These are details, and no failures: what counts is MLflow's own request below.


def proxy(check):
    from common import probes

    names = ", ".join(probes.proxy_variables()) or "no variable"
    return f"{probes.proxy(check.uri) or 'none for this address'}  (set: {names})"


def addresses(check):
    from common import probes

    host, _ = probes.first_hop(check.uri)
    check.reachable = False
    try:
        found = probes.addresses(host)
    except OSError as error:
        return f"{host}: {error.strerror or error}"
    check.reachable = True
    return f"{host} is {', '.join(found)}"


def connection(check):
    from common import probes

    host, port = probes.first_hop(check.uri)
    if not check.reachable:
        return "not tried"
    check.reachable = False
    try:
        seconds = probes.connection(host, port)
    except OSError as error:
        return f"{host} port {port}: {error.strerror or error}"
    check.reachable = True
    return f"{host} port {port}, {1000 * seconds:.0f} ms"


def certificate(check):
    from common import probes

    if check.uri.startswith("http://"):
        return "none: plain http"
    if not check.reachable:
        return "not tried"
    try:
        version, found = probes.certificate(check.uri, check.ca_bundle)
        trusted = "trusted"
    except OSError as error:
        try:
            version, found = probes.certificate(check.uri, check.ca_bundle, verify=False)
        except OSError:
            return str(getattr(error, "reason", None) or error.strerror or error)
        trusted = f"NOT trusted: {getattr(error, 'verify_message', error)}"
    return (
        f"{version}, certificate of {probes.name_of(found.subject)}, signed by "
        f"{probes.name_of(found.issuer)}, valid until {found.not_valid_after_utc:%Y-%m-%d}; "
        f"{trusted}"
    )


# The server, and what the scripts need to be allowed there.


def first_request(check):
    import os

    from common import tracking

    tracking.ask_server()
    # Patience is short from here on, too.
    os.environ.update(tracking.FIRST_REQUESTS | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"})
    return "granted"


def round_trip(check):
    from common import probes

    seconds, check.lead = probes.answers(check.uri)
    return f"{1000 * seconds:.0f} ms, median of 5"


def clock(check):
    lead = getattr(check, "lead", None)
    if lead is None:
        return "the server does not tell its time"
    if abs(lead) > CLOCK_TOLERANCE:
        raise SystemExit(
            f"error: this machine's clock and the server's differ by {abs(lead):.0f} s.\n"
            "hint:  have the clock set that is wrong; object stores refuse uploads otherwise."
        )
    return f"the server's is {lead:+.1f} s off this machine's, to within 1 s"


def versions(check):
    import mlflow

    from common import probes

    server = probes.server_version(check.uri) or "of unknown version"
    return f"server MLflow {server}, client {mlflow.__version__}"


def new_run(check):
    from common import probes, tracking

    check.run = probes.new_run(check.name, check.cleanup)
    tracking.check_artifact_location(check.run.info.artifact_uri)
    return f"experiment {check.name}, run and metric written"


def artifact(check):
    from common import probes

    probes.artifact(check.run, check.cleanup)
    check.proxied = check.run.info.artifact_uri.startswith("mlflow-artifacts:")
    way = "through the server" if check.proxied else "without the server"
    return f"written and read back, {way}"


def body_limit(check):
    from common import probes

    if not check.proxied:
        return "does not matter: files do not go through the server"
    passed, refused, rate = probes.body_limit(check.run)
    limit = f"{refused // probes.MB} MB do not" if refused else "more was not tried"
    return f"{passed // probes.MB} MB pass, {limit}; {rate:.0f} MB/s"


def multipart(check):
    from common import probes

    if not check.proxied:
        return "does not matter: files do not go through the server"
    store = probes.multipart(check.uri, check.run)
    return f"works; the parts go to {store}" if store else "not offered by the server"


def registry(check):
    from common import probes

    probes.registered_model(check.name, check.run, check.cleanup)
    return "model, version and alias written"


def clean_up(check):
    check.cleanup.close()
    return f"{check.name} is deleted again"


if __name__ == "__main__":
    main()
