"""`retnet tune` on a machine with and without a GPU."""

import pytest
import torch

from retnet.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to tune"),
        (["--heads", "256"], "heads is '256'; accepted: KxV"),
        (["--heads", "0x64"], "positive integers"),
        (["--heads", "64x64", "--dtype", "int8"], "dtype is 'int8'; accepted: bfloat16"),
        pytest.param(["arch_beginner_llama_mini"], "nothing to tune", marks=pytest.mark.slow),
        (["--heads", "64x64", "--seconds", "1"], "greater than or equal to 10"),
    ],
)
def test_wrong_arguments_end_in_one_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune", *arguments])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_tune_without_a_gpu_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune", "retnet-1.3b"])
    assert stop.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_measured_block_shapes_are_stored(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        main(["tune", "--heads", "64x64"])
    assert stop.value.code == 0
    assert "stored in" in capsys.readouterr().out
