"""Snapshots: the state of a sequence as a value that users own, and as a file that another process can continue.

    <i>.<kind>.<tensor>   the state of layer i; wider floating point is stored as float32 or bfloat16
    tokens                int32 [n]: all tokens seen; the state has read the first n - 1
    attachment            uint8 [n]: bytes kept with the state; absent if there are none
    metadata              format, model (fingerprint), position, tokens (SHA-256), content (SHA-256 of all tensors), ...
                          initial: the identity of a learned initial state; absent after the empty one
                          extra.<name>: texts kept with the state

A learned initial state (`initial_state.py`) is a snapshot at position 0: its one token is the document start, which it
has not read.

A file is written beside its target, flushed to the disk and renamed, so that a crash leaves the old file intact. A file
that is truncated, changed, or of another model is refused: continuing a wrong state gives fluent nonsense.
"""

import json
import math
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from retnet.models.fingerprint import bytes_of
from retnet.models.snapshot_file import StoredTensors, digest, opened, pieces
from retnet.models.states import ModelState
from retnet.ops.device import resolve_device
from retnet.system.checks import as_path, copied_integers, is_integer, is_number, quoted
from retnet.system.files import written_whole

FORMAT = "retnet-snapshot"
EXTRA = "extra."  # before the names of `extra` in the metadata
ATTACHMENT = "attachment"
StoredDtype = Literal["float32", "bfloat16"]
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state of one sequence that has read all `tokens` but the last. The tensors of `state` are not copied.

    model: the fingerprint of the model.
    rounding_error: norm(state - stored) / norm(state), the largest over all tensors; 0 unless stored in fewer bits.
    output_start: where the output begins that penalties count, if the output is continued.
    initial: the identity of the learned initial state that the sequence began from (SHA-256, hexadecimal), so that
        states after equal tokens are told apart; None after the empty state. At position 0 it is computed if absent.
    """

    state: ModelState
    tokens: array
    model: str
    rounding_error: float = 0.0
    output_start: int | None = None
    initial: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tokens, Set):
            raise ValueError(f"tokens is {quoted(self.tokens)}, which has no order; accepted: token ids in order")
        tokens = _copied_tokens(self.tokens)
        object.__setattr__(self, "tokens", tokens)
        self.check()
        if not isinstance(self.model, str):
            raise ValueError(f"model is {quoted(self.model)}; accepted: the fingerprint of a model, text")
        if not is_number(self.rounding_error, 0, math.inf):
            raise ValueError(f"rounding_error is {quoted(self.rounding_error)}; accepted: 0 or more")
        object.__setattr__(self, "rounding_error", float(self.rounding_error))
        if self.output_start is not None:
            if not is_integer(self.output_start, 0, len(tokens)):
                raise ValueError(f"output_start is {quoted(self.output_start)}; accepted: None, or 0 to {len(tokens)}")
            object.__setattr__(self, "output_start", int(self.output_start))
        if self.initial is None and self.is_initial:
            object.__setattr__(self, "initial", _identity(self.state))
        if not (self.initial is None or (isinstance(self.initial, str) and _SHA256.fullmatch(self.initial))):
            raise ValueError(f"initial is {quoted(self.initial)}; accepted: None, or a SHA-256 in hexadecimal")

    @property
    def is_initial(self) -> bool:
        """Whether the state has read no token: a learned initial state, or the empty one."""
        return len(self.tokens) == 1

    def check(self) -> None:
        """Raise ValueError unless the state, whose tensors can change in place, is that of all tokens but the last."""
        if not isinstance(self.state, ModelState) or not self.state.layers:
            raise ValueError(
                f"state is of type {type(self.state).__name__}; accepted: a ModelState of a model's layers"
            )
        positions = [leaf.position.tolist() for layer in self.state for leaf in layer.leaves]
        if any(position != [len(self.tokens) - 1] for position in positions):
            raise ValueError(
                f"state is at position {positions[0]} and there are {len(self.tokens)} tokens; accepted: one sequence "
                "that has read all of them but the last"
            )

    def common(self, context: Sequence[int]) -> int:
        """How many of the tokens that the state has read a context begins with."""
        read = self.tokens[:-1]
        begins = array("i", context[: len(read)])
        if begins == read:
            return len(read)
        return next((i for i, (a, b) in enumerate(zip(begins, read, strict=False)) if a != b), len(begins))

    def begin_of(self, context: Sequence[int]) -> "tuple[Snapshot, Sequence[int]] | None":
        """This state as the beginning of a context, and the tokens to read after it; None if it is not its beginning.

        The last token is not in the state yet, so the context may have another one in its place.
        """
        read = len(self.tokens) - 1
        if len(context) <= read or self.common(context) < read:
            return None
        return self.ending_with(context[read]), context[read + 1 :]

    def ending_with(self, token: int) -> "Snapshot":
        """The same state, before another last token."""
        if token == self.tokens[-1]:
            return self
        tokens = self.tokens[:]
        tokens[-1] = token
        return replace(self, tokens=tokens, output_start=None)

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + self.tokens.itemsize * len(self.tokens)

    def save(
        self,
        path: str | Path,
        dtype: StoredDtype = "float32",
        *,
        extra: Mapping[str, str] | None = None,
        attachment: bytes = b"",
    ) -> float:
        """Write a file that `load` reads; return the rounding error. An old file stays until the new one is whole.

        extra, attachment: texts by name and bytes to keep with the state, which `SnapshotFile.load` gives back.
        """
        path = as_path("path", path)
        tensors, metadata = self._stored(dtype, extra, attachment)
        with written_whole(path) as file:
            for piece in pieces(tensors, metadata):
                file.write(piece)
        return float(metadata["rounding_error"])

    def pieces(
        self, dtype: StoredDtype = "float32", *, extra: Mapping[str, str] | None = None, attachment: bytes = b""
    ) -> Iterator[bytes | memoryview]:
        """The bytes of the file that `save` writes, one tensor at a time; each piece is valid until the next."""
        return pieces(*self._stored(dtype, extra, attachment))

    def _stored(
        self, dtype: str, extra: Mapping[str, str] | None, attachment: bytes
    ) -> tuple[StoredTensors, dict[str, str]]:
        """The tensors and the metadata of the file."""
        if not isinstance(dtype, str) or dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {quoted(dtype)}; accepted: float32, bfloat16")
        state = self.state.named_tensors()
        beside = {"tokens": torch.frombuffer(self.tokens, dtype=torch.int32)}
        metadata = {
            "format": FORMAT,
            "model": self.model,
            "position": str(len(self.tokens) - 1),
            "tokens": digest(beside, {}),
            "output_start": str(len(self.tokens) if self.output_start is None else self.output_start),
            "dtypes": json.dumps({name: str(x.dtype)[6:] for name, x in state.items()}),
        }
        if self.initial is not None:
            metadata["initial"] = self.initial
        if attachment:
            beside[ATTACHMENT] = torch.frombuffer(bytearray(attachment), dtype=torch.uint8)
        metadata |= {EXTRA + name: text for name, text in (extra or {}).items()}
        tensors = StoredTensors(state | beside, getattr(torch, dtype))
        metadata["rounding_error"] = repr(max(self.rounding_error, tensors.rounding_error()))
        metadata["content"] = digest(tensors, metadata)
        return tensors, metadata

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Snapshot":
        """Read a file that `save` wrote, in the dtypes that the state had.

        Raises ValueError for a file that is something else, truncated, or changed since it was written, and
        FileNotFoundError if there is no file.
        """
        return SnapshotFile.load(path, device).snapshot


def _copied_tokens(tokens: object) -> array:
    """A copy of token ids. An engine's own array is checked as a tensor: contexts may have millions of tokens."""
    if type(tokens) is array and tokens.typecode == "i" and len(tokens):
        copy = tokens[:]
        if int(torch.frombuffer(copy, dtype=torch.int32).min()) >= 0:
            return copy
    return array("i", copied_integers("tokens", tokens, 0, 2**31 - 1, "token ids"))


