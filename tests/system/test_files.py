import pytest

from retnet.system.files import write_json, written_whole


def test_a_file_takes_its_name_only_when_it_is_whole(tmp_path):
    with written_whole(tmp_path / "a") as file:
        file.write(b"whole")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_after_an_exception_the_old_file_is_there_and_nothing_else(tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def write_half():
        with written_whole(tmp_path / "a") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_json_keeps_names_that_are_not_unicode(tmp_path):
    write_json(tmp_path / "a.json", {"name": "é" + b"\xff".decode("utf-8", "surrogateescape")})
    assert b"\xc3\xa9\xff" in (tmp_path / "a.json").read_bytes()
