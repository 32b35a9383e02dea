"""Classification with a RetNet body: code or documentation? Run it: python examples/classify.py out/demo

Texts of any length are packed into one row without padding, and each one's last token gives its class.
"""

import ast
import itertools
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import retnet


def labelled_lines(files="[a-d]*.py"):
    """(text, 1 for code or 0 for documentation) of lines with 20 characters or more, in random order."""
    found = []
    for path in sorted(Path(ast.__file__).parent.glob(files)):
        source = path.read_text(encoding="utf-8")
        strings = [n for n in ast.walk(ast.parse(source)) if isinstance(getattr(n, "value", None), ast.Constant)]
        inside = {line for n in strings if isinstance(n, ast.Expr) for line in range(n.lineno, n.end_lineno + 1)}
        lines = [(line.strip(), int(n not in inside)) for n, line in enumerate(source.splitlines(), start=1)]
        found += [(line, kind) for line, kind in lines if len(line) >= 20 and line[0] != "#"]
    return random.Random(0).sample(found, len(found))


class Classifier(nn.Module):
    def __init__(self, body, num_classes=2):
        super().__init__()
        self.body, self.head = body, nn.Linear(body.config.d_model, num_classes)

    def forward(self, texts):  # -> logits [N, classes]
        tokens = [[self.body.config.bos_token_id, *text.encode()] for text in texts]
        ends = torch.tensor([len(each) for each in tokens]).cumsum(0)
        hidden, _ = self.body.hidden(torch.tensor([list(itertools.chain(*tokens))]), cu_seqlens=F.pad(ends, (1, 0)))
        return self.head(hidden[0, ends - 1])


def main(name, steps=60, batch=16):
    model, lines = Classifier(retnet.load(name, "cpu")), labelled_lines()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for start in range(0, steps * batch, batch):
        texts, kinds = zip(*lines[start : start + batch])
        optimizer.zero_grad()
        F.cross_entropy(model(texts), torch.tensor(kinds)).backward()
        optimizer.step()
    texts, kinds = zip(*lines[-500:])
    with torch.no_grad():
        right = (model(texts).argmax(-1) == torch.tensor(kinds)).float().mean().item()
    print(f"{right:.1%} of {len(kinds)} unseen lines are right; always 'code' would give {sum(kinds) / len(kinds):.1%}")
    return right


if __name__ == "__main__":
    main(*sys.argv[1:])
