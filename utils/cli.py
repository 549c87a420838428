"""Shared by the commands: one-line errors, progress bars, signals; does not import torch."""

import contextlib
import errno
import io
import os
import re
import signal
import sys

from tqdm import tqdm

from config import DivergenceError, InputError

OUT_OF_MEMORY = "out of memory ({}): lower --micro_batch_size, --batch_size or --size (gan.py: --gan_batch_size)"
# RuntimeErrors of PyTorch that are no bugs, and what to do about them; {} is the message.
ADVICE = {
    r"out of memory|(can't|[Cc]annot) allocate memory|not enough memory|ALLOC_FAILED": OUT_OF_MEMORY,
    r"Too many open files|ancdata": "too many open files ({}): raise the limit (ulimit -n), or pass --num_workers 0",
    r"can't start new thread": "too many processes ({}): raise the limit (ulimit -u), or pass --num_workers 0",
    r"DataLoader worker \(pid": "a data loading process ended ({}): memory or shared memory (/dev/shm) ran out; pass "
    "--num_workers 0, or start a Docker container with --shm-size=8g",
}
LOST_PROCESS = r"gloo|NCCL|[Cc]onnection|Broken pipe|[Rr]endezvous|TCPStore"


class OpenOutput(io.FileIO):
    """The output of a command, which goes on when nobody reads it any more (`| head`, a closed terminal)."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return len(data)


def open_outputs():
    """Replace stdout and stderr of the process: closed ones are ignored, unknown characters are escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or not hasattr(stream, "reconfigure"):
            continue
        raw = getattr(stream.buffer, "raw", stream.buffer)
        if stream is getattr(sys, f"__{name}__") and type(raw) is io.FileIO:  # else a notebook, a test, or a console
            stream.flush()
            options = {key: getattr(stream, key) for key in ("encoding", "line_buffering", "write_through")}
            output = OpenOutput(raw.fileno(), "w", closefd=False)
            stream = io.TextIOWrapper(output if stream.buffer is raw else io.BufferedWriter(output), **options)
            setattr(sys, name, stream)
        stream.reconfigure(errors="backslashreplace")


def exit_on_input_error(main):
    """Decorate a command's main function: expected errors are reported in one line instead of a traceback.

    Exit status 2 for bad input and for errors of the system (permissions, full disk, memory, killed processes), 1 if
    training diverged, 130 for Ctrl-C.
    """

    def wrapped(argv=None):
        open_outputs()
        try:
            return main(argv)
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            raise SystemExit(130) from None
        except (InputError, OSError, DivergenceError, MemoryError, RuntimeError) as error:
            line = error_line(error)
            if line is None:
                raise
            print(f"error: {line}", file=sys.stderr)
            raise SystemExit(1 if isinstance(error, DivergenceError) else 2) from None

    wrapped.__doc__ = main.__doc__
    return wrapped


def error_line(error):
    """The message of an expected error, one line; None for a bug."""
    text = str(error).strip()
    last = (text.splitlines() or [repr(error)])[-1]
    # The message of an error from a loader process is its traceback, which ends with the original message.
    line = last if text.startswith("Caught ") else one_line(error)
    if isinstance(error, MemoryError):
        return OUT_OF_MEMORY.format(line)
    if isinstance(error, RuntimeError) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and re.search(LOST_PROCESS, line):
            return f"another process of this run ended, see its message ({line})"
        return next((advice.format(line) for pattern, advice in ADVICE.items() if re.search(pattern, line)), None)
    return last.removeprefix("config.InputError: ")


def one_line(error):
    """The beginning of an error's text, in one line, for a message that quotes it."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def progress_bar(iterable=None, **options):
    """A tqdm bar, updated twice a second on a terminal and every 30 seconds in a log file."""
    seconds = 0.5 if sys.stderr.isatty() else 30
    return tqdm(iterable, mininterval=seconds, dynamic_ncols=True, **options)


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
# Of those that end waiting for data or evaluation, `StopRequest.failed` raises the bugs.
STOPPING = (KeyboardInterrupt, InputError, RuntimeError, OSError, EOFError, MemoryError)


class StopRequest:
    """`requested` becomes true at the first Ctrl-C, SIGTERM or SIGHUP: the step is finished, a checkpoint is written.

    The command then ends with the exception `reason`.
    """

    def __init__(self):
        self.requested, self.waiting, self.reason = False, False, KeyboardInterrupt()

    def handle(self, signum, frame):
        # A second signal interrupts at once. With several processes the first does too: they cannot agree on a step.
        if self.requested or self.waiting or int(os.environ.get("WORLD_SIZE", 1)) > 1:
            self.requested = True
            raise KeyboardInterrupt
        self.requested = True

    @contextlib.contextmanager
    def interruptible(self):
        """In the block, in which no step is in progress, a signal or a fault of the system requests a stop at once."""
        try:
            self.waiting = True
            yield
        except STOPPING as error:
            self.failed(error)
        finally:
            self.waiting = False

    def failed(self, error):
        """Request a stop after a signal or a fault of the system; raise a bug, and any error of several processes."""
        self.waiting = False
        if isinstance(error, ConnectionError | EOFError):
            error = RuntimeError(f"DataLoader worker (pid unknown): {error!r}")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 or not (self.requested or error_line(error)):
            raise error from None
        if not self.requested:
            self.requested, self.reason = True, error


def default_sigchld():
    """Undo PyTorch's handler of ended loader processes, which raises amid a step: the loader detects them as well."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextlib.contextmanager
def handle_signals(signals, handler):
    """Within the block the signals call a handler, except an ignored SIGHUP (nohup)."""
    previous = {signum: signal.getsignal(signum) for signum in signals}
    if hasattr(signal, "SIGHUP") and previous.get(signal.SIGHUP) == signal.SIG_IGN:
        del previous[signal.SIGHUP]
    for signum in previous:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, found in previous.items():
            signal.signal(signum, found)


@contextlib.contextmanager
def stop_signals():
    """Within the block Ctrl-C, SIGTERM and SIGHUP set the `StopRequest` that it yields."""
    stop = StopRequest()
    with handle_signals(STOP_SIGNALS, stop.handle):
        yield stop


def sigterm_as_interrupt():
    """Within the block SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does."""
    return handle_signals(STOP_SIGNALS[1:], signal.default_int_handler)
