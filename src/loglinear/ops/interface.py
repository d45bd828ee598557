"""The public operator: everything is checked here, once, and handed to a backend.

Legend
    B batch, T tokens, G query/key groups (G divides H), H heads, K key width, V value width, L levels,
    S sequences (B, or the number of packed sequences)
"""

from __future__ import annotations

import logging
from types import NoneType
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loglinear.fenwick import chunk_height
from loglinear.ops import autocast, chunked, reference, step
from loglinear.ops.packing import check_packing
from loglinear.state import FenwickState
from loglinear.window import Window

try:
    from loglinear.ops.triton import delta, scalar
    from loglinear.ops.triton import step as kernel_step
    from loglinear.ops.triton import window_step as kernel_window_step
except ModuleNotFoundError as missing:
    if missing.name is None or missing.name.split(".")[0] != "triton":
        raise
    delta = scalar = kernel_step = kernel_window_step = None  # Triton is not installed

logger = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "torch", "triton"]
BACKENDS = ("auto", "reference", "torch", "triton")
StepBackend = Literal["auto", "torch", "triton"]
STEP_BACKENDS = ("auto", "torch", "triton")
FLOAT_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def log_linear_attention(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    level_scales: Float[Tensor, "B T H L"] | None = None,
    *,
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None = None,
    beta: Float[Tensor, "B T H"] | None = None,
    scale: float = 1.0,
    cu_seqlens: Int[Tensor, " S+1"] | None = None,
    initial_state: FenwickState | None = None,
    return_state: bool = False,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "B T H V"], FenwickState | None]:
    """Log-linear attention for the whole family of linear mixers (arXiv 2506.04761).

    Every token writes into a state of its own; states merge along a Fenwick tree as they age, so that token t finds
    about log2(t) of them, and reads each with a scale of its own:
    o_t = Σ_level level_scales[t, level] · S_t[level]ᵀ (scale · q_t).

    ============================  ====================  ========  ==============================  ================
    mixer                         ``log_decay`` g       ``beta``  transition of every state       written at t
    ============================  ====================  ========  ==============================  ================
    linear attention              None                  None      I                               k vᵀ
    RetNet, Mamba-2 (v times dt)  [B, T, H]             None      e^g I                           k vᵀ
    GLA                           [B, T, H, K]          None      diag(e^g)                       k vᵀ
    DeltaNet                      None                  given     I − β k kᵀ                      β k vᵀ
    Gated DeltaNet                [B, T, H]             given     e^g (I − β k kᵀ)                β k vᵀ
    Kimi Delta Attention (KDA)    [B, T, H, K]          given     (I − β k kᵀ) diag(e^g)          β k vᵀ
    ============================  ====================  ========  ==============================  ================

    Args:
        q: queries [B, T, G, K]. Head h uses group h // (H / G).
        k: keys [B, T, G, K]. The delta rule expects keys of norm about 1 (normalised by the caller).
        v: values [B, T, H, V]. q, k and v have one dtype: float64, float32, bfloat16 or float16.
        level_scales: λ [B, T, H, L], any sign; L - 1 is the level that holds everything older than the first L - 1
            levels do, so any L ≥ 1 works at any length (`fenwick.full_num_levels(T)` levels make the partition
            full). None: one level with λ = 1, which is the plain linear mixer.
        log_decay: natural log of the decay, ≤ 0, per head [B, T, H] or per channel [B, T, H, K]. Any float dtype.
        beta: write strength of the delta rule [B, T, H]; up to 2 allows negative eigenvalues. Any float dtype.
        scale: multiplies q.
        cu_seqlens: [S + 1] int32 or int64, 0 = first ≤ … ≤ last = T: packed sequences, each with a partition of its
            own (then B == 1). Sequences may be empty.
        initial_state: what the first token of each sequence finds (`FenwickState` of S rows); gradients flow into its
            buckets. Buckets that are not occupied at the row's position are not read. Pending decays are applied
            first, and windows come to their end.
        return_state: whether to return the state after the last token.
        backend: "reference" (recurrence over tokens, a specification), "torch" (the tree algorithm in O(T log T) time
            and O(T) memory, on any device), "triton" (kernels for CUDA devices), or "auto" (the fastest that is
            available). What no kernel covers yet (a decay per channel, the delta rule with keys wider than 256, states
            of more than 32 levels, float64, empty batches) goes to the torch backend by itself; the log says so at
            debug level.

    Returns:
        o [B, T, H, V] in v's dtype, and the new state (None unless `return_state`).

    Raises:
        TypeError: an argument is no tensor, or of a dtype that is not supported.
        ValueError: a shape, device, `cu_seqlens`, state or backend that does not fit.
        RuntimeError: backend="triton" where no kernel can run.

    The host reads the values of `cu_seqlens` and of a state's positions when it first sees a tensor, or when that was
    written to since; while a CUDA graph is captured the device checks them instead, and stops with a message.

    Under autocast q, k and v are cast to its dtype. The reference and the torch backend compute in float32 (float64 for
    float64 inputs); the torch backend sums decays in float64, those per channel beside 16-bit values in float32. The
    kernels multiply 16-bit operands and store states in 16 bits for bfloat16, multiply float16 as tf32 and float32 as
    torch is told to (`torch.backends.cuda.matmul.fp32_precision`: "ieee" or "tf32"; if nothing, as three products of
    tf32 parts, off by 2^-21, of which infinities make NaN), and always accumulate in float32; but chunks of the
    delta rule are inverted in float64 where inputs are float16 or float32.

    Example:
        >>> import torch
        >>> from loglinear import log_linear_attention
        >>> q, k = torch.randn(2, 1, 100, 2, 16).unbind(0)
        >>> v, level_scales = torch.randn(1, 100, 4, 32), torch.rand(1, 100, 4, 8)
        >>> o, state = log_linear_attention(q, k, v, level_scales, log_decay=-torch.rand(1, 100, 4), return_state=True)
        >>> o.shape, state.positions.tolist()
        (torch.Size([1, 100, 4, 32]), [100])
    """
    q, k, v = autocast.cast(q, k, v)
    _check_tensors(q, k, v, level_scales, log_decay, beta, tokens="B, T, ")
    _check_scale(scale)
    _check_packing(q, cu_seqlens)
    num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _check_state(q, v, level_scales, initial_state, num_sequences)
    if initial_state is not None and (initial_state.log_decays is not None or initial_state.window is not None):
        widest = torch.promote_types(initial_state.buckets.dtype, torch.float32)
        initial_state = initial_state.to(dtype=widest).settled()
    carried = initial_state is not None or return_state
    run = _choose(backend, q, v, level_scales, log_decay, beta, cu_seqlens, carried)
    with autocast.turned_off(q):
        o, buckets, positions = run(
            q, k, v, level_scales, log_decay=log_decay, beta=beta, scale=float(scale), cu_seqlens=cu_seqlens,
            initial_state=initial_state, return_state=return_state,
        )  # fmt: skip
    if not return_state or buckets is None or positions is None:
        return o, None
    return o, FenwickState(buckets, positions)


