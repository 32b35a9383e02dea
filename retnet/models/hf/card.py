"""The model card: the README.md of a model on the Hugging Face hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from retnet.models.config import ModelConfig
from retnet.models.cost import model_cost, parameter_counts

_CONTEXT = 8192

_TEXT = """
# {name}

A {kind} language model of {parameters:,} parameters: {num_layers} layers ({mixers}), width {width}, vocabulary
{vocabulary}. Its state for one sequence of {context:,} tokens takes {state:,} bytes.

## Use

```python
import retnet.hf  # where retnet is installed; or pass trust_remote_code=True below
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repository}")
tokenizer = AutoTokenizer.from_pretrained("{repository}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

Without `import retnet.hf` the same lines work with `trust_remote_code=True`, which runs only the shim beside the
weights.

## Architecture

Retentive networks (Sun et al. 2023, arXiv 2307.08621): trained in parallel, run in constant memory and constant time
per token.
`config.json` holds the whole configuration under `model_config`.
"""


def model_card(
    config: ModelConfig,
    repository: str | None = None,
    *,
    license: str | None = None,
    datasets: Sequence[str] = (),
    language: Sequence[str] = (),
    training: str = "",
) -> str:
    """The text of a README.md: metadata for the hub, a description of the model, and how to load it.

    repository: the name on the hub, or a directory; the configuration's name if None. training: a section of its own.
    """
    tags = ["retnet", "linear-attention"]
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags)]
    lines += [f"license: {license}"] if license else []
    for key, values in (("datasets", datasets), ("language", language)):
        lines += [f"{key}:", *(f"- {value}" for value in values)] if values else []
    mixers = Counter(type(layer.mixer).__name__.removesuffix("Config").lower() for layer in config.layers)
    text = _TEXT.format(
        name=config.name,
        kind="retentive" if set(mixers) == {"retention"} else "hybrid",
        parameters=parameter_counts(config)["total"],
        num_layers=len(config.layers),
        mixers=", ".join(f"{count} of {mixer}" for mixer, count in mixers.items()),
        width=config.d_model,
        vocabulary=config.vocab_size,
        context=_CONTEXT,
        state=model_cost(config, _CONTEXT).state_bytes,
        repository=repository or config.name,
    )
    return "\n".join(["---", *lines, "---", text, *([training] if training else [])])
