import pytest

from retnet.data.plan import Piece, Settings
from retnet.data.pool import into_folder, write_in_parallel
from retnet.data.readers import DataError
from retnet.data.tokenizer import ByteTokenizer


def test_exceptions_of_a_worker_reach_the_parent(tmp_path):
    (tmp_path / "good.txt").write_text("text " * 1000)
    (tmp_path / "bad.jsonl").write_text("[]")
    (tmp_path / "out").mkdir()
    good = [Piece(str(tmp_path / "good.txt"), "good", "text", 0, 5000, 5000)]
    for pieces, kind, message in [
        ([Piece(str(tmp_path / "bad.jsonl"), "bad", "jsonl", 0, 2, 2)], DataError, r"bad\.jsonl:1: a JSON list"),
        ([Piece(str(tmp_path / "gone.txt"), "gone", "text", 0, 2, 2)], FileNotFoundError, r"gone\.txt"),
        ([], RuntimeError, "shard 7: Traceback(.|\n)*IndexError"),  # a mistake of ours keeps its traceback
    ]:
        shards = {1: good, 7: pieces, 8: good}
        reported = {}
        description = ByteTokenizer().describe()
        with pytest.raises(kind, match=message):
            write_in_parallel(
                shards, Settings(), description, tmp_path, into_folder(tmp_path / "out"), 1, reported.__setitem__
            )
        assert set(reported) == {1}
        assert reported[1].tokens == 5001
