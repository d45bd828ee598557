"""Training on multi-query associative recall: a lean loop, for models so small that launching a step takes longer than
computing it.

    R rows per step · T tokens · P pairs, the most of any sequence · M model width · V vocabulary

    A answers to predict in a step

What a run is and leaves behind is as in `loglinear.train.trainer`: the same configuration, optimiser groups, schedule,
metrics, checkpoints and resuming. What differs is the way: sequences are made on the device, many steps' worth at a
time; logits are computed where there is an answer to predict, and nowhere else; the host waits for the device at
reports only. On a GPU the forward and backward pass are replayed as one CUDA graph where they can be captured.
Several runs of one shape can be computed together: `loglinear.train.recall_together`.

A step that is not finite is not taken, nor is any after it: the device keeps the weights of the last good step, and
the next report finds out.
"""

import functools
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from loglinear.data.recall import NO_ANSWER, RecallBatch, RecallTask, pairs_of, recall_batch, stream_seed
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.models.initialization import initialize_by_name
from loglinear.train.checkpoints import (
    COMPLETION_FILE,
    POSITION_FILE,
    checkpoint_step,
    choose_device,
    load_model,
    newest_checkpoint,
)
from loglinear.train.config import CONFIG_FILE, TrainConfig
from loglinear.train.reporting import METRICS_FILE, Clock, Display, Metrics, duration, quiet_transformers, read_metrics
from loglinear.train.resuming import check_model, starting_point, what_changes
from loglinear.train.schedule import schedule_of
from loglinear.train.trainer import SPECIAL_TOKENS, NonFiniteError, TrainResult, model_config, stop_on_signals

logger = logging.getLogger(__name__)

OPTIMIZER_FILE = "optimizer.pt"
# Sequences of the training stream that are made at a time. Part of what a run is: its parts have seeds of their own.
_PART = 1024
_TOKENS_AT_ONCE = 65_536  # in evaluation
_ANSWERS_AT_ONCE = 4096
_WARM_UP = 3  # passes before a graph is captured


def recall_task(config: TrainConfig) -> RecallTask:
    """The task of a configuration whose `task` is "mqar".

    Raises:
        ValueError, TypeError: options that are no task, see `RecallTask`.
    """
    return RecallTask.from_options(config.task_options, length=config.sequence_length)


def recall_model(config: TrainConfig, task: RecallTask) -> LogLinearConfig:
    """The model of a configuration, with the vocabulary and length of the task where the model options do not say
    otherwise, and without special tokens.
    """
    return model_config(config, task.vocabulary, dict.fromkeys(SPECIAL_TOKENS), "the task's")


def new_model(config: LogLinearConfig, seed: int) -> LogLinearForCausalLM:
    """A model whose initial weights depend on the seed and parameter names alone (see `initialize_by_name`)."""
    model = LogLinearForCausalLM(config)
    initialize_by_name(model, seed)
    return model


class Questions(NamedTuple):
    """What a step learns from: sequences, and the places in them where there is an answer to predict.

    Attributes:
        inputs: `[R, T]` int64.
        places: `[A]` int64, rows · T + position.
        answers: `[A]` int64; `NO_ANSWER` where there are fewer than A.
    """

    inputs: Tensor
    places: Tensor
    answers: Tensor

    def with_room(self, count: int) -> "Questions":
        """With so many places at least; those that are added have no answer."""
        missing = count - len(self.answers)
        if missing <= 0:
            return self
        places, answers = F.pad(self.places, (0, missing)), F.pad(self.answers, (0, missing), value=NO_ANSWER)
        return Questions(self.inputs, places, answers)


@dataclass(frozen=True)
class Progress:
    """What a run knows when it is asked: good steps done, and loss, gradient norm and learning rate since it was asked
    before. `finite` is False from the first step that was not.
    """

    steps: int
    loss: float
    gradient_norm: float
    finite: bool


