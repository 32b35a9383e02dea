"""The safetensors file of a snapshot, tensor by tensor: its bytes in order, and its digest.

safetensors' own writer needs all bytes at once. Here no more than one tensor is copied at a time, so a state can be
written, or sent over a network, in little memory beside its own. Files are read by the library.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from retnet.models.fingerprint import bytes_of

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def opened(path: Path) -> Any:
    """safetensors' `safe_open`, which opens a file twice.

    Raises FileNotFoundError too where the file is deleted between the two, which is a RuntimeError of torch's there.
    """
    try:
        return safe_open(path, "pt")
    except SafetensorError:
        raise
    except RuntimeError as error:
        if path.exists():
            raise
        raise FileNotFoundError(f"{path} was deleted while it was opened") from error


class StoredTensors(Mapping[str, Tensor]):
    """Tensors by name as a file holds them: on the CPU, wider floating point in `dtype`; each converted when read."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype):
        self._tensors, self._dtype = tensors, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to("cpu", self.dtype(name)).contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def dtype(self, name: str) -> torch.dtype:
        x = self._tensors[name]
        return self._dtype if x.is_floating_point() and x.element_size() > self._dtype.itemsize else x.dtype

    def shape(self, name: str) -> list[int]:
        return list(self._tensors[name].shape)

    def rounding_error(self) -> float:
        """norm(x - stored) / norm(x), the largest over all tensors."""
        error = 0.0
        for name, x in self._tensors.items():
            if self.dtype(name) is not x.dtype:
                exact = x.to("cpu", torch.float64)
                norm = exact.norm().clamp_min(torch.finfo(torch.float64).tiny)
                error = max(error, float((exact - self[name].double()).norm() / norm))
        return error


def pieces(tensors: StoredTensors, metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor at a time; a piece is valid until the next one is taken."""
    names = sorted(tensors, key=lambda name: (-tensors.dtype(name).itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        begin, dtype, shape = end, tensors.dtype(name), tensors.shape(name)
        end += dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        x = tensors[name]
        yield bytes_of(x)


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of the metadata and of the names, shapes, dtypes and values of all tensors."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name]
        found.update(f"{name} {list(x.shape)} {x.dtype}".encode())
        found.update(bytes_of(x.contiguous()))
    return found.hexdigest()
