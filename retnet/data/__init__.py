"""The path from text to packed rows of tokens: tokenizers, sources, token shards, documents, packing, mixtures.

Of `retnet`, it imports only `retnet.system`. Names are imported on first use (PEP 562), so that the
processes that tokenise text load no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# public name -> the module that defines it
_EXPORTS = {
    "DOCUMENT_START": "retnet.data.tokenizer",
    "IGNORED": "retnet.data.packing",
    "STDLIB": "retnet.data.sources",
    "VOCAB_SIZE": "retnet.data.tokenizer",
    "ByteCorpus": "retnet.data.corpus",
    "ByteTokenizer": "retnet.data.tokenizer",
    "Corpus": "retnet.data.corpus",
    "Document": "retnet.data.sources",
    "JsonTokenizer": "retnet.data.tokenizer_json",
    "Mixture": "retnet.data.mixture",
    "PackedDataset": "retnet.data.packing",
    "Rows": "retnet.data.packing",
    "Split": "retnet.data.sources",
    "StreamDecoder": "retnet.data.stream_decoder",
    "Tokenizer": "retnet.data.tokenizer",
    "find_documents": "retnet.data.sources",
    "find_tokenizer": "retnet.data.tokenizer_json",
    "open_corpus": "retnet.data.corpus",
    "split_documents": "retnet.data.sources",
}

if TYPE_CHECKING:
    from retnet.data.corpus import ByteCorpus as ByteCorpus
    from retnet.data.corpus import Corpus as Corpus
    from retnet.data.corpus import open_corpus as open_corpus
    from retnet.data.mixture import Mixture as Mixture
    from retnet.data.packing import IGNORED as IGNORED
    from retnet.data.packing import PackedDataset as PackedDataset
    from retnet.data.packing import Rows as Rows
    from retnet.data.sources import STDLIB as STDLIB
    from retnet.data.sources import Document as Document
    from retnet.data.sources import Split as Split
    from retnet.data.sources import find_documents as find_documents
    from retnet.data.sources import split_documents as split_documents
    from retnet.data.stream_decoder import StreamDecoder as StreamDecoder
    from retnet.data.tokenizer import DOCUMENT_START as DOCUMENT_START
    from retnet.data.tokenizer import VOCAB_SIZE as VOCAB_SIZE
    from retnet.data.tokenizer import ByteTokenizer as ByteTokenizer
    from retnet.data.tokenizer import Tokenizer as Tokenizer
    from retnet.data.tokenizer_json import JsonTokenizer as JsonTokenizer
    from retnet.data.tokenizer_json import find_tokenizer as find_tokenizer


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'retnet.data' has no attribute {name!r}; it exports {', '.join(_EXPORTS)}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
