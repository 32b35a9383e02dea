import json
import shutil

import pytest

from retnet.data import ByteCorpus, open_corpus
from retnet.data.build import build_shards
from retnet.data.plan import Settings
from retnet.data.shards import check_shards


@pytest.fixture
def shards(tmp_path, articles, tokenizer_file):
    (tmp_path / "a.txt").write_text("\n--\n".join(articles), encoding="utf-8")
    how = Settings(separator="\n--\n")
    out = tmp_path / "out"
    build_shards(
        [str(tmp_path / "a.txt")], out, tokenizer=str(tokenizer_file), settings=how, shard_size=4000, workers=1
    )
    return out


def problems(directory):
    return [problem for _, problem in check_shards(directory) if problem]


def test_undamaged_shards_pass_the_check(shards):
    assert [name for name, _ in check_shards(shards)] == [f"{number:05}" for number in range(5)]
    assert problems(shards) == []


@pytest.mark.parametrize("suffix", ["tokens", "index", "json"])
def test_one_changed_bit_is_found_by_the_check(shards, suffix):
    path = shards / f"00001.{suffix}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    open_corpus(shards)  # opening looks at sizes alone
    (problem,) = problems(shards)
    assert f"00001.{suffix} is damaged: its SHA-256 is" in problem


@pytest.mark.parametrize("suffix", ["tokens", "index", "json"])
def test_a_truncated_or_missing_file_is_found_when_opening(shards, suffix):
    path = shards / f"00002.{suffix}"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"00002\.{suffix} has {size - 1} bytes, the manifest says {size}"):
        open_corpus(shards)
    path.unlink()
    with pytest.raises(ValueError, match=rf"00002\.{suffix} is missing"):
        open_corpus(shards)


def rewrite(shards, change):
    """Change the manifest, hashes made to fit, as a mistake in the writer would."""
    from retnet.system.files import hash_file

    manifest = json.loads((shards / "manifest.json").read_bytes())
    change(manifest)
    for shard in manifest["shards"]:
        shard["sha256"] = {suffix: hash_file(shards / f"{shard['name']}.{suffix}") for suffix in shard["sha256"]}
    (shards / "manifest.json").write_text(json.dumps(manifest))


def test_the_check_finds_documents_that_do_not_match_the_index(shards):
    tokens = bytearray((shards / "00001.tokens").read_bytes())
    tokens[0] ^= 1
    (shards / "00001.tokens").write_bytes(tokens)
    rewrite(shards, lambda manifest: None)
    assert "does not begin with the document start" in problems(shards)[0]
    rewrite(shards, lambda manifest: manifest["shards"][0].update(tokens=7))
    assert "00000.index does not add up to the 7 tokens" in problems(shards)[0]


def test_the_check_finds_another_tokenizer(shards):
    shutil.copyfile(shards / "manifest.json", shards / "tokenizer/tokenizer.json")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        problems(shards)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{cut", "is not a manifest of token shards"),
        ("[]", "is not a manifest of token shards"),
        ('{"format": "retnet-tokens", "version": 2}', "retnet-tokens version 2; accepted: retnet-tokens version 1"),
        ('{"format": "other", "version": 1}', "is other version 1"),
    ],
)
def test_shards_with_another_manifest_are_refused(shards, text, message):
    (shards / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_corpus(shards)


@pytest.mark.parametrize("text", ["{cut", "[]", "\xff", '{"format": 3}', '{"name": "an extension of a browser"}'])
def test_a_folder_of_text_may_hold_a_manifest_of_its_own(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    (tmp_path / "a.txt").write_text("text")
    corpus = open_corpus(tmp_path)
    assert isinstance(corpus, ByteCorpus)
    assert len(corpus) == 2


def test_an_unknown_document_number_is_refused(shards):
    with pytest.raises(IndexError, match="document 60 of 60"):
        open_corpus(shards).describe(60)


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json in .*accepted: a folder that `retnet data` wrote"):
        problems(tmp_path)
