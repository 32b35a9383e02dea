"""Classification with a RetNet body: is a line of Python's standard library code or documentation?

    python examples/classify.py out/demo out/code-or-documentation

The head is trained together with the body. The result is a directory that transformers opens as any classifier.
"""

import ast
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import retnet.hf  # noqa: F401 (registers RetNet with transformers' Auto classes)

LABELS = ("documentation", "code")


def labelled_lines(files="[a-d]*.py"):
    """(text, index of its label) of lines with 20 characters or more, in random order."""
    found = []
    for path in sorted(Path(ast.__file__).parent.glob(files)):
        source = path.read_text(encoding="utf-8")
        strings = [n for n in ast.walk(ast.parse(source)) if isinstance(getattr(n, "value", None), ast.Constant)]
        inside = {line for n in strings if isinstance(n, ast.Expr) for line in range(n.lineno, n.end_lineno + 1)}
        lines = [(line.strip(), int(n not in inside)) for n, line in enumerate(source.splitlines(), start=1)]
        found += [(line, kind) for line, kind in lines if len(line) >= 20 and line[0] != "#"]
    return random.Random(0).sample(found, len(found))


def main(name, output, files="[a-d]*.py", steps=60, batch=16):
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(LABELS), **names).train()
    tokenizer, lines = AutoTokenizer.from_pretrained(name), labelled_lines(files)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for start in range(0, steps * batch, batch):
        texts, kinds = zip(*lines[start : start + batch])
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
        optimizer.zero_grad()
        model(**inputs, labels=torch.tensor(kinds)).loss.backward()
        optimizer.step()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)

    texts, kinds = zip(*lines[steps * batch :][:500])
    answers = pipeline("text-classification", model=str(output))(list(texts), batch_size=50)
    right = sum(answer["label"] == LABELS[kind] for answer, kind in zip(answers, kinds)) / len(kinds)
    print(f"{right:.1%} of {len(kinds)} unseen lines are right; always 'code' would give {sum(kinds) / len(kinds):.1%}")
    return right


if __name__ == "__main__":
    main(*sys.argv[1:])
