"""Muon in several processes under torchrun: sharded, or replicated with shared orthogonalisation, as in one process.

Prints "equal" if the parameters after three steps are those of one process, up to rounding.
"""

from __future__ import annotations

import sys
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from retnet.models.lm import LanguageModel
from retnet.train.muon import Muon, muon_groups
from tests.small_models import small_model


def trained(model: LanguageModel, optimizer: Muon) -> None:
    ids = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        output = model(ids)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + output.auxiliary_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main(kind: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    alone, shared = (small_model("every mixer", dtype="float64").train() for _ in range(2))
    trained(alone, Muon(muon_groups(alone, 1e-2)))
    if kind == "sharded":
        for layer in shared.layers:
            fully_shard(layer)
        fully_shard(shared)
    trained(shared, Muon(muon_groups(cast(nn.Module, shared), 1e-2), process_group=dist.group.WORLD))
    for (name, p), expected in zip(shared.named_parameters(), alone.parameters(), strict=True):
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        assert isinstance(p, DTensor) == (kind == "sharded")
        torch.testing.assert_close(whole, expected, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    if dist.get_rank() == 0:
        print("equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
