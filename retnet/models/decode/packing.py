"""Packed weights: linear layers that read the same input become one matrix for the decode step.

Packing moves weights and does not copy them: the modules' parameters read the memory of the packed matrix, so that an
optimizer, `load_state_dict` or any in-place change reaches both. To everything else they are ordinary parameters, each
contiguous and with a storage of its own, because writers of checkpoints drop or refuse tensors that share a storage.
Weights that others reach through their memory are not moved: those in shared memory, and views of larger buffers
(sharded training updates such a buffer and not the parameters).
"""

from __future__ import annotations

from collections import Counter
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack, to_dlpack

from retnet.layers.tensor_parallel import OutputLinear
from retnet.models.decode.int8 import int8_parts, move_int8_
from retnet.models.parallel.vocabulary import VocabularyHead
from retnet.ops.decode.linear import DecodeWeight

PACKABLE = (nn.Linear, OutputLinear, VocabularyHead)
PACKED = "packed_by_retnet"  # attribute of the storages of packed weights: a weak reference to the matrix's storage


def is_packable(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer whose weight is an ordinary matrix, or int8 with one scale per row.

    False for adapters and other quantised layers, for float64, and for weights that are sharded or may not move.
    """
    if not isinstance(module, nn.Linear) or type(module) not in PACKABLE or module.weight.dtype == torch.float64:
        return False
    if int8_parts(module.weight) is not None:
        return True
    return type(module.weight.data) is Tensor and all(map(_may_move, module.parameters()))


def shared_weights(model: nn.Module) -> set[int]:
    """The ids of parameters that several linear layers have: they cannot be a view of more than one matrix."""
    places = model.named_modules(remove_duplicate=False)
    linears = [module for _, module in places if isinstance(module, nn.Linear)]
    counts = Counter(id(weight) for linear in linears for weight in linear.parameters())
    return {weight for weight, count in counts.items() if count > 1}


def _may_move(weight: Tensor) -> bool:
    is_shared = weight.device.type == "cpu" and weight.is_shared()
    return not is_shared and weight.untyped_storage().nbytes() == weight.nbytes


def pack(linears: list[nn.Linear]) -> DecodeWeight:
    """Linear layers of one input as one, whose memory their weights and biases read. Packed ones are left as they are.

    Weights on a GPU that are packed cannot go to another process through CUDA IPC; their copies can.
    """
    # In the mode the parameters were made in: ordinary ones may be trained, inference tensors take only their like.
    with torch.inference_mode(linears[0].weight.is_inference()), torch.no_grad():
        return _pack(linears)


def _pack(linears: list[nn.Linear]) -> DecodeWeight:
    bias = _pack_biases(linears)
    quantized = [parts for linear in linears if (parts := int8_parts(linear.weight)) is not None]
    if len(quantized) == len(linears):
        whole, pieces = _joined([values for values, _ in quantized])
        for linear, values in zip(linears, pieces, strict=True):
            move_int8_(linear.weight, values)
        return DecodeWeight(whole, torch.cat([scale for _, scale in quantized]), bias)
    whole, pieces = _joined([linear.weight.data for linear in linears])
    for linear, values in zip(linears, pieces, strict=True):
        linear.weight.data = values
    return DecodeWeight(whole, None, bias)


def _pack_biases(linears: list[nn.Linear]) -> Tensor | None:
    """All biases in one vector, 0 where a layer has none; None if no layer has one."""
    given = next((linear.bias for linear in linears if linear.bias is not None), None)
    if given is None:
        return None
    whole, pieces = _joined(
        [given.new_zeros(linear.out_features) if linear.bias is None else linear.bias.data for linear in linears]
    )
    for linear, values in zip(linears, pieces, strict=True):
        if linear.bias is not None:
            linear.bias.data = values
    return whole


def _joined(pieces: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Matrices [N_i, K] (or vectors [N_i]) as one with sum N_i rows, and the pieces in its memory.

    Nothing is copied if they lie there already, as after an earlier generation.
    """
    buffer = _common_buffer(pieces)
    if buffer is not None:
        first, rows = pieces[0], sum(map(len, pieces))
        start = (first.data_ptr() - buffer.data_ptr()) // first.element_size()
        return first.new_empty(0).set_(buffer, start, (rows, *first.shape[1:]), first.stride()), pieces
    whole = torch.cat(pieces)
    mark = ref(whole.untyped_storage())
    # Through DLPack each part gets a storage of its own size, which keeps the whole memory alive. By capsules, as
    # `torch.from_dlpack` takes tensors of the current GPU alone.
    parts = [from_dlpack(to_dlpack(part)) for part in whole.split([len(piece) for piece in pieces])]
    for part in [whole, *parts]:
        setattr(part.untyped_storage(), PACKED, mark)
    return whole, parts


def _common_buffer(pieces: list[Tensor]) -> torch.UntypedStorage | None:
    """The storage in which the pieces follow each other as one matrix; None if they do not."""
    if not all(piece.is_contiguous() for piece in pieces):
        return None
    if len(pieces) == 1:
        return pieces[0].untyped_storage()
    marks = [getattr(piece.untyped_storage(), PACKED, None) for piece in pieces]
    buffer = marks[0]() if marks[0] is not None and all(mark is marks[0] for mark in marks) else None
    if buffer is None:
        return None
    starts = [piece.data_ptr() for piece in pieces]
    ends = [piece.data_ptr() + piece.nbytes for piece in pieces]
    lie_inside = buffer.data_ptr() <= starts[0] and ends[-1] <= buffer.data_ptr() + buffer.nbytes()
    return buffer if lie_inside and starts[1:] == ends[:-1] else None