class RecallRun:
    """One training, step by step.

    The sequences depend on the task, `config.seed` and `config.rows` alone: models that are trained with one seed see
    the same ones in the same order.

    Args:
        config: optimiser, schedule, rows per step and seed.
        task: what the sequences are.
        model: what is trained, of float32 weights; it is moved to the device.
        device, dtype: where to compute, and float32 or bfloat16 (autocast; the weights are float32).
    """

    def __init__(
        self,
        config: TrainConfig,
        task: RecallTask,
        model: LogLinearForCausalLM,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        assert config.steps is not None
        self.config, self.task, self.device, self.dtype = config, task, device, dtype
        self.model = model.train()
        torch.nn.Module.to(self.model, device)
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)
        self.gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        self.optimizer = torch.optim.AdamW(
            self.model.parameter_groups(config.weight_decay),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        self.factor = schedule_of(config, config.steps)
        self.step = 0
        # Shapes that a graph can be captured with: as many places for answers in each step.
        self.fixed_shapes = device.type == "cuda"
        self._part: tuple[int, RecallBatch] | None = None
        self._part_questions: tuple[int, list[Questions]] | None = None
        # Kept on the device: whether a step was not finite (as the fused optimiser asks for it: 1.0 skips), good steps,
        # and sums over them.
        self.broken = torch.zeros((), device=device)
        self.optimizer.found_inf = self.broken  # type: ignore[attr-defined]  (read by fused optimisers)
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._questions: Questions | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured = device.type != "cuda"

    @property
    def how(self) -> str:
        """How a step runs: "graph" or "eager"."""
        return "eager" if self._graph is None else "graph"

    def advance(self) -> None:
        """One optimiser step."""
        questions = self.questions_of(self.step)
        if self._questions is None and self.config.compile:
            self.model.model.compile_blocks()
        if self._questions is None or not self.fixed_shapes:
            self._questions = Questions(*(tensor.clone() for tensor in questions))
        else:
            for kept, new in zip(self._questions, questions, strict=True):
                kept.copy_(new)
        if not self._captured:
            self._capture()
        if self._graph is None:
            self._pass()
        else:
            self._graph.replay()
        self.take()

    def take(self) -> None:
        """Takes the step that the gradients say, at the rate of the schedule."""
        rate = self.config.learning_rate * self.factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1

    @property
    def _steps_per_part(self) -> int:
        return max(1, _PART // self.config.rows)

    def _task_of(self, part: int) -> RecallTask:
        """The task of a part of the sequences, which is that of its first step."""
        assert self.config.steps is not None
        return self.task.at(part * self._steps_per_part / self.config.steps)

    def _rows_of(self, step: int) -> RecallBatch:
        """The sequences of a step (from 0); they depend on nothing but the task, the seed, the number of rows and, if
        its numbers of pairs begin at different times, the number of steps."""
        rows, steps = self.config.rows, self._steps_per_part
        part, place = divmod(step, steps)
        if self._part is None or self._part[0] != part:
            seed = stream_seed("training", self.config.seed, part)
            self._part = part, recall_batch(self._task_of(part), steps * rows, seed, self.device)
        return self._part[1].rows(place * rows, (place + 1) * rows)

    def questions_of(self, step: int) -> Questions:
        """What a step (from 0) learns from: the answers of `_rows_of`, and no more places than are wanted."""
        part, place = divmod(step, self._steps_per_part)
        if self._part_questions is None or self._part_questions[0] != part:
            steps = range(part * self._steps_per_part, (part + 1) * self._steps_per_part)
            most = self.most_answers if self.fixed_shapes else None
            self._part_questions = part, [questions_of(self._rows_of(number), most) for number in steps]
        return self._part_questions[1][place]

    @functools.cached_property
    def most_answers(self) -> int:
        """The most answers that a step of this run has."""
        steps, most = self._steps_per_part, 1
        assert self.config.steps is not None
        for part in range(-(-self.config.steps // steps)):
            seed = stream_seed("training", self.config.seed, part)
            pairs = pairs_of(self._task_of(part), steps * self.config.rows, seed, self.device)
            most = max(most, int(pairs.view(steps, -1).sum(1).max()))
        return most

    def _pass(self) -> None:
        """Forward and backward, and what there is to say of them. No host syncs."""
        assert self._questions is not None
        inputs, places, answers = self._questions
        torch._foreach_zero_(self.gradients)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.model.model(input_ids=inputs, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, places)
        loss = answer_loss(hidden, self.model.lm_head.weight, answers, self.dtype)
        loss.backward()
        self.judge(loss)

    def judge(self, loss: Tensor) -> None:
        """Clips the gradients, and keeps what there is to say of a pass: whether it was finite above all."""
        clip = self.config.gradient_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.weights, clip, foreach=True)
        values = torch.stack([loss.detach(), norm.detach(), torch.ones_like(norm)]).double()
        finite = torch.isfinite(values).all()
        self.broken.copy_(torch.maximum(self.broken, 1.0 - finite.to(self.broken)))
        self._sums.add_(torch.where(self.broken.bool(), 0.0, values))

    @property
    def counters(self) -> list[Tensor]:
        """What `judge` keeps on the device."""
        return [self.broken, self._sums]

    def _capture(self) -> None:
        self._captured = True
        self._graph = capture(self._pass, self.counters, self.device)

    def progress(self, first_step: int = 0) -> Progress:
        """Waits for the device and says what happened since the last call; `first_step` is that of the last call."""
        loss, norm, steps = self._sums.tolist()
        finite = not self.broken.item()
        self._sums.zero_()
        good = int(steps)
        mean = (loss / good, norm / good) if good else (math.nan, math.nan)
        return Progress(first_step + good, *mean, finite)

    def save(self, folder: Path, step: int) -> None:
        """Writes a checkpoint. Its last file makes it whole."""
        folder.mkdir(parents=True, exist_ok=True)
        with quiet_transformers():
            self.model.save_pretrained(folder)
        torch.save(self.optimizer.state_dict(), folder / OPTIMIZER_FILE)
        self.config.save(folder / CONFIG_FILE)
        (folder / POSITION_FILE).write_text(json.dumps({"step": step} | self.machine))
        (folder / COMPLETION_FILE).write_text(json.dumps({"global_step": step}))

    def load(self, checkpoint: Path) -> None:
        """Takes the optimiser's state and the step of a checkpoint whose weights the model has."""
        state = torch.load(checkpoint / OPTIMIZER_FILE, map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(state)
        self.step = checkpoint_step(checkpoint) or 0

    def state(self) -> dict[str, Any]:
        """What the rest of the run depends on; asked for right after `progress`, when no sums are under way."""
        weights = [weight.detach() for weight in self.weights]
        return {"step": self.step, "weights": weights, "optimizer": self.optimizer.state_dict(), "broken": self.broken}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from the `state` of a run of this configuration, before a step is taken."""
        with torch.no_grad():
            for weight, kept in zip(self.weights, state["weights"], strict=True):
                weight.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])
        self.broken.copy_(state["broken"])
        self.step = state["step"]

    @property
    def machine(self) -> dict[str, str]:
        return {"device": self.device.type, "precision": "fp32" if self.dtype == torch.float32 else "bf16"}


def capture(run_pass: Callable[[], None], counters: list[Tensor], device: torch.device) -> torch.cuda.CUDAGraph | None:
    """A CUDA graph of a pass; None where it cannot be captured, so that steps are launched one operation at a time.

    Args:
        run_pass: reads and writes tensors at fixed places, without host syncs.
        counters: what it counts up, which is as before afterwards.
    """
    kept = [tensor.clone() for tensor in counters]
    outside, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run_pass()
    outside.wait_stream(stream)
    found: torch.cuda.CUDAGraph | None = graph
    try:
        with torch.cuda.graph(graph):
            run_pass()
    except RuntimeError as error:
        found = None
        torch.cuda.set_stream(outside)  # a capture that failed leaves its own
        torch.cuda.synchronize(device)
        # and random numbers that are still counted as the graph's
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        logger.warning("the step cannot be captured as a CUDA graph, so it is launched as it is: %s", error)
    for tensor, before in zip(counters, kept, strict=True):
        tensor.copy_(before)
    return found


def questions_of(batch: RecallBatch, most: int | None = None) -> Questions:
    """The answers of some sequences, in their order; with `most` as many places, the last of them without an answer."""
    answers = batch.answers.flatten()
    if most is None:
        chosen = (answers != NO_ANSWER).nonzero()[:, 0]
    else:
        chosen = (answers == NO_ANSWER).to(torch.uint8).argsort(stable=True)[:most]
    rows = torch.arange(len(batch.inputs), device=answers.device)[:, None] * batch.inputs.shape[1]
    return Questions(batch.inputs, (rows + batch.queries).flatten()[chosen], answers[chosen]).with_room(most or 0)


def answer_loss(hidden: Tensor, weight: Tensor, answers: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean cross-entropy of the answers that there are.

    Args:
        hidden: `[A, M]`.
        weight: `[V, M]`, of the head.
        answers: `[A]`; `NO_ANSWER` where there is none.
        dtype: of the products; logits are float32 then.
    """
    return _AnswerLoss.apply(hidden, weight, answers, dtype)


class _AnswerLoss(torch.autograd.Function):
    """Its own rule: logits are by far the largest tensors of a step, so their gradient is made in their place."""

    @staticmethod
    def forward(ctx, hidden, weight, answers, dtype):
        with torch.autocast(hidden.device.type, enabled=False):
            rows, head = hidden.to(dtype), weight.to(dtype)
            logits = rows @ head.T
            table = logits.to(torch.promote_types(dtype, torch.float32)).log_softmax(-1)
            del logits
            wanted = (answers != NO_ANSWER)[:, None]
            share = 1.0 / wanted.sum().clamp_min(1)
            target = answers.clamp_min(0)[:, None]
            loss = -(table.gather(1, target) * wanted).sum() * share
            table.exp_().scatter_add_(1, target, -torch.ones_like(wanted, dtype=table.dtype))
            table = table.to(dtype)  # of answers that are not wanted, too: products are smaller, and left out there
            of_hidden, of_weight = (table @ head) * (wanted * share), (table.T @ (rows * wanted)) * share
            ctx.save_for_backward(of_hidden.to(hidden.dtype), of_weight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        of_hidden, of_weight = ctx.saved_tensors
        return grad * of_hidden, grad * of_weight, None, None


def answer_logits(model: LogLinearForCausalLM, batch: RecallBatch) -> tuple[Tensor, Tensor]:
    """Logits at the queries and their answers, in their order: `[A, V]` and `[A]`."""
    questions = questions_of(batch)
    hidden = model.model(input_ids=questions.inputs, use_cache=False).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[questions.places]), questions.answers


def examination(task: RecallTask, stream: Any, sequences: int) -> dict[int, RecallBatch]:
    """The validation or test sequences by number of pairs, so many of each. They are made on the CPU and depend on the
    task alone: the same for every model, seed and machine.

    Args:
        stream: "validation" or "test"; neither shares a seed with the other or with training.
    """
    return {
        pairs: recall_batch(replace(task, pairs=(pairs,), begins=None), sequences, stream_seed(stream, 0, pairs))
        for pairs in task.pairs
    }


@torch.no_grad()
def answer(
    model: LogLinearForCausalLM, batch: RecallBatch, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Which queries a model answers right, and the loss of each.

    Args:
        model: is put in evaluation mode for the time.
        batch: sequences; each must have P pairs.

    Returns:
        bool and float32 `[N, P]`, on the CPU.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    sequences, pairs = batch.queries.shape
    at_once = max(1, min(_TOKENS_AT_ONCE // batch.inputs.shape[1], _ANSWERS_AT_ONCE // pairs))
    right, losses = [], []
    for start in range(0, sequences, at_once):
        part = batch.rows(start, min(start + at_once, sequences)).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, answers = answer_logits(model, part)
        logits = logits.float()
        right.append((logits.argmax(-1) == answers).view(-1, pairs).cpu())
        losses.append(F.cross_entropy(logits, answers, reduction="none").view(-1, pairs).cpu())
    model.train(training)
    return torch.cat(right), torch.cat(losses)


def mean_accuracy(
    model: LogLinearForCausalLM, batches: Mapping[int, RecallBatch], dtype: torch.dtype = torch.float32
) -> tuple[dict[int, float], float]:
    """Share of queries answered right by number of pairs, and the mean loss per query over these numbers, each of the
    same weight.
    """
    found, losses = {}, []
    for pairs, batch in batches.items():
        right, loss = answer(model, batch, dtype)
        found[pairs] = float(right.double().mean())
        losses.append(float(loss.double().mean()))
    return found, sum(losses) / len(losses)


class _Reporter:
    """What a run tells and leaves; `interrupted` is set by Ctrl-C."""

    def __init__(self, config: TrainConfig, first_step: int):
        assert config.steps is not None
        self.interrupted = False
        self.config, self.first_step = config, first_step
        self.display = Display(config.steps, first_step, config.progress)
        self.metrics = Metrics(Path(config.output), first_step, config.tensorboard)
        self.clock = Clock()
        self._mark = (first_step, 0.0)

    def training(self, progress: Progress, rate: float) -> None:
        config, step, seconds = self.config, progress.steps, self.clock.seconds
        assert config.steps is not None
        marked_step, marked_seconds = self._mark
        self._mark = (step, seconds)
        tokens = config.rows * config.sequence_length
        row = {
            "step": step,
            "tokens": step * tokens,
            "loss": progress.loss,
            "gradient_norm": progress.gradient_norm,
            "learning_rate": rate,
            "tokens_per_second": (step - marked_step) * tokens / max(seconds - marked_seconds, 1e-9),
            "seconds": seconds,
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            row["memory_bytes"] = torch.cuda.max_memory_allocated()
        self.display.training(row, (config.steps - step) * seconds / max(1, step - self.first_step))
        self.metrics.write(row)

    def held_out(self, step: int, accuracies: Mapping[int, float], loss: float) -> None:
        row: dict[str, Any] = {"step": step, "tokens": step * self.config.rows * self.config.sequence_length}
        row |= {"held_out_loss": loss, "held_out_accuracy": sum(accuracies.values()) / len(accuracies)}
        row |= {f"held_out_accuracy_{pairs}_pairs": value for pairs, value in accuracies.items()}
        self.display.evaluation(row)
        self.metrics.write(row)

    def close(self) -> None:
        self.display.close()
        self.metrics.close()


def train_recall(config: TrainConfig, *, prepare: Callable[[LogLinearForCausalLM], None] | None = None) -> TrainResult:
    """`train` for `task="mqar"`: see `loglinear.train.train`. The held-out loss is that of the validation sequences,
    `evaluation_rows` for each number of pairs.

    Raises:
        ValueError: a task that cannot be, or more than one process.
    """
    assert config.steps is not None
    task, output = recall_task(config), Path(config.output)
    wanted = recall_model(config, task)
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        raise ValueError(
            "task mqar trains on one device, got a launch by torchrun; for many trainings: loglinear sweep"
        )
    checkpoint = starting_point(config, [OPTIMIZER_FILE])
    device, dtype = choose_device(config.device, config.precision)
    if checkpoint is None:
        model = new_model(wanted, config.seed)
        if prepare is not None:
            prepare(model)
    else:
        check_model(checkpoint, wanted)
        model = load_model(checkpoint, dtype=torch.float32)
    run = RecallRun(config, task, model, device, dtype)
    if checkpoint is not None:
        run.load(checkpoint)
    first = run.step
    output.mkdir(parents=True, exist_ok=True)
    config_to_say = None if checkpoint is None else TrainConfig.from_file(checkpoint / CONFIG_FILE)
    if first < config.steps:
        config.save(output / CONFIG_FILE)
    reporter = _Reporter(config, first)
    try:
        if checkpoint is not None and config_to_say is not None:
            if first >= config.steps:
                reporter.display.say(f"already at step {first:,} of {config.steps:,}: nothing to do")
                return _result(config, checkpoint, first, reporter, 0.0)
            saved_steps = config_to_say.steps or config.steps
            for line in what_changes(checkpoint, config, config.steps, saved_steps, first, run.machine):
                reporter.display.say(line)
        parameters = sum(weight.numel() for weight in run.weights)
        reporter.display.say(
            f"{parameters:,} parameters on {device} ({run.machine['precision']}); mqar with "
            f"{', '.join(map(str, task.pairs))} pairs in {task.length:,} tokens; {config.steps:,} steps of "
            f"{config.rows:,} sequences; to {output}"
        )
        with stop_on_signals(reporter, enabled=True):
            checkpoint = _run(run, reporter, examination(task, "validation", config.evaluation_rows))
        return _result(config, checkpoint, run.step, reporter, reporter.clock.seconds)
    finally:
        reporter.close()


def _run(run: RecallRun, reporter: _Reporter, validation: Mapping[int, RecallBatch]) -> Path:
    """Trains to the last step or an interruption; returns the newest checkpoint."""
    config, output, first = run.config, Path(run.config.output), run.step
    assert config.steps is not None
    reported, checkpoint = first, None
    reporter.clock = Clock()
    while True:
        run.advance()
        reporter.display.step()
        last = run.step >= config.steps
        stop = reporter.interrupted or (config.stop_after is not None and run.step - first >= config.stop_after)
        ends = last or stop
        evaluate = last or (config.evaluate_every > 0 and run.step % config.evaluate_every == 0)
        save = ends or (config.save_every > 0 and run.step % config.save_every == 0)
        if not (ends or evaluate or save or run.step % config.log_every == 0):
            continue
        progress = run.progress(reported)
        reported = progress.steps
        if not progress.finite:
            _stop_not_finite(run, reported)
        reporter.training(progress, config.learning_rate * run.factor(run.step - 1))
        if evaluate:
            with reporter.clock.paused():
                reporter.held_out(run.step, *mean_accuracy(run.model, validation, run.dtype))
        if save:
            with reporter.clock.paused():
                checkpoint = output / f"checkpoint-{run.step}"
                run.save(checkpoint, run.step)
                _drop_old_checkpoints(output, config.keep_checkpoints)
        if ends:
            assert checkpoint is not None
            return checkpoint


def _stop_not_finite(run: RecallRun, good: int) -> None:
    output = Path(run.config.output)
    checkpoint = output / f"checkpoint-{good}"
    if newest_checkpoint(output) != checkpoint:
        run.save(checkpoint, good)
    raise NonFiniteError(
        f"step {good + 1} was not finite, so it was not taken; the last good step, {good}, is saved in {checkpoint}. "
        "Resuming meets the same data: try a lower learning rate or gradient clip in a new run",
        checkpoint,
    )


def _drop_old_checkpoints(output: Path, keep: int) -> None:
    found = [path for path in output.glob("checkpoint-*") if checkpoint_step(path) is not None]
    found.sort(key=lambda path: checkpoint_step(path) or 0)
    for path in found[:-keep] if keep else []:
        shutil.rmtree(path)


def _result(config: TrainConfig, checkpoint: Path, step: int, reporter: _Reporter, seconds: float) -> TrainResult:
    assert config.steps is not None
    rows = read_metrics(Path(config.output) / METRICS_FILE)
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    tokens = config.rows * config.sequence_length
    speed = (step - reporter.first_step) * tokens / seconds if seconds else 0.0
    if seconds:
        ending = "done" if step >= config.steps else f"stopped at step {step:,} of {config.steps:,} (resume goes on)"
        reporter.display.say(f"{ending} after {duration(seconds)}, {speed:,.0f} tokens/s; {checkpoint}")
    return TrainResult(
        output=Path(config.output),
        checkpoint=checkpoint,
        steps=step,
        finished=step >= config.steps,
        loss=losses[-1] if losses else math.nan,
        held_out_loss=held_out[-1] if held_out else None,
        tokens=step * tokens,
        seconds=seconds,
        tokens_per_second=speed,
    )
