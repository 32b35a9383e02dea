"""The model as a decode step runs it: one token a slot, few launches, weights read once.

What the paper's block computes in about forty operators is five here (`ops/decode.py`):

    q, k, v, g = norm(x) W_qkvg      one product, its four weights packed
    y, S      <- rotation, retention
    x         <- x + (swish(g) * head_norm(y)) W_O
    u          = norm(x) W_up        both halves of a gated feed-forward in one product
    x         <- x + act(u) W_down

Packing moves weights, it does not copy them: the model's parameters become views of the packed tensor. Blocks of other
shapes (attention, Mamba, mixtures, post-norm, side by side) run as their own modules between these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retnet.layers.block import Block
from retnet.layers.feed_forward import FeedForward
from retnet.layers.retention import MultiScaleRetention
from retnet.layers.state import RetentionState
from retnet.layers.token_layout import TokenLayout
from retnet.models.decode.int8 import int8_parts, move_int8_
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState
from retnet.ops.decode import (
    DecodeWeight,
    InputNorm,
    Ring,
    StepDecay,
    decode_linear,
    decode_step_,
    turn_pairs_,
    uses_kernels,
)
from retnet.ops.retention import retention
from retnet.ops.rotary import Rotary, Yarn, frequencies, rotation, scaling

Rotation = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class RotationKind:
    """What layers share cos and sin by."""

    rotary: Rotary
    key_dim: int
    base: float
    factor: float | Yarn


class FusedBlock:
    """x [S, D] -> x, overwritten; for blocks that `fits` accepts."""

    def __init__(self, block: nn.Module):
        assert isinstance(block, Block)
        mixer, config = block.mixer, block.config
        assert isinstance(mixer, MultiScaleRetention)
        self.block, self.mixer, self.config = block, mixer, mixer.config
        self.skip, self.branch = config.skip_scale, config.residual_scale
        self.mixer_norm = input_norm(block.mixer_norm)
        self.widths = [p.out_features for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
        inputs = [mixer.q_proj, mixer.k_proj, mixer.v_proj]
        if mixer.gate_proj is not None:
            inputs.append(mixer.gate_proj)
            self.widths.append(mixer.gate_proj.out_features)
        self.inputs, self.output = packed(inputs), packed([mixer.out_proj])
        self.decay_input = None if mixer.decay_proj is None else packed([mixer.decay_proj])
        head = self.config
        self.head_norm = InputNorm(head.head_norm, head.num_heads, head.head_norm_eps, _data(mixer.head_norm_weight))
        self.decay = None
        if mixer.decay_proj is None:
            self.decay = StepDecay.fixed(mixer.log_decay(torch.empty(0, device=self.inputs.values.device)))
        self.up = self.down = None
        if block.feed_forward is not None:
            self._add_feed_forward(block)

    def _add_feed_forward(self, block: Block) -> None:
        feed_forward = block.feed_forward
        assert isinstance(feed_forward, FeedForward)
        self.feed_forward_norm = input_norm(block.feed_forward_norm)
        self.activation = block.config.feed_forward.activation  # type: ignore[union-attr] (FeedForward's config)
        gate = feed_forward.gate_proj
        self.gated = gate is not None
        self.up = packed([feed_forward.up_proj] if gate is None else [gate, feed_forward.up_proj])
        self.down = packed([feed_forward.down_proj])

    @property
    def rotation(self) -> RotationKind | None:
        config = self.config
        if config.rotary == "none":
            return None
        factor = scaling(config.rotary_factor, config.rotary_yarn_length)
        return RotationKind(config.rotary, config.head_key_dim, config.rotary_base, factor)

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether this computes what the block does."""
        assert isinstance(block, Block)
        config, mixer, feed_forward = block.config, block.mixer, block.feed_forward
        if not isinstance(mixer, MultiScaleRetention) or mixer.config.decay_norm:
            return False
        if config.norm_position != "pre" or config.residual != "sequential":
            return False
        if feed_forward is not None and not (
            isinstance(feed_forward, FeedForward) and isinstance(feed_forward.inner_norm, nn.Identity)
        ):
            return False
        # A projection that someone wrapped (adapters, other quantisation) runs as its own module.
        linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
        plain = all(type(m) is nn.Linear and m.weight.dtype != torch.float64 for m in linears)
        projections = [mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.out_proj]
        return plain and all(isinstance(p, nn.Linear) for p in projections) and all(map(readable, linears))

    def __call__(
        self, x: Tensor, state: RetentionState, turn: Rotation, active: Tensor | None, ring: Ring | None
    ) -> Tensor:
        """active [S], None if all are."""
        config = self.config
        parts = decode_linear(x, self.inputs, norm=self.mixer_norm).split_with_sizes(self.widths, -1)
        q, k = (z.view(x.shape[0], -1, config.head_key_dim) for z in parts[:2])
        v = parts[2].view(x.shape[0], -1, config.head_value_dim)
        decay = self.decay
        if self.decay_input is not None:
            opened = decode_linear(x, self.decay_input, norm=self.mixer_norm)
            decay = StepDecay.of(self.mixer.gated_log_decay(opened))
        assert decay is not None
        rotary: Rotary = "half" if config.rotary == "none" else config.rotary
        y = decode_step_(q, k, v, turn, rotary, decay, state.memory, active, ring=ring)
        return self._add_branches(x, y.flatten(1), parts[3] if len(parts) > 3 else None)

    def read(self, x: Tensor, state: RetentionState, turn: Rotation) -> Tensor:
        """A block of one sequence: x [T, D], overwritten, as its next tokens; turn [T, K / 2]. The position is not
        counted."""
        config = self.config
        parts = decode_linear(x, self.inputs, norm=self.mixer_norm).split_with_sizes(self.widths, -1)
        q, k = (z.unflatten(-1, (-1, config.head_key_dim))[None] for z in parts[:2])
        v = parts[2].unflatten(-1, (-1, config.head_value_dim))[None]
        if turn is not None and config.rotary != "none":
            turn_pairs_(q, k, *turn, config.rotary)
        if config.heads_per_kv_head > 1:
            k, v = (z.repeat_interleave(config.heads_per_kv_head, 2) for z in (k, v))
        if self.decay_input is None:
            assert self.decay is not None
            log_decay = self.decay.log_decay
        else:
            opened = decode_linear(x, self.decay_input, norm=self.mixer_norm)
            log_decay = self.mixer.gated_log_decay(opened)[None]
        y, memory = retention(
            q, k, v, log_decay, state=state.memory, mode=config.mode, chunk_size=config.chunk_size,
            state_dtype=state.memory.dtype,
        )  # fmt: skip
        assert memory is not None
        state.memory.copy_(memory)
        return self._add_branches(x, y[0].flatten(1), parts[3] if len(parts) > 3 else None)

    def _add_branches(self, x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
        """What retention gave [B, H V], normed and gated, and the feed-forward, added to the stream."""
        x = decode_linear(
            y,
            self.output,
            norm=self.head_norm,
            gate=gate,
            activation="swish",
            residual_=x,
            skip=self.skip,
            branch=self.branch,
        )
        if self.up is None or self.down is None:
            return x
        up = decode_linear(x, self.up, norm=self.feed_forward_norm)
        gate, up = up.chunk(2, -1) if self.gated else (up, None)
        return decode_linear(
            up, self.down, gate=gate, activation=self.activation, residual_=x, skip=self.skip, branch=self.branch
        )


class FusedModel:
    """tokens [S] -> logits [S, vocab], states read and overwritten in place; idle slots change nothing."""

    def __init__(self, model: LanguageModel, state: ModelState, rings: list[Ring | None]):
        self.model, self.state, self.rings = model, state, rings
        self.blocks = [FusedBlock(block) if FusedBlock.fits(block) else None for block in model.layers]
        self.final_norm = input_norm(model.final_norm)
        self.head = packed([model.head]) if readable(model.head) else None
        device = state.position.device
        kinds = {block.rotation for block in self.blocks if block is not None}
        self._frequencies = {
            kind: frequencies(kind.rotary, kind.key_dim, kind.base, dtype=torch.float32, device=device)
            for kind in kinds
            if kind is not None
        }
        self._fused_positions = [
            layer.position for layer, block in zip(state, self.blocks, strict=True) if block is not None
        ]
        self._pending = next((ring.pending for ring in rings if ring is not None), None)

    def __call__(self, tokens: Tensor, active: Tensor) -> Tensor:
        model = self.model
        x, turns = self._embedded(tokens), self._turns(self.state.position[:, None])
        layout = None
        if any(block is None for block in self.blocks):
            layout = TokenLayout.of(
                (len(x), 1), x.device, start=self.state.position, mask=active[:, None], carry=True, in_place=True
            )
        some = None if not uses_kernels(active) and bool(active.all()) else active
        for block, layer, state, ring in zip(self.blocks, model.layers, self.state, self.rings, strict=True):
            if block is not None:
                assert isinstance(state, RetentionState)
                x = block(x, state, turns[block.rotation], some, ring)
            else:
                x = layer(x[:, None], state, layout)[0][:, 0].contiguous()
        self._count(active)
        return self._logits(x)

    @torch.no_grad()
    def read(self, slot: int, ids: Tensor) -> None:
        """A block of a prompt [1, T], from and to a slot's state.

        On a GPU fused blocks read it in as few launches as they decode: up to thousands of tokens launches are what
        takes the time. A CPU's time is in the products, and modules read it there.
        """
        before = self.state.slot(slot)
        if not uses_kernels(ids) or any(block is None for block in self.blocks):
            _, after = self.model.hidden(ids, before, carry=True, in_place=True)
            assert after is not None
            for mine, view, new in zip(self.state, before, after, strict=True):
                if new is not view:
                    mine.write_(slot, new)
            return
        position = before.position + torch.arange(ids.shape[1], device=ids.device)
        turns = self._turns(position[:, None])
        x = self._embedded(ids[0])
        for block, state in zip(self.blocks, before, strict=True):
            assert block is not None
            assert isinstance(state, RetentionState)
            x = block.read(x, state, turns[block.rotation])
        torch._foreach_add_([state.position for state in before], ids.shape[1])

    def _embedded(self, tokens: Tensor) -> Tensor:
        model = self.model
        x = model.embedding(tokens)
        if model.config.embedding_scale != 1.0:
            x = x * model.config.embedding_scale
        return model.embedding_norm(x)

    def _turns(self, position: Tensor) -> dict[RotationKind | None, Rotation]:
        """cos and sin [B, K / 2] of positions [B, 1] for each kind of rotation in use."""
        turns: dict[RotationKind | None, Rotation] = {None: None}
        for kind, plain in self._frequencies.items():
            cos, sin = rotation(position, kind.rotary, kind.key_dim, kind.base, factor=kind.factor, plain=plain)
            turns[kind] = cos[:, 0], sin[:, 0]
        return turns

    def _count(self, active: Tensor) -> None:
        """One token more for every active slot: positions of all fused layers in one launch."""
        step = active.long()
        if self._fused_positions:
            torch._foreach_add_(self._fused_positions, [step] * len(self._fused_positions))
        if self._pending is not None:
            length = next(ring.keys.shape[2] for ring in self.rings if ring is not None)
            self._pending.add_(step).remainder_(length)

    def _logits(self, x: Tensor) -> Tensor:
        model = self.model
        if self.head is None:
            return model.logits(model.final_norm(x))
        logits = decode_linear(x, self.head, norm=self.final_norm)
        cap = model.config.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def input_norm(module: nn.Module) -> InputNorm:
    """A norm module as what a product does to its input."""
    if isinstance(module, nn.LayerNorm):
        return InputNorm("layer", 1, module.eps, _data(module.weight), _data(module.bias))
    if isinstance(module, nn.RMSNorm):
        assert module.eps is not None
        return InputNorm("rms", 1, module.eps, _data(module.weight))
    return InputNorm()


def readable(linear: nn.Linear) -> bool:
    """Whether the weight is a plain matrix, or int8 with a scale a row."""
    return type(linear.weight.data) is Tensor or int8_parts(linear.weight) is not None


@torch.no_grad()
def packed(linears: list[nn.Linear]) -> DecodeWeight:
    """Linears of one input as one; their weights become views of it, or are found to be already.

    On a CPU what is wider than deep is laid out by columns.
    """
    width = sum(linear.out_features for linear in linears)
    by_columns = not uses_kernels(linears[0].weight) and width > linears[0].in_features
    biases = [linear.bias for linear in linears]
    some = next((bias for bias in biases if bias is not None), None)
    bias = None
    if some is not None:
        bias = torch.cat([some.new_zeros(m.out_features) if m.bias is None else m.bias for m in linears])
    quantized = [int8_parts(linear.weight) for linear in linears]
    if all(parts is not None for parts in quantized):
        values, scales = zip(*[parts for parts in quantized if parts is not None], strict=True)
        whole = _together(list(values))
        for linear, rows in zip(linears, whole.split([len(x) for x in values]), strict=True):
            move_int8_(linear.weight, rows)
        return DecodeWeight(whole, torch.cat(scales), bias)
    whole = _together([linear.weight.data for linear in linears], by_columns)
    for linear, rows in zip(linears, whole.split([m.out_features for m in linears]), strict=True):
        linear.weight.data = rows
    return DecodeWeight(whole, None, bias)


def _together(weights: list[Tensor], by_columns: bool = False) -> Tensor:
    """[N_i, K] matrices as one [sum N_i, K], which by_columns lies as [K, sum N_i]: a copy, unless they lie so."""
    first, N, K = weights[0], sum(map(len, weights)), weights[0].shape[1]
    strides, row = ((1, N), first.element_size()) if by_columns else ((K, 1), K * first.element_size())
    starts = [weight.data_ptr() for weight in weights]
    ends = [weight.data_ptr() + len(weight) * row for weight in weights]
    one_storage = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    if one_storage and starts[1:] == ends[:-1] and all(weight.stride() == strides for weight in weights):
        return first.as_strided((N, K), strides)
    return torch.cat([weight.t() for weight in weights], 1).t() if by_columns else torch.cat(weights)


def _data(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach()
