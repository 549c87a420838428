"""Behaviour shared by the commands: one-line errors, exit statuses, signals."""

import io
import signal

import pytest

from config import DivergenceError, InputError
from utils.cli import exit_on_input_error, progress_bar, sigterm_as_interrupt, stop_signals


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


@pytest.mark.parametrize("error", [ValueError("a bug"), ZeroDivisionError("a bug"), KeyError("a bug")])
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


def test_progress_bar_of_an_iterable_and_of_a_total(capsys):
    assert list(progress_bar([1, 2, 3], desc="counting")) == [1, 2, 3]
    with progress_bar(total=2) as bar:
        assert not bar.update()  # drawn at most every 30 seconds in a log file
    assert "counting: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals_record_the_first_and_raise_at_the_second(number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_signals() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        signal.raise_signal(number)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_stop_signals_raise_at_once_in_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KeyboardInterrupt), stop_signals():
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_as_interrupt_raises_and_restores_the_handler():
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == handler
