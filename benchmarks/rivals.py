"""Rivals in generation: transformers' Llama, FLA's RetNet, and an optimised decode step of a Transformer.

`generation_milliseconds` times transformers' `generate` as its users call it. `TransformerStep` is a fair rival for
the paper's Figure 6: our fused products (`retnet.ops.decode.linear`) around attention, a static cache, one CUDA graph
per token, attention over exactly the cached tokens. It is timed at a fixed length, which favours it: in use, the cache
must grow.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from runner import fla_installed, median_milliseconds
from torch import Tensor

from retnet.ops.decode.linear import DecodeWeight, InputNorm, decode_linear
from retnet.ops.rotary import rotate, rotation

# Shapes of Llamas with as many parameters as our presets: (layers, width, heads, feed-forward width).
LLAMAS = {"retnet-125m": (12, 768, 12, 2048), "retnet-1.3b": (24, 2048, 16, 5504), "retnet-6.7b": (32, 4096, 32, 11008)}
VOCAB = 50304


def llama_config(*, layers: int, width: int, heads: int, feed_forward: int, vocab: int, max_tokens: int, **options):
    """transformers' configuration of a Llama, in this project's names; `options` in transformers'."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_tokens,
        **options,
    )


def llama(shape: str, device: torch.device, max_tokens: int):
    """transformers' Llama of a preset's size, bfloat16, random weights."""
    from transformers import LlamaForCausalLM

    layers, width, heads, hidden = LLAMAS[shape]
    tokens = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    config = llama_config(
        layers=layers, width=width, heads=heads, feed_forward=hidden, vocab=VOCAB, max_tokens=max_tokens, **tokens
    )
    return _built(LlamaForCausalLM, config, device)


def write_llama(shape: str, folder: Path, max_tokens: int) -> None:
    """Save a random Llama of a preset's size, bfloat16, with a tokenizer."""
    llama(shape, torch.device("cuda" if torch.cuda.is_available() else "cpu"), max_tokens).save_pretrained(folder)
    write_tokenizer(folder, VOCAB)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Save a tokenizer of the words w0, w1, ..., one per token, of which w0 is the start of a document."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{token}": token for token in range(vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w0").save_pretrained(folder)


def fla_retnet(shape: str, device: torch.device, max_tokens: int):
    """FLA's RetNet of a preset's size; None if FLA is not installed."""
    if not fla_installed():
        return None
    from fla.models import RetNetConfig, RetNetForCausalLM

    layers, width, heads, _ = LLAMAS[shape]
    config = RetNetConfig(vocab_size=VOCAB, hidden_size=width, num_hidden_layers=layers, num_heads=heads // 2)
    config.eos_token_id = None
    config.max_position_embeddings = max_tokens
    return _built(RetNetForCausalLM, config, device)


def _built(kind, config, device: torch.device):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def generation_milliseconds(model, batch: int, prompt: int, tokens: int, cache: str | None) -> float:
    """Time per step of `generate`, without its prefill. cache: "static" compiles the step; None: a growing cache."""
    ids = torch.randint(VOCAB, (batch, prompt), device=model.device)
    options = {"do_sample": False, "pad_token_id": 0} | ({} if cache is None else {"cache_implementation": cache})

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(ids, min_new_tokens=count, max_new_tokens=count, **options)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    seconds(tokens + 1)  # compiles, captures
    return 1e3 * (seconds(tokens + 1) - seconds(1)) / tokens


@torch.no_grad()
def prompt_milliseconds(model, prompt: int) -> float:
    """Prefill of one prompt, with the logits of its last token."""
    ids = torch.randint(VOCAB, (1, prompt), device=model.device)
    return median_milliseconds(lambda: model(ids, use_cache=True, logits_to_keep=1), budget=1.0, least=2)


@torch.no_grad()
def held_bytes(model, position: int) -> int:
    """Memory of the weights, and of the cache of `generate` after `position` tokens."""
    before = torch.cuda.memory_allocated()
    ids = torch.randint(VOCAB, (1, position), device=model.device)
    kept = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    del ids
    grown = torch.cuda.memory_allocated() - before
    del kept
    return grown + sum(p.nbytes for p in model.parameters())


class TransformerStep:
    """The decode step of a Llama-shaped Transformer for B sequences with L cached tokens each; random weights.

    kv_heads: heads of keys and values; grouped-query attention has fewer than query heads.
    """

    def __init__(self, shape: str, kv_heads: int, batch: int, length: int, weights: list[DecodeWeight] | None = None):
        self.layers, width, self.heads, self.hidden = LLAMAS[shape]
        self.kv_heads, self.head_dim = kv_heads, width // self.heads
        keys = kv_heads * self.head_dim
        sizes = [(width + 2 * keys, width), (width, width), (2 * self.hidden, width), (width, self.hidden)]
        self.weights = weights or [_weight(*size) for _ in range(self.layers) for size in sizes] + [
            _weight(VOCAB, width)
        ]
        self.norm = InputNorm("rms", 1, 1e-6, torch.ones(width, device="cuda", dtype=torch.bfloat16))
        cache = (self.layers, 2, batch, kv_heads, length, self.head_dim)
        self.cache = torch.randn(cache, device="cuda", dtype=torch.bfloat16)
        self.tokens = torch.zeros(batch, dtype=torch.long, device="cuda")
        self.position = torch.full((batch, 1), length - 1, device="cuda")

    def run(self) -> None:
        """Embedding, all layers, the next token. The new key and value overwrite the last ones in the cache."""
        x = F.embedding(self.tokens, self.weights[-1].values)
        cos, sin = rotation(self.position, "half", self.head_dim, 10000.0)
        for i in range(self.layers):
            inputs, output, up, down = self.weights[4 * i : 4 * i + 4]
            x = self._attend(x, inputs, output, self.cache[i], cos, sin)
            opened, other = decode_linear(x, up, norm=self.norm).chunk(2, -1)
            x = decode_linear(other, down, gate=opened, activation="swish", residual_=x)
        self.tokens.copy_(decode_linear(x, self.weights[-1], norm=self.norm).argmax(-1))

    def _attend(
        self, x: Tensor, inputs: DecodeWeight, output: DecodeWeight, cache: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        G, K = self.kv_heads, self.head_dim
        q, k, v = decode_linear(x, inputs, norm=self.norm).split([self.heads * K, G * K, G * K], -1)
        q, k = (rotate(z.unflatten(-1, (-1, K))[:, None], cos, sin, "half").transpose(1, 2) for z in (q, k))
        keys, values = cache
        keys[:, :, -1:] = k
        values[:, :, -1] = v.unflatten(-1, (G, K))
        y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=self.heads != G)
        return decode_linear(y.transpose(1, 2).flatten(1), output, residual_=x)


def _weight(rows: int, columns: int) -> DecodeWeight:
    return DecodeWeight(torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16).mul_(0.02))
