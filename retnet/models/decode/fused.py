"""The fused decode step: one token per sequence in few launches, every weight read once.

A block of the paper takes about forty operators. Here it takes five (`ops/decode/`):

    q, k, v, g = norm(x) W_qkvg      one product of four packed weights
    q, k, v   <- convolution         in layers that have one
    y, S      <- rotation, retention
    x         <- x + (swish(g) * head_norm(y)) W_O
    u          = norm(x) W_up        both halves of a gated feed-forward in one product
    x         <- x + act(u) W_down

Blocks of other shapes (attention, Mamba, mixtures of experts, post-norm, parallel residuals, hyper-connections) and
modules with hooks or adapters run as their own modules in between. The weights are packed in place (`packing.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from retnet.layers.block import Block
from retnet.layers.feed_forward import FeedForward
from retnet.layers.linear import has_hooks, is_unhooked
from retnet.layers.norm import LayerNorm, RMSNorm
from retnet.layers.retention import MultiScaleRetention, RetentionState
from retnet.layers.short_convolution import ShortConvolution
from retnet.layers.state import LayerState
from retnet.layers.token_layout import TokenLayout
from retnet.models.decode.convolution import FusedConvolution
from retnet.models.decode.int8 import int8_parts
from retnet.models.decode.output import FusedOutput
from retnet.models.decode.packing import is_packable, pack, shared_weights
from retnet.models.lm import LanguageModel
from retnet.models.parallel.vocabulary import VocabularyHead
from retnet.models.states import ModelState
from retnet.ops import device
from retnet.ops.decode.linear import InputNorm, decode_linear
from retnet.ops.decode.ring import Ring
from retnet.ops.decode.step import decode_step_, rotate_pairs_
from retnet.ops.plan import supported_chunk_size
from retnet.ops.recurrence import StepDecay
from retnet.ops.retention import retention
from retnet.ops.rotary import Rotary, Scaling, frequencies, rotation

Rotation = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class RotaryKey:
    """The settings of a rotary embedding: layers with equal ones share cos and sin."""

    rotary: Rotary
    key_dim: int
    base: float
    factor: Scaling


class FusedBlock:
    """One block of a decode step: x [S, D] -> x, overwritten. For blocks that `supports` accepts."""

    def __init__(self, block: nn.Module):
        assert isinstance(block, Block)
        mixer, config = block.mixer, block.config
        assert isinstance(mixer, MultiScaleRetention)
        self.block, self.mixer, self.config = block, mixer, mixer.config
        self.mixer_norm = input_norm(block.mixer_norm)
        self.widths = [p.out_features for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
        inputs = [mixer.q_proj, mixer.k_proj, mixer.v_proj]
        if mixer.gate_proj is not None:
            inputs.append(mixer.gate_proj)
            self.widths.append(mixer.gate_proj.out_features)
        self.inputs = pack(inputs)
        self.output = FusedOutput(mixer.out_proj, *config.mixer_scales)
        self.convolution = FusedConvolution(mixer)
        self.decay_input = None if mixer.decay_proj is None else pack([mixer.decay_proj])
        head = self.config
        groups = head.head_norm_groups or head.num_heads
        self.head_norm = InputNorm(head.head_norm, groups, head.head_norm_eps, _data(mixer.head_norm_weight))
        self.decay = None
        if mixer.decay_proj is None:
            with torch.inference_mode(False), torch.no_grad():
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
        self.up = pack([feed_forward.up_proj] if gate is None else [gate, feed_forward.up_proj])
        self.down = FusedOutput(feed_forward.down_proj, *block.config.feed_forward_scales)

    @property
    def rotary_key(self) -> RotaryKey | None:
        config = self.config
        if config.rotary == "none":
            return None
        return RotaryKey(config.rotary, config.head_key_dim, config.rotary_base, config.position_scaling)

    @staticmethod
    def supports(block: nn.Module) -> bool:
        """Whether the fused block computes what the module does. Subclasses may not: they run as modules."""
        if type(block) is not Block:
            return False
        config, mixer, feed_forward = block.config, block.mixer, block.feed_forward
        if type(mixer) is not MultiScaleRetention or mixer.config.decay_norm or mixer.config.qk_norm != "none":
            return False
        head = mixer.config
        if head.rotary_dim is not None or head.qkv_activation != "none":
            return False
        if head.head_norm_groups is not None and head.head_norm_affine == "shared":
            return False
        if mixer.conv is not None and type(mixer.conv) is not ShortConvolution:
            return False
        if config.norm_position != "pre" or config.residual != "sequential" or (block.training and config.dropout):
            return False
        if config.hyper is not None:
            return False
        if feed_forward is not None and not (
            type(feed_forward) is FeedForward
            and isinstance(feed_forward.inner_norm, nn.Identity)
            and feed_forward.config.gate_scale == feed_forward.config.down_scale == 1.0
        ):
            return False
        norms = [block.mixer_norm] if feed_forward is None else [block.mixer_norm, block.feed_forward_norm]
        children = [*mixer.children(), *([] if feed_forward is None else feed_forward.children())]
        linears = [child for child in children if not isinstance(child, (nn.Identity, ShortConvolution))]
        return is_unhooked(block) and all(map(_is_plain_norm, norms)) and all(map(is_packable, linears))

    def __call__(
        self, x: Tensor, state: RetentionState, rotation: Rotation, active: Tensor | None, deferred: Ring | None
    ) -> Tensor:
        """active [S] bool: sequences that take part; None if all do. The position is not counted."""
        config = self.config
        product = decode_linear(x, self.inputs, norm=self.mixer_norm)
        self.convolution.step_(product, state, active)
        projected = product.split_with_sizes(self.widths, -1)
        q, k = (z.view(x.shape[0], -1, config.head_key_dim) for z in projected[:2])
        v = projected[2].view(x.shape[0], -1, config.head_value_dim)
        decay = self.decay
        if self.decay_input is not None:
            gate_input = decode_linear(x, self.decay_input, norm=self.mixer_norm)
            decay = StepDecay(self.mixer.gated_log_decay(gate_input))
        assert decay is not None
        rotary: Rotary = "half" if config.rotary == "none" else config.rotary
        y = decode_step_(q, k, v, rotation, rotary, decay, state.memory, active, ring=deferred)
        return self._add_branches(x, y.flatten(1), projected[3] if len(projected) > 3 else None)

    def read(self, x: Tensor, state: RetentionState, rotation: Rotation) -> Tensor:
        """The next tokens x [T, D] of one sequence, overwritten; rotation [T, K / 2]. The position is not counted."""
        config = self.config
        product = decode_linear(x, self.inputs, norm=self.mixer_norm)
        self.convolution.read_(product, state)
        projected = product.split_with_sizes(self.widths, -1)
        q, k = (z.unflatten(-1, (-1, config.head_key_dim))[None] for z in projected[:2])
        v = projected[2].unflatten(-1, (-1, config.head_value_dim))[None]
        if rotation is not None and config.rotary != "none":
            rotate_pairs_(q, k, *rotation, config.rotary)
        if config.heads_per_kv_head > 1:
            k, v = (z.repeat_interleave(config.heads_per_kv_head, 2) for z in (k, v))
        if self.decay_input is None:
            assert self.decay is not None
            log_decay = self.decay.log_decay
        else:
            gate_input = decode_linear(x, self.decay_input, norm=self.mixer_norm)
            log_decay = self.mixer.gated_log_decay(gate_input)[None]
        y, memory = retention(
            q, k, v, log_decay, state=state.memory, mode=config.mode,
            chunk_size=supported_chunk_size(q, v, log_decay.dim() == 3, config.chunk_size),
            state_dtype=state.memory.dtype,
        )  # fmt: skip
        assert memory is not None
        state.memory.copy_(memory)
        return self._add_branches(x, y[0].flatten(1), projected[3] if len(projected) > 3 else None)

    def _add_branches(self, x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
        """Add retention's output y [B, H V], normed and gated, and then the feed-forward to the residual stream x."""
        x = self.output(x, y, norm=self.head_norm, gate=gate, activation=self.config.gate)
        if self.up is None or self.down is None:
            return x
        up = decode_linear(x, self.up, norm=self.feed_forward_norm)
        gate, hidden = up.chunk(2, -1) if self.gated else (up, None)
        return self.down(x, hidden, gate=gate, activation=self.activation)


