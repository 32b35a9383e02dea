"""Every kind of specification (`kinds.py`) from its file to a trained model in use, or refused by name."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import retnet.hf  # noqa: F401 (registers the classes)
from retnet.models.decode.generation import generate
from retnet.models.decode.sampling import Sampling
from retnet.models.directory import load_model, save_model
from retnet.models.fingerprint import fingerprint
from retnet.models.lm import LanguageModel
from retnet.models.snapshot import Snapshot
from retnet.serve.engine import Engine
from retnet.serve.pool import growing_layer
from retnet.serve.request import Request
from retnet.serve.speculation import Speculation
from retnet.stack import Category, parse_stack
from retnet.stack.build import model_config
from retnet.stack.report import Severity, realism_report
from retnet.stack.resolve import resolve_model
from retnet.stack.summary import summarize
from tests.cli.command import run
from tests.small_models import unit_gain_

from .kinds import REFUSED, RUN
from .specs import only

PROMPT, NEW = b"a model reads what was written ", 20
SETTINGS = ("max_steps=3", "length=64", "per_device_train_batch_size=4", "num_samples=0", "logging_steps=1",
            "save_strategy=no", "use_cpu=true")  # fmt: skip
NARROW = "head_dim_range"  # the heads of a small model
WARNINGS = {"execution_modes": [NARROW, "execution_modes"]}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_kind_has_one_fault_which_names_it(name):
    text, path, key = REFUSED[name]
    fault = only(text)
    assert (fault.category, fault.dotted) == (Category.UNSUPPORTED, path)
    assert f"`{key}`" in fault.what
    assert fault.fix


def cached(model: LanguageModel, ids: torch.Tensor, split: int) -> torch.Tensor:
    """The logits of a prompt of `split` tokens, and of single tokens after it."""
    output = model(ids[:, :split], carry=True)
    pieces = [output.logits]
    for t in range(split, ids.shape[1]):
        output = model(ids[:, t : t + 1], output.state, carry=True)
        pieces.append(output.logits)
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("name", RUN)
@torch.no_grad()
def test_a_kind_is_built_and_decodes_as_one_forward_does(name):
    stack = parse_stack(RUN[name])
    config = model_config(stack)
    assert len(summarize(stack, config)) == len(config.layers)
    warnings = [finding.rule for finding in realism_report(stack) if finding.severity is Severity.WARNING]
    assert warnings == WARNINGS.get(name, [NARROW])
    model = unit_gain_(LanguageModel(config).float().eval())
    ids = torch.tensor([list(PROMPT)])
    full = model(ids).logits
    assert (cached(model, ids, 24) - full).norm() <= 1e-5 * (full - full.mean(-1, keepdim=True)).norm()


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A text to train on, beside the test's other files."""
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line {i}: a model reads what was written before.\n" for i in range(400)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_a_kind_is_explained_compiled_trained_saved_and_decoded_alike_everywhere(name, tmp_path, lines):
    file, model_dir = tmp_path / "kind.yml", tmp_path / "trained"
    file.write_text(RUN[name].replace("  n_heads: 4\n", "  n_heads: 4\n  dtype: float32\n"))
    assert run("stack", "validate", file, "--report") == 0
    assert run("stack", "explain", file, "--picture", tmp_path / "kind.svg") == 0
    assert run("stack", "compile", file, "--output-dir", tmp_path / "compiled") == 0
    assert run("train", f"model={file}", f"data={lines}", f"output_dir={model_dir}", *SETTINGS) == 0
    assert run("info", model_dir) == 0
    start, model = resolve_model(str(file)), load_model(model_dir)
    for (parameter, before), after in zip(start.named_parameters(), model.parameters(), strict=True):
        assert torch.isfinite(after).all(), parameter
        assert not torch.equal(before, after), f"{parameter} did not learn"

    check_decoding(unit_gain_(model), tmp_path)


@torch.no_grad()
def check_decoding(model: LanguageModel, folder: Path) -> None:
    """Greedy tokens, logits and states of a model, after it has been saved, in its own classes and transformers'."""
    model.eval()
    ids = torch.tensor([list(PROMPT)])
    full = model(ids).logits
    save_model(model, folder / "saved")
    loaded = load_model(folder / "saved").eval()
    assert torch.equal(loaded(ids).logits, full)

    greedy = torch.stack(list(generate(loaded, ids, NEW, temperature=0)), 1)
    text = torch.cat([ids, greedy], 1)
    assert torch.equal(model(text).logits[:, ids.shape[1] - 1 : -1].argmax(-1), greedy)
    states = [model(text[:, :length], carry=True).state for length in (30, 51)]
    if growing_layer(model.config) is None:
        assert states[0].nbytes == states[1].nbytes

    for speculation in (None, Speculation.of(3, "context", model.config), Speculation.of(3, "auto", model.config)):
        engine = Engine(model, num_slots=4, max_tokens=128, speculation=speculation)
        assert list(engine.stream(Request(list(PROMPT), NEW, Sampling(temperature=0)))) == greedy[0].tolist()
    Snapshot(states[0], text[0, :31].tolist(), fingerprint(model)).save(folder / "state.safetensors")
    state = Snapshot.load(folder / "state.safetensors").state
    output = model(text[:, 30:], state, carry=True)
    whole = model(text).logits[:, 30:]
    assert (output.logits - whole).norm() <= 1e-5 * (whole - whole.mean(-1, keepdim=True)).norm()

    face = AutoModelForCausalLM.from_pretrained(folder / "saved").eval()
    # transformers maps the file, where weights are aligned to 8 bytes: products round otherwise
    assert (face(ids).logits - full).norm() <= 1e-6 * full.norm()
    for cache in (True, False):
        assert torch.equal(face.generate(ids, max_new_tokens=NEW, do_sample=False, use_cache=cache), text)
