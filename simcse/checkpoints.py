"""The checkpoints of a run, as Trainer writes and reads them: never partial, of an encoder in several files."""

import math
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback

from simcse.arguments import LossArguments, SimCSETrainingArguments
from simcse.elastic import mark_start
from simcse.encoder import MLP_FILE
from simcse.errors import UserError
from simcse.files import replaced
from simcse.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, has_adapter
from simcse.objective import Objective
from simcse.resuming import check_best, check_checkpoint
from simcse.runs import STATE_FILE, UNFINISHED, Run, rotate, take_over
from simcse.saved_model import save_encoder
from simcse.sharding import CHECKPOINT_FILES, check_sharded, unsharded
from simcse.storage import reading, saving

OBJECTIVE_FILE = "objective.safetensors"  # in checkpoints: a learned temperature, the queue, the MLM head


class CheckpointedTrainer(Trainer):
    """Trainer with the checkpoints of a run (``simcse.runs``): the encoder, and what is trained beside it."""

    args: SimCSETrainingArguments
    model: Objective
    options: LossArguments
    merge: bool  # an adapter into the finished model
    card: str  # the model card of what is saved
    run: Run
    resumed: Path | None  # the checkpoint that training goes on from
    _best_step: int | None  # of the run that is resumed
    _queues: Tensor | None  # of all processes, rank after rank, while a checkpoint is written

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """The best so far is always written, so that the run can end with it whatever --save_strategy is."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        if self.state.best_metric is not None and not math.isfinite(self.state.best_metric):
            self.state.best_metric = None  # nothing was measured yet
        return is_best

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


class OwnFolder(TrainerCallback):
    """The run takes its folder when training begins: what is refused before leaves an earlier run as it was."""

    def __init__(self, trainer: CheckpointedTrainer):
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.take_over_folder()
