"""Rules between sections of a stack file.

Rules run on the sections that are valid by themselves. A fault is reported at the value to change: for widths at
`model`, for top_k and experts at the template, for an override at its key. Rules of one mixer are in `mixers`.
"""

from collections.abc import Iterator

from retnet.data.tokenizer import BYTES, VOCAB_SIZE
from retnet.system.suggest import nearest

from .document import Document
from .errors import Category, Fault, Path, listing, plain, show
from .layers import MAX_LAYERS
from .mixers import MIXERS, Attention
from .mixers.retnet import Retnet
from .schema import DEFAULT_ROPE_THETA, Entry, Ffn, Merge, ParallelEntry, Template
from .section import OURS
from .validate import ParsedSections


def check_rules(sections: ParsedSections, document: Document) -> list[Fault]:
    """Every fault between valid sections, in no particular order."""
    return list(_Rules(sections, document).all())


class _Rules:
    def __init__(self, sections: ParsedSections, document: Document) -> None:
        self.sections = sections
        self.document = document

    def all(self) -> Iterator[Fault]:
        yield from self.widths()
        yield from self.vocabulary()
        yield from self.rotary()
        yield from self.tying()
        yield from self.multi_token()
        yield from self.mup()
        for name, template in self.sections.templates.items():
            path: Path = ("layer_templates", name)
            yield from self.mixer(path, template)
            yield from self.ffn(path, template.ffn)
            yield from self.hyper(path, template)
            yield from self.residual((*path, "norm", "position"), template, template.norm and template.norm.position)
        for number, entry in self.sections.entries.items():
            path = ("layer_schedule", number)
            yield from self.parallel(path, entry) if isinstance(entry, ParallelEntry) else self.entry(path, entry)
        yield from self.length()
        yield from self.modes()

    def fault(
        self, path: Path, what: str, fix: str, category: Category = Category.VALIDATION, at: Path | None = None
    ) -> Fault:
        """A fault reported at `path`, with the mark of `at` if that is given."""
        return Fault(path, what, fix, category, self.document.mark(at or path))

    # Across the file

    def widths(self) -> Iterator[Fault]:
        model = self.sections.model
        if model is None:
            return
        if model.d_model % model.n_heads:
            close = max(1, round(model.d_model / model.n_heads)) * model.n_heads
            what = f"d_model {model.d_model} cannot be split into n_heads {model.n_heads}"
            yield self.fault(("model", "d_model"), what, f"write a multiple of {model.n_heads}, such as {close}")
        if model.n_heads % model.kv_heads:
            what = f"n_heads {model.n_heads} cannot share n_kv_heads {model.kv_heads} evenly"
            divisors = [n for n in range(1, min(model.n_heads, 4096) + 1) if model.n_heads % n == 0]
            yield self.fault(("model", "n_heads"), what, f"write n_kv_heads as one of: {listing(map(str, divisors))}")

    def vocabulary(self) -> Iterator[Fault]:
        model, tokenizer = self.sections.model, self.sections.tokenizer
        if model and tokenizer and tokenizer.pretrained == BYTES and model.vocab_size < VOCAB_SIZE:
            what = f"the byte tokenizer has {VOCAB_SIZE} tokens, more than {model.vocab_size}"
            yield self.fault(("model", "vocab_size"), what, f"write {VOCAB_SIZE} or more")

    def rotary(self) -> Iterator[Fault]:
        embedding, model = self.sections.embedding, self.sections.model
        if embedding is None:
            return
        rotated = any(template.mixer.settings.rotates_heads for template in self.sections.templates.values())
        if embedding.positional != "rope":
            for key in ("rope_theta", "rope_scaling"):
                if getattr(embedding, key) is not None:
                    what = f"{key} has no meaning with positional: {embedding.positional}"
                    yield self.fault(("embedding", key), what, "remove it, or write positional: rope")
            return
        scaling = embedding.rope_scaling
        if scaling and scaling.type == "yarn" and (embedding.rope_theta or DEFAULT_ROPE_THETA) <= 1:
            yield self.fault(("embedding", "rope_theta"), "yarn needs a base above 1", "write 10000.0")
        if rotated and model is not None and model.d_model % model.n_heads == 0 and model.head_dim % 2:
            what = f"rotary positions rotate pairs, but the head width (d_model / n_heads) is {model.head_dim}"
            fix = "choose d_model and n_heads so that the head width is even, or write retnet.rope: false"
            yield self.fault(("model", "d_model"), what, fix)

    def tying(self) -> Iterator[Fault]:
        embedding, head = self.sections.embedding, self.sections.head
        if embedding is None or head is None:
            return
        both = "tie_word_embeddings" in embedding.model_fields_set and "tie_weights" in head.model_fields_set
        if both and embedding.tie_word_embeddings != head.tie_weights:
            what = f"tie_weights {show(head.tie_weights)} contradicts embedding.tie_word_embeddings"
            yield self.fault(("head", "tie_weights"), what, "give one of the two, or the same value in both")

    def mup(self) -> Iterator[Fault]:
        """Scores of heads that are narrower or wider than the base's need a scale, which not every mixer has."""
        model, hints, path = self.sections.model, self.sections.hints, ("training_hints", OURS + "mup", "base_head_dim")
        base = None if hints is None or hints.mup is None else hints.mup.base_head_dim
        if model is None or base is None or model.d_model % model.n_heads:
            return
        for name, template in self.sections.templates.items():
            for kind, mixer in template.mixer.settings.leaves(template.mixer.type):
                latent = isinstance(mixer, Attention) and mixer.latent_dim is not None
                width = model.head_dim
                if isinstance(mixer, Retnet):
                    width = (mixer.key_dim or model.d_model) // model.n_heads
                unnormed = isinstance(mixer, Retnet) and mixer.head_norm == "none"
                if width != base and (latent or unnormed):
                    reason = "latent_dim" if latent else "head_norm: none"
                    what = f"scores of {kind} with {reason} in template '{plain(name)}' have no scale"
                    fix = f"remove it, or choose d_model and n_heads for heads of width {base}"
                    yield self.fault(path, what, fix)

    def multi_token(self) -> Iterator[Fault]:
        head, path, names = self.sections.head, ("head", "mtp"), self.sections.names
        if head is None:
            return
        given = "mtp" in head.model_fields_set
        if head.type == "causal_lm" and given:
            yield self.fault(
                path, "`mtp` cannot be given with type: causal_lm", "remove it, or write type: causal_lm_mtp"
            )
        elif head.type == "causal_lm_mtp" and head.mtp is None:
            what, fix = "type: causal_lm_mtp needs the key 'mtp'", "add mtp: {head_template: NAME}"
            yield self.fault(path, what, fix, at=None if given else ("head",))
        elif head.mtp is not None and names and head.mtp.head_template not in names:
            yield self.unknown_template((*path, "head_template"), head.mtp.head_template)

    def length(self) -> Iterator[Fault]:
        total = 0
        for number, entry in self.sections.entries.items():
            total += entry.num_layers
            if total > MAX_LAYERS:
                path = ("layer_schedule", number, *(("repeat",) if isinstance(entry, Entry) else ("parallel",)))
                yield self.fault(path, f"the schedule has more than {MAX_LAYERS} layers", "repeat less often")
                return

    def modes(self) -> Iterator[Fault]:
        seen: set[str] = set()
        for number, mode in self.sections.modes.items():
            if mode.name in seen:
                what = f"there is another mode {show(mode.name)}"
                yield self.fault(("execution_modes", number, "name"), what, "write another name")
            seen.add(mode.name)

    # One template

    def mixer(self, path: Path, template: Template) -> Iterator[Fault]:
        mixer, here = template.mixer, (*path, "mixer")
        for other in MIXERS:
            if other != mixer.type and other in mixer.model_fields_set:
                what = f"`{other}` cannot be given with type: {mixer.type}"
                yield self.fault(here, what, f"remove it, or write type: {other}", at=(*here, other))
        for fault in mixer.settings.faults(self.sections.model, self.sections.embedding):
            yield self.fault((*here, mixer.type, *fault.path), fault.what, fault.fix, fault.category)

    def ffn(self, path: Path, ffn: Ffn) -> Iterator[Fault]:
        here = (*path, "ffn")
        if ffn.type == "moe" and ffn.moe is None and not self.document.is_broken((*here, "moe")):
            yield self.fault(here, "type: moe needs the key 'moe'", "add moe: {experts: 8, top_k: 2}")
        if ffn.type != "moe" and ffn.moe is not None:
            yield self.fault(
                here, f"`moe` cannot be given with type: {ffn.type}", "remove it, or write type: moe", at=(*here, "moe")
            )
        if ffn.moe is not None and ffn.moe.top_k > ffn.moe.experts:
            what = f"ffn.moe.top_k {ffn.moe.top_k} is more than ffn.moe.experts {ffn.moe.experts}"
            yield self.fault(path, what, f"write top_k: {ffn.moe.experts} or less", at=(*here, "moe", "top_k"))
        for fault in ffn.moe.faults() if ffn.moe is not None else ():
            yield self.fault((*here, "moe", *fault.path), fault.what, fault.fix)
        yield from self.activation((*here, "activation"), ffn.type, ffn.activation)

    def activation(self, path: Path, ffn_type: str, activation: str | None) -> Iterator[Fault]:
        if ffn_type == "mlp" and activation == "swiglu":
            yield self.fault(
                path, "swiglu needs a gate, and type: mlp has none", "write type: gated_mlp, or gelu or relu"
            )

    def hyper(self, path: Path, template: Template) -> Iterator[Fault]:
        residual, here = template.residual, (*path, "residual", "hyper")
        if residual is None:
            return
        given = "hyper" in residual.model_fields_set
        if residual.type != "hyper_connection" and given:
            what = f"`hyper` cannot be given with type: {residual.type}"
            yield self.fault(here, what, "remove it, or write type: hyper_connection")
        elif residual.type == "hyper_connection" and residual.hyper is None:
            what, fix = "type: hyper_connection needs the key 'hyper'", "add hyper: {expand: 4}"
            yield self.fault(here, what, fix, at=None if given else here[:-1])

    def residual(self, path: Path, template: Template, position: str | None) -> Iterator[Fault]:
        kind = template.residual.type if template.residual else "sequential"
        if position == "post" and kind != "sequential":
            what = f"position: post is not defined with residual.type: {kind}"
            yield self.fault(path, what, "write position: pre, or type: sequential")

    # One schedule entry

    def parallel(self, path: Path, entry: ParallelEntry) -> Iterator[Fault]:
        here, seen = (*path, "parallel"), set[str]()
        if len(entry.parallel) < 2:
            what = f"expected at least two streams, got {len(entry.parallel)}"
            yield self.fault(here, what, "add a stream, or write the layers as entries of the schedule")
        for i, stream in enumerate(entry.parallel):
            if stream.stream in seen:
                what = f"there are two streams {show(stream.stream)}"
                yield self.fault((*here, i, "stream"), what, "give each stream a name of its own")
            seen.add(stream.stream)
            if not stream.body:
                yield self.fault((*here, i, "body"), "expected at least one layer, got none", "add a layer")
            for j, part in enumerate(stream.body):
                name, place = part.template, (*here, i, "body", j)
                if self.sections.names and name not in self.sections.names:
                    yield self.unknown_template(place, name, at=(*place, "template"))
        merge = entry.merge
        if merge is not None and merge.type == "concat" and not merge.projection:
            what = f"without a projection, {len(entry.parallel)} streams are wider than d_model"
            yield self.fault((*path, "merge", "projection"), what, "remove it, or write type: add or gated")
        if merge is not None:
            yield from self.cross_attention((*path, "merge"), merge, [stream.stream for stream in entry.parallel])

    def cross_attention(self, path: Path, merge: Merge, streams: list[str]) -> Iterator[Fault]:
        ends = {"from": merge.source, "to": merge.target}
        if merge.type != "cross_attn":
            for key in (key for key, name in ends.items() if name is not None):
                what = f"`{key}` has no meaning with type: {merge.type}"
                yield self.fault((*path, key), what, "remove it, or write type: cross_attn")
        elif None in ends.values() or merge.source == merge.target:
            what = f"cross_attn is between two streams, not from {show(merge.source)} to {show(merge.target)}"
            yield self.fault(path, what, f"write from and to as two of: {listing(streams)}")
        else:
            for key, name in ends.items():
                if name not in streams:
                    what = f"there is no stream {show(name)}"
                    yield self.fault((*path, key), what, f"write one of: {listing(streams)}")

    def unknown_template(self, path: Path, name: str, at: Path | None = None) -> Fault:
        names = self.sections.names
        close = nearest(name, tuple(names))
        fix = f"did you mean {plain(close)}?" if close else f"defined are: {listing(sorted(names)[:20])}"
        return self.fault(path, f"there is no template {show(name)}", fix, at=at)

    def entry(self, path: Path, entry: Entry) -> Iterator[Fault]:
        names = self.sections.names
        if names and entry.template not in names:
            yield self.unknown_template(path, entry.template, at=(*path, "template"))
        template = self.sections.templates.get(entry.template)
        if template is None or entry.override is None:
            return
        here, changed = (*path, "override"), entry.override
        if changed.attention is not None:
            settings = template.mixer.settings
            if not isinstance(settings, Attention):
                what = f"the template's mixer is {template.mixer.type}, not attention"
                yield self.fault((*here, "attention"), what, "remove it, or schedule a template with attention")
            elif "window" in changed.attention.model_fields_set and changed.attention.window is None:
                window = (*here, "attention", "window")
                if settings.window and not self.document.is_broken(window):
                    what = f"null does not remove the template's window of {settings.window}"
                    yield self.fault(window, what, "remove it; for global attention, add a template")
        if changed.norm is not None:
            yield from self.residual((*here, "norm", "position"), template, changed.norm.position)
        if changed.ffn is not None:
            yield from self.activation((*here, "ffn", "activation"), template.ffn.type, changed.ffn.activation)
