"""The byte tokenizer as a transformers tokenizer, for pipelines, trainers and the evaluation harness."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from retnet.data.tokenizer import DOCUMENT_START, byte_characters

DOCUMENT_START_TOKEN = "<|document|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token b is the byte b of UTF-8 text; 256 stands before a document and, where one is needed, for a pad.

    The ids are those of `retnet.data.ByteTokenizer`. `save_pretrained` beside a model's weights makes the directory
    whole.
    """
    vocabulary = {character: byte for byte, character in byte_characters().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([DOCUMENT_START_TOKEN])
    start = (DOCUMENT_START_TOKEN, DOCUMENT_START)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{DOCUMENT_START_TOKEN} $A", pair=f"{DOCUMENT_START_TOKEN} $A $B", special_tokens=[start]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=DOCUMENT_START_TOKEN,
        eos_token=DOCUMENT_START_TOKEN,
        pad_token=DOCUMENT_START_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
