"""The colours: told apart with every kind of sight, and readable on white and on a dark page."""

from itertools import combinations

import numpy as np
import pytest

from retnet.plots.palette import COLOURS, INK, PAPER, VARIANTS, look
from tests.paths import ROOT

DARK = "#0d1117"
# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
SIGHTS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.9505, 1.0, 1.089])


def linear(colour: str) -> np.ndarray:
    value = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    x, y, z = np.cbrt(TO_XYZ @ light.clip(0, 1) / WHITE)  # all components are above the linear part
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(a: str, b: str) -> float:
    darker, lighter = sorted(float(TO_XYZ[1] @ linear(colour)) for colour in (a, b))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("sight", SIGHTS)
def test_any_two_rivals_can_be_told_apart(sight):
    seen = {rival: lab(np.array(SIGHTS[sight]) @ linear(c)) for rival, c in COLOURS.items() if rival != "other"}
    near = {(a, b): np.linalg.norm(seen[a] - seen[b]) for a, b in combinations(seen, 2)}
    assert min(near.values()) > 12, min(near, key=near.__getitem__)


@pytest.mark.parametrize("rival", COLOURS)
def test_every_colour_can_be_seen_on_white_and_on_a_dark_page(rival):
    assert contrast(COLOURS[rival], PAPER) >= 3
    assert contrast(COLOURS[rival], DARK) >= 3


@pytest.mark.parametrize("rival", COLOURS)
def test_variants_of_a_rival_share_its_colour_and_differ_in_dash_and_marker(rival):
    looks = [look(rival, variant) for variant in range(VARIANTS + 1)]
    assert {one.colour for one in looks} == {COLOURS[rival]}
    assert len({(str(one.dash), one.marker) for one in looks}) == len(looks)
    assert len({str(one.dash) for one in looks[:4]}) == 4


def test_an_unknown_rival_or_variant_is_refused():
    with pytest.raises(ValueError, match=r"no rival is named 'lama'; accepted: retention, .*attention"):
        look("lama")
    with pytest.raises(ValueError, match="the variant is 13; accepted: 0 to 12"):
        look("attention", 13)


def test_the_servers_page_draws_states_and_caches_in_the_colours_of_pictures():
    style = (ROOT / "retnet" / "serve" / "http" / "page" / "style.css").read_text()
    assert f"--retention: light-dark({COLOURS['retention']}, " in style
    assert f"--attention: light-dark({COLOURS['attention']}, " in style
    assert ".line.state { stroke: var(--retention); }" in style
    assert ".line.cache { stroke: var(--attention);" in style


def test_the_training_report_draws_in_the_colour_of_retention():
    style = (ROOT / "retnet" / "train" / "report" / "style.css").read_text()
    assert f"--train: {COLOURS['retention']};" in style
    assert f"--ink: {INK};" in style
