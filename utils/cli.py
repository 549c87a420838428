"""Shared by the commands: one-line errors, progress bars, signals; does not import torch."""

import contextlib
import os
import signal
import sys

from tqdm import tqdm

from config import DivergenceError, InputError


def exit_on_input_error(main):
    """Decorate a command's main function: expected errors are reported in one line instead of a traceback.

    Exit status 2 for bad input and for operating-system errors (permissions, full disk), 1 if
    training diverged, 130 for Ctrl-C.
    """

    def wrapped(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # escape characters the terminal cannot encode
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            raise SystemExit(130) from None
        except (InputError, OSError, DivergenceError) as error:
            # The message of an error from a loader process is its traceback, which ends with the original message.
            line = (str(error).strip().splitlines() or [repr(error)])[-1].removeprefix("config.InputError: ")
            print(f"error: {line}", file=sys.stderr)
            raise SystemExit(1 if isinstance(error, DivergenceError) else 2) from None

    wrapped.__doc__ = main.__doc__
    return wrapped


def one_line(error):
    """The beginning of an error's text, in one line, for a message that quotes it."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def progress_bar(iterable=None, **options):
    """A tqdm bar, updated twice a second on a terminal and every 30 seconds in a log file."""
    seconds = 0.5 if sys.stderr.isatty() else 30
    return tqdm(iterable, mininterval=seconds, dynamic_ncols=True, **options)


class StopRequest:
    """`requested` becomes true at the first Ctrl-C or SIGTERM: the step is finished and a checkpoint is written."""

    def __init__(self):
        self.requested = False

    def handle(self, signum, frame):
        # A second signal interrupts at once. With several processes the first does too: they cannot agree on a step.
        if self.requested or int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise KeyboardInterrupt
        self.requested = True
        if hasattr(signal, "SIGCHLD"):
            # When a whole process group is terminated, the loader's processes end too, and PyTorch would raise in
            # the middle of a step.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextlib.contextmanager
def stop_signals():
    """Within the block Ctrl-C and SIGTERM set the `StopRequest` that it yields."""
    stop = StopRequest()
    previous = {signum: signal.signal(signum, stop.handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def sigterm_as_interrupt():
    """Within the block SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
