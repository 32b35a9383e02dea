"""The loss curve of a run."""

from matplotlib.figure import Figure

from retnet.train.curve import save_loss_curve

LOG = [
    {"step": 1, "bits_per_byte": 8.0},
    {"step": 2, "bits_per_byte": 6.0},
    {"step": 2, "eval_bits_per_byte": 7.0},
    {"step": 2, "train_runtime": 1.0},
]


def test_bits_per_byte_are_drawn_over_tokens(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: figures.append(self))
    save_loss_curve(LOG, 100, tmp_path / "curve.png")
    training, validation = figures[0].axes[0].lines
    assert (training.get_label(), validation.get_label()) == ("training", "validation")
    assert training.get_xydata().tolist() == [[100, 8.0], [200, 6.0]]
    assert validation.get_xydata().tolist() == [[200, 7.0]]


def test_without_validation_there_is_one_curve(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: figures.append(self))
    save_loss_curve(LOG[:2], 100, tmp_path / "curve.png")
    assert [line.get_label() for line in figures[0].axes[0].lines] == ["training"]
