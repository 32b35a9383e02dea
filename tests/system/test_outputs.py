"""Outputs of commands: what exists is replaced only when the user asks for it, and then whole."""

from __future__ import annotations

import pytest

from retnet.system.outputs import check_new_directory, check_new_file, replaced_directory


def test_a_file_that_exists_is_refused_unless_forced(tmp_path):
    file = tmp_path / "a.png"
    check_new_file(file)
    file.write_text("old")
    with pytest.raises(FileExistsError, match=r"a\.png exists; accepted: another file, or --force"):
        check_new_file(file)
    check_new_file(file, force=True)
    for force in (False, True):
        with pytest.raises(FileExistsError, match="is a directory; accepted: a file"):
            check_new_file(tmp_path, force=force)


def test_a_link_to_nothing_is_something_that_exists(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(FileExistsError):
        check_new_file(tmp_path / "link")


def test_a_directory_is_accepted_if_new_or_empty(tmp_path):
    check_new_directory(tmp_path / "new")
    check_new_directory(tmp_path)
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileExistsError, match="exists; accepted: a new or empty directory"):
        check_new_directory(tmp_path)
    check_new_directory(tmp_path, force=True)
    with pytest.raises(FileExistsError, match="is a file"):
        check_new_directory(tmp_path / "a", force=True)


def test_a_replaced_directory_holds_the_new_files_alone(tmp_path):
    target = tmp_path / "model"
    for content in ("one", "two"):
        with replaced_directory(target) as folder:
            (folder / content).write_text(content)
        assert [path.name for path in target.iterdir()] == [content]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("before", [None, [], ["one"]], ids=["new", "empty", "filled"])
def test_after_an_error_a_directory_is_as_it_was(tmp_path, before):
    target = tmp_path / "model"
    if before is not None:
        target.mkdir()
    for name in before or []:
        (target / name).write_text("old")

    def fill() -> None:
        with replaced_directory(target) as folder:
            (folder / "two").write_text("two")
            (folder / "three").mkdir()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill()
    assert (None if not target.exists() else [path.name for path in target.iterdir()]) == before
    assert [path.name for path in tmp_path.iterdir()] == ([] if before is None else ["model"])