def log_linear_attention_step(
    q: Float[Tensor, "B G K"],
    k: Float[Tensor, "B G K"],
    v: Float[Tensor, "B H V"],
    level_scales: Float[Tensor, "B H L"] | None,
    state: FenwickState,
    *,
    log_decay: Float[Tensor, "B H"] | Float[Tensor, "B H K"] | None = None,
    beta: Float[Tensor, "B H"] | None = None,
    scale: float = 1.0,
    backend: StepBackend = "auto",
) -> Float[Tensor, "B H V"]:
    """One token of `log_linear_attention`; `state` is updated in place.

    Rows may be at different positions. Nothing is read back by the host, so a step can be captured in a CUDA graph.
    For inference: where gradients are needed, call `log_linear_attention` on one token.

    The kernel reads the occupied buckets only. With one decay per head (or none, and no beta) it writes only the one
    that takes in others, if the state has room for pending decays (`state.with_pending()`); else, and for the other
    mixers, it writes all that it reads. If the state has a window (`state.with_window(...)`), it writes buckets only at
    the window's end, whatever the mixer; that kernel has not been timed on a GPU yet.

    Args:
        q, k: [B, G, K]. v: [B, H, V]. level_scales: [B, H, L] or None. log_decay: [B, H] or [B, H, K]. beta: [B, H].
        state: what this token finds; afterwards, what the next one finds. Its L is that of `level_scales` (1 for None).
            Its positions are at least 0 (and below 2^48 in the kernel). Buckets that are not occupied are zero, or, if
            the state has pending decays, finite with none pending for them; beside a window they may be anything. So it
            is with every state that this library makes; it is not checked, for the host would have to wait for the
            device.
        scale: multiplies q.
        backend: "torch" (any device), "triton" (one kernel, for CUDA devices) or "auto" (the kernel on CUDA devices,
            torch elsewhere). What the kernel does not cover (float64, more than 63 levels, keys wider than 512, a
            state that is not contiguous, windows of more than 64 tokens) goes to torch by itself; the log says so at
            debug level.

    Returns:
        o [B, H, V] in v's dtype.

    Raises:
        TypeError, ValueError: as `log_linear_attention`; also for a window that was begun for another kind of mixer.
        RuntimeError: gradients are enabled and an argument requires them, or backend="triton" where no kernel can run.

    Example:
        >>> import torch
        >>> from loglinear import FenwickState, log_linear_attention_step
        >>> state = FenwickState.zeros(batch=1, num_levels=8, num_heads=4, key_dim=16, value_dim=32)
        >>> q, k = torch.randn(2, 1, 4, 16).unbind(0)
        >>> o = log_linear_attention_step(q, k, torch.randn(1, 4, 32), torch.rand(1, 4, 8), state)
        >>> o.shape, state.positions.tolist()
        (torch.Size([1, 4, 32]), [1])
    """
    q, k, v = autocast.cast(q, k, v)
    _check_tensors(q, k, v, level_scales, log_decay, beta, tokens="B, ")
    _check_scale(scale)
    _check_state(q, v, level_scales, state, q.shape[0], required=True)
    _check_window(q, log_decay, beta, state)
    _check_writable(state)
    if torch.is_grad_enabled():
        arguments = (q, k, v, level_scales, log_decay, beta, state.buckets)
        if any(x is not None and x.requires_grad for x in arguments):
            raise RuntimeError(
                "log_linear_attention_step updates its state in place and has no gradient, but an argument requires "
                "one; wrap the call in torch.no_grad(), or call log_linear_attention on one token"
            )
    run = _choose_step(backend, q, v, level_scales, log_decay, beta, state)
    with torch.no_grad(), autocast.turned_off(q):
        return run(q, k, v, level_scales, state, log_decay, beta, float(scale))


