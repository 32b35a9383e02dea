"""Loading with transformers' tensor parallelism, run by each process of a torchrun: python ... DIRECTORY."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.distributed import DistributedConfig

import retnet.hf  # noqa: F401 (registers the classes)
from retnet.models.parallel.whole import part_of_weights
from tests.models.parallel.tensor_checks import FOUR
from tests.small_models import hf_model

STACK = [FOUR[name] for name in ("paper", "conv", "groups", "window", "nope", "mamba2", "mamba2 in groups", "mamba1")]


def check(place: Path, tied: bool) -> None:
    whole = hf_model(STACK, dtype="float64", tie_embeddings=tied)
    if dist.get_rank() == 0:
        whole.save_pretrained(place / "whole")
    dist.barrier()
    config = DistributedConfig(tp_size=dist.get_world_size())
    part = AutoModelForCausalLM.from_pretrained(place / "whole", distributed_config=config)
    assert part.model.shard.size == dist.get_world_size()
    assert part.model.layers[0].mixer.q_proj.weight.shape == (16, 32)
    expected = part_of_weights(part.model, whole.model.state_dict())
    for name, x in part.model.state_dict().items():
        assert type(x) is torch.Tensor, name
        torch.testing.assert_close(x, expected[name], rtol=0, atol=0, msg=name)
    ids = torch.randint(1, 256, (2, 10), generator=torch.Generator().manual_seed(0))
    for model in (whole, part):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        model.eval()
    gradients = part_of_weights(part.model, {name: p.grad for name, p in whole.model.named_parameters()})
    for name, p in part.model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-9, atol=1e-12, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(part(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=1e-10, atol=1e-10)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(part.generate(ids, **options), whole.generate(ids, **options))
    part.save_pretrained(place / "again")
    dist.barrier()
    again = AutoModelForCausalLM.from_pretrained(place / "again")
    differing = [n for n, x in again.state_dict().items() if not torch.equal(x, whole.state_dict()[n])]
    assert differing == [], differing
    assert again.model.config.tie_embeddings == tied
    dist.barrier()


def check_others(place: Path) -> None:
    """A classifier, which has no head; and heads that do not divide."""
    config = DistributedConfig(tp_size=dist.get_world_size())
    ids = torch.randint(1, 256, (2, 10), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)  # the new layer of the classifier
    whole = AutoModelForSequenceClassification.from_pretrained(place / "whole", num_labels=3).eval()
    torch.manual_seed(0)
    part = AutoModelForSequenceClassification.from_pretrained(
        place / "whole", num_labels=3, distributed_config=config
    ).eval()
    whole.config.pad_token_id = part.config.pad_token_id = 0
    part.score.load_state_dict(whole.score.state_dict())
    torch.testing.assert_close(part(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=1e-10, atol=1e-10)
    if dist.get_rank() == 0:
        hf_model("every mixer").save_pretrained(place / "refused")
    dist.barrier()
    with pytest.raises(ValueError, match="accepted"):
        AutoModelForCausalLM.from_pretrained(place / "refused", distributed_config=config)


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for tied in (False, True):
        place = Path(sys.argv[1]) / str(tied)
        check(place, tied)
        check_others(place)
    dist.barrier()
    if dist.get_rank() == 0:
        print("equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
