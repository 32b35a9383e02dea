"""API keys from a file."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from retnet.serve.http.access.keys import ApiKeys

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"


def key_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_keys_are_found_by_value_and_named_by_their_line(tmp_path):
    keys = ApiKeys.read(key_file(tmp_path, f"# team\nalice:{ALICE}\n\n  bob : {BOB}  \nsk-without-a-name-0123456789\n"))
    assert keys.find(ALICE.encode()) == "alice"
    assert keys.find(BOB.encode()) == "bob"
    unnamed = keys.find(b"sk-without-a-name-0123456789")
    assert unnamed is not None
    assert unnamed.startswith("key-")
    for wrong in (b"", b"alice", ALICE[:-1].encode(), f"alice:{ALICE}".encode(), b"\xff"):
        assert keys.find(wrong) is None


def test_two_keys_may_have_one_name_while_one_replaces_the_other(tmp_path):
    keys = ApiKeys.read(key_file(tmp_path, f"alice:{ALICE}\nalice:{BOB}\n"))
    assert keys.find(ALICE.encode()) == keys.find(BOB.encode()) == "alice"


def test_the_keys_themselves_are_not_kept(tmp_path):
    keys = ApiKeys.read(key_file(tmp_path, f"alice:{ALICE}\n"))
    assert ALICE not in repr(vars(keys))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has 0 keys"),
        ("# nothing\n", "has 0 keys"),
        ("alice:\n", "line 1: no key"),
        ("al ice:0123456789abcdef0\n", "line 1: the name"),
        (f"ok:{ALICE}\nx:sp ace0123456789abc\n", "line 2: no key, or one with other characters"),
        ("n" * 65 + ":0123456789abcdef0\n", "longer than 64"),
        ("x" * (2**20 + 1), "more than 1,048,576 bytes"),
    ],
)
def test_a_wrong_file_is_refused_by_line_and_no_key_is_shown(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        ApiKeys.read(key_file(tmp_path, text))
    assert "0123456789abc" not in str(caught.value)


def test_a_file_that_others_may_read_and_a_short_key_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="other users may open .*chmod 600"):
        ApiKeys.read(key_file(tmp_path, f"{ALICE}\n", 0o644))
    with pytest.warns(UserWarning, match="line 1: the key has 5 characters"):
        ApiKeys.read(key_file(tmp_path, "short\n"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ApiKeys.read(key_file(tmp_path, f"{ALICE}\n"))
