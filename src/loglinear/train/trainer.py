"""Training: `train(config)` builds the data, the model and a Hugging Face `Trainer`, and runs it.

Dimensions: T tokens per row (`sequence_length`), R rows per forward pass and device (`rows`).

A forward pass takes one packed row of R·T tokens with its boundaries in `cu_seqlens`. The data set is the
endless stream of rows by number (see `loglinear.data.packing`), read in order, so that the number of
optimiser steps done is the position in the data. Under `torchrun` the Trainer gives each process its share of
the rows.
"""

import itertools
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from loglinear.data import Corpus, PackedRows, Row, join_rows, load_tokenizer
from loglinear.data.packing import IGNORED_LABEL
from loglinear.fenwick import full_num_levels
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.ops.packing import remember_bounds
from loglinear.train.checkpoints import checkpoint_step, choose_device, load_corpora, newest_checkpoint
from loglinear.train.config import CONFIG_FILE, TrainConfig, read_mapping
from loglinear.train.reporting import (
    Clock,
    Display,
    Metrics,
    Tokenizing,
    duration,
    quiet_transformers,
    read_metrics,
    say,
)
from loglinear.train.resuming import (
    check_model,
    check_position,
    machine_of,
    save_position,
    starting_point,
    what_changes,
)
from loglinear.train.schedule import schedule_of

MODEL_FILE_SUFFIXES = (".json", ".yaml", ".yml", ".toml")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class NonFiniteError(FloatingPointError):
    """A loss or gradient was NaN or infinite; the weights of the last good step are in `checkpoint` (None if
    there is none).
    """

    def __init__(self, message: str, checkpoint: Path | None):
        super().__init__(message)
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class TrainResult:
    """What a call of `train` did.

    Attributes:
        output: the run's folder.
        checkpoint: its newest checkpoint.
        steps: optimiser steps done in all, also those before resuming.
        finished: False when the run was stopped before its last step.
        loss: training loss at the last report, nats per token.
        held_out_loss: nats per token at the last evaluation; None where nothing is held out or nothing was
            evaluated yet.
        tokens: tokens trained on in all.
        seconds: spent training in this call, without evaluation and checkpoints.
        tokens_per_second: of this call, over all devices.
    """

    output: Path
    checkpoint: Path
    steps: int
    finished: bool
    loss: float
    held_out_loss: float | None
    tokens: int
    seconds: float
    tokens_per_second: float


