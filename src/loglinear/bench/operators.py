"""The operators that are measured side by side, and what each must compute.

B batch, T tokens, G query/key groups, H heads, K key width, V value width, L levels, A softmax heads, E
softmax head width, R rows

To measure another operator, add one `Operator` to `OPERATORS`: its inputs' kind, a `prepare` that binds the
inputs and returns the call, and (for attention with a pattern) which keys a query sees. Everything else —
checking, timing, memory, rows, plots — follows.
"""

import functools
import importlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from loglinear import fenwick, log_linear_attention
from loglinear.bench.inputs import FAMILIES, Inputs
from loglinear.ops import interface
from loglinear.ops.interface import Backend

WINDOW = 1024  # tokens that sliding-window attention sees, its own included
BLOCK = 128  # tokens per block of the sparse patterns
SPARSE_BLOCKS = 16  # blocks of keys that a block of queries reads at most, in block-sparse attention


class NotSupported(Exception):
    """The operator cannot run this case here; the message becomes the row's status."""


@dataclass(frozen=True)
class Operator:
    """One way of mixing tokens.

    `mechanism` groups operators in the tables. `kind` and `families` say which inputs it takes (see
    `make_inputs`). `prepare(inputs)` returns the call to time; it raises `NotSupported` where it cannot run.
    `adapt` changes inputs before they become leaves (and is not timed). `visible(queries [R,1], keys [1,T])`
    is the pattern of softmax attention. `longest` is the length from which a case would only waste memory or
    hours: "cpu" and "cuda". `ours` picks the library's own tolerances; peers get wider ones, which tell a
    wrong result from a rounded one.
    """

    name: str
    mechanism: str
    kind: str
    prepare: Callable[[Inputs], Callable[[], Tensor]]
    note: str
    families: tuple[str, ...] = tuple(FAMILIES)
    devices: tuple[str, ...] = ("cpu", "cuda")
    longest: dict[str, int] | None = None
    adapt: Callable[[Inputs], Inputs] | None = None
    visible: Callable[[Tensor, Tensor], Tensor] | None = None
    ours: bool = False

    def reference(self, inputs: Inputs) -> Tensor:
        """The fp64 result, from definitions only. `inputs` are fp64; the output has the operator's own
        layout.
        """
        if self.kind != "attention":
            return _call_ours(inputs, "reference")()
        q, k, v = _attention(inputs)
        positions = torch.arange(q.shape[2], device=q.device)
        return _dense_rows(q, k, v, inputs.scale, self._pattern(positions[:, None], positions[None, :]))

    def expected_rows(self, inputs: Inputs, rows: Tensor) -> Tensor:
        """The fp64 output of the first and last head of the first sequence at `rows`, [2,R,V]: affordable at any
        length.

        From definitions, but for the delta rule: there every row depends on all earlier tokens in order, and the
        torch backend computes them all in fp64, whose memory grows with the length.
        """
        if self.kind == "attention":
            q, k, v = (tensor[:1, [0, -1]].double() for tensor in _attention(inputs))
            pattern = self._pattern(rows[:, None], torch.arange(q.shape[2], device=q.device)[None, :])
            return _dense_rows(q[:, :, rows], k, v, inputs.scale, pattern)[0]
        if inputs.shape.delta:
            return torch.stack([_output_of_head(inputs, head)[rows] for head in (0, -1)])
        assert inputs.q is not None and inputs.k is not None and inputs.v is not None and inputs.log_decay is not None
        length = inputs.q.shape[1]
        keys = torch.arange(length, device=rows.device)
        q = inputs.q[0, rows][:, [0, -1]].double() * inputs.scale
        k, v = (tensor[0][:, [0, -1]].double() for tensor in (inputs.k, inputs.v))
        decay = inputs.log_decay[0][:, [0, -1]].double().cumsum(0)
        causal = rows[:, None] >= keys[None, :]
        if inputs.shape.per_channel:
            weights = k.new_zeros(2, len(rows), length)
            for at, row in enumerate(rows.tolist()):  # one by one: all exponents at once would be R x T x K
                seen = k[: row + 1] * (decay[row] - decay[: row + 1]).exp()
                weights[:, at, : row + 1] = torch.einsum("hk,thk->ht", q[at], seen)
        else:
            exponent = decay.T[:, rows, None] - decay.T[:, None, :]
            weights = torch.einsum("rhk,thk->hrt", q, k) * exponent.masked_fill(~causal, -math.inf).exp()
        if inputs.level_scales is not None:
            levels = fenwick.level(rows[:, None], keys[None, :].expand(len(rows), -1), inputs.level_scales.shape[-1])
            levels = torch.where(causal, levels, torch.zeros_like(levels))
            scales = inputs.level_scales[0, rows][:, [0, -1]].double().transpose(0, 1)
            weights = weights * scales.gather(2, levels.expand(2, -1, -1).long())
        return torch.einsum("hrt,thv->hrv", weights, v)

    def rows_of(self, output: Tensor, rows: Tensor) -> Tensor:
        """The same rows of a computed output, [2,R,V] in fp64."""
        if self.kind == "attention":
            return output[0, [0, -1]][:, rows].double()
        return output[0, rows][:, [0, -1]].transpose(0, 1).double()

    def _pattern(self, queries: Tensor, keys: Tensor) -> Tensor:
        causal = queries >= keys
        return causal if self.visible is None else torch.logical_and(causal, self.visible(queries, keys))


