"""An emulation of the walk on the CPU: the kernel's own source, run by Python with stand-ins for Gluon's operations.

Triton's interpreter does not know Gluon. Here a program's roles are threads, `mbarrier`s block them, and blocks are
tensors of torch. What Hopper does asynchronously happens as late as the waits allow: products of a warpgroup read
shared memory when they are waited for, and stores of tiles when `store_wait` is called. A tile that is given back too
early is then overwritten before it is read.
"""

import importlib.util
import sys
import threading
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

SECONDS = 60  # until a role that waits for another gives up
FOLDER = Path(__file__).parents[4] / "retnet" / "kernels" / "retention" / "hopper"
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int32", "int64")}

# .program: its number; .products, .stores: what is not finished; .errors: those of the program's roles
_role = threading.local()


class Pointer:
    """Elements of a tensor by their distance from its first one."""

    def __init__(self, x: torch.Tensor, at: Any = 0):
        self.x, self.at = x, at

    def __add__(self, distance: Any) -> "Pointer":
        return Pointer(self.x, self.at + distance)

    def __sub__(self, distance: Any) -> "Pointer":
        return Pointer(self.x, self.at - distance)

    @property
    def flat(self) -> torch.Tensor:
        return self.x.view(-1)


class Shared:
    """A tile in shared memory. Fresh memory is NaN."""

    def __init__(self, tile: torch.Tensor):
        self.tile, self.shape, self.dtype = tile, tile.shape, tile.dtype

    def index(self, i: Any) -> "Shared":
        return Shared(self.tile[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.tile.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.tile.permute(order))

    def reshape(self, shape: Any) -> "Shared":
        return Shared(self.tile.view(tuple(shape)))

    def load(self, layout: Any) -> torch.Tensor:
        return self.tile.clone()

    def store(self, x: torch.Tensor) -> None:
        assert x.dtype == self.dtype
        self.tile.copy_(x)


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all expected bytes are there."""

    def __init__(self):
        self.changed = threading.Condition()
        self.count = self.missing = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def change(self, arrived: int, expected: int) -> None:
        with self.changed:
            self.missing -= arrived
            self.bytes += expected
            assert self.missing >= 0
            if self.missing == 0 and self.bytes == 0:
                self.missing, self.phase = self.count, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity: Any) -> None:
        with self.changed:
            for _ in range(SECONDS):
                if self.changed.wait_for(lambda: self.phase % 2 != int(parity), 1):
                    return
                if _role.errors:
                    break
        raise RuntimeError("a role waited in vain")


class Barriers:
    def __init__(self, count: int):
        self.all = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


class Descriptor:
    """A TMA descriptor: tiles of a tensor, with zeros beyond its end."""

    def __init__(self, described: Any):
        self.x, self.dtype = described.base, described.base.dtype
        shape = tuple(described.block_shape)
        size = described.base.element_size()
        self.block_type = SimpleNamespace(shape=shape, nbytes=torch.Size(shape).numel() * size)

    def place(self, at: list) -> tuple[slice, ...]:
        return tuple(slice(int(i), int(i) + n) for i, n in zip(at, self.block_type.shape))

    def read(self, at: list) -> torch.Tensor:
        found, tile = self.x[self.place(at)], torch.zeros(self.block_type.shape, dtype=self.dtype)
        tile[tuple(slice(n) for n in found.shape)] = found
        return tile

    def write(self, at: list, tile: torch.Tensor, *, add: bool) -> None:
        target = self.x[self.place(at)]
        tile = tile[tuple(slice(n) for n in target.shape)]
        with _adding:
            target.copy_(target + tile if add else tile)


class Product:
    """An accumulator whose product may not be finished."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: Any):
        self.parts, self.value = (a, b, acc, use_acc), None

    def finish(self) -> None:
        a, b, acc, use_acc = self.parts
        acc = acc.value if isinstance(acc, Product) else acc
        a = a.tile if isinstance(a, Shared) else a
        assert a.dtype == b.dtype != torch.float32
        self.value = a.float() @ b.tile.float() + (acc if use_acc else 0)


_adding = threading.Lock()


def _product(a, b, acc, *, use_acc=True, is_async=False):
    made = Product(a, b, acc, use_acc)
    _role.products.append(made)
    return made if is_async else _wait_products(0, (made,))


def _wait_products(outstanding: int = 0, deps: tuple = ()):
    while len(_role.products) > outstanding:
        _role.products.pop(0).finish()
    found = tuple(x if isinstance(x, Product) and x.value is None else getattr(x, "value", x) for x in deps)
    return found[0] if len(found) == 1 else found


def _load_tile(desc: Descriptor, at: list, barrier: Barrier, result: Shared) -> None:
    result.tile.copy_(desc.read(at))
    barrier.change(0, -desc.block_type.nbytes)


def _store_tile(add: bool):
    return lambda desc, at, src: _role.stores.append(lambda: desc.write(at, src.tile, add=add))


def _wait_stores(outstanding: int) -> None:
    while len(_role.stores) > outstanding:
        _role.stores.pop(0)()


def _load(pointer: Pointer) -> torch.Tensor:
    return pointer.flat[torch.as_tensor(pointer.at).long()]


def _store(pointer: Pointer, x: torch.Tensor) -> None:
    assert x.dtype == pointer.x.dtype
    pointer.flat[torch.as_tensor(pointer.at).long()] = x


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any):
    if layout == "barriers":
        return Barriers(shape[0])
    return Shared(torch.full(shape, torch.nan).to(dtype))


