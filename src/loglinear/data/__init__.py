"""Data: tokenizers, documents, tokenized corpora split by document, and packing with boundaries kept."""

from loglinear.data.corpus import Corpus
from loglinear.data.documents import Document, Documents, standard_library
from loglinear.data.packing import PackedRows, Row, join_rows
from loglinear.data.tokenizers import ByteTokenizer, encode_prompt, encode_text, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "Document",
    "Documents",
    "PackedRows",
    "Row",
    "encode_prompt",
    "encode_text",
    "join_rows",
    "load_tokenizer",
    "standard_library",
]
