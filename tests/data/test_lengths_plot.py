import numpy as np
import pytest

from retnet.data.lengths_plot import save_lengths_plot


@pytest.mark.parametrize("lengths", [[7], [1, 1], [2, 4096], list(range(1, 3000))])
def test_any_lengths_can_be_plotted(tmp_path, lengths):
    save_lengths_plot(np.array(lengths), "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_every_document_is_counted_in_a_bar(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    hist = Axes.hist

    def spy(self, *args, **kwargs):
        drawn.append(hist(self, *args, **kwargs)[0])
        return drawn[-1]

    monkeypatch.setattr(Axes, "hist", spy)
    save_lengths_plot(np.array([1, 2, 16, 1000, 1024]), "title", tmp_path / "a.png")
    counts, shares = drawn
    assert counts.sum() == 5
    assert shares.sum() == pytest.approx(1)
