"""Numbers as pictures and tables write them."""

import sys
from subprocess import run

from retnet.plots.numbers import bytes_of, plain, short, tokens


def test_numbers_have_units():
    assert [tokens(n) for n in (128, 1024, 1500, 131072, 2**21)] == ["128", "1K", "1,500", "128K", "2M"]
    assert [short(n) for n in (0, 12, 1500, 172e6, 1.54e9)] == ["0", "12", "1.5k", "172M", "1.54B"]
    assert [short(n, 3) for n in (0, 0.00012, 999, 1234567, 2.5e9)] == ["0", "0.00012", "999", "1.23M", "2.5B"]
    assert [bytes_of(n) for n in (512, 192 * 1024, 2.57 * 2**30)] == ["512 B", "192 KiB", "2.57 GiB"]
    assert [plain(x) for x in (0.02, 5, 12000)] == ["0.02", "5", "12,000"]


def test_numbers_and_colours_need_no_other_package():
    code = "import sys, retnet.plots.numbers, retnet.plots.palette; sys.exit('matplotlib' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0
