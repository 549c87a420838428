"""Behaviour shared by the commands: one-line errors, exit statuses, signals."""

import io
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT, run_python

from config import DivergenceError, InputError
from utils.cli import STOP_SIGNALS, error_line, exit_on_input_error, progress_bar, sigterm_as_interrupt, stop_signals


def failing(error):
    @exit_on_input_error
    def command(argv):
        raise error

    return command


def test_input_error_ends_a_command_with_one_line(refused):
    @exit_on_input_error
    def command(argv):
        raise InputError(f"{argv[0]} is wrong")

    assert refused(command, ["this"]) == "this is wrong"


def test_input_error_from_a_loader_process_gives_one_line(refused):
    # PyTorch raises the exception of a worker again, with its traceback as the message.
    message = 'Caught InputError in DataLoader worker process 0.\n  File "x"\nconfig.InputError: bad x\n'
    assert refused(failing(InputError(message)), []) == "bad x"


def test_operating_system_error_gives_one_line(refused):
    assert "No space left" in refused(failing(OSError(28, "No space left on device")), [])
    assert "Permission denied: 'x'" in refused(failing(PermissionError(13, "Permission denied", "x")), [])
    assert refused(failing(OSError()), []) == "OSError()"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (DivergenceError("the loss is nan"), 1, "error: the loss is nan"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_exit_status_of_other_expected_errors(capsys, error, status, line):
    with pytest.raises(SystemExit) as exit:
        failing(error)([])
    assert exit.value.code == status
    assert capsys.readouterr().err.strip() == line


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (MemoryError(), ["out of memory", "--micro_batch_size", "--gan_batch_size"]),
        (MemoryError("Unable to allocate 9 TiB"), ["out of memory (Unable to allocate 9 TiB)"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), ["memory (CUDA out of memory", "--micro_batch_size"]),
        (OSError(12, "Cannot allocate memory"), ["out of memory", "--micro_batch_size"]),
        (RuntimeError("can't start new thread"), ["too many processes", "ulimit -u"]),
        (OSError(24, "Too many open files", "x"), ["too many open files", "ulimit -n", "--num_workers 0"]),
        (RuntimeError("received 0 items of ancdata"), ["too many open files", "ulimit -n", "--num_workers 0"]),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), ["--num_workers 0", "--shm-size"]),
    ],
)
def test_errors_of_the_system_say_what_to_do(refused, error, parts):
    line = refused(failing(error), [])
    assert [part for part in parts if part not in line] == [], line


def test_out_of_memory_of_torch_gives_one_line(refused):
    @exit_on_input_error
    def command(argv):
        torch.empty(2**55)

    assert "out of memory" in refused(command, [])


def test_lost_connection_to_another_process_gives_one_line(refused, monkeypatch):
    error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9")
    with pytest.raises(RuntimeError):
        failing(error)([])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "another process of this run ended" in refused(failing(error), [])


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), ZeroDivisionError("a bug"), KeyError("a bug"), RuntimeError("a bug")]
)
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error), match="a bug"):
        failing(error)([])


def test_exit_on_input_error_keeps_result_and_docstring():
    @exit_on_input_error
    def command(argv):
        """Doc."""
        return argv

    assert command([1]) == [1]
    assert command() is None
    assert command.__doc__ == "Doc."


def test_characters_that_the_terminal_lacks_are_escaped(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", output)

    @exit_on_input_error
    def command(argv):
        print("a café", flush=True)

    command([])
    assert output.buffer.getvalue().decode("ascii").strip() == r"a caf\xe9"


PRINTS = """
import sys
from utils.cli import exit_on_input_error
@exit_on_input_error
def main(argv=None):
    for number in range(20_000):
        print(number)
        print(number, file=sys.stderr)
    open("done", "w").close()
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.parametrize("pipe", ["2> errors | head -1", "2>&1 | head -1", "> numbers 2> errors"])
def test_command_goes_on_when_its_output_is_closed(pipe, tmp_path):
    command = f"'{sys.executable}' -c '{PRINTS}' {pipe}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "done").exists()
    if "head" not in pipe:
        assert (tmp_path / "numbers").read_text() == "".join(f"{number}\n" for number in range(20_000))


def test_output_keeps_its_order_and_encoding():
    done = run_python("-c", PRINTS.replace("20_000", "3").replace("print(number)", 'print("café")'))
    assert done.stdout == "café\n" * 3 and done.stderr == "0\n1\n2\n"


def test_progress_bar_of_an_iterable_and_of_a_total(capsys):
    assert list(progress_bar([1, 2, 3], desc="counting")) == [1, 2, 3]
    with progress_bar(total=2) as bar:
        assert not bar.update()  # drawn at most every 30 seconds in a log file
    assert "counting: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_stop_signals_record_the_first_and_raise_at_the_second(number):
    handlers = [*map(signal.getsignal, STOP_SIGNALS)]
    with pytest.raises(KeyboardInterrupt), stop_signals() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        signal.raise_signal(number)
    assert [*map(signal.getsignal, STOP_SIGNALS)] == handlers


def test_first_signal_interrupts_a_waiting_loader():
    with stop_signals() as stop:
        with stop.interruptible():
            signal.raise_signal(signal.SIGINT)
            pytest.fail("still waiting")
        assert stop.requested and isinstance(stop.reason, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "error",
    [
        InputError("image x is missing"),
        OSError(24, "Too many open files"),
        MemoryError(),
        EOFError(),
        RuntimeError("out of memory"),
    ],
)
def test_faults_of_the_system_request_a_stop_where_no_step_is_in_progress(error, monkeypatch):
    with stop_signals() as stop:
        with stop.interruptible():
            raise error
        assert stop.requested and not stop.waiting and error_line(stop.reason)
    monkeypatch.setenv("WORLD_SIZE", "2")  # they cannot agree on a checkpoint
    with pytest.raises((type(error), RuntimeError)), stop_signals() as stop, stop.interruptible():
        raise error


def test_bugs_request_no_stop():
    with pytest.raises(RuntimeError, match="a bug"), stop_signals() as stop, stop.interruptible():
        raise RuntimeError("a bug")
    assert not stop.requested


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_signals() as stop, sigterm_as_interrupt():
            signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_stop_signals_raise_at_once_in_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KeyboardInterrupt), stop_signals():
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_as_interrupt_raises_and_restores_the_handler():
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == handler
