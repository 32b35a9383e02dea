"""The terminal of a conversation, with a backend that repeats what it is told, at a pseudo-terminal and at pipes."""

from __future__ import annotations

import io
import os
import pty
import signal
import sys
import termios
import threading
import time
from contextlib import contextmanager

import pytest

from retnet.cli._common import console
from retnet.cli.chat_terminal import Leave, Terminal, printable
from retnet.cli.chat_turn import Answer, Backend, ChatError, Turn


class EchoAnswer(Answer):
    stopped = False

    def stop(self):
        self.stopped = True

    def __iter__(self):
        if self.text == "fail":
            raise ChatError("no answer to [this]")
        pieces = ["all the time\n"] * 10_000 if self.text == "endless" else [self.text, "!"]
        written = []
        for piece in pieces:
            if self.stopped:
                self.figures.finish = "cancelled"
                break
            if self.text == "endless":
                time.sleep(0.001)
            self.figures.tick()
            written.append(piece)
            yield piece
        self.figures.new_tokens = len(written)
        self.end("".join(written), "state", self.before.tokens + 10)


class Echo(Backend):
    def __init__(self):
        self.files = {}
        self.asked = []

    def ask(self, turn, text):
        self.asked.append((turn, text))
        return EchoAnswer(turn, text)

    def fork(self, turn):
        return Turn(turn.messages, "fork", turn.tokens)

    def past(self, turn):
        return Turn(turn.messages, "past", turn.tokens)

    def save(self, turn, path):
        self.files[path] = turn
        return "10 tokens"

    def load(self, path):
        if path not in self.files:
            raise FileNotFoundError(2, "No such file", str(path))
        return self.files[path]

    def facts(self, turn):
        return [f"{turn.tokens} tokens"]


