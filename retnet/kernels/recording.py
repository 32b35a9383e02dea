"""Recorded passes: what a pass allocates and launches, replayed without the Python that decided it.

The host's time of a call goes into decisions: which tiles, which grid, and Triton's look at every argument. They depend
on shapes, strides, dtypes and alignment, never on values. So the first call of a kind runs as it is, the second is
recorded, and later ones replay the record: allocations and other operators of torch in their order, and launches with
the addresses of this call's tensors. No address is kept, and no tensor: a replay allocates what the pass allocates, and
frees each temporary after its last use.

A pass can be recorded if it calls kernels through `launch`, and torch's operators with tensors that are its inputs or
that it made. One that reads a value on the host, or a tensor from elsewhere, always runs as it is.
"""

import copy
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import driver

MOST_KINDS = 1024  # recordings of a `Recordings`; beyond it the oldest is forgotten

_thread = threading.local()  # .recorder: the recorder of the pass that this thread records
Results = tuple[Tensor | None, ...]
Launched = Callable[[Any, tuple[int, ...], tuple, dict[str, Any]], Any]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
    """`kernel[grid](*arguments, **options)`, noted by the recorder of this thread, if any. Returns Triton's kernel."""
    if not is_recording():
        return kernel[grid](*arguments, **options)
    return _thread.recorder.launched(kernel, grid, arguments, options)


@contextmanager
def launches_given_to(launched: Launched) -> Iterator[None]:
    """In a `with` block, `launch` of this thread calls `launched(kernel, grid, arguments, options)` and no kernel."""
    before = getattr(_thread, "recorder", None)
    _thread.recorder = SimpleNamespace(launched=launched)
    try:
        yield
    finally:
        _thread.recorder = before


def is_recording() -> bool:
    """Whether this thread records a pass."""
    return getattr(_thread, "recorder", None) is not None


class Recordings:
    """The recordings of some kind of pass, by keys that say everything the pass depends on except values."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Recording | None] = {}  # None: seen once, or not to be recorded
        self._refused: set[Hashable] = set()

    def run(self, key: Hashable, inputs: Sequence[Tensor | None], run: Callable[[], Results]) -> Results:
        """The results of `run`, which reads no tensors but `inputs`: by replay where this key has been recorded."""
        recording = self._found.get(key)
        if recording is not None and not _launches_are_watched():
            return recording.replay(inputs)
        if key not in self._found:
            while len(self._found) >= MOST_KINDS:
                oldest = next(iter(self._found))
                del self._found[oldest]
                self._refused.discard(oldest)
            self._found[key] = None
        elif recording is None and key not in self._refused and not is_recording() and _are_distinct(inputs):
            with Recorder(inputs) as recorder:
                results = run()
            self._found[key] = recorder.recording(results)
            if self._found[key] is None:
                self._refused.add(key)
            return results
        return run()

    def forget(self) -> None:
        """Make every kind of pass run as it is again, for instance because other tiles are to be used."""
        self._found.clear()
        self._refused.clear()


def _are_distinct(inputs: Sequence[Tensor | None]) -> bool:
    """Whether no tensor is given twice: a record of such a pass could not tell which of the two it reads."""
    given = [id(x) for x in inputs if x is not None]
    return len(set(given)) == len(given)


def _launches_are_watched() -> bool:
    """Whether a profiler of Triton wants to see launches, which go to it through Triton's own call alone."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


class Slot(NamedTuple):
    """The place of a tensor among those of a pass: its inputs, then what it made, in order."""

    index: int


class Described(NamedTuple):
    """A TMA descriptor without its tensor, and that tensor's slot."""

    index: int
    rest: Any


Step = Callable[[list, int], None]  # of the tensors by slot, and the current stream


@dataclass
class _Noted:
    """An operator or a launch as it was seen. `made`: the slots of an operator's results, None for a launch."""

    function: Any
    given: list  # slots and descriptors in place of tensors
    named: dict[str, Any]
    made: list[int] | None = None
    grid: tuple[int, ...] = ()
    compiled: Any = None

    @property
    def slots(self) -> set[int]:
        return {place.index for place in _flat([*self.given, *self.named.values()])}


