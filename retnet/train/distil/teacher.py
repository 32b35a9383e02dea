"""The teacher of a distillation: a directory of ours, or of a library that `retnet convert` reads."""

from __future__ import annotations

from pathlib import Path

from retnet.layers.attention import AttentionConfig
from retnet.layers.moe import MoEConfig
from retnet.models.convert import load
from retnet.models.lm import LanguageModel
from retnet.system.suggest import did_you_mean_path


def open_teacher(path: Path) -> LanguageModel:
    """The teacher, in the dtype of its files. Raises FileNotFoundError or ValueError if it is none."""
    if not path.is_dir():
        accepted = "a directory that retnet saved or retnet convert reads"
        raise FileNotFoundError(f"no teacher at {path}; accepted: {accepted}{did_you_mean_path(path)}")
    teacher = load(path)
    teacher.directory = path  # a tokenizer may lie there
    if not any(isinstance(layer.mixer, AttentionConfig) for layer in teacher.config.layers):
        raise ValueError(f"{path} has no attention layer; accepted: a teacher with attention")
    if any(isinstance(layer.feed_forward, MoEConfig) for layer in teacher.config.layers):
        raise ValueError(
            f"{path} has mixtures of experts, whose balance is not distilled; accepted: feed-forwards of one expert"
        )
    if teacher.config.mtp is not None:
        raise ValueError(
            f"{path} predicts several tokens ahead, which is not distilled; accepted: the next token alone"
        )
    return teacher.requires_grad_(False)