def piped(monkeypatch, text: str, capsys) -> tuple[Terminal, str, str]:
    """A terminal whose input is a pipe, after it has read everything."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogateescape"))))
    terminal = Terminal(Echo())
    terminal.run()
    return terminal, *capsys.readouterr()


def contents(turn: Turn) -> list[str]:
    return [message["content"] for message in turn.messages]


def test_lines_of_a_pipe_are_messages_and_the_output_is_the_answers(monkeypatch, capsys):
    terminal, out, err = piped(monkeypatch, "Hello\n\nMore\r\nlast", capsys)
    assert out == "Hello!\nMore!\nlast!\n"
    assert err == ""
    assert contents(terminal.turn) == ["Hello", "Hello!", "More", "More!", "last", "last!"]


def test_messages_of_several_lines(monkeypatch, capsys):
    terminal, _, _ = piped(monkeypatch, 'a\\\nb\n"""\n/c\n\nd\n"""\n//e\n', capsys)
    assert [text for _, text in terminal.backend.asked] == ["a\nb", "/c\n\nd", "/e"]


def test_an_error_ends_the_turn_and_not_the_program(monkeypatch, capsys):
    terminal, out, err = piped(
        monkeypatch, "fail\n/load nowhere\n/nonsense\n/save\n/save a b\n/go 7\n/undo\nHi\n", capsys
    )
    assert "no answer to [this]" in err
    assert "No such file: nowhere" in err
    assert "there is no command /nonsense; accepted: /fork" in err
    assert "0 files are named" in err
    assert "2 files are named" in err
    assert "there is no conversation 7; accepted: 1 to 1" in err
    assert "nothing to take back" in err
    assert "Traceback" not in err
    assert contents(terminal.turn) == ["Hi", "Hi!"]
    assert out.endswith("Hi!\n")


def test_undecodable_input_becomes_text(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb\n"), "utf-8", "surrogateescape"))
    terminal = Terminal(Echo())
    terminal.run()
    assert terminal.backend.asked[0][1] == "a\N{REPLACEMENT CHARACTER}b"


def test_forks_go_on_side_by_side(capsys):
    terminal = Terminal(Echo())
    for text in ("one", "/fork", "two", "/go 1", "three", "/go"):
        terminal.take(text)
    assert contents(terminal.turn) == ["one", "one!", "three", "three!"]
    assert terminal.backend.asked[1][0].state == "fork"
    assert terminal.backend.asked[2][0].state == "state"
    assert "2  4 messages  two" in capsys.readouterr().err
    terminal.take("/go 2")
    assert contents(terminal.turn) == ["one", "one!", "two", "two!"]


def test_turns_are_taken_back_to_states_as_they_can_be_gone_back_to():
    terminal = Terminal(Echo())
    for text in ("one", "two", "/undo", "three"):
        terminal.take(text)
    assert contents(terminal.turn) == ["one", "one!", "three", "three!"]
    assert terminal.backend.asked[-1][0].state == "past"


def test_few_states_are_kept():
    terminal = Terminal(Echo())
    for number in range(8):
        terminal.take(str(number))
    states = [turn.state for turn in terminal._turns]
    assert states == [None] * 5 + ["past"] * 3 + ["state"]
    for _ in range(8):
        terminal.take("/undo")
    assert terminal.turn.messages == ()


def test_a_system_message_begins_every_new_conversation(capsys):
    terminal = Terminal(Echo(), "Be brief.")
    for text in ("one", "/reset", "two"):
        terminal.take(text)
    assert contents(terminal.turn) == ["Be brief.", "two", "two!"]
    terminal.take("/system Be [long].")
    assert contents(terminal.turn) == ["Be [long]."]
    capsys.readouterr()
    terminal.take("/system")
    assert capsys.readouterr().err == "Be [long].\n"


def test_files_are_named_with_or_without_quotes(tmp_path):
    terminal = Terminal(Echo())
    terminal.take("one")
    terminal.take(f"/save '{tmp_path}/a b'")
    terminal.take("/reset")
    terminal.take(f'/load "{tmp_path}/a b"')
    assert contents(terminal.turn) == ["one", "one!"]
    with pytest.raises(ChatError, match="quotation"):
        terminal.take("/save 'x")


def test_a_conversation_is_saved_into_its_own_file_again_and_into_no_other(tmp_path):
    terminal, file = Terminal(Echo()), tmp_path / "chat"
    terminal.take("one")
    file.write_text("of another chat")
    with pytest.raises(FileExistsError, match="accepted: another file, or one that this chat saved or loaded"):
        terminal.take(f"/save {file}")
    assert not terminal.backend.files
    file.unlink()
    terminal.take(f"/save {file}")
    file.write_text("of this chat")
    terminal.take("two")
    terminal.take(f"/save {file}")
    assert len(terminal.backend.files[file].messages) == 4
    other = Terminal(terminal.backend)
    other.open(file)
    other.take(f"/save {file}")


def test_help_lists_every_command_and_stats_the_last_answer(capsys):
    terminal = Terminal(Echo())
    terminal.take("/help")
    listed = capsys.readouterr().err
    assert all(f"/{name}" in listed for name in terminal._commands if name != "exit")
    terminal.take("one")
    terminal.take("/stats")
    assert "10 tokens\nthe last answer: 2 tokens, the first after" in capsys.readouterr().err
    with pytest.raises(Leave):
        terminal.take("/quit")


def test_a_model_cannot_control_the_terminal():
    assert printable("a\x1b[2J\x07b\r\x9b\n\tc") == "a�[2J�b��\n\tc"


@contextmanager
def screen(monkeypatch):
    """A pseudo-terminal as standard input and output: what was written to it so far, and a function that types."""
    master, slave = pty.openpty()
    attributes = termios.tcgetattr(slave)
    attributes[3] &= ~termios.ECHO
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    keyboard, display = os.fdopen(os.dup(slave)), os.fdopen(slave, "w")
    monkeypatch.setattr(sys, "stdin", keyboard)
    monkeypatch.setattr(sys, "stdout", display)
    monkeypatch.setattr(console, "_file", display)
    shown: list[str] = []

    def watch():
        try:
            while data := os.read(master, 4096):
                shown.append(data.decode(errors="replace"))
        except OSError:
            return  # closed

    threading.Thread(target=watch, daemon=True).start()

    def wait_for(text, after=0):
        until = time.monotonic() + 20
        while (found := "".join(shown).find(text, after)) < 0:
            assert time.monotonic() < until, f"no {text!r} in {''.join(shown)!r}"
            time.sleep(0.005)
        return found + len(text)

    yield (lambda text: os.write(master, text.encode())), wait_for, shown
    monkeypatch.undo()
    keyboard.close()
    display.close()
    os.close(master)


def test_a_conversation_at_a_terminal(monkeypatch):
    """Prompts, figures, Ctrl-C that stops the answer alone, Ctrl-C at the prompt, and Ctrl-D."""
    with screen(monkeypatch) as (types, wait_for, shown):
        terminal = converse(types, wait_for)
    assert contents(terminal.turn)[1] == "Hello\x1b[31m!"
    assert "\x1b[31m" not in "".join(shown)
    assert contents(terminal.turn)[3].startswith("all the time\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def converse(types, wait_for) -> Terminal:
    """A terminal after a user's conversation with it."""
    terminal = Terminal(Echo())
    assert terminal.interactive
    failures = []

    def user():
        try:
            wait_for("> ")
            types("Hello\x1b[31m\n")
            place = wait_for("0 read, 0 reused")
            wait_for("> ", place)
            types("endless\n")
            wait_for("all the time")
            os.kill(os.getpid(), signal.SIGINT)
            place = wait_for("; stopped")
            wait_for("> ", place)
            os.kill(os.getpid(), signal.SIGINT)
            types("\n")
            wait_for("Ctrl-D leaves")
            types("\x04")
        except BaseException as error:
            failures.append(error)
            types("\x04\x04")

    player = threading.Thread(target=user)
    player.start()
    terminal.run()
    player.join()
    assert not failures
    return terminal