# ----------------------------------------------------------------------------------------------------
# Backends
# ----------------------------------------------------------------------------------------------------


def _choose(backend: str, q, v, level_scales, log_decay, beta, cu_seqlens, carried: bool):
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "reference":
        return reference.log_linear_attention_recurrent
    if backend == "torch" or (backend == "auto" and q.device.type != "cuda"):
        return chunked.log_linear_attention_chunked
    if not _has_kernels(backend, q):
        return chunked.log_linear_attention_chunked
    assert scalar is not None and delta is not None
    if beta is None:
        num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        missing = scalar.unsupported(q, v, level_scales, log_decay, num_sequences, carried)
        run = scalar.log_linear_attention_scalar
    else:
        missing = delta.unsupported(q, v, level_scales, log_decay, carried)
        run = delta.log_linear_attention_delta
    if missing is not None:
        logger.debug("no Triton kernel for %s: the torch backend takes this call", missing)
        return chunked.log_linear_attention_chunked
    return run


def _choose_step(backend: str, q, v, level_scales, log_decay, beta, state: FenwickState):
    if backend not in STEP_BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, STEP_BACKENDS))}, got {backend!r}")
    plain = step.step if state.window is None else step.window_step
    if backend == "torch" or (backend == "auto" and q.device.type != "cuda"):
        return plain
    if not _has_kernels(backend, q):
        return plain
    assert kernel_step is not None and kernel_window_step is not None
    kernel = kernel_step if state.window is None else kernel_window_step
    missing = kernel.unsupported(q, v, level_scales, log_decay, beta, state)
    if missing is not None:
        logger.debug("no Triton kernel for %s: torch takes this step", missing)
        return plain
    return kernel.step


