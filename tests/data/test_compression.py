"""Compressed files are read whole or are an error, as the formats' own tools do."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import shutil
import subprocess

import pytest

from retnet.data.compression import DamagedError, unpacked

TOOLS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
MAGIC = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ", ".zst": b"\x28\xb5\x2f\xfd"}


def zstd(data):
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
FORMATS = sorted(COMPRESS)
TEXT = b"".join(b"line %d of some text\n" % i for i in range(2000))


def read(path, size=-1):
    with open(path, "rb") as raw, unpacked(raw, path) as file:
        parts = list(iter(lambda: file.read(size), b""))
        raw.tell()  # still open
    return b"".join(parts)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("size", [-1, 1, 1 << 16])
def test_every_stream_of_a_file_is_read(tmp_path, suffix, size):
    path = tmp_path / f"a{suffix}"
    texts = [TEXT, b"", TEXT[:50], TEXT] if size != 1 else [TEXT[:90], b"", TEXT[:50]]
    path.write_bytes(b"".join(map(COMPRESS[suffix], texts)))
    assert read(path, size) == b"".join(texts)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("change", ["cut", "header", "trailing", "magic", "short padding", "zeros between", "empty"])
def test_a_damaged_second_stream_or_trailing_bytes_are_an_error(tmp_path, suffix, change):
    path = tmp_path / f"a{suffix}"
    first = COMPRESS[suffix](TEXT)
    second = bytearray(first)
    second[0 if suffix == ".zst" else 2] ^= 0x10
    path.write_bytes(
        {
            "cut": first + first[:-9],
            "header": first + second,
            "trailing": first + b"\n",
            "magic": first + MAGIC[suffix],
            "short padding": first + bytes(3) if suffix != ".gz" else first + bytes(3) + b"x",
            "zeros between": first + bytes(5) + first,
            "empty": b"",
        }[change]
    )
    with pytest.raises(DamagedError, match=rf"a\{suffix} is damaged or cut off: "):
        read(path, 1000)


def test_padding_of_zeros_is_read_where_the_format_has_it(tmp_path):
    xz, gz = tmp_path / "a.xz", tmp_path / "a.gz"
    xz.write_bytes(lzma.compress(TEXT) + bytes(8) + lzma.compress(TEXT) + bytes(1 << 19))
    assert read(xz) == TEXT * 2
    gz.write_bytes(gzip.compress(TEXT) + bytes(513))
    assert read(gz) == TEXT


@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_files_are_errors_where_the_tool_of_the_format_finds_damage(tmp_path, suffix):
    """Bytes flipped, cut out, put in, appended, over one to three streams. bzip2 drops what follows a stream and cannot
    be read with a warning; here that is an error."""
    tool = shutil.which(TOOLS[suffix])
    if tool is None:
        pytest.skip(f"no {TOOLS[suffix]} here")
    rng = random.Random(5)
    path = tmp_path / f"a{suffix}"
    whole = 0
    for _ in range(25):
        data = bytearray(
            b"".join(COMPRESS[suffix](TEXT[: rng.choice([1, 60, 9000])]) for _ in range(rng.randint(1, 3)))
        )
        at = rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randint(1, 50)]
        elif kind == 2:
            data[at:at] = rng.randbytes(3)
        elif kind == 3:
            data += rng.choice([rng.randbytes(9), bytes(4), bytes(512), MAGIC[suffix]])
        elif kind == 4:
            data = data[:at]
        path.write_bytes(data)
        done = subprocess.run([tool, "-dcq"], input=bytes(data), capture_output=True, check=False)
        try:
            text = read(path)
        except DamagedError:
            assert done.returncode or (suffix == ".bz2" and kind != 5)
        else:
            assert (done.returncode, done.stdout) == (0, text)
            whole += 1
    assert whole
