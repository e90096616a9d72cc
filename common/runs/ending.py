"""The end of a run: FINISHED, FAILED or KILLED, whatever happens to the process."""

import contextlib
import os
import signal
import sys
import threading
import time

import mlflow
from mlflow.exceptions import MlflowException

HANG_TIMEOUT = 6  # seconds before the main thread counts as stuck; some systems send SIGKILL at 10

# The runs within `always_ended`, the innermost last: (id, signal handler, lock of who ends it,
# another_ended).
_open = []


@contextlib.contextmanager
def always_ended(another_ended=lambda: False):
    """Within `with mlflow.start_run()`: end the run for certain, and in bounded time.

    KILLED on SIGTERM, which a batch system sends when the time is up, and on Ctrl-C; the process
    exits with 143 or 130, as shells expect. FAILED on an error, which is raised again: `start_run`
    by itself would wait minutes for a server that is away, and then raise another one. FAILED, too,
    if the signal came because another of several processes has ended. Call it in the main thread.
    """
    run_id = mlflow.active_run().info.run_id
    received, ending = [], threading.Lock()

    def stop(number, frame):
        received.append(signal.Signals(number))
        for signal_number in previous:  # a second one ends the process at once
            signal.signal(signal_number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    def swallowed(unraisable):
        """Python swallows exceptions raised in `__del__`, so send the signal again."""
        if not (received and isinstance(unraisable.exc_value, SystemExit)):
            hook(unraisable)
            return
        signal.signal(received[0], stop)
        threading.Timer(0.1, os.kill, (os.getpid(), received[0])).start()

    previous = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    hook, sys.unraisablehook = sys.unraisablehook, swallowed
    try:
        with _watched((run_id, stop, ending, another_ended)):
            yield
    except BaseException as error:
        ending.acquire()  # never released: this thread ends the run, or the one that found it stuck
        # The exit codes come up from a nested run that received the signal.
        stopped = isinstance(error, SystemExit) and error.code in (130, 143)
        status = "KILLED" if (received or stopped) and not another_ended() else "FAILED"
        if not received:  # torchrun may send SIGTERM just now: the run is ended first
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
    """End the open runs and the process if a signal does not reach its handler in time.

    Python runs a handler when its main thread returns from C code, and one that waits there for
    another process, a GPU or a disk may not. But Python writes the number of each signal into a
    pipe at once, and a thread can read it.
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


def _leave_to_the_parent():
    if _open:  # a forked process has neither these runs nor this pipe
        signal.set_wakeup_fd(-1)
        _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


def _listen(reader):
    """Read the numbers of signals, up to a 0. Does not return if one of them is not handled."""
    with open(reader, "rb", buffering=0) as pipe:
        while number := int.from_bytes(pipe.read(1), "big"):
            handler = signal.getsignal(number)
            if any(handler is stop for _, stop, _, _ in _open):  # not one of the program's own
                time.sleep(HANG_TIMEOUT)
                if signal.getsignal(number) is handler:  # `stop` replaces it first thing
                    break
        else:
            return
    try:
        name = signal.Signals(number).name
        for run_id, _, ending, another_ended in reversed(_open):
            ending.acquire()
            outcome = _end("FAILED" if another_ended() else "KILLED", run_id)
            print(
                f"error: stopped by {name} while it hung; {outcome}.", file=sys.stderr, flush=True
            )
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)  # it may hang as well
        flush.start()
        flush.join(1)
    finally:
        os._exit(128 + number)


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
