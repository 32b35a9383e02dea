"""A mixer outside the package: two registrations are enough for everything that models do.

The mixer is an exponential moving average per channel, gated by the token:

    m_t = a m_{t-1} + (1 - a) x_t        y_t = (sigmoid(x_t W_g) * m_t) W_out        a = 2^(-1 / half_life)

Its file would hold what stands here above `registered`; its lines in the two registries are that fixture.
"""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from retnet.layers import mixers
from retnet.layers.draft import Draft, accepted
from retnet.layers.mixer_base import MixerConfig, MixerFlops, MixerModule, Workload
from retnet.layers.mixers import Mixer, register
from retnet.layers.state import LayerState, no_tokens
from retnet.layers.token_layout import TokenLayout
from retnet.models.config import ModelConfig
from retnet.models.cost import mixer_costs, model_cost
from retnet.models.decode.sampling import Sampling
from retnet.models.export import export_block, export_step, initial_state
from retnet.models.lm import LanguageModel
from retnet.models.snapshot import Snapshot
from retnet.models.states import ModelState
from retnet.ops.dtypes import wide_dtype
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from retnet.serve.speculation import Speculation
from retnet.stack import mixers as stack_mixers
from retnet.stack.build import model_config
from retnet.stack.load import parse_stack
from retnet.stack.mixers import MixerSettings
from retnet.stack.scalars import Positive
from tests.small_models import random_ids, unit_gain_

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@dataclass(frozen=True)
class AverageConfig(MixerConfig):
    """half_life: tokens after which a token weighs half as much."""

    half_life: float = 4.0
    kind: Literal["average"] = "average"

    @property
    def rate(self) -> float:
        return math.log(2) / self.half_life

    def for_export(self, one_token: bool) -> "AverageConfig":
        return self


@dataclass
class AverageState(LayerState):
    """average [N, D]: of all tokens seen."""

    average: Tensor


@dataclass
class AverageDraft(Draft):
    """x [B, T, D]; keep: how much of the average each token keeps."""

    x: Tensor
    keep: Tensor

    def _write_(self, state: AverageState, counts: Tensor) -> None:
        mask = accepted(counts, self.x.shape[1])
        for t, x in enumerate(self.x.unbind(1)):
            state.average.copy_(torch.where(mask[:, t, None], state.average.lerp(x, 1 - self.keep), state.average))


