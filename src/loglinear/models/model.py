"""One model with a mixer slot: pre-norm blocks of a mixer and a SwiGLU MLP, and the language model head.

    B rows · T tokens · N packed tokens · S packed sequences · M model width

A padded batch is packed at the door (its padding dropped) and unpacked at the exit, so that every layer sees
whole sequences only, each with its own positions; what a row gives does not depend on the rows beside it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from loglinear.layers import MIXERS, Attention, RMSNorm, fused
from loglinear.layers.packing import PackedLayout, PaddedBatch, pack_padded, token_positions
from loglinear.models.cache import MixerCacheLayer, cache_layers, new_cache
from loglinear.models.config import LogLinearConfig
from loglinear.models.cost import Cost
from loglinear.models.decoding import decode_call
from loglinear.models.optim import parameter_groups
from loglinear.ops.packing import unchanging_bounds

IGNORED_LABEL = -100


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer, 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        opened = fused.silu_product(gate, up) if fused.covers(gate, up) else F.silu(gate) * up
        return self.down_proj(opened)


class LogLinearBlock(GradientCheckpointingLayer):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: LogLinearConfig, layer_idx: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = MIXERS[config.mixers[layer_idx]](config, layer_idx)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        if config.rescale_residual_init:
            # Read by `_init_weights`, which is called for modules with parameters of their own only.
            for writer in (self.mixer.out_proj, self.mlp.down_proj):
                writer.init_scale = (2 * config.num_hidden_layers) ** -0.5

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        layout: PackedLayout | None = None,
        past_key_values: MixerCacheLayer | None = None,
        columns: int = 0,
    ) -> Tensor:
        """`x [B, T, M]` (`[1, N, M]` packed) to the same; the state in `past_key_values` moves on by
        `columns` columns of the batch."""
        state, extra = None, {}
        if isinstance(self.mixer, Attention):
            extra["layout"] = layout
        if past_key_values is not None:
            rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            state = past_key_values.starting_state(self.mixer, rows, x)
        mixed, state = self.mixer(
            self.mixer_norm(x),
            state,
            cu_seqlens=cu_seqlens,
            return_state=past_key_values is not None,
            **extra,
        )
        if past_key_values is not None:
            past_key_values.record(state, columns)
        x, normed = self.mlp_norm.of_sum(x, mixed)
        return x + self.mlp(normed)


class LogLinearPreTrainedModel(PreTrainedModel):
    """What transformers has to know about our models."""

    config_class = LogLinearConfig
    config: LogLinearConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # the Trainer then passes num_items_in_batch
    _no_split_modules = ["LogLinearBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True  # no rollback: assisted decoding is refused
    _can_compile_fullgraph = True
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "time_step", "level_scales.weight"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            scale = getattr(module, "init_scale", 1.0)
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range * scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]


class LogLinearModel(LogLinearPreTrainedModel):
    """Embedding, blocks and a final norm: token ids in, hidden states out."""

    def __init__(self, config: LogLinearConfig) -> None:
        super().__init__(config)
        config.check_state_options()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LogLinearBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states of `input_ids [B, T]`.

        Args:
            input_ids: `[B, T]` int64; or give `inputs_embeds [B, T, M]`.
            attention_mask: `[B, S]` with S >= T, nonzero at real tokens; its last T columns are those of this
                call, and earlier ones are not needed (the state knows every row's own position). The real
                tokens of a row must be contiguous within the call. Or a dict of such masks by layer type. A
                mask costs one device sync per call; without padding, leave it out to avoid it.
            past_key_values: state to go on from, `DynamicCache(config=model.config)` or a `StaticCache`; it
                is updated in place.
            inputs_embeds: see input_ids.
            use_cache: whether to return a state when none was given. Default: `config.use_cache`, but never
                in training.
            cu_seqlens: `[S+1]` int32 or int64 bounds of sequences packed into one row (then B is 1): each is
                read on its own. It is read back to the host.
            output_hidden_states: whether to return the input of every block and the final output.
            return_dict: False for a tuple.

        Returns:
            last_hidden_state `[B, T, M]`: at padding behind a row's tokens, the hidden state of its last real
            token, read in this call or an earlier one (so the last column is each row's newest one); at padding
            before them, zeros.
            past_key_values as asked for. hidden_states too; those of the blocks are zeros at padding before the
            tokens of this call.

        Raises:
            ValueError, TypeError: inputs that contradict each other, a mask with holes, a cache of another
            model or batch, more tokens than a static cache has room for (not checked when compiled).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.ndim != 3 or x.shape[1] < 1:
            given = tuple(x.shape if input_ids is None else input_ids.shape)
            wanted = "[B, T, M] inputs_embeds" if input_ids is None else "[B, T] input_ids"
            raise ValueError(f"{wanted} with T >= 1 wanted, got shape {given}")
        batch, columns = x.shape[:2]
        if past_key_values is None and self._wants_cache(use_cache):
            past_key_values = new_cache(self.config)
        states = None if past_key_values is None else cache_layers(past_key_values, self.config)
        padded = self._padding(attention_mask, cu_seqlens, batch, columns)
        if padded is not None:
            cu_seqlens, x = padded.cu_seqlens, padded.pack(x)
        layout = None
        attends = any(isinstance(block.mixer, Attention) for block in self.layers)
        if cu_seqlens is not None and (attends or not torch.compiler.is_compiling()):
            layout = PackedLayout(cu_seqlens, x.shape[1])  # also checks it
        rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if states is not None:
            for cache_layer in states:
                cache_layer.check_rows(rows)
            if not torch.compiler.is_compiling():  # what the host counts would be compiled in
                if cu_seqlens is None or layout is None:
                    self.check_room(states, columns, columns)
                else:
                    self.check_room(states, cu_seqlens.diff(), max(layout.lengths))
        collected: list[Tensor] = []
        with contextlib.nullcontext() if torch.compiler.is_compiling() else unchanging_bounds():
            for index, block in enumerate(self.layers):
                if output_hidden_states:
                    collected.append(x)
                cache_layer = None if states is None else states[index]
                if x.shape[1] == 0:  # a call of nothing but padding
                    if cache_layer is not None:
                        cache_layer.advance(columns)
                    continue
                x = block(x, cu_seqlens=cu_seqlens, layout=layout, past_key_values=cache_layer, columns=columns)
        x = self.norm(x)
        if padded is not None:
            collected = [padded.unpack(hidden) for hidden in collected]
            x = padded.unpack(x, None if states is None else states[-1].output_before(rows, x))
        collected.append(x)
        if states is not None:
            newest = x[:, -1]
            if padded is None and cu_seqlens is not None:  # packed by the caller
                last = (cu_seqlens[1:].to(torch.int64) - 1).clamp_min(0)
                before = states[-1].output_before(rows, x)
                newest = torch.where(cu_seqlens.diff().gt(0)[:, None], x[0, last], before)
            states[-1].record_output(newest)
        output = BaseModelOutputWithPast(
            last_hidden_state=collected[-1],
            past_key_values=past_key_values,
            hidden_states=tuple(collected) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def compile_blocks(self) -> None:
        """Put every block through `torch.compile`. Blocks of a kind share one graph, so that the first step takes
        seconds and not minutes; names of parameters stay as they are.
        """
        for block in self.layers:
            block.compile()

    def check_room(self, states: list[MixerCacheLayer], counts: Tensor | int, most: int) -> None:
        """Refuses tokens that a static cache has no room for: `counts` (`[B]`, or one number for all rows), at most
        `most` in a row. Only attention layers can be full, and all of them hold the same tokens.

        Raises:
            ValueError: they do not fit.
        """
        for block, cache_layer in zip(self.layers, states, strict=True):
            if isinstance(block.mixer, Attention):
                cache_layer.check_room(counts, most)
                return

    def _wants_cache(self, use_cache: bool | None) -> bool:
        if self.training and (self.gradient_checkpointing or use_cache is None):
            return False
        return self.config.use_cache if use_cache is None else use_cache

    def _padding(
        self,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        cu_seqlens: Tensor | None,
        batch: int,
        columns: int,
    ) -> PaddedBatch | None:
        """The packed form of a padded batch; None when there is no padding or the caller has packed it."""
        mask = attention_mask
        if isinstance(mask, dict):
            mask = next((value for value in mask.values() if value is not None), None)
        if cu_seqlens is not None:
            if mask is not None:
                raise ValueError("give attention_mask (a padded batch) or cu_seqlens (a packed one), not both")
            if batch != 1:
                raise ValueError(f"a packed batch has one row, but cu_seqlens came with {batch} rows")
            return None
        if mask is None:
            return None
        if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < columns:
            raise ValueError(f"attention_mask must be [{batch}, at least {columns}], got {tuple(mask.shape)}")
        return pack_padded(mask[:, mask.shape[1] - columns :])


class LogLinearForCausalLM(LogLinearPreTrainedModel, GenerationMixin):
    """`LogLinearModel` with a language model head, for training and for `generate`.

    Example:
        >>> import torch
        >>> from loglinear import LogLinearConfig, LogLinearForCausalLM
        >>> model = LogLinearForCausalLM(LogLinearConfig.preset("tiny-gated-deltanet")).eval()
        >>> prompt = torch.tensor([[1, 2, 3]])
        >>> model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LogLinearConfig) -> None:
        super().__init__(config)
        self.model = LogLinearModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of the next token after each token of `input_ids [B, T]`; see `LogLinearModel.forward` for
        the other inputs.

        Args:
            labels: `[B, T]`, the ids themselves (they are shifted here), -100 where nothing is to be
                predicted. Padding, and the first token of each row and packed sequence, are never predicted. Where
                nothing is left to predict, the loss is NaN, as that of other models of transformers.
            logits_to_keep: how many of the last columns to compute logits for (0: all), or `[P]` indices of
                columns.
            num_items_in_batch: what to divide the summed loss by (gradient accumulation); default: the
                predicted tokens.

        Returns:
            loss (with labels), logits `[B, T or fewer, vocab_size]`, past_key_values, hidden_states as asked
            for.

        Raises:
            ValueError: as `LogLinearModel.forward`; labels of another shape, or together with logits_to_keep; a
                negative logits_to_keep.
        """
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(
                f"logits_to_keep: got {logits_to_keep}, wanted a number of columns (0: all) or their indices"
            )
        whole = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None and not whole:
            raise ValueError("labels need the logits of every column: leave logits_to_keep out")
        if use_cache is None and labels is not None:
            use_cache = False  # a loss is asked for, not a state
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states,
        )
        hidden = outputs.last_hidden_state
        if not whole:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden = hidden[:, kept]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                raise ValueError(f"labels must be {tuple(logits.shape[:2])} like the batch, got {tuple(labels.shape)}")
            labels = self._predictable(labels, attention_mask, cu_seqlens)
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return output.to_tuple() if return_dict is False else output

    @staticmethod
    def _predictable(labels: Tensor, attention_mask: Tensor | dict | None, cu_seqlens: Tensor | None) -> Tensor:
        """`labels` without those that would be predicted from another sequence or from padding."""
        if cu_seqlens is not None:
            positions = token_positions(1, labels.shape[1], None, cu_seqlens, labels.device)
            return labels.masked_fill(positions == 0, IGNORED_LABEL)
        if isinstance(attention_mask, dict):
            attention_mask = next((value for value in attention_mask.values() if value is not None), None)
        if attention_mask is None:
            return labels
        real = attention_mask[:, attention_mask.shape[1] - labels.shape[1] :].ne(0)
        previous = F.pad(real[:, :-1], (1, 0), value=True)
        return labels.masked_fill(torch.logical_not(torch.logical_and(real, previous)), IGNORED_LABEL)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one call by `generate`, without the mask where it calls for a token that it has just generated.

        So a decoding step has inputs of fixed shape and needs no device sync: the state knows where every row is.

        Raises:
            ValueError: a static cache has no room for the call's tokens. `forward` sees that too, but not where
                `generate` has compiled it.
        """
        columns = attention_mask.shape[1] if isinstance(attention_mask, Tensor) else None
        if next_sequence_length == 1 and not is_first_iteration:
            attention_mask = None
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]  (the protocol of `self` there fits no model)
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if inputs.get("past_key_values") is not None:
            self._check_room(inputs, columns)
        return inputs

    def _check_room(self, inputs: dict[str, Any], columns: int | None) -> None:
        """Refuses `inputs` that overfill a static cache, which has seen `columns` columns after them (None: unknown).
        No row can have more tokens than columns, so the device is read only where they are more than the cache has."""
        states = cache_layers(inputs["past_key_values"], self.config)
        capacity = states[0].max_cache_len
        if capacity is None or (columns is not None and columns <= capacity):
            return
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        new = (inputs["inputs_embeds"] if ids is None else ids).shape[1]
        if mask is None:
            self.model.check_room(states, new, new)
        else:
            counts = mask.ne(0).sum(1)
            self.model.check_room(states, counts, int(counts.max()))

    def get_compiled_call(self, compile_config: Any) -> Callable:
        """What `generate` calls for every token after the first where it decodes with a static cache on a GPU: a step
        that is recorded once and replayed (see `models.decoding`). With a `compile_config` of the caller's own it is
        `torch.compile`, as in other models.
        """
        if compile_config is not None:
            return super().get_compiled_call(compile_config)
        return functools.partial(decode_call, self)

    @staticmethod
    def create_masks_for_generate(
        config: LogLinearConfig, inputs_embeds: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor | None:
        """The mask that `generate` passes on: the padding mask, of this call's columns only."""
        if attention_mask is None:
            return None
        return attention_mask[:, attention_mask.shape[1] - inputs_embeds.shape[1] :]

    def _get_stopping_criteria(self, *arguments: Any, **options: Any) -> StoppingCriteriaList:
        """The library's, without its warning that more than `max_position_embeddings` tokens may fail: they cannot."""
        criteria = super()._get_stopping_criteria(*arguments, **options)  # type: ignore[misc]
        for one in criteria:
            if isinstance(one, MaxLengthCriteria):
                one.max_position_embeddings = None
        return criteria

    def _get_static_cache_init_shape(self) -> None:
        """Asked by `generate` in order to allocate keys and values beforehand: our layers make their own states."""
        return None

    def cost(
        self,
        length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Cost:
        """What this model costs at a context of `length` tokens, by default in bfloat16 on a GPU, wherever it is now:
        see `loglinear.models.cost.Cost`."""
        return self.config.cost(length, dtype, device)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups with and without weight decay, each parameter in exactly one: see
        `loglinear.models.optim`."""
        return parameter_groups(self, weight_decay)
