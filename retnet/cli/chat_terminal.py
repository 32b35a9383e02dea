"""The terminal of `retnet chat`: reads messages and commands, writes answers as they come.

Ctrl-C stops an answer and not the program. Where standard input or output is no terminal, there are no prompts, colours
or figures: one line is one message, and the output is the answers.
"""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from rich.markup import escape

from retnet.cli._common import console, errors, printable, write_text
from retnet.cli.chat_turn import Answer, Backend, ChatError, Turn
from retnet.system.outputs import check_new_file
from retnet.system.suggest import choices

KEPT_STATES = 4  # of a conversation, for /undo; older turns are read again
BLOCK = '"""'  # before and after a message of several lines
HELP = """\
/fork            begin a second conversation that is the same so far, and go on in it
/go [N]          go on in conversation N; without N, list all
/undo            take back the last message and its answer
/save FILE       write the conversation and its state into a file
/load FILE       go on with the conversation in a file
/system [TEXT]   begin a new conversation with this system message; without TEXT, show it
/reset           begin a new conversation
/stats           tokens, state and times
/help            this list
/quit            leave; so does Ctrl-D
End a line with \\ to go on in the next one, or write several lines between two lines of \"\"\".
Ctrl-C stops an answer; what was written stays."""


class Leave(Exception):
    """The user wants to leave."""


