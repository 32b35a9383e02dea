"""Text as packed rows of byte tokens: sources, split, tokenizer, packing. A leaf: it imports nothing else of ours."""

from retnet.data.packing import IGNORED, PackedDataset
from retnet.data.sources import STDLIB, Document, Split, find_documents, split_documents
from retnet.data.tokenizer import DOCUMENT_START, VOCAB_SIZE, ByteTokenizer, StreamDecoder

__all__ = [
    "DOCUMENT_START",
    "IGNORED",
    "STDLIB",
    "VOCAB_SIZE",
    "ByteTokenizer",
    "Document",
    "PackedDataset",
    "Split",
    "StreamDecoder",
    "find_documents",
    "split_documents",
]
