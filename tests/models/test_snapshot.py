"""Sessions continued in another engine or process with the same tokens; damaged or incomplete files refused."""

import os
import signal
import subprocess
import sys
import textwrap
from array import array
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from retnet.models.decode.sampling import Sampling
from retnet.models.directory import save_model
from retnet.models.fingerprint import fingerprint
from retnet.models.snapshot import Snapshot, SnapshotFile
from retnet.models.snapshot_file import digest
from retnet.models.states import ModelState
from retnet.serve.engine import Engine
from retnet.serve.request import Refused, Request
from retnet.system import files
from tests.paths import ROOT
from tests.serve.test_engine import alone, engine_of, facts
from tests.small_models import prompt, small_model

SAMPLED = Sampling(temperature=0.8, seed=5, logprobs=2, repetition_penalty=1.2)


def session(model, new_tokens: int = 9):
    """An engine with a request in the middle of decoding."""
    engine = engine_of(model)
    generation = engine.submit(Request(prompt(19), 60, SAMPLED))
    while generation.num_new < new_tokens:
        engine.step()
    return engine, generation


def test_a_restored_session_continues_with_the_same_bits_without_prefill(any_model, tmp_path):
    engine, generation = session(any_model)
    error = engine.snapshot(generation).save(tmp_path / "session.safetensors")
    assert error == 0
    engine.run()
    other = engine_of(any_model)
    restored = other.submit(Request([], 51, SAMPLED), Snapshot.load(tmp_path / "session.safetensors"))
    other.run()
    assert restored.tokens == generation.tokens[9:]
    assert restored.logprobs == generation.logprobs[9:]
    assert other.stats().prompt_tokens == 0