class Recorder(TorchDispatchMode):
    """Notes the operators and the launches of one pass over `inputs`, in the thread that runs it."""

    def __init__(self, inputs: Sequence[Tensor | None]):
        super().__init__()
        self._slots: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by id; a dead tensor's id may come again
        self._views: dict[int, tuple[int, int]] = {}  # slot of a view -> the slot it looks into, bytes between the two
        self._noted: list[_Noted] = []
        self._count, self._num_inputs, self._device = 0, len(inputs), -1
        self._paused, self._refused = False, False
        for x in inputs:  # a slot each, also where there is none
            self._add(x)
            if x is not None and x.is_cuda:
                self._device = x.get_device()

    def __enter__(self) -> "Recorder":
        _thread.recorder = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _thread.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._paused and not self._refused:
            self._note_operator(func, args, kwargs, result)
        return result

    def launched(self, kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]) -> Any:
        self._paused = True  # compiling, and Triton's interpreter, call operators of their own
        try:
            compiled = kernel[grid](*arguments, **options)
        finally:
            self._paused = False
        places = None if self._refused else self._places([*arguments, *options.values()])
        if places is not None:
            given, named = places[: len(arguments)], dict(zip(options, places[len(arguments) :]))
            self._noted.append(_Noted(kernel, given, named, None, grid, compiled))
        return compiled

    def recording(self, results: Results) -> "Recording | None":
        """The record of the pass that returned `results`. None if it cannot be replayed."""
        places = self._places(list(results))
        if self._refused or places is None:
            return None
        kept = {place.index for place in _flat(places)}
        wanted = set(kept)  # as tensors; direct launches take addresses, so a view that they alone read is not made
        steps: list[tuple[Step, set[int]]] = []
        for noted in reversed(self._noted):
            if noted.made is None:
                direct = _direct_launch(noted, self._views)
                step, used = direct or (_launch_again(noted), noted.slots)
                wanted |= set() if direct else used
            elif noted.function.is_view and self._views.keys() >= set(noted.made) and not wanted & set(noted.made):
                continue
            else:
                step, used = _operator(noted), noted.slots | set(noted.made)
                wanted |= noted.slots
            steps.append((step, used))
        freed, seen = [], kept | set(range(self._num_inputs))
        for step, used in steps:  # from the last to the first
            freed.append((step, tuple(used - seen)))
            seen |= used
        return Recording(freed[::-1], self._count - self._num_inputs, places, self._device)

    def _note_operator(self, func, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        places = self._places([*args, *kwargs.values()])
        results = [result] if isinstance(result, Tensor) else result
        if places is None or not isinstance(results, (list, tuple)) or not all(isinstance(x, Tensor) for x in results):
            self._refused = True  # a value on the host, or a tensor that is not the pass's own
            return
        given, named = places[: len(args)], dict(zip(kwargs, places[len(args) :]))
        made = [self._add(x) for x in results]
        self._noted.append(_Noted(func, given, named, made))
        if func.is_view and len(made) == 1 and isinstance(given[0], Slot) and made[0] != given[0].index:
            source, distance = self._views.get(given[0].index, (given[0].index, 0))
            self._views[made[0]] = source, distance + result.data_ptr() - args[0].data_ptr()

    def _add(self, x: Tensor | None) -> int:
        """The slot of a tensor: its own, where an operator returned what it was given, or the next."""
        if x is not None and (place := self._slot_of(x)) is not None:
            return place.index
        if x is not None:
            self._slots[id(x)] = (weakref.ref(x), self._count)
        self._count += 1
        return self._count - 1

    def _slot_of(self, x: Tensor) -> Slot | None:
        found = self._slots.get(id(x))
        return Slot(found[1]) if found is not None and found[0]() is x else None

    def _places(self, values: list) -> list | None:
        """The values with slots in place of tensors. None, and no recording, if a tensor is not of this pass."""
        places = []
        for value in values:
            place = value
            if isinstance(value, Tensor):
                place = self._slot_of(value)
            elif isinstance(value, (list, tuple)) and any(isinstance(x, Tensor) for x in value):
                place = self._places(list(value))
            elif hasattr(value, "block_shape") and isinstance(getattr(value, "base", None), Tensor):
                slot, rest = self._slot_of(value.base), copy.copy(value)
                rest.base = None
                place = None if slot is None else Described(slot.index, rest)
            if place is None and value is not None:
                self._refused = True
                return None
            places.append(place)
        return places


class Recording:
    """The steps of one kind of pass, each with the slots that are free after it, and where the results lie."""

    def __init__(self, steps: list[tuple[Step, tuple[int, ...]]], made: int, results: list, device: int):
        self._steps, self._blank, self._device = steps, [None] * made, device
        self._results = [place.index if isinstance(place, Slot) else None for place in results]

    def replay(self, inputs: Sequence[Tensor | None]) -> Results:
        slots = [*inputs, *self._blank]
        stream = torch._C._cuda_getCurrentRawStream(self._device) if self._device >= 0 else 0
        for step, freed in self._steps:
            step(slots, stream)
            for index in freed:
                slots[index] = None
        return tuple([None if index is None else slots[index] for index in self._results])


def _flat(places: list) -> list[Slot | Described]:
    """The slots and descriptors among values, and in lists among them."""
    flat = [x for place in places for x in (place if isinstance(place, list) else [place])]
    return [x for x in flat if isinstance(x, (Slot, Described))]


def _filled(places: list, slots: list) -> list:
    """Values for places: the tensors of slots, descriptors of them, and constants as they are."""
    values = []
    for place in places:
        value = place
        if isinstance(place, Slot):
            value = slots[place.index]
        elif isinstance(place, Described):
            value = copy.copy(place.rest)
            value.base = slots[place.index]
        elif isinstance(place, list):
            value = _filled(place, slots)
        values.append(value)
    return values


_ALLOCATIONS = {torch.ops.aten.empty.memory_format: torch.empty, torch.ops.aten.zeros.default: torch.zeros}


def _operator(noted: _Noted) -> Step:
    """The step that calls an operator of torch."""
    function, given, named, made = noted.function, noted.given, noted.named, noted.made or []
    if function in _ALLOCATIONS and not (named.get("pin_memory") or named.get("memory_format")):
        make, size, slot = _ALLOCATIONS[function], given[0], made[0]
        dtype, device = named.get("dtype"), named.get("device")

        def allocate(slots: list, stream: int) -> None:
            slots[slot] = make(size, dtype=dtype, device=device)

        return allocate

    names, values = list(named), list(named.values())

    def call(slots: list, stream: int) -> None:
        result = function(*_filled(given, slots), **dict(zip(names, _filled(values, slots))))
        for index, x in zip(made, [result] if isinstance(result, Tensor) else result):
            slots[index] = x

    return call


def _launch_again(noted: _Noted) -> Step:
    """The step that launches through Triton's own call, in any of its versions and in its interpreter."""
    kernel, grid, given, names = noted.function, noted.grid, noted.given, list(noted.named)
    values = list(noted.named.values())

    def call(slots: list, stream: int) -> None:
        kernel[grid](*_filled(given, slots), **dict(zip(names, _filled(values, slots))))

    return call


def _direct_launch(noted: _Noted, views: dict[int, tuple[int, int]]) -> tuple[Step, set[int]] | None:
    """The step that calls Triton's compiled launcher with addresses in place of tensors, and the slots that it reads.

    None where the launcher is not known to take them so: it is not a part of Triton's interface.
    """
    found, names = _launcher_of(noted.compiled), noted.function.arg_names
    left = names[len(noted.given) :]
    if found is None or any(name not in noted.named for name in left):
        return None
    launcher, known = found[0], iter(found[1])
    arguments: list = []
    pointers: list[tuple[int, int, int]] = []  # position, slot, offset
    maps: list[tuple[int, int, int, tuple]] = []
    for place in (*noted.given, *(noted.named[name] for name in left)):
        if isinstance(place, Slot):
            pointers.append((len(arguments), *views.get(place.index, (place.index, 0))))
            arguments.append(None)
        elif isinstance(place, Described):
            rest = _map_arguments(place.rest, next(known))
            maps.append((len(arguments), *views.get(place.index, (place.index, 0)), rest))
            arguments += [None, *place.rest.shape, *place.rest.strides]
        elif isinstance(place, (list, tuple)):
            return None
        else:
            arguments.append(place)
    x, y, z = (*noted.grid, 1, 1)[:3]
    run, function = noted.compiled.run, noted.compiled.function
    fill = driver.active.utils.fill_tma_descriptor if maps else None
    cooperative, dependent, metadata = run.launch_cooperative_grid, run.launch_pdl, noted.compiled.packed_metadata

    def direct(slots: list, stream: int) -> None:
        values = arguments.copy()
        for position, slot, offset in pointers:
            values[position] = slots[slot].data_ptr() + offset
        for position, slot, offset, rest in maps:
            values[position] = fill(slots[slot].data_ptr() + offset, *rest)
        launcher(x, y, z, stream, function, cooperative, dependent, None, None, metadata, None, None, None, *values)

    return direct, {slot for _, slot, *_ in (*pointers, *maps)}


def _launcher_of(compiled: Any) -> tuple[Callable, list] | None:
    """The compiled launcher of a kernel for NVIDIA GPUs, and what it knows of its descriptors. Triton 3.6 alone."""
    if compiled is None or not triton.__version__.startswith("3.6.") or torch.version.hip is not None:
        return None
    run = compiled.run
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    launcher, known = run.launch, []
    if getattr(launcher, "__closure__", None) is not None:  # a function that makes tensor maps before it launches
        cells = (cell.cell_contents for cell in launcher.__closure__)
        within = dict(zip(launcher.__code__.co_freevars, cells))
        if within.keys() != {"launcher", "tensordesc_indices", "tensordesc_meta"}:
            return None
        launcher, known = within["launcher"], within["tensordesc_meta"]
        if any(one is None or one["fp4_padded"] for one in known):
            return None
    return launcher, known


def _map_arguments(described: Any, known: dict[str, Any]) -> tuple:
    """The arguments after the address from which the driver makes a tensor map."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    element = known["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[known["elem_type"]]
    sizes = list(described.shape), list(described.strides)
    return known["swizzle"], *element, known["block_size"], *sizes, int(described.padding == "nan")
