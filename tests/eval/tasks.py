"""Small tasks of lm-evaluation-harness, of every output type, over questions with choices."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

TASKS: dict[str, dict[str, Any]] = {
    "retnet_choice": {
        "output_type": "multiple_choice",
        "fewshot_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "retnet_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "retnet_text": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path, questions: Sequence[Mapping[str, Any]], **changes: Mapping[str, Any]) -> Path:
    """Write TASKS and their data: the folder for --include-path. changes: keys of a task, by its name."""
    data = folder / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, questions)))
    (folder / "tasks").mkdir()
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    for name, task in TASKS.items():
        whole = {"task": name, **common, **task, **changes.get(name, {})}
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(whole))  # which is YAML too
    return folder / "tasks"


def use_offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Data sets come from files alone, and are cached in the folder of the test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