class Average(MixerModule):
    """x [B, T, D] -> y [B, T, D]."""

    WEIGHT_ROLES: ClassVar = {"gate_proj": "value", "out_proj": "output"}

    def __init__(self, config: AverageConfig, d_model: int):
        super().__init__()
        self.config = config
        self.gate_proj = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, num_tokens: int = 0) -> AverageState:
        average = torch.zeros(batch, self.out_proj.in_features, device=device, dtype=wide_dtype(dtype))
        return AverageState(no_tokens(batch, device), average)

    def forward(
        self, x: Tensor, state: AverageState | None, layout: TokenLayout
    ) -> tuple[Tensor, AverageState | AverageDraft | None]:
        wide = x.to(wide_dtype(x.dtype))
        before = self.init_state(len(layout.lengths), x.device, x.dtype) if state is None else state
        average, after = self._averages(wide, before, layout)
        y = self.out_proj(torch.sigmoid(self.gate_proj(x)) * average.to(x.dtype))
        if layout.deferred:
            return y, AverageDraft(wide, torch.tensor(math.exp(-self.config.rate), dtype=wide.dtype))
        if state is not None and layout.in_place:
            after = state.average.copy_(after)
        return y, AverageState.after(state, layout, average=after) if layout.carry else None

    def _averages(self, x: Tensor, before: AverageState, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """The average after each token [B, T, D] and after the last ones [N, D], from weights of pairs of tokens."""
        positions, sequences, rate = layout.positions, layout.sequences, self.config.rate
        real = torch.ones_like(positions, dtype=torch.bool) if layout.mask is None else layout.mask
        x = (1 - math.exp(-rate)) * x.masked_fill(~real[..., None], 0)
        places = torch.arange(x.shape[1], device=x.device)
        seen = (sequences[:, :, None] == sequences[:, None, :]) & (places[:, None] >= places)
        weights = self._weights(positions[:, :, None] - positions[:, None, :], x.dtype) * seen
        carried = self._weights(positions + 1 - before.position[sequences], x.dtype)[..., None]
        average = carried * before.average[sequences] + weights @ x
        own = sequences.flatten() == torch.arange(len(layout.lengths), device=x.device)[:, None]
        ends = (before.position + layout.lengths)[:, None]
        last = self._weights(ends - 1 - positions.flatten(), x.dtype) * own
        return average, self._weights(layout.lengths, x.dtype)[:, None] * before.average + last @ x.flatten(0, 1)

    def _weights(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.exp(-self.config.rate * distance.clamp_min(0).to(dtype))


def average_flops(config: AverageConfig, work: Workload) -> MixerFlops:
    """Two products and a sum per channel."""
    return MixerFlops(3 * work.d_model, 3 * work.d_model)


class AverageSettings(MixerSettings):
    """`type: average` in a stack file."""

    STATE_KEY = "ssm_state"

    half_life: Positive = 4.0

    def config(self, spec) -> AverageConfig:
        return AverageConfig(self.half_life)


STACK = """
schema_version: 1
model: {name: averages, d_model: 32, vocab_size: 257, max_seq_len: 64, n_heads: 2, mlp_ratio: 2, dtype: float32}
tokenizer_contract: {type: hf, pretrained: bytes}
embedding: {type: learned, positional: rope, tie_word_embeddings: false}
layer_templates:
  average:
    mixer: {type: average, average: {half_life: 6.0}}
    ffn: {type: mlp, activation: gelu}
    state: {ssm_state: true}
  retention:
    mixer: {type: retnet}
    ffn: {type: mlp, activation: gelu}
layer_schedule:
- {template: average}
- {template: retention}
- {template: average}
head: {type: causal_lm, tie_weights: false}
"""


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    register(Mixer("average", AverageConfig, Average, AverageState, AverageDraft, average_flops))
    stack_mixers.MIXERS["average"] = AverageSettings
    yield
    del mixers.MIXERS["average"], stack_mixers.MIXERS["average"]


@pytest.fixture(scope="module")
def config(registered) -> ModelConfig:
    return model_config(parse_stack(STACK))


@pytest.fixture(scope="module")
def model(config) -> LanguageModel:
    return unit_gain_(LanguageModel(config)).double().eval()


def test_a_stack_file_gives_its_configuration_which_survives_json(config):
    assert config.layers[0].mixer == AverageConfig(6.0)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_its_recurrence_is_the_definition(config):
    layer = Average(AverageConfig(3.0), 5).double()
    x, keep = torch.randn(2, 7, 5, dtype=torch.float64), 2 ** (-1 / 3)
    average, expected = torch.zeros(2, 5, dtype=torch.float64), []
    for token in x.unbind(1):
        average = keep * average + (1 - keep) * token
        expected.append(layer.out_proj(torch.sigmoid(layer.gate_proj(token)) * average))
    y, state = layer(x, None, TokenLayout.of((2, 7), x.device, carry=True))
    torch.testing.assert_close(y, torch.stack(expected, 1), **EXACT)
    torch.testing.assert_close(state.average, average, **EXACT)


def test_it_trains(config):
    model, ids = LanguageModel(config), random_ids(2, 16)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(20):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_packs_and_padding_change_nothing(model):
    ids, lengths = random_ids(3, 9), torch.tensor([9, 4, 6])
    alone = [model(row[None, :n]).logits[0] for row, n in zip(ids, lengths)]
    packed = torch.cat([row[:n] for row, n in zip(ids, lengths)])[None]
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    output = model(packed, cu_seqlens=bounds, carry=True)
    torch.testing.assert_close(output.logits[0], torch.cat(alone), **EXACT)
    mask = torch.arange(9) >= 9 - lengths[:, None]
    left = torch.stack([row.roll(9 - int(n)) for row, n in zip(ids, lengths)])
    padded = model(left, mask=mask, carry=True)
    for row, n, expected in zip(padded.logits, lengths, alone):
        torch.testing.assert_close(row[9 - n :], expected, **EXACT)
    for one, other in zip(padded.state, output.state):
        for x, y in zip(one.tensors().values(), other.tensors().values()):
            torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("pieces", [(9,), (4, 1, 4), (1,) * 9])
def test_prefill_and_decode_from_any_split_equal_one_forward(model, pieces, in_place):
    ids, state, logits = random_ids(2, 9), model.init_state(2), []
    with torch.no_grad():
        for piece in ids.split(pieces, 1):
            output = model(piece, state, carry=True, in_place=in_place)
            state = output.state
            logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, **EXACT)


def test_rejected_draft_tokens_leave_no_trace(model):
    ids = random_ids(2, 12)
    with torch.no_grad():
        state = model(ids[:, :8], carry=True).state
        _, draft = model.draft(ids[:, 8:], state)
        draft.accept_(state, torch.tensor([1, 3]))
        expected = model(ids[:, :11], mask=torch.arange(11) < torch.tensor([[9], [11]]), carry=True).state
    for one, other in zip(state, expected):
        for x, y in zip(one.tensors().values(), other.tensors().values()):
            torch.testing.assert_close(x, y, **EXACT)


def test_states_and_snapshots_are_saved_and_loaded(model, tmp_path):
    with torch.no_grad():
        state = model(random_ids(1, 8), carry=True).state
    state.save(tmp_path / "state.safetensors")
    again = ModelState.load(tmp_path / "state.safetensors")
    assert [type(layer) for layer in again] == [type(layer) for layer in state]
    assert torch.equal(again.layers[2].average, state.layers[2].average)


def test_its_cost_and_the_size_of_its_state_are_counted(config):
    cost, _, _ = mixer_costs(config, 1000)
    assert (cost.forward_flops, cost.decode_flops, cost.state_bytes) == (96, 96, 8 + 4 * 32)
    assert model_cost(config, 10).state_bytes == LanguageModel(config).init_state(1).nbytes


@pytest.mark.parametrize("speculation", [None, Speculation(3)], ids=["plain", "drafts"])
def test_the_engine_serves_it_and_continues_from_a_snapshot_file(model, speculation, tmp_path):
    prompt, greedy = random_ids(6).tolist() * 2, Sampling(temperature=0)
    engine = Engine(model, num_slots=4, speculation=speculation)
    generations = [engine.submit(Request(prompt[n:], 10, greedy, keep_state=True)) for n in range(3)]
    engine.run()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(16):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    expected = ids[0, len(prompt) :].tolist()
    assert generations[0].tokens == expected[:10]
    generations[0].snapshot.save(tmp_path / "snapshot")
    after = engine.submit(Request([], 6, greedy), Snapshot.load(tmp_path / "snapshot"))
    engine.run()
    assert after.tokens == expected[10:]


def test_generate_of_transformers_uses_its_cache(config, model, tmp_path):
    from retnet.models.hf import RetNetForCausalLM
    from retnet.models.hf.cache import StateCache

    network = RetNetForCausalLM.wrap(model).eval()
    ids, options = random_ids(2, 5, low=1), {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    expected = network.generate(ids, use_cache=False, **options)
    assert torch.equal(network.generate(ids, **options), expected)
    assert torch.equal(network.generate(ids, cache_implementation="static", **options), expected)
    with torch.no_grad():
        cache = StateCache()
        network(ids[:, :3], past_key_values=cache)
        kept = copy.deepcopy(cache)
        kept.reorder_cache(torch.tensor([1, 0]))
        again = network(ids[:, 3:], past_key_values=cache).logits
        torch.testing.assert_close(again, network(ids).logits[:, 3:], **EXACT)
        swapped = network(ids.flip(0)[:, 3:], past_key_values=kept).logits
        torch.testing.assert_close(swapped, again.flip(0), **EXACT)
    network.save_pretrained(tmp_path)
    again = RetNetForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, network(ids).logits, **EXACT)


def test_it_is_exported(config):
    model = unit_gain_(LanguageModel(config)).eval()
    ids, state, logits = random_ids(1, 12), initial_state(model), []
    step, block = export_step(model).module(), export_block(model).module()
    for piece in ids.split((7, 1, 3, 1), 1):
        row, *state = (step if piece.shape[1] == 1 else block)(piece, *state)
        logits.append(row[0])
    with torch.no_grad():
        expected = model(ids).logits[0, [6, 7, 10, 11]]
    torch.testing.assert_close(torch.stack(logits), expected, rtol=1e-4, atol=1e-4)


def test_a_name_or_a_state_is_registered_once():
    with pytest.raises(ValueError, match="has that name or state"):
        register(Mixer("average", AverageConfig, Average, AverageState, AverageDraft, average_flops))
    with pytest.raises(ValueError, match=r"AverageConfig.kind is 'average'; accepted: the mixer's name, 'mean'"):
        register(Mixer("mean", AverageConfig, Average, AverageState, AverageDraft, average_flops))
