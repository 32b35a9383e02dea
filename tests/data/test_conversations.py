"""Conversations in jsonl: what is read, what is refused with its line, and the corpus that they become."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from retnet.data.chat_corpus import ChatCorpus, open_chats
from retnet.data.chat_template import find_chat_template
from retnet.data.conversations import conversation_files, read_conversations
from retnet.data.readers import DataError
from retnet.data.tokenizer import ByteTokenizer

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def write(path, *records):
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def corpus_of(path, length=None) -> ChatCorpus:
    template = find_chat_template(None, ByteTokenizer(), None, for_training=True)
    return open_chats(str(path), conversation_files(str(path)), template, None, length)


def test_what_a_conversation_may_hold(tmp_path):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
        {"role": "user", "content": "hi", "name": "eve"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}, {"function": {"name": "g"}}
        ]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": "ho", "weight": 0},
    ]  # fmt: skip
    record = {"messages": messages, "tools": None, "id": 3, "chat_template_kwargs": {"enable_thinking": False}}
    ((line, chat),) = read_conversations(write(tmp_path / "a.jsonl", record))
    assert line == 1
    assert chat.messages[0] == {"role": "system", "content": "a\nb"}
    assert chat.messages[1] == messages[1]
    assert [call["function"]["arguments"] for call in chat.messages[2]["tool_calls"]] == [{"x": 1}, {}]
    assert chat.messages[3]["content"] == ""
    assert "weight" not in chat.messages[4]
    assert list(chat.learned) == [False, False, True, False, False]
    assert chat.options == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "fields text; accepted: an object with 'messages'"),
        ([1], "a JSON list"),
        ({"messages": []}, "a list of 1 to 16,384 messages"),
        ({"messages": "hi"}, 'messages is "hi"'),
        ({"messages": [{"role": "human", "content": "a"}]}, r"messages\[0\] is of role 'human'; accepted"),
        ({"messages": [{"content": "a"}]}, r"accepted: an object with role"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no content; accepted: text"),
        ({"messages": [TURNS[0], {"role": "assistant"}]}, r"\[1\] has no content; accepted: text, or tool_calls"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, r"content is \{\"a\": 1\}; accepted: text, or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "accepted: text, or a list"),
        ({"messages": [{**TURNS[0], "weight": 1}]}, "weight 1 and role user; accepted: 0 or 1"),
        ({"messages": [{**TURNS[1], "weight": 0.5}]}, "weight 0.5"),
        ({"messages": [{**TURNS[1], "tool_calls": [{"name": "f"}]}]}, "accepted: a list of {function"),
        ({"messages": [{**TURNS[0], "tool_calls": [{}]}]}, "tool_calls and role user"),
        ({"messages": [{**TURNS[1], "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "not JSON"),
        ({"messages": [{**TURNS[1], "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]}, "no object"),
        ({"messages": TURNS, "tools": {"a": 1}}, "tools is"),
        ({"messages": TURNS, "chat_template_kwargs": [1]}, "chat_template_kwargs is"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_named_with_its_line(tmp_path, record, message):
    file = write(tmp_path / "a.jsonl", {"messages": TURNS}, record)
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{message}"):
        list(read_conversations(file))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b'{"messages": 1, "messages": 2}', "not JSON: two fields named 'messages'"),
        (b'{"messages": NaN}', "not JSON: NaN is no number"),
        (b'{"messages": "\xff"}', "not UTF-8: invalid start byte 0xff"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + line + b"\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {message}"):
        conversation_files(str(tmp_path / "a.jsonl"))


def test_sources_of_conversations_are_told_from_other_sources(tmp_path):
    chats = write(tmp_path / "a.jsonl", {"messages": TURNS})
    packed = write(tmp_path / "b.ndjson.gz", {"messages": TURNS}, {"messages": TURNS * 2})
    assert [f.path for f in conversation_files(str(chats))] == [chats]
    assert len(list(read_conversations(packed))) == 2
    assert [f.name for f in conversation_files(str(tmp_path))] == ["a.jsonl", "b.ndjson.gz"]
    texts = write(tmp_path / "c.jsonl", {"text": "a"})
    assert conversation_files(str(texts)) == ()
    (tmp_path / "d.txt").write_text('{"messages": []}')
    assert conversation_files(str(tmp_path / "d.txt")) == ()
    assert conversation_files(str(tmp_path)) == (), "a folder with text beside them"
    assert conversation_files(str(tmp_path / "none")) == ()


def test_the_corpus_of_conversations(tmp_path):
    file = write(tmp_path / "a.jsonl", *({"messages": [TURNS[0], {**TURNS[1], "content": "é" * n}]} for n in (1, 2, 3)))
    corpus = corpus_of(file)
    prompt = [256, *b"User:\nhi\nAssistant:\n"]
    assert corpus.tokens(1).tolist() == [*prompt, *("éé".encode()), 256]
    assert corpus.learned(1).tolist() == [False] * len(prompt) + [True] * 5
    assert corpus.tokens(1, 3, 6).tolist() == prompt[3:6]
    assert corpus.prompt(2, 4).tolist() == prompt
    assert (corpus.num_targets, corpus.num_bytes) == (3 + 5 + 7, 2 + 4 + 6)
    assert corpus.describe(2) == f"{file}:3"
    assert corpus.uncut
    train, valid = corpus.split(0.01)
    assert (len(train), len(valid)) == (2, 1)
    assert len({corpus.fingerprint, train.fingerprint, valid.fingerprint}) == 3
    assert corpus_of(file).fingerprint == corpus.fingerprint


def test_conversations_are_cut_at_the_end_of_a_row_without_an_end_of_their_own(tmp_path):
    file = write(tmp_path / "a.jsonl", {"messages": TURNS * 3}, {"messages": TURNS}, {"messages": [TURNS[0]]})
    whole, cut = corpus_of(file), corpus_of(file, 40)
    assert (whole.cut_short, whole.without_answer) == (0, 1)
    assert (cut.cut_short, cut.without_answer) == (1, 1)
    assert cut.tokens(0).tolist() == whole.tokens(0)[:40].tolist()
    assert cut.learned(0).tolist() == whole.learned(0)[:40].tolist()
    assert cut.learned(0).sum() == 3, "of the first answer alone"
    with pytest.raises(DataError, match="has an answer to learn in its first 10 tokens"):
        corpus_of(file, 10)


def test_copies_of_a_conversation_are_on_one_side_and_one_alone_cannot_be_split(tmp_path):
    other = [TURNS[0], {**TURNS[1], "content": "he"}]
    file = write(tmp_path / "a.jsonl", *[{"messages": TURNS}] * 3, {"messages": other})
    sides = corpus_of(file).split(0.5)
    kinds = [{tuple(np.array(side.tokens(i))) for i in range(len(side))} for side in sides]
    assert [len(kind) for kind in kinds] == [1, 1]
    with pytest.raises(ValueError, match=r"one conversation, too few .* accepted: more, or a file"):
        corpus_of(write(tmp_path / "b.jsonl", *[{"messages": TURNS}] * 3)).split(0.5)


def test_tools_that_a_template_would_leave_out_are_refused(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: tools in a conversation, and the chat template plain writes none"
    ):
        corpus_of(write(tmp_path / "a.jsonl", {"messages": TURNS, "tools": tools}))