def train(config: TrainConfig, *, prepare: Callable[[LogLinearForCausalLM], None] | None = None) -> TrainResult:
    """Train a model as the configuration says. Writes checkpoints, `train_config.yaml` and `metrics.jsonl` to
    `config.output`.

    Args:
        prepare: called with the new model before anything is trained, for example to give it other initial
            weights; the checkpoint of a resumed run is loaded after it.

    Raises:
        ValueError: options that do not fit each other, the data or the run that is resumed.
        FileExistsError: the output folder holds a run and `resume` is off.
        NonFiniteError: a loss or gradient was not finite; the last good step was saved.

    >>> result = train(TrainConfig(model="tiny-gated-deltanet", steps=20, output="runs/tiny"))
    >>> result.checkpoint.name
    'checkpoint-20'
    """
    if config.task == "mqar":
        from loglinear.train.recall import train_recall

        return train_recall(config, prepare=prepare)
    output = Path(config.output)
    checkpoint = starting_point(config)
    with quiet_transformers():
        tokenizer = load_tokenizer(config.tokenizer)
        arguments = _training_arguments(config)
        with arguments.main_process_first(local=True, desc="tokenizing"):
            training, held_out = load_corpora(config, tokenizer, Tokenizing(config.progress and arguments.should_save))
        set_seed(config.seed)
        model = build_model(config, tokenizer)
        if prepare is not None:
            prepare(model)
        if config.recompute:
            with warnings.catch_warnings():
                # Newer releases of transformers have another name for it and warn; the older ones have this name only.
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.compile:
            model.model.compile_blocks()
        rows = PackedRows(training, config.sequence_length, config.seed)
        arguments.max_steps = steps = _number_of_steps(config, training, arguments.world_size)
        arguments.use_cache = model.config.use_cache  # which the Trainer writes into the checkpoint
        first_step = 0
        if checkpoint is not None:
            first_step = check_position(checkpoint, rows, config, arguments.world_size)
            check_model(checkpoint, model.config)
            if first_step >= steps:
                say(
                    f"already at step {first_step:,} of {steps:,}: nothing to do; --steps above {first_step:,} goes on",
                    arguments.should_save,
                )
                return _nothing_left(config, output, checkpoint, first_step, arguments.world_size)
            saved = TrainConfig.from_file(checkpoint / CONFIG_FILE)
            saved_steps = _number_of_steps(saved, training, arguments.world_size)
            for line in what_changes(checkpoint, config, steps, saved_steps, first_step, machine_of(arguments)):
                say(line, arguments.should_save)
        elif config.resume:
            say(f"resume: no checkpoint in {output}, so the run starts at its first step", arguments.should_save)
        if arguments.should_save:
            output.mkdir(parents=True, exist_ok=True)
            config.save(output / CONFIG_FILE)
        trainer = PackedTrainer(config, model, arguments, tokenizer, rows, held_out)
        return trainer.run(checkpoint, first_step)


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> LogLinearForCausalLM:
    """A model with new weights. Where the model file and the model options do not say otherwise, its vocabulary and
    special tokens are the tokenizer's, and its length (`max_position_embeddings`, and with it the number of levels)
    is that of the rows: levels that no row reaches would stay untrained.

    Raises:
        ValueError: an unknown preset or option, or a `vocab_size` option smaller than the tokenizer's
            vocabulary.
        FileNotFoundError: a model file that does not exist.
    """
    tokens = {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}
    return LogLinearForCausalLM(model_config(config, len(tokenizer), tokens, "the tokenizer's"))


def model_config(
    config: TrainConfig, vocabulary: int, special_tokens: dict[str, int | None], whose: str
) -> LogLinearConfig:
    """The configuration of the model that is trained on so many tokens, which are `whose`: see `build_model`."""
    from_file = config.model.lower().endswith(MODEL_FILE_SUFFIXES)
    chosen = _without_bookkeeping(read_mapping(config.model)) if from_file else {}
    options = {
        "vocab_size": vocabulary,
        "max_position_embeddings": config.sequence_length,
        **special_tokens,
        **chosen,
        **config.model_options,
    }
    if options["vocab_size"] < vocabulary:
        raise ValueError(f"the model's vocab_size: got {options['vocab_size']}, wanted at least {whose} {vocabulary}")
    return LogLinearConfig(**options) if from_file else LogLinearConfig.preset(config.model, **options)


def _without_bookkeeping(values: dict[str, Any]) -> dict[str, Any]:
    """A model file without what transformers adds when it saves one: also a null for each special token that was
    not given.
    """
    added = ("architectures", "model_type", "transformers_version", "dtype")
    named = {key: value for key, value in values.items() if key not in SPECIAL_TOKENS or value is not None}
    return {key: value for key, value in named.items() if key not in added}


def length_line(model: LogLinearConfig, sequence_length: int) -> str:
    """The length that a model is meant for and its levels, against the rows it is trained on.

    >>> length_line(LogLinearConfig.preset("tiny-mamba2", max_position_embeddings=256), 100)
    'model for 256 tokens, trained on rows of 100: they reach 8 of its 9 levels, the others stay untrained'
    """
    line = f"model for {model.max_position_embeddings:,} tokens"
    if model.max_position_embeddings != sequence_length:
        line += f", trained on rows of {sequence_length:,}"
    levels, reached = model.num_levels or 1, full_num_levels(sequence_length)
    if levels == 1:
        return line
    if levels > reached:
        return f"{line}: they reach {reached} of its {levels} levels, the others stay untrained"
    if levels < reached:
        return f"{line}: the last of its {levels} levels takes in what is older than the others reach"
    return f"{line}: {levels} levels"


