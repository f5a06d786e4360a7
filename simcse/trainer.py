"""The trainer: ``transformers.Trainer`` with GS-InfoNCE for a loss and the STS pairs for an evaluation."""

from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
)

from fused_infonce import gs_infonce
from simcse.arguments import LossArguments, SimCSETrainingArguments
from simcse.dataset import TwoViews
from simcse.model import SentenceEncoder, save_encoder
from simcse.report import log_line
from simcse.sts import Pairs, encode, geometry, spearman


class SimCSETrainer(Trainer):
    """Unsupervised SimCSE (Gao et al. 2021) with Gaussian negatives (GS-InfoNCE, COLING 2022).

    ``train_dataset`` is a list of sentences; ``eval_dataset`` the pairs to watch, or None.
    """

    args: SimCSETrainingArguments
    model: SentenceEncoder
    loss_is_scaled_for_ga = False  # a mean over each batch: Trainer divides it by the accumulation steps

    def __init__(
        self,
        model: SentenceEncoder,
        tokenizer: PreTrainedTokenizerBase,
        args: SimCSETrainingArguments,
        loss: LossArguments,
        sentences: list[str],
        pairs: Pairs | None = None,
        max_seq_length: int = 32,
    ):
        super().__init__(
            model=model,
            args=args,
            data_collator=TwoViews(tokenizer, max_seq_length),
            train_dataset=sentences,
            eval_dataset=pairs,
            processing_class=tokenizer,
        )
        self.loss = loss
        for printing in (ProgressCallback, PrinterCallback):
            self.remove_callback(printing)
        if not args.disable_tqdm:
            self.add_callback(ProgressBar)
        self.add_callback(LogLines)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """GS-InfoNCE between the two views of B sentences, encoded as one batch of 2B rows."""
        vectors = model(**inputs)  # (2B, D)
        anchors, positives = vectors.chunk(2)  # (B, D) each
        # Noise of its own, by seed and step: dropout is then the same with noise and without, so that the two
        # can be compared under one seed, and a resumed run draws what an unbroken one would.
        generator = torch.Generator().manual_seed(1_000_003 * self.args.seed + self.state.global_step)
        with self.accelerator.autocast():
            loss = gs_infonce(
                anchors,
                positives,
                temperature=self.loss.temp,
                num_noise=self.loss.num_noise,
                noise_weight=self.loss.noise_weight,
                noise=self.loss.noise,
                generator=generator,
            )
        return (loss, vectors) if return_outputs else loss

    def evaluate(
        self,
        eval_dataset: Pairs | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Spearman × 100, alignment and uniformity on the pairs, in fp32 without dropout."""
        pairs = eval_dataset or self.eval_dataset
        vectors = encode(
            self.model,
            self.processing_class,
            pairs.sentences,
            self.args.per_device_eval_batch_size,
            progress=not self.args.disable_tqdm and self.is_world_process_zero(),
        )
        scores = {f"{pairs.task.lower()}_spearman": spearman(pairs, vectors), **geometry(pairs, vectors)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # An encoder is more than one file of weights: these three are where Trainer writes and reads it.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            save_encoder(self.model, self.processing_class, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.model.load_weights(self.state.best_model_checkpoint)


class ProgressBar(ProgressCallback):
    """Trainer's progress bar, without its log lines."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class LogLines(TrainerCallback):
    """A line of plain text for each thing that Trainer logs."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            tqdm.write(log_line(logs, state.global_step, state.max_steps))