def _has_kernels(backend: str, q: Tensor) -> bool:
    """Whether kernels can run; refuses a backend that asks for them where they cannot."""
    if scalar is not None and (q.device.type == "cuda" or scalar.INTERPRETED):
        return True
    if backend == "auto":
        return False
    why = "triton is not installed" if scalar is None else f"the tensors are on {q.device}"
    raise RuntimeError(f"backend='triton' needs CUDA tensors and Triton, but {why}; use backend='auto' or 'torch'")


# ----------------------------------------------------------------------------------------------------
# Checks
# ----------------------------------------------------------------------------------------------------


def _check_scale(scale: float) -> None:
    if not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def _check_tensors(q, k, v, level_scales, log_decay, beta, tokens: str) -> None:
    optional = {"level_scales": level_scales, "log_decay": log_decay, "beta": beta}
    named = {"q": q, "k": k, "v": v} | {name: x for name, x in optional.items() if x is not None}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in FLOAT_TYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    for name, x in named.items():
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}: all arguments must be on one device")

    leading = 1 + tokens.count(",")  # dimensions before the head's: B, T or B, counted with the head's own
    for name, x, axes in (("q", q, "G, K"), ("k", k, "G, K"), ("v", v, "H, V")):
        if x.ndim != leading + 1:
            raise ValueError(f"{name} must be [{tokens}{axes}], got shape {_shape(x)}")
    if k.shape != q.shape:
        raise ValueError(f"q and k must have one shape [{tokens}G, K], got {_shape(q)} and {_shape(k)}")
    outer, (groups, key_dim), (heads, value_dim) = q.shape[:-2], q.shape[-2:], v.shape[-2:]
    if v.shape[:-2] != outer:
        raise ValueError(f"v must be [{tokens}H, V] with the leading sizes {list(outer)} of q, got {_shape(v)}")
    if tokens == "B, T, " and outer[1] < 1:
        raise ValueError(f"q must hold at least one token, got shape {_shape(q)}")
    for name, size in (("G", groups), ("K", key_dim), ("H", heads), ("V", value_dim)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got q {_shape(q)} and v {_shape(v)}")
    if heads % groups:
        raise ValueError(f"the number of groups must divide the number of heads, got G = {groups} and H = {heads}")
    by_head = (*outer, heads)
    if level_scales is not None and (level_scales.shape[:-1] != by_head or level_scales.shape[-1] < 1):
        raise ValueError(
            f"level_scales must be [{tokens}H, L] = {list(by_head)} + [L ≥ 1], got shape {_shape(level_scales)}"
        )
    if log_decay is not None and log_decay.shape not in (by_head, (*by_head, key_dim)):
        raise ValueError(f"log_decay must be [{tokens}H] = {list(by_head)} or [{tokens}H, K] = "
                         f"{[*by_head, key_dim]}, got shape {_shape(log_decay)}")  # fmt: skip
    if beta is not None and beta.shape != by_head:
        raise ValueError(f"beta must be [{tokens}H] = {list(by_head)}, got shape {_shape(beta)}")


def _check_packing(q: Tensor, cu_seqlens: Tensor | None) -> None:
    """Shape and dtype; the values are checked by the backend, which needs them on the host (`sequence_bounds`)."""
    if cu_seqlens is None:
        return
    check_packing(cu_seqlens)
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, q on {q.device}: all arguments must be on one device")
    if q.shape[0] != 1:
        raise ValueError(f"packed sequences (cu_seqlens) need a batch of 1, got {q.shape[0]}")


def _check_writable(state: FenwickState) -> None:
    """A step writes into its state."""
    for name, x in state.named_tensors():
        if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
            raise ValueError(f"the state's {name} are updated in place, but several entries share memory (strides "
                             f"{x.stride()} for shape {_shape(x)}): clone the state")  # fmt: skip
        if torch.compiler.is_compiling():  # which knows no inference tensors
            continue
        if x.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"the state's {name} were made in inference mode and cannot be updated outside of it: "
                             "clone the state")  # fmt: skip


