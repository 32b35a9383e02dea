"""The server's log."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from retnet.serve.http.access.log import LOGGER, configure_log
from retnet.serve.http.settings import Settings
from tests.serve.http.server import tiny_server

SECRET = "a prompt that nobody else may read"


@pytest.fixture(autouse=True)
def _restored_loggers() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in (LOGGER, "uvicorn.error")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def lines_of(settings: Settings, quiet: bool = False) -> list[dict]:
    """The log of a server that was asked for a completion, a wrong one, a path that is not there, and its health."""
    stream = io.StringIO()
    configure_log(stream, quiet=quiet, prompts=settings.log_prompts)
    with tiny_server(settings) as client:

        @client.app.post("/v1/broken")
        async def broken() -> None:
            raise RuntimeError(SECRET)

        body = {"model": "tiny", "prompt": SECRET, "max_tokens": 3, "ignore_eos": True}
        assert client.post("/v1/completions", json=body, headers={"x-request-id": "mine.1"}).status_code == 200
        assert client.post("/v1/completions", json=body | {"temperature": SECRET}).status_code == 400
        client.get(f"/v1/{SECRET}")
        client.get("/health")
        assert client.post("/v1/broken", json={}).status_code == 500
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_request_is_one_line_with_its_times_and_tokens():
    done, wrong, lost, failure, broken = lines_of(Settings())
    assert done["event"] == "request"
    assert (done["route"], done["method"], done["status"], done["label"]) == ("/v1/completions", "POST", 200, "mine.1")
    assert (done["prompt_tokens"], done["new_tokens"], done["finish"]) == (len(SECRET) + 1, 3, ["length"])
    assert 0 <= done["queue_ms"] <= done["first_token_ms"] <= done["total_ms"]
    assert done["request"] not in ("mine.1", wrong["request"])
    assert (wrong["status"], wrong["error"]) == (400, "invalid_request_error")
    assert (lost["status"], lost["route"]) == (404, "none")
    assert (failure["level"], failure["exception"], failure["request"]) == ("error", "RuntimeError", broken["request"])
    assert any("in broken" in place or place.endswith(" broken") for place in failure["traceback"])
    assert (broken["status"], broken["error"]) == (500, "server_error")


def test_prompts_are_in_the_log_only_if_it_is_asked_for():
    assert SECRET not in json.dumps(lines_of(Settings()))
    done, *_ = lines_of(Settings(log_prompts=True))
    assert done["prompts"] == [SECRET]


def test_a_quiet_log_has_failures_only():
    assert [line["event"] for line in lines_of(Settings(), quiet=True)] == ["a request failed"]


def test_a_line_stays_one_line_whatever_is_in_it():
    stream = io.StringIO()
    configure_log(stream)
    logging.getLogger(LOGGER).warning("two\nlines \x1b[31m and a terminal's escape")
    (line,) = stream.getvalue().splitlines()
    assert "\x1b" not in line
    assert json.loads(line)["level"] == "warning"
