"""Our tokenizers as transformers', for pipelines, trainers and the evaluation harness."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from retnet.data.tokenizer import DOCUMENT_START, DOCUMENT_START_TOKEN, PAD, byte_characters

TransformersTokenizer = PreTrainedTokenizerBase
CONFIG_FILE = "tokenizer_config.json"
PAD_TOKEN = "<|pad|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token b is the byte b of UTF-8 text; 256 stands before a document and ends one; 255 is the pad.

    255 (0xFF) is no part of any UTF-8 text. The pad is not the end, so that collators which ignore the labels of pads
    keep those of ends. The ids are those of `retnet.data.ByteTokenizer`. `save_pretrained` beside a model's weights
    makes the directory whole.
    """
    vocabulary = {character: byte for byte, character in byte_characters().items() if byte != PAD} | {PAD_TOKEN: PAD}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([DOCUMENT_START_TOKEN, PAD_TOKEN])
    start = (DOCUMENT_START_TOKEN, DOCUMENT_START)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{DOCUMENT_START_TOKEN} $A", pair=f"{DOCUMENT_START_TOKEN} $A $B", special_tokens=[start]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=DOCUMENT_START_TOKEN,
        eos_token=DOCUMENT_START_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def transformers_tokenizer(
    file: Path | None, start: int, end: int | None = None, add_bos_token: bool | None = None
) -> TransformersTokenizer:
    """A `tokenizer.json` as transformers reads it, with the configuration beside it; the byte tokenizer without a file.

    start, end: the tokens around documents, for a file without a configuration. add_bos_token: put the document start
    before every text, or not; as the configuration says if None.
    """
    if file is None:
        return byte_tokenizer()
    options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    if file.with_name(CONFIG_FILE).is_file():
        return AutoTokenizer.from_pretrained(file.parent, **options)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **options)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(start)
    if end is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer
