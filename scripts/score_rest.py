"""Ask a served model (`mlflow models serve`) to predict rows of a table, or images (guide 4).

    python scripts/score_rest.py
    python scripts/score_rest.py --data "[[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]"
    python scripts/score_rest.py --images 5 --dataset digits --url http://127.0.0.1:5001

First, in another terminal: mlflow models serve -m "models:/New Registered Model/1" --env-manager
local --port 1234. You will see one line per row or image with the prediction, and a JSON object as
the last line. No tracking server is asked, so there is no --tracking_uri, and no key is sent. Needs
common/cli.py, and for images the room training of common/.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common/ is

from common import cli
from common.errors import UserError

URL = "http://127.0.0.1:1234"  # the guide's port; /invocations is added if it is missing
COLUMNS = ("sepal_length", "sepal_width", "petal_length", "petal_width")
ROWS = "[[5.1, 3.5, 1.4, 0.2]]"
LARGEST, PATIENCE = 2**26, 300  # bytes and seconds of an answer
OTHER_PORT = "is it the port of mlflow models serve, and not of the tracking server?"


def build_parser():
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--url", type=str.strip, default=URL, help="the served model (default: %(default)s)"
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        default=COLUMNS,
        metavar="NAME",
        help=f"names of the columns (default: {' '.join(COLUMNS)})",
    )
    parser.add_argument("--data", default=ROWS, help="rows, as JSON (default: %(default)s)")
    parser.add_argument(
        "--images",
        type=cli.whole_number(1),
        metavar="N",
        help="send the first N images of the test set in place of rows (default: rows)",
    )
    cli.add_data_arguments(parser)
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if not (args.url and args.url.isprintable()):  # and not shown: it may hold a password
        parser.error("--url is empty, or holds control characters")
    rows = rows_in(args.data, len(args.columns))
    if rows is None:
        parser.error(f"--data must be rows of {len(args.columns)} values, as JSON: {args.data!r}")

    # 1. The payload, in one of the forms that MLflow takes today.
    truth = None
    if args.images:
        from common import training

        test = training.load_data(args.dataset, args.data_dir, train=False)
        # Pixels in [0, 1] and no more: the model normalises them itself.
        pixels = test.images[: args.images].float() / 255
        truth = test.labels[: args.images].tolist()
        payload = {"inputs": pixels.tolist()}
    else:
        # Column names and rows. Bare `columns` and `data`, as MLflow 1 took them, are refused.
        payload = {"dataframe_split": {"columns": list(args.columns), "data": rows}}

    # 2. Ask.
    url = args.url.rstrip("/").removesuffix("/invocations") + "/invocations"
    answers = ask(url, payload, len(truth or rows))

    # 3. Print the answers. A network returns one logit per class; the largest is the prediction.
    if truth:
        try:
            answers = [list.index(row, max(row)) for row in answers]
        except (AttributeError, TypeError, ValueError) as error:
            what = "the served model does not answer with one number per class and image."
            raise UserError(
                what, "serve a model of train_mnist_mlflow.py, or send rows."
            ) from error
        for i, (true, predicted) in enumerate(zip(truth, answers, strict=True)):
            print(f"sample   {i}  true {true}  predicted {predicted}", flush=True)
    else:
        for row, predicted in zip(rows, answers, strict=True):
            print(f"row      {row}  predicted {predicted}", flush=True)
    cli.print_result(url=without_login(url), predictions=answers)


def rows_in(text, width):
    """Return the rows in a JSON text, or None if it is no list of rows of that many values."""
    import json

    try:
        rows = json.loads(text)
        json.dumps(rows, allow_nan=False)  # Python reads and writes NaN, and JSON has none
    except (RecursionError, ValueError):
        return None
    good = isinstance(rows, list) and all(isinstance(r, list) and len(r) == width for r in rows)
    return rows if good and rows else None


def without_login(url):
    """Return the address without login and query; with "..." if nobody can tell where one ends.

    It is the rule of `connection.printable`, without MLflow; also where "//" is missing.
    """
    import re

    if found := re.match(r"([\w+.-]*:?//+|/?)([^/@]*:.*|[^/]*)@(.*)", url):
        url = found[1] + ("..." if set("@?#") & set(found[2]) else found[3])
    return re.split("[?#]", url)[0]


def ask(url, payload, count):
    """Post the payload, and return `count` predictions; or raise UserError with what went wrong."""
    import json
    import re
    import time
    from urllib.parse import urlsplit

    import requests
    import urllib3

    shown, session, content = without_login(url), requests.Session(), bytearray()
    start = time.monotonic()
    how = {"timeout": (10, 120), "stream": True, "allow_redirects": False}
    try:
        # A compute node's proxy cannot reach a server on this machine: loopback goes without it.
        session.trust_env = urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1")
        response = session.post(url, json=payload, **how)
        while piece := response.raw.read1(2**16, decode_content=True):  # what has come so far
            content += piece
            if len(content) > LARGEST or time.monotonic() > start + PATIENCE:
                what = f"its answer takes more than {LARGEST} bytes or {PATIENCE} s."
                raise UserError(f"{shown} answers, but not as a served model: {what}", OTHER_PORT)
    except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
        found = re.search(r"\[Errno -?\d+\] ([^'\")]+)", str(error))
        # The error's own words repeat the address: whole, encoded, or the parts of a wrong split.
        reason = str(error)[:200] if shown == url else type(error).__name__
        reason = found[1] if found else reason
        raise UserError(
            f"no served model answers at {shown}: {reason}",
            'mlflow models serve -m "models:/NAME/1" --env-manager local --port 1234',
        ) from error
    try:
        answer = json.loads(content)
    except (RecursionError, ValueError):
        answer = None
    if response.status_code != 200 and isinstance(answer, dict):
        # MLflow's message repeats the whole request before it says what is wrong.
        said = " ".join(str(answer.get("message", answer)).split()).rsplit(" Error: ", 1)[-1][:300]
        raise UserError(
            f"the served model refuses the request (error {response.status_code}): {said}",
            "the model's page names the inputs it takes: columns, or images (--images).",
        )
    predictions = answer.get("predictions") if isinstance(answer, dict) else None
    if not isinstance(predictions, list) or len(predictions) != count:
        raise UserError(
            f"{shown} answers (status {response.status_code}), but not as a served model.",
            OTHER_PORT,
        )
    return predictions


if __name__ == "__main__":
    cli.run(main)
