import numpy as np
import pytest

from retnet.data.lengths_plot import draw_lengths, save_lengths_plot


@pytest.mark.parametrize("lengths", [[7], [1, 1], [2, 4096], list(range(1, 3000))])
def test_any_lengths_can_be_plotted(tmp_path, lengths):
    save_lengths_plot(np.array(lengths), "title", "facts", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_every_document_is_counted_in_a_bar():
    figure = draw_lengths(np.array([1, 2, 16, 1000, 1024]), "title", "facts")
    documents, share = figure.axes
    assert sum(bar.get_height() for bar in documents.patches) == 5
    assert sum(bar.get_height() for bar in share.patches) == pytest.approx(1)
    assert [text.get_text() for text in figure.texts] == ["title", "facts"]
    assert documents.get_legend().get_texts()[0].get_text() == "median document, 16 tokens"


def test_lengths_are_labelled_as_tokens_are_written():
    figure = draw_lengths(np.array([3, 70_000, 2_000_000]), "title", "")
    figure.canvas.draw()
    labels = [label.get_text() for label in figure.axes[1].get_xticklabels()]
    assert labels == ["8", "64", "512", "4K", "32K", "256K", "2M"]
