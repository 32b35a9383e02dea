"""Streaming text from an exported byte model with onnxruntime and numpy: no torch, no tokenizer library.

    python -c "import retnet; from retnet.models.export import export_onnx; \
               export_onnx(retnet.load('out/demo', 'cpu'), 'out/onnx')"
    python examples/stream_onnx.py out/onnx "def " --tokens 200
"""

import argparse
import codecs
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def read(sessions, ids, state, block_tokens):
    """Logits [vocab] after ids, and the state. Several tokens run through the block, a single one through the step."""
    logits = None
    while len(ids):
        piece, ids = ids[:block_tokens], ids[block_tokens:]
        session = sessions["step" if len(piece) == 1 else "block"]
        logits, *values = session.run(None, {"ids": np.array([piece], dtype=np.int64), **state})
        state = dict(zip(state, values))
    return logits[0], state


def stream(directory, prompt, num_tokens, temperature, seed):
    """Yield one byte at a time."""
    sessions = {name: onnxruntime.InferenceSession(directory / f"{name}.onnx") for name in ("step", "block")}
    manifest = json.loads((directory / "export.json").read_text())
    state = {entry["name"]: np.zeros(entry["shape"], entry["dtype"]) for entry in manifest["state"]}
    start = manifest["bos_token_id"]
    rng = np.random.default_rng(seed)
    ids = [start, *prompt.encode()]
    for _ in range(num_tokens):
        logits, state = read(sessions, ids, state, manifest["block_tokens"])
        logits[start] = -np.inf  # never start a new document
        scaled = (logits - logits.max()).astype(np.float64) / max(temperature, 1e-6)
        ids = [int(rng.choice(len(scaled), p=np.exp(scaled) / np.exp(scaled).sum()))]
        yield bytes(ids)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in stream(given.directory, given.prompt, given.tokens, given.temperature, given.seed):
        sys.stdout.write(utf8.decode(piece))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
