"""Registers RetNet with transformers' Auto classes when imported.

    import retnet.hf
    model = AutoModelForCausalLM.from_pretrained("a/directory/that/retnet/wrote")

Without the import, the same directories load with `trust_remote_code=True` through the shim that they contain.
"""

from retnet.system.extras import needs

with needs("hf", "retnet.hf"):
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

from retnet.models.directory import MODEL_TYPE
from retnet.models.hf import (
    RetNetConfig,
    RetNetForCausalLM,
    RetNetForSequenceClassification,
    RetNetForTokenClassification,
    RetNetModel,
    RetNetPreTrainedModel,
    StateCache,
)
from retnet.models.hf.model import register_causal

__all__ = [
    "RetNetConfig",
    "RetNetForCausalLM",
    "RetNetForSequenceClassification",
    "RetNetForTokenClassification",
    "RetNetModel",
    "RetNetPreTrainedModel",
    "StateCache",
]

AutoConfig.register(MODEL_TYPE, RetNetConfig, exist_ok=True)
AutoModel.register(RetNetConfig, RetNetModel, exist_ok=True)
AutoModelForCausalLM.register(RetNetConfig, RetNetForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(RetNetConfig, RetNetForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(RetNetConfig, RetNetForTokenClassification, exist_ok=True)
register_causal(RetNetForCausalLM)
