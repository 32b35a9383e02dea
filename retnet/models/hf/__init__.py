"""The Hugging Face face of the language model: configuration, model classes, cache, tokenizer of bytes, model card.

Thin on purpose: everything that computes is `LanguageModel`; here are names and conventions. Importing it registers
nothing; `import retnet.hf` does.
"""

from retnet.models.hf.cache import StateCache
from retnet.models.hf.config import RetNetConfig
from retnet.models.hf.inputs import document_bounds
from retnet.models.hf.model import RetNetForCausalLM, RetNetModel

__all__ = ["RetNetConfig", "RetNetForCausalLM", "RetNetModel", "StateCache", "document_bounds"]
