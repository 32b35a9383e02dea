from __future__ import annotations

import json

import pytest

from retnet.cli.chat_local import LocalBackend
from retnet.cli.chat_turn import ChatError, Turn
from retnet.data.chat_template import find_chat_template
from retnet.data.tokenizer import ByteTokenizer
from retnet.models.decode.sampling import Sampling
from retnet.serve.request import Request
from tests.small_models import BYTES, small_model

TOKENIZER = ByteTokenizer()
LETTERS = dict.fromkeys(b"abcdefgh", 60.0)


@pytest.fixture
def backend():
    return make()


def make(max_tokens=8, stack="retention", **sampling) -> LocalBackend:
    options = {"seed": 1, "logit_bias": LETTERS, **sampling}
    template = find_chat_template(None, TOKENIZER, None)
    return LocalBackend(small_model(stack, **BYTES), TOKENIZER, template, Sampling(**options), max_tokens)


def say(backend, turn, text):
    answer = backend.ask(turn, text)
    return "".join(answer), answer


def test_the_next_turn_reads_only_what_is_new(backend):
    first, one = say(backend, Turn(), "Hello")
    second, two = say(backend, one.turn, "More")
    assert one.figures.read == 1 + len("User:\nHello\nAssistant:\n")
    assert (one.figures.reused, one.figures.new_tokens, one.figures.finish) == (0, 8, "length")
    assert two.figures.reused == one.turn.tokens - 1
    assert two.figures.read == len("\nUser:\nMore\nAssistant:\n")
    context = f"User:\nHello\nAssistant:\n{first}\nUser:\nMore\nAssistant:\n"
    alone = make()
    generation = alone.engine.submit(Request([256, *context.encode()], 8, backend.sampling))
    alone.engine.run()
    assert second == TOKENIZER.decode(generation.tokens)
    assert [message["content"] for message in two.turn.messages] == ["Hello", first, "More", second]


def test_two_conversations_from_one_turn_do_not_touch(backend):
    _, one = say(backend, Turn(), "Hello")
    left, _ = say(backend, one.turn, "left")
    say(backend, backend.fork(one.turn), "right")
    assert say(backend, one.turn, "left")[0] == left


def test_a_stopped_answer_keeps_what_was_written(backend):
    backend.max_tokens = 1000
    answer = backend.ask(Turn(), "Hello")
    pieces = []
    for piece in answer:
        pieces.append(piece)
        if len(pieces) == 5:
            answer.stop()
    assert answer.turn.messages[-1]["content"] == "".join(pieces)
    assert answer.figures.finish == "cancelled"
    _, more = say(backend, answer.turn, "More")
    assert more.figures.reused == answer.turn.tokens - 1
    assert backend.engine.idle or backend.engine.stats().running == 0


def test_an_answer_that_is_stopped_while_it_reads_changes_nothing(backend):
    answer = backend.ask(Turn(), "x" * 2000)
    answer.stop()
    assert list(answer) == []
    assert answer.turn is answer.before


def test_an_answer_that_nobody_reads_to_its_end_frees_the_slot(backend):
    backend.max_tokens = None
    pieces = iter(backend.ask(Turn(), "Hello"))
    next(pieces)
    pieces.close()
    assert backend.engine.stats().running == 0


def test_a_saved_conversation_goes_on_as_the_one_in_memory(backend, tmp_path):
    _, one = say(backend, Turn(), "Hello")
    file = tmp_path / "talk.safetensors"
    assert "tokens" in backend.save(one.turn, file)
    other = make()
    loaded = other.load(file)
    assert loaded.messages == one.turn.messages
    text, again = say(other, loaded, "More")
    assert (text, again.figures.reused) == (say(backend, one.turn, "More")[0], one.turn.tokens - 1)


def test_files_that_are_no_conversation_of_this_model_are_refused(backend, tmp_path):
    _, one = say(backend, Turn(), "Hello")
    file = tmp_path / "talk.safetensors"
    with pytest.raises(ChatError, match="say something first"):
        backend.save(Turn(), file)
    backend.save(one.turn, file)
    with pytest.raises(ChatError, match="is of another model"):
        make(stack="gated").load(file)
    one.turn.state.save(file)
    with pytest.raises(ChatError, match="holds no messages"):
        backend.load(file)
    one.turn.state.save(file, attachment=json.dumps([{"role": "user"}]).encode())
    with pytest.raises(ChatError, match="holds no messages"):
        backend.load(file)
    file.write_bytes(b"no")
    with pytest.raises(ChatError, match="not a safetensors file"):
        backend.load(file)
    with pytest.raises(FileNotFoundError):
        backend.load(tmp_path / "nowhere")


def test_a_conversation_that_does_not_begin_with_the_state_says_so(backend):
    _, one = say(backend, Turn(), "Hello")
    edited = Turn(({"role": "user", "content": "Hullo"}, *one.turn.messages[1:]), one.turn.state, one.turn.tokens)
    _, two = say(backend, edited, "More")
    assert two.figures.reused == 0
    assert "begin the conversation" in str(two.figures)


def test_an_answer_ends_where_another_turn_begins():
    spelling = b"\nUser:"
    backend = make(max_tokens=40, logit_bias={}, temperature=0)
    backend.sampling = Sampling(seed=1, logit_bias=dict.fromkeys(spelling, 100.0))
    text, answer = say(backend, Turn(), "Hello")
    assert "\nUser:" not in text
    assert answer.figures.finish in ("length", "stop_string")


def test_facts_compare_the_state_with_a_cache(backend):
    _, one = say(backend, Turn(), "Hello")
    tokens, state = backend.facts(one.turn)
    assert f"{one.turn.tokens} tokens in 2 messages" in tokens
    assert "KV cache" in state


def test_a_context_that_is_full_is_an_error_and_not_the_end():
    backend = make(max_tokens=100, stack="hybrid")
    with pytest.raises(ChatError):
        backend.ask(Turn(), "x" * 8192)
    assert say(backend, Turn(), "Hello")[0]
