"""Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300) with TRL, on the CPU in minutes.

    python recipes/grpo.py out/demo out/grpo

Prompts are comments of Python's standard library, cut after a few words. The reward of a continuation is the share of
its characters that are lower-case letters or spaces: a rule that a program can check, as the length of a proof or the
result of a test would be. Printed: the mean reward of the first and of the last steps.
"""

import ast
import random
import re
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import retnet.hf  # noqa: F401 (registers RetNet with AutoModelForCausalLM)
from retnet.models.hf.tokenizer import byte_tokenizer


def prompts(files="[a-d]*.py", count=256):
    """Beginnings of comments."""
    found = set()
    for path in sorted(Path(ast.__file__).parent.glob(files)):
        comments = re.findall(r"^ *# ([A-Z][^\n]{30,})$", path.read_text(encoding="utf-8"), re.MULTILINE)
        found |= {"# " + " ".join(comment.split()[:3]) + " " for comment in comments}
    return Dataset.from_dict({"prompt": random.Random(0).sample(sorted(found), min(count, len(found)))})


def prose(completions, **_):
    """The share of lower-case letters and spaces in each text."""
    return [sum(c.islower() or c == " " for c in text) / max(len(text), 1) for text in completions]


def tokenizer_of(directory):
    """The tokenizer beside a model; bytes where there is none."""
    has_file = (Path(directory) / "tokenizer.json").is_file()
    return AutoTokenizer.from_pretrained(directory) if has_file else byte_tokenizer()


def main(directory, output, steps=40, learning_rate=1e-3):
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(directory),
        reward_funcs=prose,
        args=GRPOConfig(
            output_dir=output, max_steps=steps, per_device_train_batch_size=32, num_generations=8,
            max_completion_length=32, learning_rate=learning_rate, logging_steps=1, save_strategy="no", report_to=[],
            seed=0, bf16=False,
        ),
        train_dataset=prompts(),
        processing_class=tokenizer_of(directory),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(output)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    few = max(1, steps // 8)
    first, last = (sum(part) / len(part) for part in (rewards[:few], rewards[-few:]))
    print(f"mean reward {first:.3f} in the first {few} steps, {last:.3f} in the last {few}")
    return first, last


if __name__ == "__main__":
    main(*sys.argv[1:3])
