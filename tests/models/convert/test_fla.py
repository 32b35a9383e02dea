"""flash-linear-attention itself, on a GPU: it loads what we wrote, and computes our logits."""

from __future__ import annotations

import os

import pytest
import torch

from retnet.models import convert

from .peers import FLA_CONFIG, VOCAB, fla_state

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("length", [48, 300], ids=["recurrent kernel", "chunk kernel"])
@pytest.mark.parametrize(
    "options",
    [{}, {"expand_k": 0.5, "norm_eps": 1e-3}, {"num_kv_heads": 2}, {"use_output_gate": False}],
    ids=["plain", "expansions", "shared keys", "no gate"],
)
@torch.no_grad()
def test_fla_loads_a_converted_model_and_gives_our_logits(tmp_path, monkeypatch, options, length):
    monkeypatch.setitem(os.environ, "TRITON_F32_DEFAULT", "ieee")  # its float32 products are TF32 otherwise
    models = pytest.importorskip("fla.models.retnet")
    config = FLA_CONFIG | {"hidden_size": 128, "num_heads": 2, "intermediate_size": 256} | options
    model = convert.load(fla_state(config), config=config, device="cuda")
    convert.convert(model, tmp_path / "fla", to="fla")
    theirs, info = models.RetNetForCausalLM.from_pretrained(
        tmp_path / "fla", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    ids = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(0)).cuda()
    wanted = theirs.cuda().eval()(ids).logits
    assert ((model(ids).logits - wanted).norm() / wanted.norm()).item() < 1e-5
