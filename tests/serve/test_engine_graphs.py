"""On a GPU a decode step is a captured graph: the same tokens as the plain step, in the same memory."""

from dataclasses import replace

import pytest
import torch

from retnet.models.decode.sampling import Sampling, SamplingParts
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from retnet.serve.speculation import Speculation
from tests.small_models import MTP, prompt, small_model

from .automaton import cycle

pytestmark = pytest.mark.gpu

REQUESTS = [
    Request(
        prompt(5 + 7 * n, n), 20 + n, Sampling(temperature=t, seed=n, logprobs=p, top_k=k, presence_penalty=0.1 * n)
    )
    for n, (t, p, k) in enumerate([(0, None, None), (0.8, 2, None), (0.8, None, 5), (0, 3, 3), (1.0, None, None)])
]


def outputs(model, graphs: bool, device="cuda", **options) -> list:
    engine = Engine(model.to(device), num_slots=4, max_tokens=128, prompt_chunk=16, graphs=graphs, **options)
    generations = [engine.submit(request) for request in REQUESTS]
    engine.run()
    return [(g.tokens, g.logprobs, g.finish_reason) for g in generations]


@pytest.mark.parametrize("stack", ["retention", "convolution", "hybrid"])
@pytest.mark.parametrize("speculation", [None, Speculation(3), Speculation(3, source="mtp")])
def test_captured_steps_give_the_bits_of_plain_ones(stack, speculation):
    model = small_model(stack, mtp=MTP)
    assert outputs(model, True, speculation=speculation) == outputs(model, False, speculation=speculation)


@pytest.mark.parametrize("speculation", [None, Speculation(3)])
def test_captured_steps_read_the_masks_of_their_grammars(speculation):
    """A grammar comes and goes in one slot; the requests beside it keep their bits."""
    model, results = small_model().cuda(), []
    for graphs in (True, False):
        engine = Engine(model, num_slots=4, prompt_chunk=16, graphs=graphs, speculation=speculation)
        grammars = [cycle([5, 9, 60, 31, 32]), None, cycle([7, 8]), None, None]
        generations = [
            engine.submit(replace(request, grammar=grammar))
            for request, grammar in zip(REQUESTS, grammars, strict=True)
        ]
        engine.run()
        results.append([(g.tokens, g.logprobs, g.finish_reason) for g in generations])
        assert generations[0].tokens == ([5, 9, 60, 31, 32] * 4)[:20]
        assert generations[2].tokens == ([7, 8] * 11)[:22]
    assert results[0] == results[1]
    assert results[0][1::2] == outputs(model, True, speculation=speculation)[1::2]
    assert results[0][4] == outputs(model, True, speculation=speculation)[4]


@pytest.mark.parametrize("stack", ["retention", "hybrid"])
def test_log_probabilities_of_a_prompt_are_those_of_a_full_forward(stack):
    model = small_model(stack).cuda()
    engine = Engine(model, num_slots=4, max_tokens=128, prompt_chunk=16)
    generation = engine.submit(Request(prompt(50), 0, prompt_logprobs=2))
    engine.run()
    with torch.no_grad():
        rows = model(torch.tensor([prompt(50)], device="cuda")).logits[0, :-1].log_softmax(-1)
    own = rows.gather(-1, torch.tensor(prompt(50)[1:], device="cuda")[:, None])[:, 0].tolist()
    assert [found.logprob for found in generation.prompt_logprobs[1:]] == pytest.approx(own, abs=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("speculation", [None, Speculation(3)])
def test_a_model_on_a_second_gpu_is_served_there(speculation):
    model = small_model("hybrid")
    on_first = outputs(model, True, "cuda:0", speculation=speculation)
    assert outputs(model, True, "cuda:1", speculation=speculation) == on_first


def test_memory_is_flat_once_warmed_up():
    model = small_model().cuda()
    engine = Engine(model, num_slots=4, prompt_chunk=16)
    engine.warmup(SamplingParts())
    generation = engine.submit(Request(prompt(40), None, Sampling(temperature=0)))
    for _ in range(20):
        engine.step()
    before = torch.cuda.memory_allocated()
    for _ in range(500):
        engine.step()
    assert torch.cuda.memory_allocated() == before
    assert generation.num_new >= 500


def test_capturing_a_graph_does_not_change_running_requests():
    model = small_model().cuda()
    engine = Engine(model, num_slots=4, prompt_chunk=16)
    first = engine.submit(REQUESTS[0])
    for _ in range(5):
        engine.step()
    engine.submit(REQUESTS[2])  # needs parts of sampling that were not captured yet
    engine.run()
    alone = Engine(model, num_slots=4, prompt_chunk=16)
    again = alone.submit(REQUESTS[0])
    alone.run()
    assert first.tokens == again.tokens
