"""The launch of a walk: its tile, its compiled variants, and the TMA descriptors of its tensors."""

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from retnet.kernels.recording import is_recording, launch
from retnet.kernels.retention.hopper.walk import walk_kernel
from retnet.kernels.retention.hopper.warp_roles import CHUNK, GROUP_VALUES

MOST_KEYS = 256  # of a program: [64 values, 256 keys] in float32 take half the registers of a warpgroup's threads
_BLOCK_LAYOUT = gl.NVMMASharedLayout(128, 16, 4)  # of a descriptor's tile


@dataclass(frozen=True)
class WalkTile:
    """The tile of a walk: keys and warpgroups (64 values each) per program, stages per pipeline, registers per role."""

    keys: int
    splits: int
    groups: int
    x_stages: int
    y_stages: int
    z_stages: int
    mix_registers: int
    score_registers: int


@cache
def tile_of(keys: int, values: int, narrow: bool) -> WalkTile:
    """The tile of a walk that contracts over `keys` and makes `values`.

    Two warpgroups share the tiles of x and y; if `narrow`, a program has only one. The register counts of four roles at
    256 keys are the ones that compile without spills and without serialized products. None are left over.
    """
    splits = max(1, keys // MOST_KEYS)
    keys //= splits
    groups = 2 if not narrow and (values >= 256 or (values == 128 and keys == 64)) else 1
    stages = 2 if keys == 256 else 3
    mix_registers, score_registers = {256: (216, 64), 128: (184, 96), 64: (136, 96)}[keys]
    if groups == 1:
        score_registers = 96
    return WalkTile(keys, splits, groups, stages, stages, stages, mix_registers, score_registers)


@dataclass(frozen=True)
class Variant:
    """The constants of a compiled walk, in the kernel's order, and its programs per head and part."""

    programs: int
    constants: tuple[int | bool, ...]


@lru_cache(maxsize=256)
def variant_of(
    K: int, V: int, narrow: bool, over_values: bool, reverse: bool, *, read: bool, has_codes: bool, per_document: bool,
    has_initial: bool, store_final: bool, per_token: bool = False, xy_heads: int = 1, z_heads: int = 1,
    crossing: bool = False,
) -> Variant:  # fmt: skip
    """xy_heads, z_heads: how many heads share x and y, or z. crossing: for the gradient of log_decay (`Crossing`)."""
    tile, values = (tile_of(V, K, narrow), K) if over_values else (tile_of(K, V, narrow), V)
    constants = {
        "KEYS": tile.keys,
        "VALUES": values,
        "SPLITS": tile.splits,
        "GROUPS": tile.groups,
        "KEY_STRIDE": 1 if over_values else V,
        "VALUE_STRIDE": V if over_values else 1,
        "REVERSE": reverse,
        "READ": read,
        "HAS_CODES": has_codes,
        "PER_DOCUMENT": per_document,
        "HAS_INITIAL": has_initial,
        "STORE_FINAL": store_final,
        "PER_TOKEN": per_token,
        "XY_HEADS": xy_heads,
        "Z_HEADS": z_heads,
        "TERMS": tile.splits * values // GROUP_VALUES if crossing else 0,
        "X_STAGES": tile.x_stages,
        "Y_STAGES": tile.y_stages if read else 3,  # without readers there is room for a third
        "Z_STAGES": tile.z_stages if read else 3,
        "MIX_REGISTERS": tile.mix_registers,
        "SCORE_REGISTERS": tile.score_registers,
        "LOAD_REGISTERS": 24,
    }
    names = walk_kernel.arg_names[-len(constants) :]
    return Variant(tile.splits * values // (GROUP_VALUES * tile.groups), tuple(constants[name] for name in names))


# Triton's own lookup of a compiled kernel inspects every argument again, which takes most of the host time of a launch.
_compiled: dict[tuple, triton.compiler.CompiledKernel] = {}


def launch_walk(variant: Variant, programs: int, arguments: tuple) -> None:
    """Launch the walk. Compiled code is kept by everything it depends on; unaligned pointers go through Triton."""
    log_decay, documents = arguments[4], arguments[9]
    pointers = (log_decay, *arguments[6:12], *arguments[13:16])
    key = (
        variant.constants,
        arguments[0].base.dtype,
        arguments[-3],  # heads
        documents.dtype,
        driver.active.get_current_device(),
    )
    compiled = _compiled.get(key)
    aligned = all(x is None or x.data_ptr() % 16 == 0 for x in pointers)
    if compiled is not None and aligned and not is_recording():
        compiled[programs, 1, 1](*arguments, *variant.constants)
        return
    compiled = launch(walk_kernel, (programs,), *arguments, *variant.constants, num_warps=4)
    if aligned:
        _compiled[key] = compiled


def tma_readable(x: Tensor) -> Tensor:
    """x if TMA can address it, else a copy. TMA needs a contiguous last axis, and a base and strides of 16 bytes."""
    if x.data_ptr() % 16 == 0:
        if x.is_contiguous():
            return x
        step = 16 // x.element_size()
        *outer, last = _geometry(x.shape, x.stride())[1]
        if last == 1 and all(stride > 0 and stride % step == 0 for stride in outer):
            return x
    return x.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=1024)
def _geometry(shape: torch.Size, strides: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Sizes and strides for TMA. It also checks the stride of an axis of size 1, where any aligned one will do."""
    outer = [stride if size > 1 else shape[-1] for size, stride in zip(shape[:-1], strides)]
    return list(shape), [*outer, strides[-1]]


def descriptor(x: Tensor, width: int) -> TensorDescriptor:
    """A descriptor of x [B, T, H, features] in tiles of [CHUNK tokens, width features] of one head.

    Made without the constructor: it would take as long as the launch, and `tma_readable` has checked the same."""
    described = object.__new__(TensorDescriptor)
    described.base = x
    described.shape, described.strides = _geometry(x.shape, x.stride())
    described.block_shape, described.layout = [1, CHUNK, 1, width], _BLOCK_LAYOUT
    return described
