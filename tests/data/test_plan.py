import gzip
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.data import plan as plan_module
from retnet.data.plan import Piece, Settings, describe_files, make_plan
from retnet.data.readers import Reading

pytestmark = pytest.mark.filterwarnings("ignore:.*(each text file is a document too|one document each):UserWarning")

WHOLE_FILES = Settings()


def read_plan(plan, how=WHOLE_FILES):
    """The documents of each shard."""
    return [
        [block.data.decode() for piece in pieces for block in Reading(piece, how, utf8=True).blocks()]
        for pieces in plan
    ]


@settings(max_examples=60)
@given(
    texts=st.lists(st.text("abé ", min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=20),
    kind=st.sampled_from(["text", "jsonl"]),
    shard_size=st.integers(1, 400),
    files=st.integers(1, 3),
)
def test_every_document_is_in_one_shard_whole_and_in_order(tmp_path_factory, texts, kind, shard_size, files):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(files):
        if kind == "text":
            (folder / f"{i}.txt").write_text("\n--\n".join(texts), encoding="utf-8")
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (folder / f"{i}.jsonl").write_text(lines, encoding="utf-8")
    how = Settings(separator="\n--\n" if kind == "text" else None)
    plan = make_plan([str(folder)], how, shard_size)
    shards = read_plan(plan, how)
    assert [text for shard in shards for text in shard] == texts * files
    assert all(pieces for pieces in plan)
    sizes = [sum(piece.size for piece in pieces) for pieces in plan]
    longest = max(len(text.encode()) for text in texts) + 4 + 90  # and its line around it
    assert max(sizes) <= shard_size + longest
    assert all(size >= shard_size for size in sizes[:-1])


@settings(max_examples=300)
@given(
    text=st.lists(st.sampled_from(["a", "b", "\n", "\n\n", "\r\n", "\r"]), min_size=1, max_size=60).map("".join),
    separator=st.sampled_from(["\n\n\n", "\n\n", "\nb\n", "aa", "\r\n\r\n"]),
    shard_size=st.integers(1, 30),
    look=st.sampled_from([1, 5, 1 << 16]),
)
def test_shard_sizes_change_no_document_where_separators_overlap(tmp_path_factory, text, separator, shard_size, look):
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_bytes(text.encode())
    how = Settings(separator=separator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_LOOK", look)
        shards = read_plan(make_plan([str(path)], how, shard_size), how)
    between = separator if "\r" in separator else separator.replace("\n", "\r?\n")
    assert [document for shard in shards for document in shard] == [d for d in re.split(between, text) if d.strip()]


def test_a_file_without_a_separator_and_a_compressed_one_are_not_cut(tmp_path):
    (tmp_path / "a.txt").write_text("line\n" * 1000)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0))
    plan = make_plan([str(tmp_path)], Settings(), 100)
    assert [[piece.name for piece in pieces] for pieces in plan] == [
        [f"{tmp_path.name}/a.txt"],
        [f"{tmp_path.name}/b.jsonl.gz"],
    ]
    assert read_plan(plan) == [["line\n" * 1000], ["x"] * 1000]


def test_a_folder_may_hold_every_kind_of_file(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "in").mkdir()
    parquet.write_table(pa.table({"text": [f"p{i}" for i in range(9)]}), tmp_path / "in/a.parquet", row_group_size=4)
    (tmp_path / "in/b.jsonl").write_text('{"text": "j"}\n')
    (tmp_path / "in/c.py").write_text("code")
    (tmp_path / "in/d.md.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "in/image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "in/weights.gz").write_bytes(gzip.compress(b"\0\0\0"))
    (tmp_path / "in/empty.txt").write_bytes(b"")
    (plan,) = make_plan([str(tmp_path / "in"), str(tmp_path / "in/c.py")], Settings())
    assert read_plan([plan]) == [[*(f"p{i}" for i in range(9)), "j", "code", "packed", "code"]]
    names = ["in/a.parquet"] * 3 + ["in/b.jsonl", "in/c.py", "in/d.md.gz", "c.py"]
    assert [piece.name for piece in plan] == names
    assert [piece.first_row for piece in plan[:3]] == [0, 4, 8]


