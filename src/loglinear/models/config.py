"""One configuration for every model of the library."""

import difflib
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from loglinear.fenwick import chunk_height, full_num_levels
from loglinear.layers import MIXERS, Attention

if TYPE_CHECKING:
    import torch

    from loglinear.models.cost import Cost

CACHE_LAYER_TYPE = "loglinear_mixer"
STATE_DTYPES = ("float32", "bfloat16")

# Keys that transformers itself passes to every configuration, in code or from a saved config.json.
_FRAMEWORK_KEYS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation_internal",
        "_name_or_path",
        "_output_attentions",
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "layer_types",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "torch_dtype",
    }
)


def _plain_errors(cls: type) -> type:
    """Turns the validation errors of `@strict`, which are neither, into TypeError (fields) and ValueError
    (everything else)."""
    strict_init = cls.__init__

    @functools.wraps(strict_init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            strict_init(self, *args, **kwargs)
        except StrictDataclassError as error:
            kind = TypeError if isinstance(error.__cause__, TypeError) else ValueError
            raise kind(f"{cls.__name__}: {error.__cause__ or error}") from error

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


@_plain_errors
@strict
class LogLinearConfig(PreTrainedConfig):
    """Configuration of `LogLinearModel` and `LogLinearForCausalLM`.

    Sizes that are not given are derived and stored, so that a saved configuration says all of them. A size
    that the chosen mixer does not have, a contradiction, and an unknown key are refused.

    Args:
        mixer: one of `loglinear.layers.MIXERS`; "attention" makes a Transformer.
        vocab_size: number of token ids.
        hidden_size: width of the model.
        num_hidden_layers: number of blocks (a mixer and an MLP each).
        num_heads: heads of the mixer (for "attention": of the attention).
        head_dim: value width V of a head. Derived from `expand` or `expand_v`.
        state_size: key width K of a head, the other side of its matrix-valued state. Derived from the mixer's
            paper.
        num_groups: query/key groups G, a divisor of num_heads. Default: 1 for mamba2, else one per head.
        expand: mamba2 only, width of all heads over hidden_size (2).
        expand_v: V / K, for the other recurrent mixers.
        conv_size: taps of the short convolution; 0 for none. Default: that of the mixer's paper.
        num_levels: number of levels L. Default: the full partition of max_position_embeddings; 1 is the plain
            linear mixer without level parameters. Beyond `2^(L-1)` tokens the last level absorbs everything
            older.
        max_position_embeddings: the length that the model is meant for; nothing stops it from reading
            further.
        intermediate_size: width of the SwiGLU MLP. Default: 8/3 of hidden_size, rounded up to a multiple of
            64.
        attention_layers: indices of the blocks that use softmax attention instead of the mixer (hybrids).
        num_attention_heads, num_key_value_heads, attention_head_dim: of those attention layers (or of mixer
            "attention", whose num_attention_heads is num_heads). Default: heads of 64 channels if they divide
            hidden_size (else num_heads of them), ungrouped.
        rope_theta: base of the rotary positions of attention and retention.
        tie_word_embeddings: whether the output projection is the embedding.
        norm_eps: epsilon of every RMSNorm.
        initializer_range: standard deviation of projections and embeddings at the start.
        rescale_residual_init: divide it by sqrt(2 num_hidden_layers) for the projections that write into the
            residual stream.
        use_cache: whether a forward pass outside training returns its state.
        state_dtype: "float32" or "bfloat16", in which recurrent states are kept between calls. Default: bfloat16 for
            states of a full partition (see `full_partition`) that have a window (see `decoding_window`) in a bfloat16
            model, unless decays are per channel. A bucket is then written at most once in a window, is owed its decays,
            and merges with what is about as large: after 100,000 steps it errs by as much as one rounding to bfloat16
            (docs/math.md, section 12). float64 in a float64 model, float32 everywhere else: one level, and the last of
            too few, add ever smaller things to an ever larger sum. So does the last of a full partition from 128 times
            `max_position_embeddings` tokens on, if little decays; float32 is to be asked for there.
            Models that differ in this, or in the next, take each other's states, and give them their own form when they
            next read several tokens (not in a static cache, which keeps the form of its first state).
        decoding_window: a power of two N: decoding keeps the newest tokens, up to every multiple of N, as they are, and
            writes states only there (docs/math.md, section 11). 0: states are written at every token. Default: 16 for
            states on a GPU, 0 elsewhere.
        bos_token_id, eos_token_id, pad_token_id: special tokens.

    Raises:
        ValueError, TypeError: as above, with what was given and what is wanted.

    Example:
        >>> config = LogLinearConfig(mixer="mamba2", hidden_size=256, num_hidden_layers=4, num_heads=8)
        >>> config.head_dim, config.state_size, config.num_levels
        (64, 128, 15)
    """

    model_type = "loglinear"
    keys_to_ignore_at_inference = ["past_key_values"]

    mixer: str = "gated_deltanet"
    vocab_size: int = 32_000
    hidden_size: int = 1536
    num_hidden_layers: int = 21
    num_heads: int = 6
    head_dim: int | None = None
    state_size: int | None = None
    num_groups: int | None = None
    expand: int | float | None = None
    expand_v: int | float | None = None
    conv_size: int | None = None
    num_levels: int | None = None
    max_position_embeddings: int = 16_384
    intermediate_size: int | None = None
    attention_layers: list[int] | tuple[int, ...] = ()
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    attention_head_dim: int | None = None
    rope_theta: int | float = 10_000.0
    tie_word_embeddings: bool = False
    norm_eps: int | float = 1e-5
    initializer_range: int | float = 0.02
    rescale_residual_init: bool = False
    use_cache: bool = True
    state_dtype: str | None = None
    decoding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        kwargs.pop("layer_types", None)
        self._check_numbers()
        if self.mixer not in MIXERS:
            raise ValueError(
                f"mixer must be one of {', '.join(MIXERS)}, got {self.mixer!r}{_nearest(self.mixer, MIXERS)}"
            )
        self.attention_layers = sorted(self.attention_layers)
        self._derive_attention()
        self._derive_mixer()
        self.check_state_options()
        if self.intermediate_size is None:
            self.intermediate_size = 64 * math.ceil(self.hidden_size * 8 / 3 / 64)
        super().__post_init__(**kwargs)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names of the fields that a user may set."""
        return tuple(cls.__dataclass_fields__)

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        for key in kwargs:
            if key not in _FRAMEWORK_KEYS:
                raise ValueError(f"unknown configuration key {key!r}{_nearest(key, self.field_names())}")

    def _check_numbers(self) -> None:
        """Ranges of the plain fields; what depends on the mixer is checked where it is derived."""
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "head_dim", "state_size",
            "num_groups", "num_levels", "max_position_embeddings", "intermediate_size", "num_attention_heads",
            "num_key_value_heads", "attention_head_dim",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in ("expand", "expand_v", "rope_theta", "norm_eps", "initializer_range"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if self.conv_size is not None and (self.conv_size < 0 or self.conv_size == 1):
            raise ValueError(f"conv_size must be 0 (no convolution) or at least 2 taps, got {self.conv_size}")
        layers = list(self.attention_layers)
        outside = [index for index in layers if not 0 <= index < self.num_hidden_layers]
        if outside:
            raise ValueError(
                "attention_layers must be indices from 0 to num_hidden_layers - 1 = "
                f"{self.num_hidden_layers - 1}, got {outside}"
            )
        if len(set(layers)) != len(layers):
            raise ValueError(f"attention_layers must not repeat an index, got {layers}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name} must be in [0, vocab_size = {self.vocab_size}), got {token}")

    def _derive_attention(self) -> None:
        """Sizes of softmax attention, if the model has any."""
        sizes = ("num_attention_heads", "num_key_value_heads", "attention_head_dim")
        if self.mixer == "attention":
            if self.attention_layers:
                raise ValueError("mixer 'attention' uses softmax attention in every layer: leave attention_layers out")
            if self.num_attention_heads not in (None, self.num_heads):
                raise ValueError(
                    f"num_attention_heads {self.num_attention_heads} contradicts num_heads {self.num_heads}: "
                    "with mixer 'attention' give num_heads alone"
                )
            self.num_attention_heads = self.num_heads
        elif not self.attention_layers:
            given = [name for name in sizes if getattr(self, name) is not None]
            if given:
                raise ValueError(f"{given[0]} is a size of attention layers, but attention_layers is empty")
            return
        if self.num_attention_heads is None:
            self.num_attention_heads = self.num_heads if self.hidden_size % 64 else self.hidden_size // 64
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.attention_head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"num_attention_heads {self.num_attention_heads} does not divide hidden_size "
                    f"{self.hidden_size}: give attention_head_dim too"
                )
            self.attention_head_dim = self.hidden_size // self.num_attention_heads
        if self.attention_head_dim % 2:
            raise ValueError(f"attention_head_dim must be even for rotary positions, got {self.attention_head_dim}")

    def _derive_mixer(self) -> None:
        """Sizes of the recurrent mixer, from its own class."""
        mixer = MIXERS[self.mixer]
        if issubclass(mixer, Attention):
            names = ("head_dim", "state_size", "num_groups", "expand", "expand_v", "conv_size", "num_levels")
            for name in names:
                if getattr(self, name) is not None:
                    hint = "; give attention_head_dim" if name == "head_dim" else ""
                    raise ValueError(f"{name} is not a size of mixer 'attention', got {getattr(self, name)}{hint}")
            return
        if self.num_groups is not None and self.num_heads % self.num_groups:
            raise ValueError(f"num_groups {self.num_groups} does not divide num_heads {self.num_heads}")
        for name, value in mixer.sizes(self).items():
            setattr(self, name, value)
        if self.num_levels is None:
            self.num_levels = full_num_levels(self.max_position_embeddings)

    def check_state_options(self) -> None:
        """Refuses what the states of this model cannot be kept in. For models too: `from_pretrained` changes fields of
        a configuration after it was checked.

        Raises:
            ValueError: a `state_dtype` that is not one of two, a `decoding_window` that is neither 0 nor a power of
                two, or one of them for a model without recurrent states.
        """
        if self.state_dtype not in (None, *STATE_DTYPES):
            wanted = " or ".join(map(repr, STATE_DTYPES))
            raise ValueError(f"state_dtype must be {wanted}, got {self.state_dtype!r}")
        if self.decoding_window not in (None, 0):
            chunk_height(self.decoding_window, "decoding_window")
        for name in ("state_dtype", "decoding_window"):
            if self.mixer == "attention" and getattr(self, name) not in (None, 0):
                raise ValueError(f"{name} is of recurrent states, but mixer 'attention' has none: leave it out")

    def validate_layer_type(self) -> None:
        """Nothing to check: `layer_types` is derived."""

    @property
    def layer_types(self) -> list[str]:
        """The type of every layer's cache, as transformers asks for it."""
        return [CACHE_LAYER_TYPE] * self.num_hidden_layers

    @property
    def mixers(self) -> list[str]:
        """The mixer of every layer, attention layers of a hybrid included."""
        layers = range(self.num_hidden_layers)
        return ["attention" if layer in self.attention_layers else self.mixer for layer in layers]

    @property
    def full_partition(self) -> bool:
        """Whether there are several levels, and all that a sequence of `max_position_embeddings` tokens fills."""
        levels = self.num_levels or 1
        return levels > 1 and levels >= full_num_levels(self.max_position_embeddings)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "LogLinearConfig":
        """A named configuration, with any field overridden. See `presets()` for the names.

        Raises:
            ValueError: no preset has this name, or an override is not a field.

        Example:
            >>> LogLinearConfig.preset("log-linear-gated-deltanet-796m", num_hidden_layers=2).state_size
            192
        """
        from loglinear.models.presets import PRESETS

        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}{_nearest(name, PRESETS)}; the presets are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def presets(cls) -> list[str]:
        """Names of all presets."""
        from loglinear.models.presets import PRESETS

        return list(PRESETS)

    def cost(
        self,
        length: int | None = None,
        dtype: "torch.dtype | None" = None,
        device: "torch.device | str | None" = None,
    ) -> "Cost":
        """What a model of this configuration costs at a context of `length` tokens, by default in bfloat16 on a GPU:
        see `loglinear.models.cost.Cost`."""
        from loglinear.models.cost import cost

        return cost(self, length, dtype, device)


def _nearest(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    """`; did you mean 'x'?` for the known name nearest to `name`, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
