"""Teachers: directories of transformers' Llama and Qwen3, tiny ones here and those of real sizes in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from retnet.layers.moe import MoEConfig
from retnet.models.convert.llama import NAMES, config_of
from retnet.models.directory import build_empty, load_model, save_model
from retnet.models.tensor_files import SHARD_BYTES
from retnet.train.distil.from_stack import all_retention
from retnet.train.distil.student import converted_layers, make_student, student_config
from retnet.train.distil.teacher import open_teacher
from tests.paths import ROOT
from tests.small_models import BYTES, random_ids, small_model
from tests.train.distil.models import LLAMA

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 128,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28, "vocab_size": 151936,
    "rope_theta": 1e6, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_1B = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "num_hidden_layers": 16, "vocab_size": 128256,
    "rope_theta": 5e5, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192},
    "max_position_embeddings": 131072, "tie_word_embeddings": True,
}  # fmt: skip


def write_random(directory: Path, config: dict) -> int:
    """A directory of transformers with random bfloat16 weights. Returns their bytes.

    The weights repeat a million normal numbers: a billion of them would take most of the test's time.
    """
    directory.mkdir()
    block = torch.randn(2**20 + 1, dtype=torch.bfloat16)  # an odd length, so that rows differ
    (directory / "config.json").write_text(json.dumps(config))
    model = build_empty(config_of(config))
    tensors = {}
    for name, weight in model.state_dict().items():
        part = name.split(".")
        theirs = ".".join("{}" if word.isdigit() else word for word in part)
        if name == "head.weight" and config.get("tie_word_embeddings"):
            continue
        number = next((word for word in part if word.isdigit()), "")
        values = block.repeat(-(-weight.numel() // len(block)))[: weight.numel()]
        tensors[NAMES[theirs].replace("{}", number)] = values.view(weight.shape).mul_(weight.shape[-1] ** -0.5)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return sum(x.nbytes for x in tensors.values())


@pytest.mark.parametrize(
    "config",
    [
        {**TINY, "model_type": "llama", "rope_scaling": LLAMA3},
        {**TINY, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    ],
)
def test_a_directory_of_transformers_is_a_teacher(config, tmp_path):
    write_random(tmp_path / "teacher", config)
    teacher = open_teacher(tmp_path / "teacher")
    student = make_student(teacher, student_config(teacher.config, all_retention(teacher.config)))
    assert converted_layers(teacher.config, student.config) == [0, 1]
    assert {x.dtype for x in student.parameters()} == {torch.bfloat16}
    save_model(student, tmp_path / "student")
    ids = random_ids(1, 12)
    with torch.no_grad():
        logits = load_model(tmp_path / "student")(ids).logits
        assert torch.equal(logits, student(ids).logits)
    assert logits.isfinite().all()
    mixer, taught = student.layers[0].mixer, teacher.layers[0].mixer
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        assert torch.equal(getattr(mixer, name).weight, getattr(taught, name).weight)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("retention",), "has no attention layer; accepted: a teacher with attention"),
        ("experts", "has mixtures of experts, whose balance is not distilled"),
    ],
)
def test_teachers_that_cannot_be_distilled_are_refused(layers, message, tmp_path):
    if layers == "experts":
        stack = (LLAMA, type(LLAMA)(LLAMA.mixer, MoEConfig(num_experts=2, top_k=1, hidden_dim=8)))
    else:
        stack = layers[0]
    save_model(small_model(stack, **BYTES), tmp_path / "teacher")
    with pytest.raises(ValueError, match=message):
        open_teacher(tmp_path / "teacher")


def test_a_teacher_that_is_not_there_is_named_with_the_nearest(tmp_path):
    (tmp_path / "my-llama").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no teacher at .*my-lama; accepted: .*; did you mean .*my-llama"):
        open_teacher(tmp_path / "my-lama")


PEAK = r"""
import re, sys
from pathlib import Path
from retnet.models.directory import save_model
from retnet.models.tensor_files import SHARD_BYTES
from retnet.train.distil.from_stack import all_retention
from retnet.train.distil.teacher import open_teacher
from retnet.train.distil.student import make_student, student_config

def peak():  # of this program: ru_maxrss would also be that of the process that started it
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

before = peak()
teacher = open_teacher(Path(sys.argv[1]))
student = make_student(teacher, student_config(teacher.config, all_retention(teacher.config)))
own = sum(x.nbytes for layer in student.layers for x in layer.mixer.parameters())
save_model(student, sys.argv[2])
print(peak() - before, own // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("config", [QWEN3, LLAMA_1B], ids=["Qwen3-0.6B", "Llama-3.2-1B"])
def test_teachers_of_real_sizes_are_read_in_the_memory_of_their_weights(config, tmp_path):
    weights = write_random(tmp_path / "teacher", config)
    words = [sys.executable, "-c", PEAK, str(tmp_path / "teacher"), str(tmp_path / "student")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=900, check=True)
    grown, own = (int(word) * 1024 for word in done.stdout.split()[-2:])
    print(f"weights {weights / 2**30:.2f} GiB, student's mixers {own / 2**30:.2f}, peak {grown / 2**30:.2f}")
    assert weights < grown < weights + own + SHARD_BYTES  # that which is being written
