"""Streaming with states: read a text of any length in constant memory, keep the state, continue from it three times.

    python examples/stream_states.py out/demo long.txt state.safetensors
    python examples/stream_states.py out/demo more.txt state.safetensors     # goes on where the first call ended

MODEL is anything that `retnet.load` takes. The text is read as bytes in pieces, so it may be larger than the memory.
"""

import sys
from pathlib import Path

import torch

import retnet
from retnet import ModelState
from retnet.models.decode.generation import generate, prefill


def pieces(file, size=65536):
    """The bytes of a file, a piece at a time: [1, at most `size`]."""
    while data := file.read(size):
        yield torch.tensor([list(data)])


def read(model, file, state):
    """The state after the text of a file: after `state`, or from the start of a document if it is None."""
    if state is None:
        _, state = prefill(model, torch.tensor([[model.config.bos_token_id]]))
    for ids in pieces(file):
        _, state = prefill(model, ids, state)
    return state


def continuations(model, state, count, num_tokens, seed=0):
    """Several different continuations, decoded together: the state is copied, the text is not read again."""
    generator = torch.Generator().manual_seed(seed)
    forks, newline = state.repeat(count), torch.full((count, 1), ord("\n"))
    tokens = generate(model, newline, num_tokens, state=forks, temperature=0.7, generator=generator)
    rows = torch.stack(list(tokens), dim=1).tolist()
    return [bytes(token for token in row if token < 256).decode(errors="replace") for row in rows]


def main(name, text, kept):
    model = retnet.load(name, "cpu")
    state = ModelState.load(kept) if Path(kept).exists() else None
    with open(text, "rb") as file:
        state = read(model, file, state)
    state.save(kept)
    print(f"{int(state.position):,} tokens read; the state has {state.nbytes:,} bytes and is in {kept}")
    for number, continuation in enumerate(continuations(model, state, 3, 60)):
        print(f"--- continuation {number}\n{continuation}")


if __name__ == "__main__":
    main(*sys.argv[1:])
