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

# Exit codes, finer than those of the other scripts. Of the failures that `connection.diagnose`
# tells apart (1 if it has a new one, which the tests would say):
CODES = {
    **{"proxy": 12, "name": 13, "no_server": 14, "tls": 15, "timeout": 16, "dropped": 17},
    **{"redirect": 18, "web_page": 19, "unauthenticated": 20, "forbidden": 21, "no_mlflow": 22},
    **{"too_many_requests": 23, "server_error": 24, "refused": 24},
    **{"unavailable": 25, "too_large": 26, "object_store": 27, "experiment": 21, "workspace": 29},
}
# And of what only this script finds out:
ADDRESS = 10
CREDENTIAL = 11
CLOCK = 28
RUN = 30
ARTIFACT = 31
REGISTRY = 32
CLEAN_UP = 33

# The defaults of the five scripts.
EXPERIMENTS = ("mnist_cnn_pytorch", "mnist_cnn_pytorch_shared")
MODEL_NAME = "MNIST_CNN"

# For the time after a signal: a batch system leaves half a minute.
HASTE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
CLOCK_TOLERANCE = 300  # seconds; object stores refuse requests that are signed 15 minutes off


def build_parser():
    parser = cli.parser(__doc__)
    cli.add_server_arguments(parser)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    import contextlib
    import os
    import re
    import signal
    import uuid
    from types import SimpleNamespace

    import requests
    from google.protobuf.json_format import ParseError  # MLflow lets it through
    from mlflow.exceptions import MlflowException

    from common.errors import STOPPING, UserError

    received, of_server = [], (MlflowException, requests.RequestException, ParseError)

    def stop(number, frame):
        """Clean up, quickly, and exit as shells expect; a second signal changes nothing."""
        received.append(number)
        for signal_number in STOPPING:
            signal.signal(signal_number, signal.SIG_IGN)
        os.environ.update(HASTE)
        sys.exit(128 + number)

    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, stop)
    # (name, step, exit code if the step itself is what fails, whether the rest depends on it)
    steps = (
        ("address", server, ADDRESS, True),
        ("credential", credential, CREDENTIAL, True),
        ("CA bundle", ca_bundle, CODES["tls"], True),
        ("proxy", proxy, None, False),
        ("DNS", addresses, None, False),
        ("TCP", tcp, None, False),
        ("TLS", certificate, None, False),
        ("access", first_request, None, True),
        ("round trip", round_trip, None, False),
        ("clock", clock, CLOCK, False),
        ("versions", versions, None, False),
        ("run", new_run, RUN, True),
        ("artifact", artifact, ARTIFACT, True),
        ("body limit", body_limit, ARTIFACT, False),
        ("multipart", multipart, CODES["object_store"], False),
        ("registry", registry, REGISTRY, False),
        ("our names", default_names, CODES["forbidden"], False),
    )
    findings, failed = {}, []

    def passes(name, step, code):
        """Run a step and print its line; return whether it passed."""
        failure = None
        try:
            finding = step(check)
        except (*of_server, OSError, UserError) as error:
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
    except of_server:  # while cleaning up after a signal
        print(f"warning: {check.name} may be left on the server.", file=sys.stderr, flush=True)
    if received:
        sys.exit(128 + received[0])
    code = failed[0].code if failed else 0
    said = [failure.what.rstrip(".") for failure in failed]
    cli.print_result(**findings, failures=said, exit_code=code)
    sys.exit(code)


def as_failure(error, code):
    """Return what `error` is, with its exit code: of the way there, or the step's own, `code`."""
    from common import connection
    from common.errors import UserError

    failure = connection.diagnose(error)
    kind = getattr(failure, "kind", None)
    said = connection.without_secrets(" ".join(str(error).split()))
    if failure is None or (kind == "refused" and code):
        what, hint = said, "show this to those who run the server."
    # Whoever got this far is known to the server, and not offered this one thing.
    elif kind == "no_mlflow" and code:
        what, hint = f"the server does not offer this: {said}", failure.hint
    elif kind == "forbidden" and code:  # nor, perhaps, allowed to do it
        return UserError(failure.what, failure.hint, code)
    else:
        return UserError(failure.what, failure.hint, CODES.get(kind, code or 1))
    return UserError(f"{what[:300].rstrip('.')}.", hint, code or 1)


# What would be used, and where it comes from. Nothing is sent yet.


def server(check):
    from common import connection
    from common.errors import UserError

    check.uri, reason = connection.address(check.args.tracking_uri)
    if not check.uri.startswith("http"):
        raise UserError(
            f"there is no server to check: the tracking address is a database ({reason}).",
            "give --tracking_uri, or export MLFLOW_TRACKING_URI or AM_SC_API_KEY.",
        )
    return f"{check.uri}  ({reason})"