class FusedModel:
    """A language model as a decode step: tokens [S] -> (logits [S, vocab], the states after them).

    Retention states, and all caches with room left, are overwritten in place. Inactive sequences change nothing.
    """

    def __init__(self, model: LanguageModel):
        self.model = model
        fusable = fusable_blocks(model)
        self.blocks = [FusedBlock(block) if block in fusable else None for block in model.layers]
        head, final_norm = model.head, model.final_norm
        fuses_head = shared_weights(model).isdisjoint(map(id, head.parameters())) and is_packable(head)
        fuses_head = fuses_head and _is_plain_norm(final_norm) and is_unhooked(head) and is_unhooked(final_norm)
        self.head = pack([head]) if fuses_head else None
        self.final_norm = input_norm(final_norm) if fuses_head else None
        keys = {block.rotary_key for block in self.blocks if block is not None} - {None}
        place = model.embedding.weight.device
        with torch.inference_mode(False):
            self._frequencies = {
                key: frequencies(key.rotary, key.key_dim, key.base, dtype=torch.float32, device=place)
                for key in keys
                if key is not None
            }
        self._packed_from = _Origin(model, [b.block for b in self.blocks if b is not None] + [head, final_norm])

    @property
    def is_current(self) -> bool:
        """Whether the model still has the modules, hooks and weights that it was packed with.

        In-place changes of weights (optimizers, `load_state_dict`) reach the packed ones by themselves.
        """
        return self._packed_from.is_unchanged()

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        state: ModelState,
        active: Tensor | None = None,
        deferred: Sequence[Ring | None] | None = None,
    ) -> tuple[Tensor, ModelState]:
        """active [S] bool: sequences that take part; all if None. deferred: deferred writes for each layer, or None."""
        with device.current_device_of(tokens):
            return self._decode(tokens, state, active, deferred)

    def _decode(
        self, tokens: Tensor, state: ModelState, active: Tensor | None, deferred: Sequence[Ring | None] | None
    ) -> tuple[Tensor, ModelState]:
        x, rotations = self._embed(tokens), self._rotations(state.position[:, None])
        layout = None
        if any(block is None for block in self.blocks):
            mask = None if active is None else active[:, None]
            layout = TokenLayout.of((len(x), 1), x.device, start=state.position, mask=mask, carry=True, in_place=True)
        if device.uses_kernels(tokens):
            taking_part = tokens.new_ones(tokens.shape, dtype=torch.bool) if active is None else active
        else:
            taking_part = None if active is None or bool(active.all()) else active
        after: list[LayerState] = []
        deferred = [None] * len(self.blocks) if deferred is None else deferred
        for block, module, layer, writes in zip(self.blocks, self.model.layers, state, deferred, strict=True):
            if block is not None:
                assert isinstance(layer, RetentionState)
                x = block(x, layer, rotations[block.rotary_key], taking_part, writes)
            else:
                x, layer = module(x[:, None], layer, layout)
                x = x[:, 0].contiguous()
            after.append(layer)
        self._count(state, active, deferred)
        return self._logits(x), ModelState(tuple(after))

    @torch.no_grad()
    def read(self, ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Read a chunk of a prompt [1, T]. Returns the final hidden states [T, D], ready for the model's `logits`, and
        the state after the chunk; the given one may be overwritten.

        On a GPU the fused blocks read it in as few launches as they decode with, because up to thousands of tokens the
        launches take the time. On a CPU the products take the time, and the modules run.
        """
        if not device.uses_kernels(ids) or any(block is None for block in self.blocks):
            hidden, after = self.model.hidden(ids, state, carry=True, in_place=True)
            assert after is not None
            return hidden[0], after
        position = state.position + torch.arange(ids.shape[1], device=ids.device)
        rotations = self._rotations(position[:, None])
        x = self._embed(ids[0])
        for block, layer in zip(self.blocks, state, strict=True):
            assert block is not None
            assert isinstance(layer, RetentionState)
            x = block.read(x, layer, rotations[block.rotary_key])
        torch._foreach_add_([layer.position for layer in state], ids.shape[1])
        return self.model.final_norm(x), state

    def _embed(self, tokens: Tensor) -> Tensor:
        model = self.model
        x = model.embedding(tokens)
        if model.config.embedding_scale != 1.0:
            x = x * model.config.embedding_scale
        return model.embedding_norm(x)

    def _rotations(self, position: Tensor) -> dict[RotaryKey | None, Rotation]:
        """cos and sin [B, K / 2] of positions [B, 1] for each rotary embedding in use."""
        rotations: dict[RotaryKey | None, Rotation] = {None: None}
        for key, plain in self._frequencies.items():
            cos, sin = rotation(position, key.rotary, key.key_dim, key.base, factor=key.factor, plain=plain)
            rotations[key] = cos[:, 0], sin[:, 0]
        return rotations

    def _count(self, state: ModelState, active: Tensor | None, deferred: Sequence[Ring | None]) -> None:
        """Count one more token of every active sequence, for all fused layers in one launch."""
        positions = [layer.position for layer, block in zip(state, self.blocks, strict=True) if block is not None]
        step = 1 if active is None else active.long()
        if positions:
            torch._foreach_add_(positions, step if isinstance(step, int) else [step] * len(positions))
        writes = next((writes for writes in deferred if writes is not None), None)
        if writes is not None:  # the count is shared by all layers
            writes.pending.add_(step).remainder_(writes.keys.shape[2])

    def _logits(self, x: Tensor) -> Tensor:
        model = self.model
        if self.head is None or self.final_norm is None:
            return model.logits(model.final_norm(x))
        logits = decode_linear(x, self.head, norm=self.final_norm)
        if model.config.logit_scale != 1.0:
            logits = logits * model.config.logit_scale
        if isinstance(model.head, VocabularyHead):
            logits = model.head.shard.gathered(logits, model.config.vocab_size)
        cap = model.config.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def fusable_blocks(model: LanguageModel) -> set[nn.Module]:
    """The blocks that the fused step runs."""
    shared = shared_weights(model)
    return {
        block for block in model.layers if FusedBlock.supports(block) and shared.isdisjoint(map(id, block.parameters()))
    }


class _Origin:
    """The modules and tensors that a `FusedModel` was packed from, to notice when the model no longer has them."""

    def __init__(self, model: LanguageModel, fused: list[nn.Module]):
        self._modules = list(model.modules())
        self._classes = [type(module) for module in self._modules]
        self._links: list[tuple[dict[str, Any], str, object]] = []
        for module in self._modules:
            self._links += [(module._modules, name, child) for name, child in module._modules.items()]
            self._links += [(module._parameters, name, weight) for name, weight in module._parameters.items()]
        self._owns = [vars(module) for module in self._modules]
        self._hooked = [has_hooks(own) for own in self._owns]
        weights = [weight for root in fused for weight in root.parameters()]
        self._places = [(weight, _place(weight)) for weight in weights]
        # Small tensors that were copied: fixed decays come from log_rate, and packed int8 has its scales beside it.
        # Compared by value, because changes through `.data` and in inference mode leave no version.
        mixers = [block.mixer for block in fused if isinstance(block, Block)]
        copied = [mixer.log_rate for mixer in mixers if isinstance(mixer.log_rate, Tensor)]
        copied += [parts[1] for weight in weights if (parts := int8_parts(weight)) is not None]
        self._copied = [(x, x.detach().clone()) for x in copied]

    def is_unchanged(self) -> bool:
        return (
            all(names.get(name) is value for names, name, value in self._links)
            and all(type(module) is kind for module, kind in zip(self._modules, self._classes, strict=True))
            and self._hooked == [has_hooks(own) for own in self._owns]
            and all(_place(weight) == place for weight, place in self._places)
            and all(torch.equal(x, before) for x, before in self._copied)
        )


def _place(weight: Tensor) -> int:
    parts = int8_parts(weight)
    return (weight if parts is None else parts[0]).data_ptr()


def _is_plain_norm(module: nn.Module) -> bool:
    return type(module) in (LayerNorm, RMSNorm, nn.Identity)


def empty_deferred_writes(model: LanguageModel, state: ModelState, length: int) -> list[Ring | None]:
    """Room for `length` deferred writes for each layer that the fused step runs; None for other layers."""
    rooms: list[Ring | None] = []
    pending = torch.zeros_like(state.position)
    fusable = fusable_blocks(model)
    for block, layer in zip(cast(Iterable[Block], model.layers), state, strict=True):
        if not length or not isinstance(layer, RetentionState) or block not in fusable:
            rooms.append(None)
            continue
        N, H, K, V = layer.memory.shape
        G = block.mixer.config.num_kv_heads or H
        rows = layer.memory.new_empty(0, dtype=model.embedding.weight.dtype)
        keys, values = rows.new_zeros(N, G, length, K), rows.new_zeros(N, G, length, V)
        rooms.append(Ring(keys, values, layer.memory.new_zeros(N, H, length), pending))
    return rooms


def input_norm(module: nn.Module) -> InputNorm:
    """A norm module as the norm that `decode_linear` applies to its input."""
    if isinstance(module, nn.LayerNorm):
        return InputNorm("layer", 1, module.eps, _data(module.weight), _data(module.bias))
    if isinstance(module, nn.RMSNorm):
        assert module.eps is not None
        return InputNorm("rms", 1, module.eps, _data(module.weight))
    return InputNorm()


def _data(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach()
