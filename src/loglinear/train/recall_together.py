"""Trainings on recall that are computed together: models of one shape, each with its own seed and learning rate.

    E models · R rows per step · T tokens · A answers to predict in a step · M model width · V vocabulary

A model for recall is so small that a GPU is hardly busy with it. E of them are one model whose weights have one more
dimension (`torch.func.vmap`), and the step of all is one CUDA graph. Nothing else is shared: each run has its own
sequences, gradient norm, optimiser and count of good steps, so that what it does is what it would do alone, but for
rounding; one that is not finite does not touch the others.

The weights of the runs' models are views of the stacked ones, and their gradients of the stacked gradients: between
steps every model is an ordinary one.

With `compile` in the configuration the forward and backward pass of all models go through `torch.compile` as a whole:
most of what a step does is to move elementwise results through memory, and the compiler fuses those. Where it cannot,
a warning says so and the pass is launched as it is.
"""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from loglinear.train.recall import Questions, RecallRun, answer_loss, capture

logger = logging.getLogger(__name__)

_BODY = "model."  # the model without its head
_TABLE = "embed_tokens.weight"
_PARTS = 32  # of the rows of a model, at most


class RunsTogether:
    """Several runs, step by step.

    Args:
        runs: at the same step; on one device, of models of one shape, on one task, with equal configurations but for
            seed and learning rate.

    Raises:
        ValueError: runs that cannot be computed together.
    """

    def __init__(self, runs: Sequence[RecallRun]):
        _check(runs)
        self.runs = list(runs)
        first = runs[0]
        self.device, self.dtype = first.device, first.dtype
        self.weights: dict[str, Tensor] = {}
        named = [dict(run.model.named_parameters()) for run in runs]
        for name in named[0]:
            own = [parameters[name] for parameters in named]
            weights = torch.stack([parameter.detach() for parameter in own])
            weights.grad = torch.zeros_like(weights)
            for parameter, weight, gradient in zip(own, weights, weights.grad, strict=True):
                parameter.data, parameter.grad = weight, gradient
            self.weights[name] = weights.requires_grad_()
        for run in runs:
            run.gradients = [weight.grad for weight in run.weights if weight.grad is not None]
        head = first.model.lm_head.weight
        self._head = next(name for name, parameter in named[0].items() if parameter is head)
        self._hidden = self._mapped = vmap(self._hidden_of)
        if first.config.compile:
            # Every instance is another model for the compiler, which would stop at the eighth in a process.
            torch.compiler.reset()
            self._hidden = torch.compile(self._mapped, dynamic=False)
        self._questions: list[Questions] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured = self.device.type != "cuda"
        # Answers that every step has room for, where shapes are fixed: runs of one seed have the same ones.
        self._most = max(run.most_answers for run in self._by_seed().values()) if first.fixed_shapes else None

    @property
    def step(self) -> int:
        return self.runs[0].step

    @property
    def how(self) -> str:
        """How a step runs: "graph" or "eager", after "compiled" where it is."""
        how = "eager" if self._graph is None else "graph"
        return how if self._hidden is self._mapped else f"compiled {how}"

    def _by_seed(self) -> dict[int, RecallRun]:
        return {run.config.seed: run for run in self.runs}

    def advance(self) -> None:
        """One optimiser step of every run."""
        by_seed = {
            seed: run.questions_of(self.step).with_room(self._most or 0) for seed, run in self._by_seed().items()
        }
        questions = [by_seed[run.config.seed] for run in self.runs]
        first = self._questions is None
        if self._questions is None or self._most is None:
            self._questions = [Questions(*(tensor.clone() for tensor in one)) for one in questions]
        else:
            for kept, new in zip(self._questions, questions, strict=True):
                torch._foreach_copy_(list(kept), list(new))
        if first:
            self._try_compiled()
        if not self._captured:
            self._captured = True
            self._graph = capture(self._pass, self._counters, self.device)
        if self._graph is None:
            self._pass()
        else:
            self._graph.replay()
        for run in self.runs:
            run.take()

    def _try_compiled(self) -> None:
        """Compiles, where that is wanted; goes on without where it cannot be done."""
        if self._hidden is self._mapped:
            return
        kept = [counter.clone() for counter in self._counters]
        try:
            self._pass()
        except Exception as error:  # of the compiler, of whatever kind
            reason = " ".join(str(error).split())[:300]
            logger.warning("the pass cannot be compiled, so it is launched as it is: %s", reason)
            self._hidden = self._mapped
        for counter, before in zip(self._counters, kept, strict=True):
            counter.copy_(before)

    @property
    def _counters(self) -> list[Tensor]:
        return [counter for run in self.runs for counter in run.counters]

    def _pass(self) -> None:
        """Forward and backward of all models. No host syncs."""
        assert self._questions is not None
        torch._foreach_zero_([weights.grad for weights in self.weights.values() if weights.grad is not None])
        inputs = torch.stack([questions.inputs for questions in self._questions])
        body = {name.removeprefix(_BODY): weights for name, weights in self.weights.items() if name.startswith(_BODY)}
        with (
            torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32),
            # fused attention is called for one model after the other (CPU), or refuses its own backward (CUDA)
            sdpa_kernel(SDPBackend.MATH),
        ):
            hidden = self._hidden(body, inputs)
        losses = [
            answer_loss(one.flatten(0, 1).index_select(0, questions.places), head, questions.answers, self.dtype)
            for one, head, questions in zip(hidden, self.weights[self._head], self._questions, strict=True)
        ]
        torch.stack(losses).sum().backward()
        for run, loss in zip(self.runs, losses, strict=True):
            run.judge(loss)

    def _hidden_of(self, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """`[R, T, M]` of one model's weights and sequences `[R, T]`.

        Computed in parts of the rows, each with its copy of the weights: the gradient of a matrix is a sum over all
        R · T tokens, and few programs of a GPU would each make it from end to end, while most of the GPU waits (11 of
        20 ms of a step of nine models at width 16). Not the table of tokens, which nothing is multiplied with.
        """
        parts = math.gcd(inputs.shape[0], _PARTS)
        copies = {name: weight.expand(parts, *weight.shape) for name, weight in weights.items() if name != _TABLE}
        dims = {name: None if name == _TABLE else 0 for name in weights}
        hidden = vmap(self._part_of, in_dims=(dims, 0))({**weights, **copies}, inputs.unflatten(0, (parts, -1)))
        return hidden.flatten(0, 1)

    def _part_of(self, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """`[R / parts, T, M]` of a part of the rows."""
        arguments = {"input_ids": inputs, "use_cache": False}
        return functional_call(self.runs[0].model.model, weights, kwargs=arguments).last_hidden_state


def _check(runs: Sequence[RecallRun]) -> None:
    if not runs:
        raise ValueError("runs together: got none, wanted at least one")
    first = runs[0]
    for run in runs:
        ours, theirs = (one.config.replace(seed=0, learning_rate=1.0) for one in (run, first))
        if ours != theirs or run.task != first.task:
            raise ValueError("runs together: got configurations that differ in more than seed and learning rate")
        if run.model.config.to_dict() != first.model.config.to_dict():
            raise ValueError("runs together: got models of different shapes, wanted one shape")
        if run.step != first.step:
            raise ValueError(f"runs together: got one at step {run.step} and one at {first.step}, wanted the same step")
        if (run.device, run.dtype) != (first.device, first.dtype):
            raise ValueError("runs together: got several devices or types, wanted one")