def credential(check):
    import mlflow

    from common import connection

    connection.settle(check.args.workspace)
    mlflow.set_tracking_uri(check.uri)
    connection.check_token()
    workspace = f"; workspace {check.args.workspace}" if check.args.workspace else ""
    return connection.credential() + workspace


def ca_bundle(check):
    import os

    import mlflow
    import requests

    from common import connection

    connection.trust(check.args.ca_bundle)
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
    from common import connection
    from scripts import probes

    names = ", ".join(probes.proxy_variables()) or "no variable"
    through = connection.printable(connection.proxy_of(check.uri) or "none for this address")
    return f"{through}  (set: {names})"


def addresses(check):
    from scripts import probes

    host, _ = probes.first_hop(check.uri)
    check.reachable = False
    try:
        found = probes.addresses(host)
    except OSError as error:
        return f"{host}: {error.strerror or error}"
    check.reachable = True
    return f"{host} is {', '.join(found)}"


def tcp(check):
    from scripts import probes

    host, port = probes.first_hop(check.uri)
    if not check.reachable:
        return "not tried"
    check.reachable = False
    try:
        seconds = probes.tcp(host, port)
    except OSError as error:
        return f"{host} port {port}: {error.strerror or error}"
    check.reachable = True
    return f"{host} port {port}, {1000 * seconds:.0f} ms"


def certificate(check):
    from scripts import probes

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

    from common import connection

    connection.ask_server()
    # Patience is short from here on, too.
    os.environ.update(connection.FIRST_REQUESTS | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"})
    return "granted"


def round_trip(check):
    from scripts import probes

    seconds, check.lead = probes.answers()
    return f"{1000 * seconds:.0f} ms, median of 5"


def clock(check):
    from common.errors import UserError

    lead = getattr(check, "lead", None)
    if lead is None:
        return "the server does not tell its time"
    if abs(lead) > CLOCK_TOLERANCE:
        raise UserError(
            f"this machine's clock and the server's differ by {abs(lead):.0f} s.",
            "have the clock set that is wrong; object stores refuse uploads otherwise.",
        )
    return f"the server's is {lead:+.1f} s off this machine's, to within 1 s"


def versions(check):
    import mlflow

    from common import connection

    server = connection.server_version() or "of unknown version"
    return f"server MLflow {server}, client {mlflow.__version__}"


def new_run(check):
    from scripts import probes

    check.run = probes.new_run(check.name, check.cleanup)
    return f"experiment {check.name}, run and metric written"


def artifact(check):
    from scripts import probes

    probes.artifact(check.run, check.cleanup)
    check.proxied = check.run.info.artifact_uri.startswith("mlflow-artifacts:")
    way = "through the server" if check.proxied else "without the server"
    return f"written and read back, {way}"


def body_limit(check):
    from scripts import probes

    if not check.proxied:
        return "does not matter: files do not go through the server"
    passed, refused, rate = probes.body_limit(check.run)
    limit = f"{refused // probes.MB} MB do not" if refused else "more was not tried"
    return f"{passed // probes.MB} MB pass, {limit}; {rate:.0f} MB/s"


def multipart(check):
    import mlflow

    from scripts import probes

    if not check.proxied:
        return "does not matter: files do not go through the server"
    if not mlflow.environment_variables.MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD.get():
        return "switched off by MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD"
    store = probes.multipart(check.run)
    return f"works; the parts go to {store}" if store else "not offered by the server"


def registry(check):
    from scripts import probes

    probes.registered_model(check.name, check.run, check.cleanup)
    return "model, version and alias written"


def default_names(check):
    """What the scripts write to if no name is given: it may be somebody else's."""
    import os

    import mlflow

    from common import connection, runs

    client, own = mlflow.MlflowClient(), os.environ.get("MLFLOW_EXPERIMENT_NAME", "").strip()
    experiments = [own] if own else EXPERIMENTS
    for name in experiments:
        found = connection.ask_server(name)
        if found and found.lifecycle_stage == "active":
            made = client.create_run(found.experiment_id, run_name=check.name)
            check.cleanup.callback(client.delete_run, made.info.run_id)
    if client.search_registered_models(f"name = '{MODEL_NAME}'"):  # else it would be made
        runs.check_registrable(MODEL_NAME)
    return f"{', '.join([*experiments, MODEL_NAME])} can be written to, or are not seen here"


def clean_up(check):
    check.cleanup.close()
    return f"{check.name} is deleted again"


if __name__ == "__main__":
    cli.run(main)