def _specialize(roles: list, warps: list[int], registers: list[int]) -> None:
    """Run the roles to their ends, each in a thread."""
    assert len(roles) == len(warps) + 1 == len(registers) + 1
    errors, program = [], _role.program

    def run(role, args) -> None:
        _begin(program, errors)
        try:
            role(*args)
            assert not _role.products
            assert not _role.stores
        except BaseException as error:  # of any kind: it is raised again in the thread that waits
            errors.append(error)

    threads = [threading.Thread(target=run, args=role, daemon=True) for role in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _begin(program: int, errors: list) -> None:
    _role.program, _role.products, _role.stores, _role.errors = torch.as_tensor(program), [], [], errors


def _same(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


def _jit(fn=None, **options):
    return fn or _same


def _of_two(function):
    return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(contents)
    return module


def _stand_ins() -> dict[str, ModuleType]:
    language = _module(
        "language",
        **DTYPES,
        constexpr=_same,
        constexpr_function=_same,
        static_range=range,
        num_warps=lambda: 4,
        program_id=lambda axis: _role.program,
        warp_specialize=_specialize,
        thread_barrier=lambda: None,
        barrier=lambda: None,
        allocate_shared_memory=_allocate,
        arange=lambda start, end, layout=None: torch.arange(start, end),
        zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
        sum=torch.sum,
        exp2=torch.exp2,
        where=torch.where,
        maximum=_of_two(torch.maximum),
        minimum=_of_two(torch.minimum),
        convert_layout=_same,
        load=_load,
        store=_store,
        **{
            name: lambda *args, **kwargs: None
            for name in ("BlockedLayout", "SliceLayout", "SwizzledSharedLayout", "NVMMASharedLayout")
        },
        NVMMADistributedLayout=lambda *args: None,
        DotOperandLayout=lambda *args: None,
    )
    hopper = _module(
        "hopper",
        fence_async_shared=lambda: None,
        mbarrier=_module(
            "mbarrier",
            MBarrierLayout=lambda: "barriers",
            init=lambda barrier, count: barrier.init(count),
            expect=lambda barrier, size: barrier.change(1, size),
            arrive=lambda barrier, count: barrier.change(count, 0),
            wait=lambda barrier, phase: barrier.wait(phase),
        ),
        tma=_module(
            "tma",
            async_load=_load_tile,
            async_store=_store_tile(add=False),
            async_atomic_add=_store_tile(add=True),
            store_wait=_wait_stores,
        ),
        warpgroup_mma=_product,
        warpgroup_mma_wait=_wait_products,
    )
    gluon = _module("gluon", jit=_jit, constexpr_function=_same, language=language)
    return {
        "triton.experimental": _module("experimental", gluon=gluon),
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language": language,
        "triton.experimental.gluon.language._core": _module("_core", builtin=_same),
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
    }


@cache
def _kernel():
    """`walk_kernel` as a Python function."""
    stand_ins = _stand_ins()
    for name in ("borders", "warp_roles", "walk"):
        path = f"retnet.kernels.retention.hopper.{name}"
        spec = importlib.util.spec_from_file_location(path, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        stand_ins[path] = importlib.util.module_from_spec(spec)
        with mock.patch.dict(sys.modules, stand_ins):
            spec.loader.exec_module(stand_ins[path])
    return stand_ins["retnet.kernels.retention.hopper.walk"].walk_kernel


def launch_walk(variant: Any, programs: int, arguments: tuple) -> None:
    """`launch.launch_walk`, one program after another."""
    given = [
        Pointer(x) if isinstance(x, torch.Tensor) else Descriptor(x) if hasattr(x, "block_shape") else x
        for x in arguments
    ]
    given = [torch.tensor(x) if isinstance(x, int) else x for x in given]
    for program in range(programs):
        _begin(program, [])
        _kernel()(*given, *variant.constants)
