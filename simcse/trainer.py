"""The trainer: ``transformers.Trainer`` with the SimCSE objective and the STS pairs for an evaluation."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
)

from simcse.arguments import AUTO, LossArguments, SimCSETrainingArguments
from simcse.auto_size import choose_mini_batches
from simcse.callbacks import LogLines, PerRankDropout, ProgressBar
from simcse.checkpoints import CheckpointedTrainer, OwnFolder
from simcse.collator import Row, Views, duplicate_ids
from simcse.encoder import SentenceEncoder
from simcse.flags import asking
from simcse.mini_batches import keep_freed_memory
from simcse.objective import Objective
from simcse.runs import Run
from simcse.sharding import ShardedEncoder, check_sharding, enable_sharding
from simcse.sts import Pairs, encode, geometry, spearman


class SimCSETrainer(CheckpointedTrainer):
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
                is_full_batch=not everyone,
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
        self.add_callback(PerRankDropout)
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
            choose_mini_batches(self)
        self.run.settings["mini_batch_size"] = self.model.mini_batches.size
        return super().train(*args, **kwargs)

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
