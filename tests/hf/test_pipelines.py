"""transformers' pipelines, on a directory that holds model and tokenizer."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, pipeline

import retnet.hf  # noqa: F401 (registers)


def test_text_generation_one_by_one_and_in_batches(saved):
    generator = pipeline("text-generation", model=saved, device="cpu")
    prompts = ["the state", "a", "retention keeps"]
    options = {"max_new_tokens": 8, "do_sample": False}
    alone = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
    together = [result[0]["generated_text"] for result in generator(prompts, batch_size=3, **options)]
    assert together == alone
    assert all(text.startswith(prompt) and text != prompt for text, prompt in zip(alone, prompts))


def test_feature_extraction_gives_final_hidden_states(saved):
    features = pipeline("feature-extraction", model=saved, device="cpu")("abc", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(saved)
    hidden = model.base_model(torch.tensor([[256, 97, 98, 99]])).last_hidden_state
    torch.testing.assert_close(features, hidden)