def test_a_dataset_saved_to_disk_is_cut_by_rows(tmp_path):
    from datasets import Dataset, DatasetDict

    texts = [f"text {i} " * 20 for i in range(3000)]
    saved = DatasetDict({"train": Dataset.from_dict({"text": texts}), "test": Dataset.from_dict({"text": ["t"]})})
    saved.save_to_disk(tmp_path / "saved", num_shards={"train": 2, "test": 1})
    plan = make_plan([str(tmp_path / "saved")], Settings(), 50_000)
    assert len(plan) > 3
    assert [text for shard in read_plan(plan) for text in shard] == texts
    assert read_plan(make_plan([str(tmp_path / "saved")], Settings(split="test"))) == [["t"]]
    with pytest.raises(ValueError, match=r"no split 'valid'; it has: train, test \(choose one with --split\)"):
        make_plan([str(tmp_path / "saved")], Settings(split="valid"))


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json", "manifest.json", "dataset_info.json"])
@pytest.mark.parametrize("text", ['{"counter": 1}', '["train"]', "cut {", '{"splits": {"train": 3}}'])
def test_a_folder_of_text_may_hold_files_named_as_those_of_a_dataset(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_plan(make_plan([str(tmp_path)], Settings())) == [[text]]


def test_an_incomplete_saved_split_is_named(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / "train").mkdir()
    with pytest.raises(
        ValueError, match=r"train is incomplete; accepted: a dataset or a split that `save_to_disk` wrote"
    ):
        make_plan([str(tmp_path)], Settings())


def test_suffixes_may_be_in_capitals(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "A.JSONL").write_text('{"text": "line"}\n')
    (tmp_path / "B.Jsonl.GZ").write_bytes(gzip.compress(b'{"text": "packed line"}\n'))
    (tmp_path / "C.TXT.GZ").write_bytes(gzip.compress(b"packed"))
    parquet.write_table(pa.table({"text": ["row"]}), tmp_path / "D.PARQUET")
    assert read_plan(make_plan([str(tmp_path)], Settings())) == [["line", "packed line", "packed", "row"]]


def test_a_dataset_by_name_is_loaded_through_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/train.csv").write_text("text,label\nfirst row,1\nsecond row,2\n")
    name = f"hf:{tmp_path / 'tables'}"
    (plan,) = make_plan([name], Settings())
    assert read_plan([plan]) == [["first row", "second row"]]
    with pytest.raises(ValueError, match="is 1 of 2 rows; accepted: a whole split"):
        make_plan([name], Settings(split="train[:1]"))
    with pytest.raises(FileNotFoundError, match=r"cannot load dataset .*, split test"):
        make_plan([name], Settings(split="test"))


def test_sources_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*gone \(accepted: files, folders, 'stdlib'"):
        make_plan([str(tmp_path / "gone")], Settings())
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"a\.parquet is not parquet"):
        make_plan([str(tmp_path)], Settings())
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "b.txt.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"b\.txt\.gz is damaged"):
        make_plan([str(tmp_path)], Settings())


def test_shards_of_little_text_are_few(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    assert make_plan([str(tmp_path / "a.txt")], Settings()) == [
        [Piece(str(tmp_path / "a.txt"), "a.txt", "text", 0, 1, 1)]
    ]


def test_a_changed_file_changes_the_description_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    plan = make_plan([str(tmp_path)], Settings())
    before = describe_files(plan)
    assert describe_files(plan) == before
    (tmp_path / "a.txt").write_text("bc")
    assert describe_files(plan) != before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings("body"), r"field is 'body', and nothing here has one: 1 text file \(a\.txt\); accepted for: jsonl"),
        (Settings(split="train"), "split is 'train', and nothing here has one"),
        (Settings(config="en"), r"config is 'en', and nothing here has one: .*; accepted for: hf:NAME"),
    ],
)
def test_a_setting_that_no_source_uses_is_refused(tmp_path, settings, message):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=message):
        make_plan([str(tmp_path / "a.txt")], settings)


def test_a_separator_without_text_files_is_refused_and_one_that_is_nowhere_makes_itself_heard(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="separator is ';', and nothing here has one: 1 jsonl file"):
        make_plan([str(tmp_path / "a.jsonl")], Settings(separator=";"))
    (tmp_path / "b.txt").write_text("a;b")
    (tmp_path / "c.txt").write_text("c")
    sources = [str(tmp_path / "b.txt"), str(tmp_path / "c.txt")]
    with pytest.warns(UserWarning, match=r"separator ';' is not in 1 text file \(c\.txt\): one document each"):
        plan = make_plan(sources, Settings(separator=";"))
    assert read_plan(plan, Settings(separator=";")) == [["a", "b", "c"]]


def test_a_damaged_arrow_file_of_a_dataset_is_named(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"text": [f"text {i}" for i in range(2000)]}).save_to_disk(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.arrow")
    whole = path.read_bytes()
    for data in (whole[:-8], whole[: len(whole) // 2], whole + b"\0" * 8, whole + b"x", b"", whole[:4]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{path.name} is (damaged or cut off|not an arrow stream)"):
            make_plan([str(tmp_path / "saved")], Settings())
    path.unlink()
    with pytest.raises(OSError, match=path.name):
        make_plan([str(tmp_path / "saved")], Settings())
    (tmp_path / "saved/state.json").unlink()
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="saved is incomplete; accepted: a dataset or a split"):
        make_plan([str(tmp_path / "saved")], Settings())


def test_text_files_beside_records_are_documents_and_a_warning_says_so(tmp_path):
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.warns(UserWarning, match=r"1 jsonl file \(a\.jsonl\), 1 text file \(README\.md\); each text file is"):
        assert read_plan(make_plan([str(tmp_path)], Settings())) == [["about", "a"]]
