"""Evaluation shared by processes: every process gets the results of one process, in its order."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from retnet.eval.processes import ALONE, Processes, launched
from tests.eval.tasks import use_offline, write_tasks
from tests.torchrun import torchrun

WORDS = ["state", "decay", "a token", "the chunk that was read before", "time", "memory per sequence", "rows"]


def test_shares_are_consecutive_whole_and_of_about_equal_cost():
    generator = torch.Generator().manual_seed(0)
    for items in (0, 1, 2, 7, 100):
        costs = (torch.rand(items, generator=generator) ** 4).tolist()
        for count in (1, 2, 3, 8):
            shares = [Processes(rank, count).share(costs) for rank in range(count)]
            assert [i for share in shares for i in share] == list(range(items))
            largest = max((sum(costs[i] for i in share) for share in shares), default=0)
            assert largest <= sum(costs) / count + 2 * max(costs, default=0) + 1e-9


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launched() as processes:
        assert processes == ALONE
    assert ALONE.run([1, 1, 1], lambda share: [2 * i for i in share]) == [0, 2, 4]
    assert ALONE.device("auto") == "auto"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 without RANK; accepted: the variables"), launched():
        pass


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Processes(rank, 4, rank % 2).device("auto") for rank in range(4)] == ["cuda:0", "cuda:1"] * 2
    assert Processes(1, 2, 1).device("cpu") == "cpu"
    with pytest.raises(ValueError, match="process 3 of this machine has no GPU of its own, as there are 2; accepted"):
        Processes(2, 3, 2).device("auto")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def evaluate(launcher: str, *words: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """`retnet eval` in one process, under torchrun or under accelerate launch."""
    program = ["-m", "retnet.cli", "eval", *map(str, words), "--device", "cpu"]
    if launcher == "torchrun":
        return torchrun(processes, *program, HF_HUB_OFFLINE="1")
    command = [sys.executable]
    if launcher == "accelerate":
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]
        command += [f"--main_process_port={free_port()}", "--num_machines=1", "--mixed_precision=no"]
        command += ["--dynamo_backend=no"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*command, *program], capture_output=True, text=True, env=environment, timeout=500)


def answer(launcher: str, *words: object, processes: int = 2) -> dict:
    """What the first process prints, which is one JSON object."""
    done = evaluate(launcher, *words, "--json", processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_tasks_have_the_scores_and_samples_of_one_process(hybrid_byte_model, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    use_offline(monkeypatch, tmp_path)
    questions = [
        {"question": " ".join(WORDS[: 1 + i % 7]), "choices": WORDS[i % 3 :: 2], "answer": i % 2} for i in range(23)
    ]
    sampled = {"until": ["e"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    tasks = write_tasks(tmp_path, questions, retnet_text={"generation_kwargs": sampled, "repeats": 2})
    found, samples = {}, {}
    for launcher in ("alone", "accelerate"):
        file = tmp_path / f"{launcher}.jsonl"
        words = [hybrid_byte_model, "--tasks", "retnet_choice,retnet_rolling,retnet_text", "--num-fewshot", 2]
        words += ["--include-path", tasks, "--samples", file]
        found[launcher] = answer(launcher, *words)
        samples[launcher] = file.read_text()
    assert found["accelerate"] == found["alone"]
    assert found["alone"]["retnet_choice"]["acc_stderr,none"] > 0
    lines = [json.loads(line) for line in samples["alone"].splitlines()]
    assert len(lines) == 3 * 23
    assert len({line["resps"][0][0] for line in lines if line["task"] == "retnet_text"}) > 5  # sampled texts differ
    assert samples["accelerate"] == samples["alone"]


@pytest.mark.slow
def test_perplexity_and_bits_per_byte_are_those_of_one_process(byte_model, text_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the state decays, and a token is read. " * 40)
    ways = [
        ["--file", text, "--context", 64, "--stride", 7],
        ["--data", text_folder, "--part", "all"],
    ]
    for words in ways:
        alone = answer("alone", byte_model, *words)
        shared = answer("torchrun", byte_model, *words, processes=3)
        for result in (alone, shared):
            result.pop("seconds", None)
            if "bits_per_byte" in result:
                assert len(result["bits_per_byte"]) == 3  # gzip, xz and the model
        assert shared == alone


PROGRAM = """
from retnet.eval.processes import SharedError, launched

with launched() as processes:
    def work(share):
        if processes.rank == 1:
            raise ValueError("document 7 is broken")
        return [f"{i} \u00e9" for i in share]

    whole = processes.run([1.0] * 5, lambda share: [[i, 0.1 + i, None, "\u00e9"] for i in share])
    assert whole == [[i, 0.1 + i, None, "\u00e9"] for i in range(5)], whole
    assert processes.run([], lambda share: []) == []
    try:
        processes.run([1.0] * 5, work)
    except SharedError as error:
        print(f"process {processes.rank}: {error}.", flush=True)
"""


@pytest.mark.slow
def test_an_error_in_the_share_of_one_process_is_that_of_all(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = torchrun(3, tmp_path / "program.py")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split(".\n")[:-1]) == [f"process {rank}: document 7 is broken" for rank in range(3)]
