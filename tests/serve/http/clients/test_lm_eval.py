"""lm-evaluation-harness with `local-completions`: the score is that of `retnet eval`."""

from __future__ import annotations

import json

import pytest

from retnet.models.hf.tokenizer import byte_tokenizer
from tests.cli.command import run
from tests.eval.tasks import use_offline, write_tasks

pytest.importorskip("lm_eval", reason="needs the extra `eval`")
pytest.importorskip("tenacity", reason="needs the extra `clients`")

pytestmark = pytest.mark.slow
WORDS = ["river", "stone", "cloud", "light", "north", "seven", "paper", "green"]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    use_offline(monkeypatch, tmp_path)
    questions = [
        {"question": f"{WORDS[i % 8]} {WORDS[i // 3 % 8]}?", "choices": WORDS[i % 5 : i % 5 + 4], "answer": i % 4}
        for i in range(24)
    ]
    return write_tasks(tmp_path, questions)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_local_completions_gives_the_score_of_retnet_eval(url, tasks, byte_model, tmp_path, capsys, batch_size):
    import lm_eval
    from lm_eval.tasks import TaskManager

    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = ("eval", byte_model, "--tasks", "retnet_choice", "--include-path", tasks, "--num-fewshot", "1", "--json")
    assert run(*words) == 0
    ours = json.loads(capsys.readouterr().out)["retnet_choice"]
    through = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=f"model={byte_model.name},base_url={url}/v1/completions,tokenizer={tmp_path / 'tokenizer'},"
        "tokenizer_backend=huggingface,add_bos_token=True",
        tasks=["retnet_choice"],
        num_fewshot=1,
        batch_size=batch_size,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    theirs = through["results"]["retnet_choice"]
    assert 0 < ours["acc,none"] < 1
    for metric in ("acc,none", "acc_norm,none"):
        assert theirs[metric] == ours[metric]
