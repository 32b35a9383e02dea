"""`generate` of transformers, with our states as its cache: every way to decode, pad and continue."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import CompileConfig, TextStreamer

from retnet.models.hf import StateCache
from tests.small_models import hf_model

from .conftest import random_ids


def generate(model, ids, **options):
    return model.generate(ids, **{"max_new_tokens": 10, "do_sample": False, **options})


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 40, "temperature": 1.3, "num_return_sequences": 2},
    "beam": {"num_beams": 4, "num_return_sequences": 2},
    "beam sampled": {"num_beams": 3, "do_sample": True},
    "penalised": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_cache_changes_no_token(model, way):
    ids = random_ids(3, 7)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(generate(model, ids, use_cache=use_cache, **WAYS[way]))
    assert torch.equal(*results)
    assert len({tuple(row) for row in results[0][:, 7:].tolist()}) > 1, "rows that all say the same test little"


@pytest.mark.parametrize(
    ("side", "num_beams"),
    [
        ("left", 3),
        ("right", 1),
        pytest.param("left", 1, marks=pytest.mark.slow),
        pytest.param("right", 3, marks=pytest.mark.slow),
    ],
)
def test_a_padded_batch_equals_each_row_alone(model, side, num_beams):
    rows = [random_ids(1, length)[0] for length in (9, 4, 6)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side=side)
    together = generate(model, padded, attention_mask=mask, num_beams=num_beams)[:, 9:]
    for row, tokens in zip(rows, together):
        alone = generate(model, row[None], num_beams=num_beams)[0, len(row) :]
        assert torch.equal(tokens, alone)


def test_a_conversation_continues_from_a_filled_cache(model):
    """Several tokens into a filled cache, by `generate` and by `forward`; the cache is not read twice."""
    cache = StateCache()
    first = generate(model, random_ids(2, 6), past_key_values=cache)
    assert cache.get_seq_length() == first.shape[1] - 1, "the last token has not been read"
    more = torch.cat([first, random_ids(2, 5)], 1)
    assert torch.equal(generate(model, more, past_key_values=cache), generate(model, more, use_cache=False))


def test_a_cache_can_be_forked(model):
    ids, turns = random_ids(1, 8), random_ids(2, 4)
    with torch.no_grad():
        cache = model(ids, past_key_values=StateCache()).past_key_values
    for turn in turns:
        conversation = torch.cat([ids, turn[None]], 1)
        forked = generate(model, conversation, past_key_values=copy.deepcopy(cache))
        assert torch.equal(forked, generate(model, conversation, use_cache=False))


def test_a_prompt_read_in_chunks_gives_the_same_tokens(model):
    ids = random_ids(2, 11)
    assert torch.equal(generate(model, ids, prefill_chunk_size=4), generate(model, ids))


def test_embeddings_can_take_the_place_of_ids(retnet_model):
    ids = random_ids(2, 6)
    embedded = generate(retnet_model, None, inputs_embeds=retnet_model.get_input_embeddings()(ids))
    assert torch.equal(embedded, generate(retnet_model, ids)[:, 6:])


def test_a_row_that_has_ended_leaves_the_others_alone(model):
    ids = random_ids(3, 5)
    free = generate(model, ids)
    eos = int(free[0, 7])
    stopped = generate(model, ids, eos_token_id=eos)
    for row, expected in zip(stopped[:, 5:].tolist(), free[:, 5:].tolist()):
        end = expected.index(eos) + 1 if eos in expected else len(expected)
        assert row[:end] == expected[:end]
        assert set(row[end:]) <= {0}


def test_exhaustive_beam_search_finds_the_likeliest_continuation():
    """7 tokens, 4 new ones: 343 beams keep every prefix of 3, so that the result is the argmax over all 2401."""
    model = hf_model(vocab_size=7, bos_token_id=None)
    prompt = torch.tensor([[1, 4, 2]])
    continuations = torch.tensor(list(itertools.product(range(7), repeat=4)))
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(continuations), -1), continuations], 1)).logits[:, 2:-1]
    scores = logits.double().log_softmax(-1).gather(-1, continuations[..., None]).sum((1, 2))
    found = generate(model, prompt, max_new_tokens=4, min_new_tokens=4, num_beams=343, length_penalty=0.0)
    assert found[0, 3:].tolist() == continuations[scores.argmax()].tolist()
    greedy = generate(model, prompt, max_new_tokens=4)
    assert greedy.tolist() != found.tolist(), "greedy search would have done"


def test_generation_streams(retnet_model):
    pieces = []

    class Collector(TextStreamer):
        def __init__(self):
            super().__init__(tokenizer=None)

        def put(self, value):
            pieces.extend(value.flatten().tolist())

        def end(self):
            pieces.append("end")

    result = generate(retnet_model, random_ids(1, 5), streamer=Collector())
    assert pieces == [*result[0].tolist(), "end"]


def test_a_model_without_states_generates_without_a_cache():
    from dataclasses import replace

    from retnet.models.hf import RetNetConfig, RetNetForCausalLM

    config = hf_model().model.config
    layers = tuple(replace(layer, keeps_state=False) for layer in config.layers)
    stateless = RetNetForCausalLM(RetNetConfig.of(replace(config, layers=layers))).eval()
    assert generate(stateless, random_ids(1, 5), pad_token_id=0).shape == (1, 15)


@pytest.mark.parametrize("kind", ["quantized", "offloaded"])
def test_an_unsupported_kind_of_cache_is_refused(retnet_model, kind):
    with pytest.raises(ValueError, match=f"cache_implementation is '{kind}'; accepted: None, 'dynamic', 'static'"):
        generate(retnet_model, random_ids(1, 5), cache_implementation=kind)


def test_assisted_generation_is_refused(retnet_model):
    with pytest.raises(ValueError, match="stateful"):
        generate(retnet_model, random_ids(1, 5), prompt_lookup_num_tokens=3)


def test_a_growing_state_is_refused_for_a_static_cache():
    with pytest.raises(ValueError, match="AttentionState grows with the tokens"):
        generate(hf_model("hybrid"), random_ids(1, 5), cache_implementation="static")


@pytest.mark.slow
def test_compiled_generation_gives_the_same_without_a_graph_break(retnet_model):
    ids = random_ids(2, 6)
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True
    expected = generate(retnet_model, ids)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=2):
        compiled = generate(retnet_model, ids, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(compiled, expected)