class _Values(NamedTuple):
    """What a step came to, on its way to the host."""

    step: int  # how many were taken before it
    epoch: float  # where the Trainer was then
    numbers: torch.Tensor  # losses, gradient norm, and 1 if any of them, on any process, is not finite
    copied: torch.cuda.Event | None

    @classmethod
    def send(cls, step: int, epoch: float, numbers: torch.Tensor) -> "_Values":
        if not numbers.is_cuda:
            return cls(step, epoch, numbers, None)
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return cls(step, epoch, host, copied)

    def arrive(self) -> list[float]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.numbers.tolist()


class PackedTrainer(Trainer):
    """The Hugging Face Trainer on packed rows.

    It takes the model's own parameter groups, evaluates a held-out loss per token, and takes no step that is not
    finite. On a GPU the optimiser itself refuses that step and all after it, and the host, which prepares the next one
    meanwhile, sees it a step later, or when it reports, evaluates or saves (`settle`).
    """

    def __init__(
        self,
        config: TrainConfig,
        model: LogLinearForCausalLM,
        arguments: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase,
        rows: PackedRows,
        held_out: Corpus | None,
    ):
        self.run_config = config
        self.output = Path(config.output)
        self.network = model
        self.rows = rows
        self.rows_per_step = config.rows * config.accumulation * arguments.world_size
        self.held_out_rows = None
        if held_out is not None:
            self.held_out_rows = PackedRows(held_out, config.sequence_length, seed=0, epochs=1)
        self.numbered_rows = NumberedRows(rows, arguments.max_steps * self.rows_per_step)
        self._losses: list[torch.Tensor] = []
        self._broken = torch.zeros((), dtype=torch.float32, device=arguments.device)
        self._unseen: _Values | None = None
        self._special_tokens = [
            (holder, name, getattr(holder, name))
            for holder in (model.config, model.generation_config)
            for name in SPECIAL_TOKENS
        ]
        super().__init__(
            model=model,
            args=arguments,
            data_collator=join_rows,
            train_dataset=self.numbered_rows,
            processing_class=tokenizer,
            callbacks=[],
        )
        self.remove_callback(PrinterCallback)
        self._flops_per_pass = model.cost(config.sequence_length).training_flops_per_token * (
            config.rows * config.sequence_length
        )

    @property
    def runs_ahead(self) -> bool:
        """Whether the host prepares the next step while the device still computes this one."""
        return self.args.device.type == "cuda"

    def run(self, checkpoint: Path | None, first_step: int) -> TrainResult:
        """Train from a checkpoint (None: from the start) to the last step or an interruption."""
        reporter = Reporter(self, first_step)
        self.reporter = reporter
        self.add_callback(reporter)
        try:
            with stop_on_signals(reporter, enabled=self.args.world_size == 1):
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            reporter.close()
        return reporter.result()

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        config = self.run_config
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                self.network.parameter_groups(config.weight_decay),
                lr=config.learning_rate,
                betas=(config.beta1, config.beta2),
                eps=config.epsilon,
                fused=True,
            )
            if self.runs_ahead:
                self.optimizer.found_inf = self._broken  # type: ignore[attr-defined]  (read by fused optimisers)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            factor = schedule_of(self.run_config, num_training_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def set_learning_rate(self, step: int) -> None:
        """Give the optimiser the rate that the schedule has for a step (from 0).

        A checkpoint's optimiser and scheduler hold the rate of the next step as the run was planned then; a run
        that is given more steps would take one step with it.
        """
        assert self.optimizer is not None and self.lr_scheduler is not None
        factor = schedule_of(self.run_config, self.args.max_steps)(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def keep_special_tokens(self) -> None:
        """Give the model back the special tokens it was built with: the Trainer puts the tokenizer's in their place,
        also where the model file names others.
        """
        for holder, name, token in self._special_tokens:
            setattr(holder, name, token)

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.numbered_rows)

    def get_train_dataloader(self):
        loader: Any = super().get_train_dataloader()
        loader.device = None  # `_prepare_inputs` sends batches there
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step and how many labels they have, as the Trainer counts them, on all processes; but
        counted on the host, and sent without waiting for the device."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        count = torch.tensor(sum(int(batch["labels"][..., 1:].ne(IGNORED_LABEL).sum()) for batch in batches))
        if device.type == "cuda":
            count = count.pin_memory()
        count = count.to(device, non_blocking=True)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            everywhere: Any = self.accelerator.gather(count)
            count = everywhere.sum()
        return batches, count

    def _prepare_inputs(self, inputs):
        """To the device, without waiting for what it is doing; the host goes on knowing where sequences begin."""
        sent = {name: x.to(self.args.device, non_blocking=x.is_pinned()) for name, x in inputs.items()}
        if self.args.device.type != "cpu":
            remember_bounds(sent["cu_seqlens"], inputs["cu_seqlens"].tolist())
        return sent

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        return loss

    def floating_point_ops(self, inputs) -> int:
        return self._flops_per_pass

    def _get_grad_norm(self, model, grad_norm=None):
        """The gradient's norm. The Trainer asks for it right before the optimiser's step: the last moment to
        stop.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        losses, self._losses = self._losses, []
        values = torch.stack([loss.float() for loss in losses] + [torch.as_tensor(norm).to(losses[0]).float()])
        broken = torch.logical_not(torch.isfinite(values).all()).float()
        if self.args.world_size > 1:
            # Every process must stop at the same step.
            torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX)
        before, numbers = self._unseen, torch.cat([values, broken[None]])
        self._unseen = _Values.send(self.state.global_step, self.state.epoch, numbers)
        if self.runs_ahead:
            self._broken.copy_(torch.maximum(self._broken, broken))
            if before is not None:
                self._look_at(before)
        else:
            self.settle()
        return norm

    def settle(self) -> None:
        """Waits for the step that the host has not looked at.

        Raises:
            NonFiniteError: it was not finite.
        """
        unseen, self._unseen = self._unseen, None
        if unseen is not None:
            self._look_at(unseen)

    def _look_at(self, values: _Values) -> None:
        *losses, norm, broken = values.arrive()
        if not broken:
            return
        if late := self.state.global_step - values.step:  # the optimiser has refused these steps
            assert self.lr_scheduler is not None
            self.state.global_step, self.state.epoch = values.step, values.epoch
            self.lr_scheduler.last_epoch -= late
            self.lr_scheduler._step_count -= late
            self.set_learning_rate(values.step)
        self._stop_non_finite(sum(losses), norm)

    def _stop_non_finite(self, loss: float, norm: float) -> None:
        step, newest = self.state.global_step, newest_checkpoint(self.output)
        weights_good = all(bool(torch.isfinite(weight).all()) for weight in self.network.parameters())
        self.accelerator.wait_for_everyone()  # all have looked before one of them saves
        if weights_good and (newest is None or checkpoint_step(newest) != step):
            self._save_checkpoint(self.network, trial=None)
        self.accelerator.wait_for_everyone()
        checkpoint = newest_checkpoint(self.output)
        saved = "there is no checkpoint before it"
        if checkpoint is not None:
            saved = f"the last good step, {checkpoint_step(checkpoint)}, is saved in {checkpoint}"
        raise NonFiniteError(
            f"step {step + 1} was not finite (loss {loss}, gradient norm {norm}), so it was not taken; {saved}. "
            "Resuming meets the same data: try a lower learning rate or gradient clip in a new run",
            checkpoint,
        )

    def _save_checkpoint(self, model, trial) -> None:
        with self.reporter.clock.paused():
            folder = self.output / f"checkpoint-{self.state.global_step}"
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                self.run_config.save(folder / CONFIG_FILE)
                step, machine = self.state.global_step, machine_of(self.args)
                save_position(folder, self.rows, step, self.rows_per_step, machine)
            super()._save_checkpoint(model, trial)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="held_out") -> dict[str, float]:
        """Mean loss per token over held-out rows, the same ones every time. Each process takes its share of
        the rows.
        """
        assert self.held_out_rows is not None and eval_dataset is None, "only the run's own held-out rows"
        with self.reporter.clock.paused():
            total, count = self._held_out_totals(self.held_out_rows)
        metrics = {f"{metric_key_prefix}_loss": total / count, f"{metric_key_prefix}_tokens": count}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _held_out_totals(self, rows: PackedRows) -> tuple[float, int]:
        """Sum of the loss over the evaluated tokens and their number, over all processes."""
        self.network.eval()
        wanted = rows.num_rows if self.run_config.evaluation_rows == 0 else self.run_config.evaluation_rows
        numbers = range(self.args.process_index, min(wanted, rows.num_rows), self.args.world_size)
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for begin in range(0, len(numbers), self.run_config.rows):
            batch = join_rows([rows[number] for number in numbers[begin : begin + self.run_config.rows]])
            count = int((batch["labels"] != IGNORED_LABEL).sum())
            if count:
                loss = self.network(**self._prepare_inputs(batch)).loss
                totals += torch.stack([loss.double() * count, torch.full_like(loss, count, dtype=torch.float64)])
        if self.args.world_size > 1:
            torch.distributed.all_reduce(totals)
        self.network.train()
        total, count = totals.tolist()
        if count == 0:
            raise ValueError("the held-out documents hold no token to predict; hold out more of them")
        return total, int(count)


class NumberedRows(Dataset):
    """The first `count` rows of a stream as a data set."""

    def __init__(self, rows: PackedRows, count: int):
        self.rows = rows
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Row:
        return self.rows[number]


class Stoppable(Protocol):
    """What Ctrl-C reaches: a run that looks at `interrupted` after each step."""

    interrupted: bool
    display: Display


class Reporter(TrainerCallback):
    """Decides when to report, evaluate, save and stop, and reports."""

    def __init__(self, trainer: PackedTrainer, first_step: int):
        self.trainer = trainer
        self.config = trainer.run_config
        self.first_step = first_step
        self.step = first_step
        self.steps = trainer.args.max_steps
        self.main = trainer.args.should_save
        self.tokens_per_step = trainer.rows_per_step * self.config.sequence_length
        self.output = trainer.output
        self.interrupted = False
        self.loss = math.nan
        self.held_out_loss: float | None = None
        self.clock = Clock()
        self._mark = (first_step, 0.0)
        self.metrics = Metrics(self.output, first_step, self.config.tensorboard) if self.main else None
        self.display = Display(self.steps, first_step, self.main and self.config.progress)

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.keep_special_tokens()
        self.trainer.set_learning_rate(self.first_step)
        self.clock = Clock()
        parameters = sum(parameter.numel() for parameter in self.trainer.network.parameters())
        begin = f" from step {self.first_step:,}" if self.first_step else ""
        self.display.say(
            f"{parameters:,} parameters on {args.device} ({'bf16' if args.bf16 else 'fp32'}); "
            f"{self.trainer.rows.num_tokens:,} training tokens; {self.steps:,} steps of "
            f"{self.tokens_per_step:,} tokens{begin}; to {self.output}"
        )
        self.display.say(length_line(self.trainer.network.config, self.config.sequence_length))

    def on_step_end(self, args, state, control, **kwargs):
        config, self.step = self.config, state.global_step
        self.display.step()
        last = self.step >= self.steps
        stop = self.interrupted or (config.stop_after is not None and self.step - self.first_step >= config.stop_after)
        control.should_log = last or stop or self.step % config.log_every == 0
        control.should_evaluate = self.trainer.held_out_rows is not None and (
            last or (config.evaluate_every > 0 and self.step % config.evaluate_every == 0)
        )
        control.should_save = last or stop or (config.save_every > 0 and self.step % config.save_every == 0)
        control.should_training_stop = last or stop
        if control.should_log or control.should_evaluate or control.should_save:
            self.trainer.settle()

    def on_log(self, args, state, control, logs=None, **kwargs):
        assert logs is not None
        if "loss" in logs:
            self._report_training(state.global_step, logs)
        elif "held_out_loss" in logs:
            self.held_out_loss = logs["held_out_loss"]
            row = {"step": state.global_step, "tokens": state.global_step * self.tokens_per_step}
            row |= {name: logs[name] for name in ("held_out_loss", "held_out_tokens")}
            self.display.evaluation(row)
            if self.metrics is not None:
                self.metrics.write(row)

    def _report_training(self, step: int, logs: dict[str, float]) -> None:
        marked_step, marked_seconds = self._mark
        seconds = self.clock.seconds
        self._mark = (step, seconds)
        self.loss = logs["loss"]
        row = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "loss": logs["loss"],
            "gradient_norm": logs["grad_norm"],
            "learning_rate": logs["learning_rate"],
            "tokens_per_second": (step - marked_step) * self.tokens_per_step / max(seconds - marked_seconds, 1e-9),
            "seconds": seconds,
        }
        if self.trainer.args.device.type == "cuda":
            row["memory_bytes"] = torch.cuda.max_memory_allocated(self.trainer.args.device)
        seconds_left = (self.steps - step) * seconds / (step - self.first_step)
        self.display.training(row, seconds_left)
        if self.metrics is not None:
            self.metrics.write(row)

    def close(self) -> None:
        self.seconds = self.clock.seconds
        self.display.close()
        if self.metrics is not None:
            self.metrics.close()

    def result(self) -> TrainResult:
        done = self.step - self.first_step
        finished = self.step >= self.steps
        checkpoint = self.output / f"checkpoint-{self.step}"
        speed = done * self.tokens_per_step / max(self.seconds, 1e-9)
        ending = "done" if finished else f"stopped at step {self.step:,} of {self.steps:,} (resume goes on)"
        self.display.say(f"{ending} after {duration(self.seconds)}, {speed:,.0f} tokens/s; {checkpoint}")
        return TrainResult(
            output=self.output,
            checkpoint=checkpoint,
            steps=self.step,
            finished=finished,
            loss=self.loss,
            held_out_loss=self.held_out_loss,
            tokens=self.step * self.tokens_per_step,
            seconds=self.seconds,
            tokens_per_second=speed,
        )


def _number_of_steps(config: TrainConfig, training: Corpus, world_size: int) -> int:
    if config.steps is not None:
        return config.steps
    tokens_per_step = config.rows * config.accumulation * world_size * config.sequence_length
    epochs = 1.0 if config.epochs is None else config.epochs
    return max(1, math.ceil(epochs * training.num_tokens / tokens_per_step))


def _nothing_left(
    config: TrainConfig, output: Path, checkpoint: Path | None, step: int, world_size: int
) -> TrainResult:
    """The result of a run that had reached its last step before."""
    assert checkpoint is not None
    rows = read_metrics(output / "metrics.jsonl") if (output / "metrics.jsonl").is_file() else []
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    tokens_per_step = config.rows * config.accumulation * world_size * config.sequence_length
    return TrainResult(
        output=output,
        checkpoint=checkpoint,
        steps=step,
        finished=True,
        loss=losses[-1] if losses else math.nan,
        held_out_loss=held_out[-1] if held_out else None,
        tokens=step * tokens_per_step,
        seconds=0.0,
        tokens_per_second=0.0,
    )


def _training_arguments(config: TrainConfig) -> TrainingArguments:
    """The Trainer's own arguments. When to log, evaluate and save is `Reporter`'s, so those are off here."""
    device, dtype = choose_device(config.device, config.precision)
    on_gpu = device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=config.output,
        per_device_train_batch_size=config.rows,
        gradient_accumulation_steps=config.accumulation,
        max_grad_norm=config.gradient_clip,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        bf16=dtype == torch.bfloat16,
        use_cpu=not on_gpu,
        seed=config.seed,
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        save_total_limit=config.keep_checkpoints or None,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        # A step that is not finite stops the run; nothing may hide it in an average.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
        log_level_replica="error",
    )
    if arguments.n_gpu > 1:
        # Several GPUs in one process would mean splitting a batch of one packed row; several processes do it
        # right.
        arguments._n_gpu = 1
        warnings.warn(
            "several GPUs are visible and one is used; start with `torchrun --nproc-per-node=…` for more",
            stacklevel=3,
        )
    return arguments


@contextmanager
def stop_on_signals(reporter: Stoppable, enabled: bool) -> Iterator[None]:
    """The first Ctrl-C or termination ends the run after its current step, with a checkpoint; the second at
    once.
    """
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        if reporter.interrupted:
            raise KeyboardInterrupt
        reporter.interrupted = True
        reporter.display.say("stopping after this step, with a checkpoint; once more to stop at once")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
