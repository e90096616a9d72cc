"""The end of a run, whatever happens to the process.

If you only want one thing for your own training script, copy this file, and write

    with mlflow.start_run(), ending.always_ended():

in its main thread.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import mlflow
from mlflow.exceptions import MlflowException

DEAF = 6  # seconds to react to a signal; some batch systems send SIGKILL after ten


class _Open(NamedTuple):
    """A run within `always_ended`."""

    run_id: str
    stop: Callable  # its signal handler
    ending: threading.Lock  # held by the thread that ends it
    another_ended: Callable


class _Forking(threading.local):
    """The signals that the thread held back when it began to fork."""

    mask = None


_open = []  # the innermost run is the last
_forking = _Forking()


@contextlib.contextmanager
def always_ended(another_ended=lambda: False):
    """Inside `with mlflow.start_run()`: end the run for certain, and in bounded time.

    KILLED on SIGTERM and on Ctrl-C, and the process exits with 143 or 130, as shells expect: a
    batch system sends SIGTERM when the time is up or the job is preempted, Python would die at
    once, and the run would be RUNNING for ever. FAILED on an error, which is raised again:
    `start_run` by itself would wait minutes for a server that is away, and then raise another.
    FAILED, too, if the signal came because `another_ended()` of several processes. From then on
    MLflow does not wait for a server for long.
    """
    run_id = mlflow.active_run().info.run_id
    received, ending = [], threading.Lock()

    def stop(number, frame):
        received.append(signal.Signals(number))
        for signal_number in previous:  # a second one ends the process at once
            signal.signal(signal_number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    def dropped(unraisable):
        """Python drops what is raised while it cleans an object up: then the signal comes again."""
        if not (received and isinstance(unraisable.exc_value, SystemExit)):
            hook(unraisable)
            return
        signal.signal(received[0], stop)
        threading.Timer(0.1, os.kill, (os.getpid(), received[0])).start()

    previous = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    hook, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        with _watched(_Open(run_id, stop, ending, another_ended)):
            yield
    except BaseException as error:
        ending.acquire()  # for good: by this thread, or by the one that ends a run that hangs
        # The exit codes come up from a run within this one (nested) that received the signal.
        stopped = isinstance(error, SystemExit) and error.code in (130, 143)
        status = "KILLED" if (received or stopped) and not another_ended() else "FAILED"
        if not received:  # torchrun may send SIGTERM right now: the run is ended first
            for number in previous:
                signal.signal(number, lambda number, frame: None)
        outcome = _end(status, run_id)
        if received:
            print(f"error: stopped by {received[0].name}; {outcome}.", file=sys.stderr, flush=True)
        elif status not in outcome:
            print(f"warning: {outcome}.", file=sys.stderr, flush=True)
        raise
    finally:
        sys.unraisablehook = hook
        if not received:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _watched(run):
    """End the runs that are open, and the process, if a signal does not get to its handler in time.

    Python runs a handler when its main thread is back from C code. One that waits there for a
    process that hangs, for a GPU or for a disk does not come back; but Python writes the number
    of each signal into a pipe at once, and a thread can read it.
    """
    _open.append(run)
    outermost = len(_open) == 1 and os.name != "nt"  # it watches for all
    if outermost:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        other = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=_listen, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        if run in _open:  # and not in a forked process
            _open.remove(run)
            if outermost:
                signal.set_wakeup_fd(other)
                with contextlib.suppress(OSError):  # it is full, or nobody listens any more
                    os.write(writer, b"\0")  # a forked process may hold the pipe open
                os.close(writer)


def _before_fork():
    """Hold signals to the new process back until it has let go of the pipe of `_watched`.

    They would look like signals to this process. (And Python forgets, in a new process, the
    signals that came before its hooks ran.) Signals to this one wait or go to another thread.
    """
    if _open and _forking.mask is None:
        # Read first: a signal handler may raise in the call that blocks.
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))


def _after_fork():
    if _forking.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)
        _forking.mask = None  # last: a signal handler may raise before


def _after_fork_in_child():
    if _open:
        signal.set_wakeup_fd(-1)
        _open.clear()  # they are its parent's runs
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
    )
    # Again: a signal handler may raise before the first instruction of those.
    os.register_at_fork(after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def _listen(reader):
    """Read the numbers of signals, up to a 0. Does not return if one of them is not handled."""
    with open(reader, "rb", buffering=0) as pipe:
        while number := int.from_bytes(pipe.read(1), "big"):
            handler = signal.getsignal(number)
            if any(handler is run.stop for run in _open):  # not one that the program has set
                time.sleep(DEAF)
                if signal.getsignal(number) is handler:  # `stop` sets another, first thing
                    break
        else:
            return
    try:
        name = signal.Signals(number).name
        for run in reversed(_open):
            run.ending.acquire()
            outcome = _end("FAILED" if run.another_ended() else "KILLED", run.run_id)
            text = f"error: stopped by {name} while it hung; {outcome}."
            print(text, file=sys.stderr, flush=True)
        # It may hang, too, if the main thread does in writing.
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(1)
    finally:
        os._exit(128 + number)


def end_half_open_child(experiment_id, parent_run_id, run_name):
    """Mark as KILLED a child run that a signal met while it was being opened or closed.

    It is in the store by then, and `always_ended` not yet, or no longer, in force.
    """
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "5"
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    with contextlib.suppress(MlflowException):
        for run in mlflow.search_runs(
            experiment_ids=[experiment_id],
            filter_string=f"tags.mlflow.parentRunId = '{parent_run_id}' AND "
            f"attributes.run_name = '{run_name}' AND attributes.status = 'RUNNING'",
            output_format="list",
        ):
            mlflow.MlflowClient().set_terminated(run.info.run_id, "KILLED")


def _end(status, run_id):
    """Tell the server, in the seconds that a batch system leaves before it sends SIGKILL."""
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "5"
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
    try:
        if mlflow.active_run():
            mlflow.end_run(status)
        else:  # from another thread, where MLflow knows of no run
            mlflow.MlflowClient().set_terminated(run_id, status)
    except MlflowException:
        return f"the server does not answer, and the run {run_id} may stay RUNNING there"
    with contextlib.suppress(MlflowException):  # its models, if one was being written
        for model in mlflow.search_logged_models(
            filter_string=f"source_run_id = '{run_id}'", output_format="list"
        ):
            if model.status == "PENDING":
                mlflow.MlflowClient().finalize_logged_model(model.model_id, "FAILED")
    return f"the run is marked {status}"
