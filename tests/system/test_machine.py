"""Facts about the machine, read where they are and not guessed where they are not."""

from __future__ import annotations

import os

from retnet.system import machine


def test_a_commit_is_that_of_this_checkout_and_of_no_other(monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_COMMIT", "of the environment")
    machine.source_commit.cache_clear()
    try:
        monkeypatch.setattr(machine, "_ROOT", tmp_path)
        assert machine.source_commit() == "of the environment"
        machine.source_commit.cache_clear()
        (tmp_path / "pyproject.toml").touch()
        (tmp_path / ".git").mkdir()
        answers = {"rev-parse": "0123456789ab", "status": " M file"}
        monkeypatch.setattr(machine, "_git", lambda *words: answers[words[0]])
        assert machine.source_commit() == "0123456789ab+"
    finally:
        machine.source_commit.cache_clear()


def test_a_machine_without_git_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._git("rev-parse", "HEAD") == ""


def test_the_processor_has_a_name_on_every_system(monkeypatch, tmp_path):
    assert machine.cpu_name()
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "nothing")
    assert machine.cpu_name()


def test_the_quota_of_a_container(monkeypatch, tmp_path):
    file = tmp_path / "cpu.max"
    monkeypatch.setattr(machine, "_CPU_MAX", file)
    assert machine.core_quota() is None
    for text, cores in (("max 100000\n", None), ("150000 100000\n", 1.5), ("nonsense", None)):
        file.write_text(text)
        assert machine.core_quota() == cores


def test_versions_are_those_of_installed_packages():
    found = machine.package_versions(["torch", "no-such-package"])
    assert list(found) == ["torch"]


def test_cores_are_those_that_the_process_may_use():
    assert 1 <= machine.usable_cores() <= (os.cpu_count() or 1)
