"""The command line as the tests call it."""

from __future__ import annotations

import pytest

from retnet.cli import main


def run(*words: object) -> int:
    """The exit code of `retnet` with these arguments."""
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return int(done.value.code or 0)


def wrong_input(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message of a command line that has to be refused."""
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split())
