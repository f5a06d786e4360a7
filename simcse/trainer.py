"""The trainer: ``transformers.Trainer`` with the SimCSE objective and the STS pairs for an evaluation."""

import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
)

from simcse.arguments import AUTO, LossArguments, SimCSETrainingArguments
from simcse.dataset import Row, Views, duplicate_ids
from simcse.elastic import mark_start
from simcse.errors import UserError
from simcse.files import replaced
from simcse.layout import save_encoder
from simcse.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, has_adapter
from simcse.mini_batches import UNMEASURED, MiniBatches, choose, keep_freed_memory
from simcse.model import MLP_FILE, SentenceEncoder
from simcse.objective import Objective
from simcse.report import log_line
from simcse.runs import (
    STATE_FILE,
    UNFINISHED,
    Run,
    check_best,
    check_checkpoint,
    reading,
    rotate,
    saving,
    take_over,
)
from simcse.sharding import (
    CHECKPOINT_FILES,
    ShardedEncoder,
    check_sharded,
    check_sharding,
    enable_sharding,
    unsharded,
)
from simcse.sts import Pairs, encode, geometry, spearman

OBJECTIVE_FILE = "objective.safetensors"  # in checkpoints: a learned temperature, the queue, the MLM head


class SimCSETrainer(Trainer):
    """SimCSE (Gao et al. 2021) with Gaussian negatives (GS-InfoNCE, COLING 2022).

    ``rows`` are tuples of one sentence (encoded twice), two (a pair), or more (a pair and its hard negatives), all
    of one length; ``pairs`` are what evaluation scores, or None. ``merge``: an adapter of the encoder is merged
    into the finished model; checkpoints have it alone.
    """

    args: SimCSETrainingArguments
    model: Objective
    loss_is_scaled_for_ga = False  # a mean over each batch: Trainer divides it by the accumulation steps

    def __init__(
        self,
        encoder: SentenceEncoder,
        tokenizer: PreTrainedTokenizerBase,
        args: SimCSETrainingArguments,
        options: LossArguments,
        rows: list[Row],
        pairs: Pairs | None = None,
        max_seq_length: int = 32,
        query_prompt: str = "",
        document_prompt: str = "",
        merge: bool = True,
    ):
        if options.do_mlm and tokenizer.mask_token is None:
            raise ValueError("--do_mlm: the model's tokenizer has no mask token; leave it out")
        everyone = options.negatives == "global" and args.world_size > 1
        if args.fsdp:
            check_sharding(args, options, encoder)
        super().__init__(
            model=Objective(encoder, options, dist.group.WORLD if everyone else None),
            args=args,
            data_collator=Views(
                tokenizer,
                max_seq_length,
                options.mask_duplicates,
                whole=not everyone,
                query_prompt=query_prompt,
                document_prompt=document_prompt,
            ),
            train_dataset=rows,
            eval_dataset=pairs,
            processing_class=tokenizer,
        )
        self.options = options
        self.merge = merge
        self.views = max(2, len(rows[0]))
        self.card = ""  # the model card of what is saved
        self.run = Run.new({})
        self.resumed: Path | None = None  # the checkpoint that training goes on from
        self._best_step: int | None = None  # of the run that is resumed
        self._draws: tuple[int, torch.Generator] | None = None
        self._stats: dict[str, float] = {}
        self._queues: Tensor | None = None  # of all processes, rank after rank, while a checkpoint is written
        if options.do_mlm:
            self._masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=options.mlm_probability)
        for printing in (ProgressCallback, PrinterCallback):
            self.remove_callback(printing)
        if not args.disable_tqdm:
            self.add_callback(ProgressBar)
        self.add_callback(LogLines)
        self.add_callback(OwnDropout)
        self.add_callback(OwnFolder(self))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(GS-)InfoNCE over the views of B rows, (V·B, L), embedded as one batch or in mini batches; plus MLM."""
        inputs = dict(inputs)
        ids = inputs.pop("ids", None)
        if ids is not None and self.model.loss.group is not None:
            ids = self._ids_of_everyone(ids)
        if self.options.do_mlm:
            inputs |= self._mask(inputs)
        # With whole weights accelerate has wrapped the forward in autocast.
        with self.accelerator.autocast() if self.is_fsdp_enabled else nullcontext():
            vectors, mlm = model(**inputs)  # (V·B, D), ()
        vectors = vectors.float()
        columns = self.model.columns(vectors, self.views, ids)
        generator = self._generator()
        before = generator.clone_state()
        with self.accelerator.autocast():
            loss = self.model.contrastive_loss(columns, generator)
        if self._is_logging_step():
            self._stats = self.model.stats(columns, before)
        if self.options.do_mlm:
            mlm = mlm / self._mean_over_processes((inputs["labels"] != -100).sum()).clamp(min=1)
            if self._stats:
                self._stats |= {"contrastive_loss": float(loss.detach()), "mlm_loss": float(mlm.detach())}
            loss = loss + self.options.mlm_weight * mlm
        if self.model.training:
            self.model.enqueue(columns.positives)
        return (loss, vectors) if return_outputs else loss

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            enable_sharding(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.device.type == "cpu":
            keep_freed_memory()
        if self.options.mini_batch_size == AUTO:
            self._choose_mini_batches()
        self.run.settings["mini_batch_size"] = self.model.mini_batches.size
        return super().train(*args, **kwargs)

    def _choose_mini_batches(self) -> None:
        """Takes the resumed run's size, else the fastest on rank 0, measured before the model is wrapped."""
        before = Run.read(self.resumed) if self.resumed is not None else None
        size = before.settings.get("mini_batch_size") if before else None
        if self.is_fsdp_enabled:
            plan = MiniBatches(UNMEASURED if size is None else size)
        elif self.args.torch_compile:
            plan = MiniBatches(size or 0)  # of few shapes: each one is compiled
        else:
            plan = self._measure_mini_batches(size) if self.is_world_process_zero() else MiniBatches()
            if self.args.world_size > 1:
                plan = broadcast_object_list([plan])[0]
        self.model.mini_batches = plan
        if self.is_world_process_zero():
            rows = self.views * self.args.train_batch_size
            number = f"{plan.size} of {rows}" if 0 < plan.size < rows else f"all {rows}"
            tqdm.write(f"embeds   {number} sentences at once (--mini_batch_size {plan.size})")

    def _measure_mini_batches(self, size: int | None) -> MiniBatches:
        rows = self.train_dataset
        spread = rows[:: len(rows) // self.args.train_batch_size][: self.args.train_batch_size]
        inputs = self.data_collator(spread)
        inputs.pop("ids", None)
        inputs = {name: x.to(self.args.device) for name, x in inputs.items()}
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.train()
        on_gpu = self.args.device.type == "cuda"
        with torch.random.fork_rng([self.args.device] if on_gpu else []), self.accelerator.autocast():
            if self.options.do_mlm:
                inputs |= self._mask(inputs)
                self._draws = None
            return choose(self.model.embed, inputs, parameters, size)

    def _generator(self) -> torch.Generator:
        """Random numbers of the step, beside dropout's, by seed, step and process; of noise rank 0's count.

        So dropout is the same with noise and without, and the two can be compared under one seed; and a resumed
        run draws what an unbroken one would. Batches that are accumulated in one step draw one after the other.
        """
        step = self.state.global_step
        if self._draws is None or self._draws[0] != step:
            self._draws = (
                step,
                torch.Generator().manual_seed(1_000_003 * self.args.seed + step + (self.args.process_index << 40)),
            )
        return self._draws[1]

    def _ids_of_everyone(self, keys: Tensor) -> Tensor:
        """``duplicate_ids`` of all processes' texts, those of this one's, (V·B,)."""
        W, V = self.args.world_size, self.views
        whole = self.accelerator.gather(keys).view(W, V, -1).transpose(0, 1)  # (V, W, B)
        ids = duplicate_ids(whole.flatten().tolist(), W * whole.shape[2])
        return ids.view(whole.shape)[:, self.args.process_index].flatten().to(keys.device)

    def _mean_over_processes(self, count: Tensor) -> Tensor:
        """So that a mean over all processes' tokens is what comes out of averaging the gradients."""
        return self.accelerator.reduce(count.float(), "mean") if self.args.world_size > 1 else count

    def _mask(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A share of the tokens masked as transformers' collator for BERT does."""
        self._masking.generator = self._generator()
        masked, labels = self._masking.torch_mask_tokens(inputs["input_ids"].cpu().clone())
        labels[inputs["attention_mask"].cpu() == 0] = -100
        return {"masked_ids": masked.to(self.args.device), "labels": labels.to(self.args.device)}

    def _is_logging_step(self) -> bool:
        every = self.state.logging_steps
        due = self.model.training and every > 0 and (self.state.global_step + 1) % every == 0
        return due and self.is_world_process_zero()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What is not defined, as the uniformity of one row, is left out: JSON has no NaN."""
        if "loss" in logs:
            logs = {**logs, **self._stats}
            self._stats = {}
        super().log({name: value for name, value in logs.items() if math.isfinite(value)}, start_time)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """The best so far is always written, so that the run can end with it whatever --save_strategy is."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        if self.state.best_metric is not None and not math.isfinite(self.state.best_metric):
            self.state.best_metric = None  # nothing was measured yet
        return is_best

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: Trainer would train a step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Any:
        with asking("--optim", self.args.optim):
            return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        with asking("--lr_scheduler_type", self.args.lr_scheduler_type):
            return super().create_scheduler(num_training_steps, optimizer)

    def evaluate(
        self,
        eval_dataset: Pairs | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Spearman × 100, alignment and uniformity on the pairs, in fp32 without dropout; rank 0 measures."""
        pairs = eval_dataset or self.eval_dataset
        takes_part = self.is_world_process_zero() or self.is_fsdp_enabled  # which gathers weights in all processes
        metrics = self._measure(pairs, metric_key_prefix) if takes_part else {}
        if self.args.world_size > 1:
            metrics = broadcast_object_list([metrics])[0]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure(self, pairs: Pairs, prefix: str) -> dict[str, float]:
        vectors = encode(
            ShardedEncoder(self.model) if self.is_fsdp_enabled else self.model.encoder,
            self.processing_class,
            pairs.sentences,
            self.args.per_device_eval_batch_size,
            progress=not self.args.disable_tqdm,
        )
        scores = {f"{pairs.task.lower()}_spearman": spearman(pairs, vectors), **geometry(pairs, vectors)}
        return {f"{prefix}_{name}": value for name, value in scores.items()}

    # An encoder is more than one file of weights: these three are where Trainer writes and reads it.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        with saving(folder):
            merge = self.merge and folder == Path(self.args.output_dir)
            encoder = self.model.encoder
            if self.is_fsdp_enabled:
                encoder = unsharded(encoder, state_dict)
            save_encoder(encoder, self.processing_class, folder, self.card, merge)
            extra = self.model.extra_state()
            if self._queues is not None:
                extra["queue"] = self._queues
            if extra and folder != Path(self.args.output_dir):
                save_file(extra, folder / OBJECTIVE_FILE)

    def save_state(self) -> None:
        if self.args.should_save:
            file = Path(self.args.output_dir, STATE_FILE)
            with saving(file), replaced(file) as beside:
                self.state.save_to_json(str(beside))

    def _model_files(self) -> list[str]:
        """What a checkpoint holds of the encoder, as far as it is read."""
        encoder = self.model.encoder
        adapter = [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
        files = adapter if has_adapter(encoder.backbone) else ["config.json", "model.safetensors"]
        return files + [MLP_FILE] * (encoder.mlp is not None)

    def _extra_names(self) -> set[str]:
        """Names of the tensors that a checkpoint holds beside the encoder's."""
        return set(self.model.extra_state()) - {"queue"} | ({"queue"} if self.options.queue_size else set())

    def check_resumable(self, checkpoint: Path) -> None:
        """Refuse a checkpoint with a missing or damaged file: a part of the run would start from the beginning."""
        one = self.args.world_size == 1
        optimizer = CHECKPOINT_FILES if self.is_fsdp_enabled else ["optimizer.pt"]
        required = [*self._model_files(), *optimizer, "scheduler.pt"]
        required.append("rng_state.pth" if one else f"rng_state_{self.args.process_index}.pth")
        required += [OBJECTIVE_FILE] * bool(self._extra_names())
        required += ["scaler.pt"] * (getattr(self.accelerator, "scaler", None) is not None)
        state = check_checkpoint(checkpoint, required)
        if self.args.load_best_model_at_end:
            self._best_step = check_best(checkpoint, state, self._model_files())
        self.resumed = checkpoint

    def take_over_folder(self) -> None:
        """Make --output_dir this run's, when everything has been read and training is about to begin."""
        if self.args.fsdp:
            check_sharded(self.model)
        output = Path(self.args.output_dir)
        if self.args.should_save:
            with saving(output):
                overwrite = self.args.overwrite_output_dir
                self.run = take_over(output, self.run, self.resumed, self._best_step, overwrite)
                mark_start(output, self.run.id)
        self.accelerator.wait_for_everyone()
        if self.resumed is not None:  # the path that the state gives is that of another day
            step = self._best_step
            self.state.best_model_checkpoint = str(output / f"checkpoint-{step}") if step else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        with reading(folder / self._model_files()[1]):
            if self.is_fsdp_enabled:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                self.model.encoder.load_weights(folder)
        if not self._extra_names():
            return
        with reading(folder / OBJECTIVE_FILE):
            state = load_file(folder / OBJECTIVE_FILE)
            if absent := sorted(self._extra_names() - set(state)):
                raise ValueError(f"it lacks {', '.join(absent)}")
            if "queue" in state:
                state["queue"] = state["queue"].tensor_split(self.args.world_size)[self.args.process_index].clone()
            self.model.load_extra_state(state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(f"optimizer.pt or scheduler.pt in {checkpoint}"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with reading(f"scaler.pt in {checkpoint}"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(f"rng_state.pth in {checkpoint}"):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        with reading(self.state.best_model_checkpoint):
            if self.is_fsdp_enabled:
                super()._load_best_model()
            else:
                self.model.encoder.load_weights(self.state.best_model_checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint is written in a folder of its own and then moved: it is whole, or it is not there."""
        output = Path(self.args.output_dir)
        self._run_dir = output / UNFINISHED
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(self._run_dir, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.world_size > 1 and len(self.model.queue):
            self._queues = self.accelerator.gather(self.model.queue)
        try:
            with saving(output / name):
                super()._save_checkpoint(model, trial)
        except UserError:
            shutil.rmtree(self._run_dir, ignore_errors=True)  # on a full disk it is in the way
            raise
        finally:
            unfinished, self._run_dir, self._queues = self._run_dir, output, None
        self.accelerator.wait_for_everyone()
        is_best = self.state.best_global_step == self.state.global_step
        if is_best:
            self.state.best_model_checkpoint = str(output / name)
        if self.args.should_save:
            with saving(output / name):
                if is_best:
                    self.state.save_to_json(str(unfinished / name / STATE_FILE))
                self.run.write(unfinished / name)
                shutil.rmtree(output / name, ignore_errors=True)
                (unfinished / name).rename(output / name)
                unfinished.rmdir()
            rotate(output, self.run, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return str(getattr(self, "_run_dir", self.args.output_dir))


class ProgressBar(ProgressCallback):
    """Trainer's progress bar, without its log lines."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class LogLines(TrainerCallback):
    """A line of plain text for each thing that Trainer logs."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            tqdm.write(log_line(logs, state.global_step, state.max_steps))


class OwnFolder(TrainerCallback):
    """The run takes its folder when training begins: what is refused before leaves an earlier run as it was."""

    def __init__(self, trainer: SimCSETrainer):
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.take_over_folder()


@contextmanager
def asking(flag: str, value: Any) -> Iterator[None]:
    """As one line that names the flag, what transformers says of a value it cannot use, or lacks a package for."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{flag} {getattr(value, 'value', value)}: {error}") from None


class OnlyOurs(logging.Filter):
    """Without transformers' lines about a resume: shares of steps beside counts of them, and paths of another day.

    What differs from the checkpoint is compared in ``simcse.runs``, which also finds the best checkpoint.
    """

    HIDDEN = ("arguments do not match the ones in the `trainer_state.json`", "The best checkpoint ")

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in self.HIDDEN)


for _name in ("transformers.trainer", "transformers.trainer_utils"):
    logging.getLogger(_name).addFilter(OnlyOurs())


class OwnDropout(TrainerCallback):
    """Every process draws its own dropout; the order of the data is drawn before, alike."""

    def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
        if args.process_index:
            torch.manual_seed(args.seed + 1_000_003 * args.process_index)
