"""transformers' interface to the language model: configuration, model classes, cache, byte tokenizer, model card.

`LanguageModel` computes everything; this package only maps names and conventions. Importing it does not register
anything; `import retnet.hf` does.
"""

from retnet.system.extras import needs

with needs("hf", "The interface to transformers"):
    from retnet.models.hf.body import RetNetModel
    from retnet.models.hf.cache import StateCache
    from retnet.models.hf.classify import RetNetForSequenceClassification, RetNetForTokenClassification
    from retnet.models.hf.config import RetNetConfig
    from retnet.models.hf.inputs import document_bounds
    from retnet.models.hf.model import RetNetForCausalLM
    from retnet.models.hf.pretrained import RetNetPreTrainedModel

__all__ = [
    "RetNetConfig",
    "RetNetForCausalLM",
    "RetNetForSequenceClassification",
    "RetNetForTokenClassification",
    "RetNetModel",
    "RetNetPreTrainedModel",
    "StateCache",
    "document_bounds",
]