@dataclass(frozen=True, eq=False)
class SnapshotFile:
    """A snapshot and what was kept with it in its file. `extra`: texts by name; `attachment`: bytes."""

    snapshot: Snapshot
    extra: dict[str, str]
    attachment: bytes

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "SnapshotFile":
        """Read a file that `Snapshot.save` wrote. Raises as `Snapshot.load` does."""
        path, device = as_path("path", path), resolve_device(device)
        if not path.is_file():
            raise FileNotFoundError(f"no snapshot at {path}: {'not a file' if path.exists() else 'no such file'}")
        try:
            with opened(path) as file:
                metadata = dict(file.metadata() or {})
                # Copies, because the file is mapped and could change after the check.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a snapshot (format {metadata.get('format')!r}); accepted: {FORMAT!r}")
        content = metadata.pop("content", None)
        if content != digest(tensors, metadata):
            raise ValueError(f"{path} was changed since it was written: its SHA-256 is not the one it names")
        try:
            attached = tensors.pop(ATTACHMENT, None)
            snapshot = _snapshot(tensors, metadata, device)
            if attached is not None and (attached.dtype != torch.uint8 or attached.dim() != 1):
                raise ValueError(f"its attachment is {list(attached.shape)} of {attached.dtype}")
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} is not a whole snapshot: {error}") from error
        extra = {name[len(EXTRA) :]: text for name, text in metadata.items() if name.startswith(EXTRA)}
        return cls(snapshot, extra, b"" if attached is None else bytes(bytes_of(attached)))


def _snapshot(tensors: dict[str, Tensor], metadata: dict[str, str], device: torch.device) -> Snapshot:
    dtypes, seen = json.loads(metadata["dtypes"]), tensors.pop("tokens")
    if seen.dtype != torch.int32 or metadata["tokens"] != digest({"tokens": seen}, {}):
        raise ValueError("its tokens are not those that it names")
    if int(metadata["position"]) != len(seen) - 1:
        raise ValueError(f"it has {len(seen)} tokens for position {metadata['position']}")
    tokens = array("i")
    tokens.frombytes(bytes_of(seen.contiguous()))
    named = {name: x.to(device, getattr(torch, dtypes[name])) for name, x in tensors.items()}
    facts = metadata["model"], float(metadata["rounding_error"]), int(metadata["output_start"])
    return Snapshot(ModelState.from_named(named), tokens, *facts, metadata.get("initial"))


def _identity(state: ModelState) -> str | None:
    """The SHA-256 of an initial state; None for the empty one, which is all zeros."""
    tensors = state.named_tensors()
    if not any(bool(x.any()) for x in tensors.values()):
        return None
    return digest(StoredTensors(tensors, torch.float64), {})
