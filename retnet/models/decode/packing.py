"""Packed weights: linear layers that read the same input become one matrix for the decode step.

Packing moves weights and does not copy them: the modules' parameters become views of the packed matrix, so that an
optimizer, `load_state_dict` or any in-place change reaches both. The views are contiguous unless packed by columns.
Weights that others reach through their memory are not moved: those in shared memory, and views of larger buffers
(sharded training updates such a buffer and not the parameters).
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from retnet.models.decode.int8 import int8_parts, move_int8_
from retnet.ops import device
from retnet.ops.decode.linear import DecodeWeight

PACKED = "packed_by_retnet"  # marks the storages of packed weights, which may be packed again


def is_packable(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer whose weight is an ordinary matrix, or int8 with one scale per row.

    False for adapters and other quantised layers, for float64, and for weights that are sharded or may not move.
    """
    if type(module) is not nn.Linear or module.weight.dtype == torch.float64:
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
    storage = weight.untyped_storage()
    if weight.device.type == "cpu" and weight.is_shared():
        return False
    return storage.nbytes() == weight.nbytes or getattr(storage, PACKED, False)


def pack(linears: list[nn.Linear], by_columns: bool = False) -> DecodeWeight:
    """Linear layers of one input as one; their weights and biases become views of it. Packed ones are left as they are.

    by_columns: where it is faster (on a CPU, for more rows than columns), store the matrix by columns. The parameters
    are then not contiguous, which some code that trains or saves them does not expect.
    """
    # In the mode the parameters were made in: ordinary ones may be trained, inference tensors take only their like.
    with torch.inference_mode(linears[0].weight.is_inference()), torch.no_grad():
        return _pack(linears, by_columns)


def _pack(linears: list[nn.Linear], by_columns: bool) -> DecodeWeight:
    width = sum(linear.out_features for linear in linears)
    by_columns = by_columns and not device.uses_kernels(linears[0].weight) and width > linears[0].in_features
    bias = _pack_biases(linears)
    quantized = [parts for linear in linears if (parts := int8_parts(linear.weight)) is not None]
    if len(quantized) == len(linears):
        whole = _joined([values for values, _ in quantized])
        for linear, values in zip(linears, whole.split([len(values) for values, _ in quantized]), strict=True):
            move_int8_(linear.weight, values)
        return DecodeWeight(whole, torch.cat([scale for _, scale in quantized]), bias)
    whole = _joined([linear.weight.data for linear in linears], by_columns)
    for linear, values in zip(linears, whole.split([linear.out_features for linear in linears]), strict=True):
        linear.weight.data = values
    return DecodeWeight(whole, None, bias)


def _pack_biases(linears: list[nn.Linear]) -> Tensor | None:
    """All biases in one vector, 0 where a layer has none; None if no layer has one."""
    given = next((linear.bias for linear in linears if linear.bias is not None), None)
    if given is None:
        return None
    whole = _joined(
        [given.new_zeros(linear.out_features) if linear.bias is None else linear.bias.data for linear in linears]
    )
    for linear, values in zip(linears, whole.split([linear.out_features for linear in linears]), strict=True):
        if linear.bias is not None:
            linear.bias.data = values
    return whole


def _joined(pieces: list[Tensor], by_columns: bool = False) -> Tensor:
    """Matrices [N_i, K] (or vectors [N_i]) as one with sum N_i rows, stored by columns if asked.

    Returns a view if they already lie in memory like that, or by columns where that is not asked: an engine may have
    packed them, and reads them still. Otherwise a copy.
    """
    first, rows = pieces[0], sum(map(len, pieces))
    by_rows = (first.shape[1], 1) if first.dim() == 2 else (1,)
    for strides in [(1, rows)] if by_columns else [by_rows, (1, rows)][: first.dim()]:
        if _lie_joined(pieces, strides):
            return first.as_strided((rows, *first.shape[1:]), strides)
    whole = torch.cat([piece.t() for piece in pieces], 1).t() if by_columns else torch.cat(pieces)
    setattr(whole.untyped_storage(), PACKED, True)
    return whole


def _lie_joined(pieces: list[Tensor], strides: tuple[int, ...]) -> bool:
    """Whether the pieces follow each other in one storage as one matrix with these strides."""
    row_bytes = strides[0] * pieces[0].element_size()
    starts = [piece.data_ptr() for piece in pieces]
    ends = [piece.data_ptr() + len(piece) * row_bytes for piece in pieces]
    one_storage = len({piece.untyped_storage().data_ptr() for piece in pieces}) == 1
    return one_storage and starts[1:] == ends[:-1] and all(piece.stride() == strides for piece in pieces)