def _check_state(q, v, level_scales, state, rows: int, required: bool = False) -> None:
    if state is None and not required:
        return
    if not isinstance(state, FenwickState):
        raise TypeError(f"the state must be a FenwickState, got {type(state).__name__}")
    if not isinstance(state.window, (Window, NoneType)):
        raise TypeError(f"the state's window must be a Window or None, got {type(state.window).__name__}")
    for name, x in [("buckets", state.buckets), ("positions", state.positions), *state.named_tensors()]:
        if not isinstance(x, Tensor):
            raise TypeError(f"the state's {name} must be a tensor, got {type(x).__name__}")
        if x.layout != torch.strided:
            raise TypeError(f"the state's {name} must be a dense tensor, got layout {x.layout}")
    num_levels = 1 if level_scales is None else level_scales.shape[-1]
    wanted = (rows, num_levels, v.shape[-2], q.shape[-1], v.shape[-1])
    if state.buckets.shape != wanted:
        raise ValueError(
            f"the state's buckets must be [rows, L, H, K, V] = {list(wanted)}, got {_shape(state.buckets)}"
        )
    if state.buckets.dtype not in FLOAT_TYPES:
        raise TypeError(f"the state's buckets must be floating point, got {state.buckets.dtype}")
    if state.positions.dtype != torch.int64:
        raise TypeError(f"the state's positions must be int64, got {state.positions.dtype}")
    if state.positions.shape != (rows,):
        raise ValueError(f"the state's positions must be [rows] = [{rows}], got {_shape(state.positions)}")
    if state.log_decays is not None:
        if state.log_decays.dtype != torch.float32:
            raise TypeError(f"the state's log_decays must be float32, got {state.log_decays.dtype}")
        if state.log_decays.shape != wanted[:3]:
            raise ValueError(
                f"the state's log_decays must be [rows, L, H] = {list(wanted[:3])}, got {_shape(state.log_decays)}"
            )
        if state.window is not None:
            raise ValueError("the state has pending decays and a window, wanted one of them at most")
    if state.window is not None:
        _check_window_tensors(state, state.window)
    for name, x in state.named_tensors():
        if x.device != q.device:
            raise ValueError(f"the state's {name} are on {x.device}, q on {q.device}: all must be on one device")


def _check_window_tensors(state: FenwickState, window: Window) -> None:
    """Shapes and dtypes of a window, among themselves and with the state that it is in."""
    rows, num_levels, heads, key_dim, value_dim = state.buckets.shape
    if window.keys.ndim != 4 or heads % max(1, window.keys.shape[1]):
        raise ValueError(f"the window's keys must be [rows, G, N, K], got {_shape(window.keys)}")
    groups, length = window.keys.shape[1:3]
    chunk_height(length, "a window")
    by_channel = window.log_decays is not None and window.log_decays.ndim == 4
    wanted = {
        "begun": (rows,),
        "keys": (rows, groups, length, key_dim),
        "values": (rows, heads, length, value_dim),
        "log_decays": (rows, heads, length, key_dim) if by_channel else (rows, heads, length),
        "mixing": (rows, heads, length, length),
        "owed": (rows, 2, heads, num_levels),
    }
    if (window.owed is None) != (window.log_decays is None or by_channel):
        raise ValueError("the window must say what buckets are owed if it has a decay per head, and only then")
    for name, x in window.named_tensors():
        if x.shape != wanted[name]:
            raise ValueError(f"the window's {name} must be {list(wanted[name])}, got {_shape(x)}")
        if x.dtype not in ((torch.int64,) if name == "begun" else (torch.float32, torch.float64)):
            raise TypeError(f"the window's {name} must be {'int64' if name == 'begun' else 'float32 or float64'}, got "
                            f"{x.dtype}")  # fmt: skip


def _check_window(q: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: FenwickState) -> None:
    """A step adds its token to the window, which has room for tokens of one kind."""
    window = state.window
    if window is None:
        return
    if window.keys.shape[1] != q.shape[1]:
        raise ValueError(f"the state's window is for {window.keys.shape[1]} groups of keys, but q and k have "
                         f"{q.shape[1]}")  # fmt: skip
    kinds = {None: "no decay", 2: "a decay per head", 3: "a decay per channel"}
    mine = kinds[None if window.log_decays is None else window.log_decays.ndim - 1]
    given = kinds[None if log_decay is None else log_decay.ndim]
    if mine != given:
        raise ValueError(f"the state's window is for tokens with {mine}, got {given}")
    if (window.mixing is None) != (beta is None):
        kept, got = ("without" if x is None else "with" for x in (window.mixing, beta))
        raise ValueError(f"the state's window is for tokens {kept} a beta, got one {got}")
