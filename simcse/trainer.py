"""The trainer: ``transformers.Trainer`` with the SimCSE objective and the STS pairs for an evaluation."""

import shutil
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
from transformers.trainer_utils import rotate_checkpoints

from simcse.arguments import LossArguments, SimCSETrainingArguments
from simcse.dataset import Row, Views, duplicate_ids
from simcse.layout import save_encoder
from simcse.model import SentenceEncoder
from simcse.objective import Objective
from simcse.report import log_line
from simcse.sts import Pairs, encode, geometry, spearman

OBJECTIVE_FILE = "objective.safetensors"  # in checkpoints: a learned temperature, the queue, the MLM head


class SimCSETrainer(Trainer):
    """SimCSE (Gao et al. 2021) with Gaussian negatives (GS-InfoNCE, COLING 2022).

    ``rows`` are tuples of one sentence (encoded twice), two (a pair), or more (a pair and its hard negatives), all
    of one length; ``pairs`` are what evaluation scores, or None.
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
    ):
        if options.do_mlm and tokenizer.mask_token is None:
            raise ValueError("--do_mlm: the model's tokenizer has no mask token; leave it out")
        everyone = options.negatives == "global" and args.world_size > 1
        super().__init__(
            model=Objective(encoder, options, dist.group.WORLD if everyone else None),
            args=args,
            data_collator=Views(tokenizer, max_seq_length, options.mask_duplicates, whole=not everyone),
            train_dataset=rows,
            eval_dataset=pairs,
            processing_class=tokenizer,
        )
        self.options = options
        self.views = max(2, len(rows[0]))
        self.card = ""  # the model card of what is saved
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
        vectors, mlm = model(**inputs)  # (V·B, D), ()
        columns = self.model.columns(vectors, self.views, ids)
        generator = self._generator()
        before = generator.clone_state()
        with self.accelerator.autocast():
            loss = self.model.loss(**vars(columns), generator=generator)
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
        if "loss" in logs:
            logs = {**logs, **self._stats}
            self._stats = {}
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Pairs | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Spearman × 100, alignment and uniformity on the pairs, in fp32 without dropout; rank 0 measures."""
        pairs = eval_dataset or self.eval_dataset
        metrics = self._measure(pairs, metric_key_prefix) if self.is_world_process_zero() else {}
        if self.args.world_size > 1:
            metrics = broadcast_object_list([metrics])[0]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure(self, pairs: Pairs, prefix: str) -> dict[str, float]:
        vectors = encode(
            self.model.encoder,
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
        save_encoder(self.model.encoder, self.processing_class, folder, self.card)
        extra = self.model.extra_state()
        if self._queues is not None:
            extra["queue"] = self._queues
        if extra and folder != Path(self.args.output_dir):
            save_file(extra, folder / OBJECTIVE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.encoder.load_weights(resume_from_checkpoint)
        extra = Path(resume_from_checkpoint) / OBJECTIVE_FILE
        if extra.is_file():
            state = load_file(extra)
            if "queue" in state:
                state["queue"] = state["queue"].tensor_split(self.args.world_size)[self.args.process_index].clone()
            self.model.load_extra_state(state)

    def _load_best_model(self) -> None:
        self.model.encoder.load_weights(self.state.best_model_checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint is written in a folder of its own and then moved: it is whole, or it is not there."""
        output = Path(self.args.output_dir)
        self._run_dir = output / ".unfinished"
        if self.args.should_save:
            shutil.rmtree(self._run_dir, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.world_size > 1 and len(self.model.queue):
            self._queues = self.accelerator.gather(self.model.queue)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            unfinished, self._run_dir, self._queues = self._run_dir, output, None
        self.accelerator.wait_for_everyone()
        name = f"checkpoint-{self.state.global_step}"
        is_best = self.state.best_global_step == self.state.global_step
        if is_best:
            self.state.best_model_checkpoint = str(output / name)
        if self.args.should_save:
            if is_best:
                self.state.save_to_json(str(unfinished / name / "trainer_state.json"))
            shutil.rmtree(output / name, ignore_errors=True)
            (unfinished / name).rename(output / name)
            unfinished.rmdir()
            rotate_checkpoints(
                output_dir=str(output),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
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


class OwnDropout(TrainerCallback):
    """Every process draws its own dropout; the order of the data is drawn before, alike."""

    def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
        if args.process_index:
            torch.manual_seed(args.seed + 1_000_003 * args.process_index)
