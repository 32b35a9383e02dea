"""The inputs and the gradients of one retention call, passed by reference through the CPU forms and the GPU kernels."""

from dataclasses import dataclass, field

from torch import Tensor

from retnet.kernels.layout import layout


# Not frozen: a frozen dataclass takes three times as long to make, and one is made per call. Nobody assigns to it.
@dataclass(slots=True, eq=False)
class RetentionProblem:
    """Checked inputs of `retnet.ops.retention`, in the order in which the torch.library operators take them.

    q, k [B, T, G, K]; v [B, T, H, V]; log_decay [H] or [B, T, H]; state [N, H, K, V]; mask [B, T]; cu_seqlens [N + 1].
    chunk_size: tokens per chunk; None or 0 leaves the choice to the kernels.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    scale: float
    state: Tensor | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    chunk_size: int | None = None
    direct: bool = field(default=False, init=False)  # whether the call may go round the dispatcher (ops/direct.py)
    _kind: tuple | None = field(default=None, init=False)

    @property
    def arguments(self) -> tuple:
        """The fields in order: the operators' first arguments."""
        return (
            self.q, self.k, self.v, self.log_decay, self.scale, self.state, self.mask, self.cu_seqlens, self.chunk_size,
        )  # fmt: skip

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.v, self.log_decay, self.state, self.mask, self.cu_seqlens

    @property
    def kind(self) -> tuple:
        """Everything that a pass over this problem depends on, except the values of its tensors and `chunk_size`.

        Kept from the first time it is asked for.
        """
        if self._kind is None:
            self._kind = (*map(layout, self.tensors), self.scale)
        return self._kind

    @property
    def num_sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def per_token(self) -> bool:
        """Whether every token has a decay of its own."""
        return self.log_decay.dim() == 3

    @property
    def plain(self) -> bool:
        """Every token of every row belongs to one sequence: neither masked nor packed."""
        return self.mask is None and self.cu_seqlens is None

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """[N, H, K, V]."""
        return self.num_sequences, self.v.shape[2], self.q.shape[3], self.v.shape[3]

    def block(self, rows: slice, tokens: slice, sequences: slice) -> "RetentionProblem":
        """A part of the batch as a problem of its own, neither masked nor packed; its tensors are views."""
        log_decay = self.log_decay[rows, tokens] if self.per_token else self.log_decay
        state = None if self.state is None else self.state[sequences]
        q, k, v = (x[rows, tokens] for x in (self.q, self.k, self.v))
        return RetentionProblem(q, k, v, log_decay, self.scale, state, None, None, self.chunk_size)


@dataclass(frozen=True, slots=True)
class RetentionGradients:
    """Gradients of a problem's tensors in their shapes; None where not requested. dstate is float32."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dlog_decay: Tensor | None
    dstate: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields in order."""
        return self.dq, self.dk, self.dv, self.dlog_decay, self.dstate
