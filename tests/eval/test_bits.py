import math

import pytest
import torch
import torch.nn.functional as F

from retnet.data import ByteTokenizer, find_documents
from retnet.eval import bits
from retnet.eval.bits import bits_per_byte
from retnet.models.directory import load_model


def test_every_byte_counts_once_and_documents_do_not_share_context(byte_model, text_folder):
    model = load_model(byte_model)
    documents = find_documents(text_folder)[:3]
    expected = 0.0
    with torch.no_grad():
        for document in documents:
            ids = torch.tensor(ByteTokenizer().encode(document.read(), start=True))
            expected += F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="sum").item()
    result = bits_per_byte(model, ByteTokenizer(), documents)
    assert result.num_bytes == sum(d.size for d in documents)
    assert result.bits == pytest.approx(expected / math.log(2), rel=1e-5)


@pytest.mark.parametrize("piece", [1, 7, 100])
def test_the_size_of_the_pieces_read_changes_no_figure(byte_model, text_folder, monkeypatch, piece):
    model = load_model(byte_model)
    documents = find_documents(text_folder)[:1]
    whole = bits_per_byte(model, ByteTokenizer(), documents).bits
    monkeypatch.setattr(bits, "PIECE_BYTES", piece)
    assert bits_per_byte(model, ByteTokenizer(), documents).bits == pytest.approx(whole, rel=1e-5)


def test_nothing_to_score_is_an_error(byte_model):
    with pytest.raises(ValueError, match="no documents to score"):
        bits_per_byte(load_model(byte_model), ByteTokenizer(), [])
