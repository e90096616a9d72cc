"""The end of a run: FINISHED, FAILED or KILLED, whatever happens to the process."""

import contextlib
import gc
import os
import signal
import sys
import threading
import time
import traceback

import mlflow
from mlflow.exceptions import MlflowException

from common.errors import STOPPING


@contextlib.contextmanager
def always_ended():
    """Within `with mlflow.start_run()`: end the run for certain, and in bounded time.

    KILLED on Ctrl-C and what else of `STOPPING` would end the process, which exits with 128 and the
    signal's number. FAILED on an error, which is raised again: `start_run` by itself would wait
    minutes for a server that is away, and then raise another one. Call it in the main thread. A
    process that is killed outright, or hangs in C code until it is, leaves its run RUNNING; with a
    checkpoint, the next job goes on with it.
    """
    run_id = mlflow.active_run().info.run_id
    received = []

    def stop(number, frame):
        if not received:
            received.extend([signal.Signals(number), time.monotonic()])
            raise SystemExit(128 + number)
        if time.monotonic() > received[1] + 2:  # sooner, it is a launcher that passes it on
            os._exit(128 + number)  # a second Ctrl-C ends the process at once

    def swallowed(unraisable):
        """Python swallows exceptions raised in `__del__`, so send the signal again."""
        if not (received and isinstance(unraisable.exc_value, SystemExit)):
            hook(unraisable)
            return
        number = received[0]
        received.clear()
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()

    def ends(number):  # and is not ignored, as by `nohup`, nor handled by a program of one's own
        handler = signal.getsignal(number)
        default = handler in (signal.SIG_DFL, signal.default_int_handler)
        return default or (number == signal.SIGTERM and callable(handler))

    previous = {number: signal.signal(number, stop) for number in filter(ends, STOPPING)}
    hook, sys.unraisablehook = sys.unraisablehook, swallowed
    try:
        yield
    except BaseException as error:
        # The exit codes come up from a nested run that received the signal.
        stopped = isinstance(error, SystemExit) and error.code in [128 + n for n in STOPPING]
        status = "KILLED" if received or stopped else "FAILED"
        if not received:  # torchrun may send SIGTERM just now: the run is ended first
            for number in previous:
                signal.signal(number, lambda number, frame: None)
        # What was interrupted may hold SQLite's lock; let go of it, or the end waits for itself.
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        outcome = _end(status, run_id)
        if received:
            print(f"error: stopped by {received[0].name}; {outcome}.", file=sys.stderr, flush=True)
            raise SystemExit(128 + received[0]) from None  # C code may have replaced it
        elif status not in outcome:
            print(f"warning: {outcome}.", file=sys.stderr, flush=True)
        raise
    finally:
        sys.unraisablehook = hook
        if not received:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _end(status, run_id):
    """Tell the server, in the seconds that a batch system leaves before it sends SIGKILL."""
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "5"
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
    try:
        mlflow.end_run(status)
    except MlflowException:
        return f"the server or database fails, and the run {run_id} may stay RUNNING there"
    with contextlib.suppress(MlflowException):  # its models, if one was being written
        for model in mlflow.search_logged_models(
            filter_string=f"source_run_id = '{run_id}'", output_format="list"
        ):
            if model.status == "PENDING":
                mlflow.MlflowClient().finalize_logged_model(model.model_id, "FAILED")
    return f"the run is marked {status}"
