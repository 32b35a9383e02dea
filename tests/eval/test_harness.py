"""lm-evaluation-harness on our model: its scores are the model's, and shared contexts are read once."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest
import torch

from retnet.cli import main
from retnet.models.directory import load_model

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from retnet.eval.harness import RetNetLM, run_tasks  # noqa: E402
from tests.eval.tasks import use_offline, write_tasks  # noqa: E402

QUESTIONS = [
    {"question": "The state", "choices": ["decays", "grows", "is read"], "answer": 0},
    {"question": "A token is", "choices": ["lost", "added", "read twice"], "answer": 1},
    {"question": "Time per token", "choices": ["grows", "is constant"], "answer": 1},
]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    use_offline(monkeypatch, tmp_path)
    return write_tasks(tmp_path, QUESTIONS)


MODELS = ["byte_model", "hybrid_byte_model"]


@pytest.fixture(params=MODELS)
def model_directory(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def harness(model_directory) -> RetNetLM:
    return RetNetLM(str(model_directory))


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def log_likelihood(model, context: str, answer: str) -> float:
    ids = torch.tensor([[256, *(context + answer).encode()]])
    with torch.no_grad():
        logs = model(ids).logits.double().log_softmax(-1)[0]
    first = 1 + len(context.encode())
    return sum(logs[t - 1, ids[0, t]].item() for t in range(first, ids.shape[1]))


def test_answers_have_the_scores_of_one_forward_pass_whatever_contexts_share(harness, model_directory):
    model = load_model(model_directory)
    shots = "Question: what?\nAnswer: that\n\n"
    pairs = [
        (shots + "Question: one", " a"),
        (shots + "Question: two", " beta"),
        ("", "alone"),
        (shots + "Question: one", " long answer"),
        ("Question: what?", " x"),
        ("another", " thing"),
        (shots + "Question: one more", " b"),
    ]
    results = harness.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, answer), (value, _) in zip(pairs, results):
        assert value == pytest.approx(log_likelihood(model, context, answer), rel=1e-4)
    held = sum(1 + len(context) for context in {context for context, _ in pairs})
    assert (
        harness.tokens_read
        == 1 + len(shots) + len("Question: one") + len("two") - 1 + len(" more") + len("another") + 1
    )
    assert harness.tokens_read < held / 2


def test_the_greedy_answer_is_marked(harness):
    text = harness.generate_until([request("generate_until", "abc", {"max_gen_toks": 6, "until": []})])[0]
    assert len(text) > 0
    results = harness.loglikelihood([request("loglikelihood", "abc", answer) for answer in (text, "zq9")])
    assert [greedy for _, greedy in results] == [text.isascii(), False]


def test_generation_stops_before_a_string(harness):
    def answer(*until: str) -> str:
        return harness.generate_until([request("generate_until", "abc", {"max_gen_toks": 20, "until": list(until)})])[0]

    free = answer()
    string = next(character for character in free[1:] if character.isascii())
    assert answer(string) == free.split(string)[0]


@pytest.mark.parametrize("model_directory", [MODELS[0], pytest.param(MODELS[1], marks=pytest.mark.slow)], indirect=True)
def test_tasks_run_and_agree_with_the_huggingface_backend(harness, model_directory, tasks, tmp_path):
    """The same directory through `--model hf`, which knows nothing of our states."""
    from retnet.models.hf.tokenizer import byte_tokenizer

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = ["retnet_choice", "retnet_text", "retnet_rolling"]
    options = {"task_manager": manager, "bootstrap_iters": 0}
    ours = run_tasks(harness, names, **options)["results"]
    directory = tmp_path / "with-tokenizer"
    from retnet.models.hf import RetNetForCausalLM

    RetNetForCausalLM.from_pretrained(model_directory).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    theirs = {}
    for name, add_start in zip(names, (None, None, False)):  # the harness starts rolling documents itself
        start = "" if add_start is None else f",add_bos_token={add_start}"
        arguments = f"pretrained={directory},trust_remote_code=True,dtype=float32{start}"
        result = lm_eval.simple_evaluate(
            model="hf", model_args=arguments, tasks=[name], batch_size=2, device="cpu", **options
        )
        theirs |= result["results"]
    assert ours["retnet_choice"]["acc,none"] == theirs["retnet_choice"]["acc,none"]
    assert ours["retnet_text"] == theirs["retnet_text"]
    expected = theirs["retnet_rolling"]["byte_perplexity,none"]
    assert ours["retnet_rolling"]["byte_perplexity,none"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_the_command_runs_tasks(byte_model, tasks, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(
            [
                "eval",
                str(byte_model),
                "--tasks",
                "retnet_choice",
                "--include-path",
                str(tasks),
                "--num-fewshot",
                "1",
                "--json",
            ]
        )
    assert not exit_.value.code
    results = json.loads(capsys.readouterr().out)
    assert 0 <= results["retnet_choice"]["acc,none"] <= 1


@pytest.mark.parametrize("name", ["nope", "retnet_choise", "", "nope.yaml", "../x"])
def test_the_command_names_a_task_that_does_not_exist(byte_model, tasks, capsys, name, monkeypatch):
    managers = partial(TaskManager, include_defaults=False)  # the harness's own thousands of tasks take seconds to list
    monkeypatch.setattr("lm_eval.tasks.TaskManager", managers)
    with pytest.raises(SystemExit) as exit_:
        main(["eval", str(byte_model), "--tasks", f"retnet_choice,{name}", "--include-path", str(tasks)])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert f"no task {name!r}; accepted: a task, group or tag" in said
    assert ("did you mean 'retnet_choice'?" in said) == (name == "retnet_choise")


def test_unknown_model_arguments_are_refused(byte_model):
    with pytest.raises(ValueError, match="unknown model_args: dtpye; accepted: pretrained, device, dtype"):
        RetNetLM(str(byte_model), dtpye="bfloat16")


def test_importing_the_command_line_loads_no_harness():
    code = "import sys, retnet.cli; print('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
