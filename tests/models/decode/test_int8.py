"""Weight-only int8: the engine gives the same tokens as the quantised model's own modules."""

from unittest.mock import patch

import pytest
import torch

from retnet.models.decode.int8 import int8_parts, quantize_int8_
from retnet.models.decode.sampling import Sampling
from retnet.models.fingerprint import fingerprint
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from tests.small_models import LATENT, PAPER, prompt, small_model

pytest.importorskip("torchao")


BFLOAT16 = 0.1  # nats, of products whose inputs and results are rounded to it


def quantized():
    return quantize_int8_(small_model())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("stack", ["retention", "gated", "convolution"])
def test_an_engine_reads_int8_weights_as_their_modules_do(stack, device):
    model = quantize_int8_(small_model(stack).to(device))
    assert int8_parts(model.layers[0].mixer.q_proj.weight) is not None
    if stack == "gated":
        assert int8_parts(model.layers[0].mixer.decay_proj.weight) is None
    engine = Engine(model, num_slots=4, prompt_chunk=8)
    generation = engine.submit(Request(prompt(13), 10, Sampling(temperature=0, logprobs=0)))
    engine.run()
    with torch.no_grad():
        ids = torch.tensor([prompt(13) + generation.tokens], device=device)
        logprobs = model(ids).logits[0].log_softmax(-1).cpu()
    for i, (token, reported) in enumerate(zip(generation.tokens, generation.logprobs)):
        assert float(logprobs[12 + i].max() - logprobs[12 + i, token]) < BFLOAT16
        assert reported.logprob == pytest.approx(float(logprobs[12 + i, token]), abs=BFLOAT16)


def test_int8_is_near_the_weights_that_it_rounds():
    plain, ids = small_model(), torch.tensor([prompt(16)])
    with torch.no_grad():
        exact, rounded = (model(ids).logits for model in (plain, quantized()))
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()


@torch.no_grad()
def test_maps_that_decoding_absorbs_keep_their_weights():
    model, ids = quantize_int8_(small_model([LATENT, PAPER])), torch.tensor([prompt(9)])
    mixer = model.layers[0].mixer
    assert [int8_parts(getattr(mixer, f"{name}_proj").weight) is None for name in "qkv"] == [False, True, True]
    state = model(ids[:, :8], carry=True).state
    with patch.object(type(mixer), "keys_values", side_effect=AssertionError("keys are made in a step")):
        step = model(ids[:, 8:], state).logits
    exact = model(ids).logits[:, 8:]
    assert (step - exact).norm() < 0.05 * exact.norm()


def test_int8_weights_are_another_model_to_a_snapshot():
    assert fingerprint(quantized()) == fingerprint(quantized())
    assert fingerprint(quantized()) != fingerprint(small_model())


def test_packing_keeps_one_copy():
    model = quantized()
    engine = Engine(model, num_slots=1)
    engine.submit(Request([1, 2], 2))
    engine.run()
    mixer = model.layers[0].mixer
    values = [proj.weight.qdata for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
    ends = [x.data_ptr() + x.nbytes for x in values]
    assert [x.data_ptr() for x in values[1:]] == ends[:-1]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in values)