def _attention(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    assert inputs.attention is not None
    return inputs.attention


def _dense_rows(q: Tensor, k: Tensor, v: Tensor, scale: float, pattern: Tensor) -> Tensor:
    scores = torch.einsum("bhre,bhte->bhrt", q, k) * scale
    return torch.softmax(scores.masked_fill(~pattern, -math.inf), dim=-1) @ v


def _output_of_head(inputs: Inputs, head: int) -> Tensor:
    """The fp64 output of one head of the first sequence, [T,V], by the torch backend."""
    one = inputs.map(lambda x: x[:1, :, [head]].detach().double())
    with torch.no_grad():
        return _call_ours(one, "torch")()[0, :, 0]


# --- ours


def _call_ours(inputs: Inputs, backend: Backend) -> Callable[[], Tensor]:
    q, k, v = inputs.q, inputs.k, inputs.v
    assert q is not None and k is not None and v is not None

    def call() -> Tensor:
        output, _ = log_linear_attention(
            q,
            k,
            v,
            inputs.level_scales,
            log_decay=inputs.log_decay,
            beta=inputs.beta,
            scale=inputs.scale,
            backend=backend,
        )
        return output

    return call


class _RefuseFallback(logging.Handler):
    """Raises where the operator says that no kernel covers a call."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("no Triton kernel"):
            raise NotSupported(message.partition(": ")[0])


def _call_kernels(inputs: Inputs) -> Callable[[], Tensor]:
    """The call with the kernels or not at all: what none covers would go to the torch backend without an error, and its
    time would pass for that of the kernels. The first call shows it, before anything is computed or timed.
    """
    call, listening = _call_ours(inputs, "triton"), True

    def listen() -> Tensor:
        nonlocal listening
        if not listening:
            return call()
        logger, handler = logging.getLogger(interface.__name__), _RefuseFallback()
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        try:
            output = call()
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
        listening = False
        return output

    return listen


def _ours(kind: str, backend: Backend) -> Operator:
    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        return _call_kernels(inputs) if backend == "triton" else _call_ours(inputs, backend)

    name = kind if backend == "auto" else f"{kind}-{backend}"
    what = "full partition" if kind == "log-linear" else "one level, the plain linear mixer"
    return Operator(
        name,
        kind,
        kind,
        prepare,
        f"this library, backend {backend}, {what}",
        devices=("cuda",) if backend == "triton" else ("cpu", "cuda"),
        ours=True,
    )


# --- softmax attention through PyTorch's SDPA


def _prepare_sdpa(inputs: Inputs, backend: SDPBackend) -> Callable[[], Tensor]:
    q, k, v = _attention(inputs)

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=inputs.scale)

    return call


# --- sparse attention through FlexAttention


def _within_window(queries: Tensor, keys: Tensor) -> Tensor:
    return queries - keys < WINDOW


def _in_sparse_blocks(queries: Tensor, keys: Tensor) -> Tensor:
    """The two newest blocks of keys, and the rest of `SPARSE_BLOCKS` spread evenly over all older ones
    (block 0 always among them).
    """
    query_block, key_block = queries // BLOCK, keys // BLOCK
    spread = SPARSE_BLOCKS - 2
    # Block b is the i-th of `spread` evenly spaced ones, b = (i * query_block) // spread, for i = ceil(b *
    # spread / query_block).
    index = (key_block * spread + query_block - 1) // query_block.clamp(min=1)
    evenly_spaced = torch.logical_and((index * query_block) // spread == key_block, index < spread)
    return torch.logical_or(evenly_spaced, query_block - key_block < 2)


def _compiled_flex_attention() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    # Every length is compiled on its own. Past a handful of lengths the compiler would give up and run the
    # uncompiled form, which stores T x T scores; so it starts afresh each time.
    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False)


def _prepare_flex(inputs: Inputs, visible: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import BlockMask

    q, k, v = _attention(inputs)
    length = q.shape[2]
    if length % BLOCK != 0:
        raise NotSupported(f"lengths that are not a multiple of {BLOCK}")
    # Which blocks are read, from the corners of each block: exact for both patterns, and never T x T.
    starts = torch.arange(0, length, BLOCK, device=q.device)
    low, high = starts[:, None], starts[None, :]
    causal = low >= high
    touched = torch.logical_and(causal, visible(low, high + BLOCK - 1))
    whole = torch.logical_and(touched, torch.logical_and(low > high, visible(low + BLOCK - 1, high)))
    partial = torch.logical_and(touched, torch.logical_not(whole))

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        counts = blocks.sum(-1, dtype=torch.int32)
        indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        return counts[None, None], indices[None, None]

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.logical_and(query >= key, visible(query, key))

    block_mask = BlockMask.from_kv_blocks(*ordered(partial), *ordered(whole), BLOCK_SIZE=BLOCK, mask_mod=mask)
    compiled = _compiled_flex_attention()
    return lambda: compiled(q, k, v, block_mask=block_mask, scale=inputs.scale)


# --- flash-linear-attention, where it is installed


def _peer(module: str, function: str) -> Callable:
    try:
        return getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise NotSupported(f"flash-linear-attention is not installed ({error})") from error
    except AttributeError as error:
        raise NotSupported(f"this version of flash-linear-attention has no {module}.{function}") from error


def _scales_like_values(inputs: Inputs) -> Inputs:
    """Level scales in the dtype of v, which flash-linear-attention multiplies them with."""
    assert inputs.level_scales is not None and inputs.v is not None
    return replace(inputs, level_scales=inputs.level_scales.to(inputs.v.dtype))


def _one_group_per_head(inputs: Inputs) -> Inputs:
    """Repeats q and k for every head, for kernels that know no groups."""
    assert inputs.q is not None
    repeats = inputs.shape.num_heads // inputs.q.shape[2]

    def repeat(tensor: Tensor) -> Tensor:
        return tensor if tensor.shape[2] == inputs.shape.num_heads else tensor.repeat_interleave(repeats, dim=2)

    return inputs.map(repeat)


def _fla(
    name: str, kind: str, family: str, place: str, arguments: str, adapt: Callable[[Inputs], Inputs] | None = None
) -> Operator:
    """A function of flash-linear-attention at `place` in `fla.ops`, "module.function", and the inputs that it takes."""
    module, function = place.split(".")

    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        attend = _peer(f"fla.ops.{module}", function)
        return lambda: attend(*(getattr(inputs, one) for one in arguments.split()), scale=inputs.scale)[0]

    note = f"flash-linear-attention, {function}"
    return Operator(name, kind, kind, prepare, note, families=(family,), devices=("cuda",), adapt=adapt)


_BACKENDS: tuple[Backend, ...] = ("auto", "triton", "torch")
_QUADRATIC = {"cpu": 65_536, "cuda": 262_144}

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        *(_ours(kind, backend) for kind in ("log-linear", "linear") for backend in _BACKENDS),
        Operator(
            "softmax-math",
            "standard",
            "attention",
            functools.partial(_prepare_sdpa, backend=SDPBackend.MATH),
            "softmax attention that stores the T x T scores (SDPA, math)",
            longest={"cpu": 8_192, "cuda": 65_536},
        ),
        Operator(
            "softmax-flash",
            "FlashAttention",
            "attention",
            functools.partial(_prepare_sdpa, backend=SDPBackend.FLASH_ATTENTION),
            "softmax attention, FlashAttention kernel (SDPA; on a processor its blocked kernel)",
            longest=_QUADRATIC,
        ),
        Operator(
            "softmax-cudnn",
            "FlashAttention",
            "attention",
            functools.partial(_prepare_sdpa, backend=SDPBackend.CUDNN_ATTENTION),
            "softmax attention, cuDNN kernel (SDPA)",
            devices=("cuda",),
            longest=_QUADRATIC,
        ),
        Operator(
            "sliding-window",
            "sparse",
            "attention",
            functools.partial(_prepare_flex, visible=_within_window),
            f"softmax attention to the last {WINDOW} tokens (FlexAttention)",
            devices=("cuda",),
            visible=_within_window,
        ),
        Operator(
            "block-sparse",
            "sparse",
            "attention",
            functools.partial(_prepare_flex, visible=_in_sparse_blocks),
            f"softmax attention to at most {SPARSE_BLOCKS} blocks of {BLOCK} tokens (FlexAttention)",
            devices=("cuda",),
            visible=_in_sparse_blocks,
        ),
        _fla(
            "fla-log-linear",
            "log-linear",
            "scalar",
            "log_linear_attn.chunk_log_linear_attn",
            "q k v log_decay level_scales",
            _scales_like_values,
        ),
        _fla(
            "fla-simple-gla", "linear", "scalar", "simple_gla.chunk_simple_gla", "q k v log_decay", _one_group_per_head
        ),
        _fla(
            "fla-gated-deltanet",
            "linear",
            "delta",
            "gated_delta_rule.chunk_gated_delta_rule",
            "q k v log_decay beta",
        ),
        _fla("fla-gla", "linear", "channel", "gla.chunk_gla", "q k v log_decay"),
        _fla("fla-kda", "linear", "channel-delta", "kda.chunk_kda", "q k v log_decay beta"),
    )
}

# The order of mechanisms in tables and legends.
MECHANISMS = ("standard", "FlashAttention", "sparse", "linear", "log-linear")


def select(names: list[str]) -> list[Operator]:
    """The operators of these names.

    Raises:
        ValueError: there is no such operator.
    """
    unknown = [name for name in names if name not in OPERATORS]
    if unknown:
        raise ValueError(f"unknown operator {', '.join(unknown)}; known are {', '.join(OPERATORS)}")
    return [OPERATORS[name] for name in names]