class Terminal:
    """A conversation at a terminal.

    system: the first message of new conversations, if there is one.
    """

    def __init__(self, backend: Backend, system: str | None = None):
        self.backend, self.system = backend, system
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._conversations: list[list[Turn]] = [[self._new()]]
        self._current = 0
        self._last: Answer | None = None
        self._own_files: set[Path] = set()  # that this chat has saved or loaded
        self._commands: dict[str, Callable[[str], None]] = {
            name: getattr(self, f"_{name}")
            for name in ("fork", "go", "undo", "save", "load", "system_message", "reset", "stats", "help", "quit")
        }
        self._commands["system"] = self._commands.pop("system_message")
        self._commands["exit"] = self._commands["quit"]

    @property
    def turn(self) -> Turn:
        """The conversation up to its last answer."""
        return self._turns[-1]

    @property
    def _turns(self) -> list[Turn]:
        return self._conversations[self._current]

    def run(self) -> None:
        """Read and answer until the input ends."""
        if self.interactive:
            with suppress(ImportError):  # lines can be edited, and earlier ones come back
                import readline  # noqa: F401
        while True:
            try:
                text = self._read()
            except KeyboardInterrupt:
                self._say("\n[dim]/quit or Ctrl-D leaves[/]")
                continue
            except EOFError:
                return
            try:
                self.take(text)
            except Leave:
                return
            except (ChatError, OSError) as error:
                errors.print(f"[bold red]error:[/] {escape(_words(error))}", soft_wrap=True, highlight=False)

    def take(self, text: str) -> None:
        """Answer a message, or carry out a command. Raises ChatError, OSError, and Leave."""
        if not text.strip():
            return
        if text.startswith("//"):
            text = text[1:]
        elif text.startswith("/"):
            name, _, rest = text[1:].partition(" ")
            command = self._commands.get(name.strip())
            if command is None:
                accepted = choices(f"/{name}", (f"/{each}" for each in self._commands))
                raise ChatError(f"there is no command /{name}; {accepted}")
            return command(rest.strip())
        self._answer(text)

    def _answer(self, text: str) -> None:
        answer = self._last = self.backend.ask(self.turn, text)
        ends_line = True
        try:
            with _on_interrupt(answer.stop):
                for piece in answer:
                    shown = printable(piece) if self.interactive else piece
                    write_text(shown)
                    ends_line = shown.endswith("\n")
        finally:
            if not ends_line or not self.interactive:
                write_text("\n")
        if answer.turn is answer.before:
            self._say("[dim]stopped before the answer began[/]")
            return
        self._turns[-1] = self.backend.past(self.turn)
        self._turns.append(answer.turn)
        for old in range(len(self._turns) - KEPT_STATES):
            self._turns[old] = Turn(self._turns[old].messages)
        if self.interactive:
            self._say(f"[dim]{escape(str(answer.figures))}[/]")

    def _fork(self, _: str) -> None:
        self._conversations.append([*map(self.backend.past, self._turns[:-1]), self.backend.fork(self.turn)])
        origin, self._current = self._current, len(self._conversations) - 1
        self._say(f"[dim]conversation {self._current + 1}, a copy of {origin + 1}; /go {origin + 1} goes back[/]")

    def _go(self, number: str) -> None:
        count = len(self._conversations)
        if not number:
            for i, turns in enumerate(self._conversations):
                last = next((m["content"] for m in reversed(turns[-1].messages) if m["role"] == "user"), "")
                here = "*" if i == self._current else " "
                self._say(f"{here} {i + 1}  {len(turns[-1].messages)} messages  {escape(_short(last))}")
            return
        if not number.isdecimal() or not 1 <= int(number) <= count:
            raise ChatError(f"there is no conversation {number}; accepted: 1 to {count}")
        self._current = int(number) - 1
        self._say(f"[dim]conversation {number}, {len(self.turn.messages)} messages[/]")

    def _undo(self, _: str) -> None:
        if len(self._turns) < 2:
            raise ChatError("there is nothing to take back")
        taken = self._turns.pop()
        self._say(f"[dim]taken back: {escape(_short(taken.messages[len(self.turn.messages)]['content']))}[/]")

    def _save(self, file: str) -> None:
        path = _path(file)
        if path.absolute() not in self._own_files:  # a conversation is saved into its own file again
            check_new_file(path, accepted="another file, or one that this chat saved or loaded")
        self._say(f"[dim]{escape(str(path))}: {self.backend.save(self.turn, path)}[/]")
        self._own_files.add(path.absolute())

    def _load(self, file: str) -> None:
        path = _path(file)
        self.open(path)
        self._say(f"[dim]{escape(str(path))}: {self.turn.tokens} tokens, {len(self.turn.messages)} messages[/]")

    def open(self, path: Path) -> None:
        """Replace the current conversation by that of a file."""
        self.go_on_with(self.backend.load(path))
        self._own_files.add(path.absolute())

    def go_on_with(self, turn: Turn) -> None:
        """Replace the current conversation."""
        self._conversations[self._current] = [turn]

    def _system_message(self, text: str) -> None:
        if not text:
            self._say(escape(self.system) if self.system else "[dim]there is no system message[/]")
            return
        self.system = text
        self._reset("")

    def _reset(self, _: str) -> None:
        self.go_on_with(self._new())
        self._say("[dim]a new conversation[/]")

    def _new(self) -> Turn:
        return Turn(({"role": "system", "content": self.system},) if self.system else ())

    def _stats(self, _: str) -> None:
        for line in self.backend.facts(self.turn):
            self._say(escape(line))
        if self._last is not None:
            self._say(escape(f"the last answer: {self._last.figures}"))

    def _help(self, _: str) -> None:
        self._say(escape(HELP))

    def _quit(self, _: str) -> None:
        raise Leave

    def _say(self, text: str) -> None:
        """What is not part of an answer."""
        (console if self.interactive else errors).print(text, highlight=False, soft_wrap=True)

    def _read(self) -> str:
        """The next message or command. Raises EOFError at the end of the input."""
        line = self._line("> ")
        if line.strip() == BLOCK:
            lines = []
            while (line := self._line(". ")).strip() != BLOCK:
                lines.append(line)
            text = "\n".join(lines)
            return f"/{text}" if text.startswith("/") else text  # no command
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self._line(". ")
        return line

    def _line(self, prompt: str) -> str:
        if self.interactive:
            line = input(prompt)
        else:
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            line = line.removesuffix("\n").removesuffix("\r")
        return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@contextmanager
def _on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at the first Ctrl-C; the second one interrupts as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _path(file: str) -> Path:
    """The path that a command names, with or without quotes."""
    try:
        words = shlex.split(file)
    except ValueError as error:
        raise ChatError(f"{file}: {error}") from error
    if len(words) != 1:
        raise ChatError(f"{len(words)} files are named; accepted: one, in quotes if it has spaces")
    return Path(words[0]).expanduser()


def _short(text: str) -> str:
    line = " ".join(printable(text).split())
    return line if len(line) <= 60 else line[:59] + "…"


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__
