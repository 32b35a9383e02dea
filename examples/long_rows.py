"""Training on rows that several processes share: each holds a part, and the gradients are those of the whole row.

    torchrun --nproc_per_node=2 examples/long_rows.py [TEXT] [--tokens 4096] [--steps 5]
    python examples/long_rows.py                               one process, the same losses up to rounding

A row is TOKENS bytes of TEXT (by default, of this file, repeated). Without `cu_seqlens` it is one document.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist

import retnet
from retnet.ops.context_shard import ContextShard


def main(text: bytes, tokens: int, steps: int) -> list[float]:
    """The losses of the steps."""
    row = torch.tensor([256, *(text * (tokens // len(text) + 1))[:tokens]])
    device = torch.device("cuda", dist.get_rank()) if torch.cuda.is_available() else torch.device("cpu")
    shard = ContextShard.of(tokens)
    mine = slice(shard.rank * shard.tokens, (shard.rank + 1) * shard.tokens)
    ids, labels = row[:-1][mine][None].to(device), row[1:][mine][None].to(device)  # shifted, then cut
    model = retnet.load("retnet-tiny-conv", device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model.loss(ids, labels, context=shard)  # this shard's share of the mean over the row
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)  # the shares add up
        optimizer.step()
        optimizer.zero_grad()
        losses.append(shard.total(loss).item())
        if shard.rank == 0:
            print(f"{losses[-1]:.5f} nats per byte, {shard.tokens:,} of {tokens:,} tokens per process", flush=True)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="?", default=Path(__file__))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **alone)
    main(options.text.read_bytes(), options.tokens, options.steps)
    dist.destroy_process_group()