def test_a_session_continues_in_another_process(small, tmp_path):
    engine, generation = session(small)
    engine.snapshot(generation).save(tmp_path / "session.safetensors")
    engine.run()
    save_model(small, tmp_path / "model")
    code = textwrap.dedent(f"""
        from retnet.models.directory import load_model
        from retnet.serve.engine import Engine
        from retnet.serve.request import Request
        from retnet.models.decode.sampling import Sampling
        from retnet.models.snapshot import Snapshot
        engine = Engine(load_model({str(tmp_path / "model")!r}), num_slots=4)
        snapshot = Snapshot.load({str(tmp_path / "session.safetensors")!r})
        print(list(engine.stream(Request([], 51, {SAMPLED!r}), snapshot)))
        left_open = engine.stream(Request([1], None))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.strip() == str(generation.tokens[9:]), done.stderr
    assert "Exception ignored" not in done.stderr, "a stream that is left open at exit"


def test_more_prompt_after_a_snapshot_is_one_conversation(any_model):
    first = alone(any_model, Request(prompt(9), 7, Sampling(temperature=0), keep_state=True))
    question = prompt(6, seed=1)
    engine = engine_of(any_model)
    second = engine.submit(Request(question, 8, Sampling(temperature=0)), first.snapshot)
    engine.run()
    whole = alone(any_model, Request(prompt(9) + first.tokens + question, 8, Sampling(temperature=0)))
    assert second.tokens == whole.tokens


def test_forks_continue_independently(any_model):
    engine, generation = session(any_model)
    at = generation.num_new
    twin = engine.fork(generation, Request([], 51, SAMPLED))
    other = engine.fork(generation, Request([], 51, Sampling(temperature=0.8, seed=6)))
    engine.run()
    assert twin.tokens == generation.tokens[at:]
    assert other.tokens != generation.tokens[at:]
    assert facts(generation) == facts(alone(any_model, generation.request))


def test_bfloat16_files_are_smaller_and_name_their_error(small, tmp_path):
    engine, generation = session(small)
    snapshot = engine.snapshot(generation)
    snapshot.save(tmp_path / "wide")
    error = snapshot.save(tmp_path / "narrow", "bfloat16")
    assert 1e-4 < error < 2**-8
    assert (tmp_path / "narrow").stat().st_size < 0.6 * (tmp_path / "wide").stat().st_size
    loaded = Snapshot.load(tmp_path / "narrow")
    assert loaded.rounding_error == error
    for a, b in zip(loaded.state, snapshot.state):
        assert a.memory.dtype == torch.float32
        assert float((a.memory - b.memory).norm() / b.memory.norm()) <= 1.0001 * error
    with pytest.raises(ValueError, match="dtype is 'float16'; accepted: float32, bfloat16"):
        snapshot.save(tmp_path / "other", "float16")


def test_texts_and_bytes_are_kept_with_a_snapshot_and_covered_by_its_digest(small, tmp_path):
    engine, generation = session(small)
    snapshot, path = engine.snapshot(generation), tmp_path / "session"
    extra, attachment = {"owner": "Zoë", "model": "of extra"}, b"\x00any bytes"
    snapshot.save(path, extra=extra, attachment=attachment)
    loaded = SnapshotFile.load(path)
    assert (loaded.extra, loaded.attachment) == (extra, attachment)
    assert loaded.snapshot.tokens == generation.seen
    assert loaded.snapshot.model == engine.fingerprint
    assert Snapshot.load(path).tokens == generation.seen
    data = path.read_bytes()
    for old, new in ((b"of extra", b"of Extra"), (attachment, b"\x00Any bytes")):
        assert old in data
        path.write_bytes(data.replace(old, new))
        with pytest.raises(ValueError, match="was changed since it was written"):
            SnapshotFile.load(path)
    snapshot.save(path)
    assert (SnapshotFile.load(path).extra, SnapshotFile.load(path).attachment) == ({}, b"")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_pieces_of_a_snapshot_are_the_bytes_of_its_file(any_model, tmp_path, dtype):
    engine, generation = session(any_model)
    snapshot = engine.snapshot(generation)
    snapshot.save(tmp_path / "session", dtype, attachment=b"12345")
    pieces = [bytes(piece) for piece in snapshot.pieces(dtype, attachment=b"12345")]
    assert b"".join(pieces) == (tmp_path / "session").read_bytes()
    assert len(pieces) > len(list(snapshot.state))
    with safe_open(tmp_path / "session", "pt") as file:
        assert set(file.keys()) == {*snapshot.state.named_tensors(), "tokens", "attachment"}


def test_a_snapshot_of_another_model_is_refused(small):
    engine, generation = session(small)
    snapshot = engine.snapshot(generation)
    trained = small_model()
    with torch.no_grad():
        trained.layers[1].mixer.v_proj.weight.mul_(1.001)
    for other in (trained, small_model(dtype="float64"), small_model(logit_soft_cap=30.0)):
        with pytest.raises(Refused, match="the snapshot is of another model"):
            Engine(other, num_slots=1).submit(Request([1], 5), snapshot)
    assert fingerprint(small_model()) == fingerprint(small)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.999])
def test_truncated_files_are_refused(small, tmp_path, share):
    engine, generation = session(small)
    path = tmp_path / "session"
    engine.snapshot(generation).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        Snapshot.load(path)


def test_files_that_were_changed_are_refused(small, tmp_path):
    engine, generation = session(small)
    path = tmp_path / "session"
    engine.snapshot(generation).save(path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for place in (header, (header + len(data)) // 2, len(data) - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match="was changed since it was written"):
            Snapshot.load(path)
    model = engine.fingerprint.encode()
    path.write_bytes(data.replace(model, model[:-1] + (b"0" if model[-1:] != b"0" else b"1")))
    with pytest.raises(ValueError, match="was changed since it was written"):
        Snapshot.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not a snapshot"):
        Snapshot.load(path)
    path.write_bytes(data)
    assert "tokens" in load_file(path)
    assert Snapshot.load(path).tokens == generation.seen


def test_a_writer_killed_in_the_middle_leaves_the_old_file_whole(small, tmp_path):
    engine, generation = session(small)
    path = tmp_path / "session"
    engine.snapshot(generation).save(path)
    old = path.read_bytes()
    writer = os.fork()
    if not writer:
        files.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        try:
            loaded = Snapshot.load(path)
            loaded.tokens.append(1)
            loaded.save(path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == old
    assert len(os.listdir(tmp_path)) == 2, "the staged file is left beside it"
    engine.snapshot(generation).save(path)
    assert Snapshot.load(path).tokens == generation.seen


def test_a_request_without_a_state_has_no_snapshot(small):
    engine = engine_of(small)
    generation = engine.submit(Request(prompt(3), 2))
    with pytest.raises(ValueError, match="the request is waiting; accepted: one that is decoding"):
        engine.snapshot(generation)
    engine.run()
    with pytest.raises(ValueError, match="the request is finished"):
        engine.snapshot(generation)


def test_the_tokens_of_a_snapshot_are_a_copy_that_was_checked(small):
    engine, generation = session(small)
    snapshot = engine.snapshot(generation)
    given = array("i", snapshot.tokens)
    copied = replace(snapshot, tokens=given)
    given[0] += 1
    assert copied.tokens == snapshot.tokens
    copied.tokens.append(1)
    given[-1] = -1
    for wrong in (given, array("q", [2**31] * len(given)), array("d", given), array("i")):
        with pytest.raises(ValueError, match=r"tokens|state is at position"):
            replace(snapshot, tokens=wrong)


def test_penalties_continue_with_the_session(small, tmp_path):
    sampling = Sampling(temperature=0, presence_penalty=1.5, frequency_penalty=0.3)
    engine = engine_of(small)
    generation = engine.submit(Request(prompt(9), 30, sampling))
    while generation.num_new < 12:
        engine.step()
    engine.snapshot(generation).save(tmp_path / "session")
    engine.run()
    restored = engine.submit(Request([], 18, sampling), Snapshot.load(tmp_path / "session"))
    engine.run()
    assert restored.tokens == generation.tokens[12:]


def test_one_weight_that_differs_makes_another_model():
    model, other = small_model(vocab_size=5000), small_model(vocab_size=5000)
    assert fingerprint(model) == fingerprint(other)
    with torch.no_grad():
        other.embedding.weight[3, 1] += 1e-3
    assert fingerprint(model) != fingerprint(other)


def test_a_loaded_snapshot_does_not_depend_on_its_file(small, tmp_path):
    engine, generation = session(small)
    snapshot = engine.snapshot(generation)
    snapshot.save(tmp_path / "session")
    loaded = Snapshot.load(tmp_path / "session")
    with (tmp_path / "session").open("r+b") as file:
        file.seek(0, 2)
        end = file.tell()
        file.seek(end // 2)
        file.write(b"\x7f" * (end - end // 2))
    for a, b in zip(loaded.state.named_tensors().values(), snapshot.state.named_tensors().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fact", ["dtypes", "model", "tokens", "rounding_error", "position", "output_start"])
def test_a_file_without_an_entry_in_its_metadata_is_refused_even_if_its_hashes_match(small, tmp_path, fact):
    engine, generation = session(small)
    path = tmp_path / "session"
    engine.snapshot(generation).save(path)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    metadata.pop("content")
    for changed in ({}, {fact: "999"} if fact in ("tokens", "position") else None):
        if changed is None:
            continue
        facts_ = {name: value for name, value in metadata.items() if name != fact} | changed
        tensors = load_file(path)
        save_file(tensors, tmp_path / "forged", {**facts_, "content": digest(tensors, facts_)})
        with pytest.raises(ValueError, match="not a whole snapshot"):
            Snapshot.load(tmp_path / "forged")


def test_states_of_other_shapes_are_refused(small, tmp_path):
    engine, generation = session(small)
    snapshot = engine.snapshot(generation)
    narrow = ModelState(tuple(replace(layer, memory=layer.memory[:, :, :1]) for layer in snapshot.state))
    for state in (narrow, ModelState(tuple(snapshot.state)[:1])):
        with pytest.raises(Refused, match="shapes"):
            engine.submit(Request([1], 5), replace(snapshot, state=state))
    with pytest.raises(FileNotFoundError, match="not a file"):
        Snapshot.load(tmp_path)


def test_a_snapshot_that_changes_while_its_request_waits_fails_the_request(small):
    snapshot = alone(small, Request(prompt(9), 4, Sampling(temperature=0), keep_state=True)).snapshot
    engine = engine_of(small)
    kept, waiting = engine.submit(Request(prompt(5), 4)), engine.submit(Request([1], 4), snapshot)
    for layer in snapshot.state:
        layer.position.fill_(50)
    engine.run()
    assert kept.finish_reason == "length"
    assert waiting.finish_reason == "failed"
    assert "while it waited, the snapshot was changed: state is at position [50]" in waiting.error
