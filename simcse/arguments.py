"""The flags of ``python -m simcse.train``: ours, and every one of ``transformers.TrainingArguments``."""

import math
import sys
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from fused_infonce.config import FIELDS, LossConfig
from simcse.encoder import PoolerType
from simcse.flags import MODEL, flag, pooler_flag
from simcse.loss_flags import LOSS_FLAGS, fill_defaults, loss_flags, refuse_noise
from simcse.published import LOSSES, check_name, options_of
from simcse.recipes import RECIPES


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str = flag(
        "minilm",
        MODEL,
    )
    pooler_type: PoolerType | None = pooler_flag(  # noqa: RUF009 (a field, as its neighbours)
        "what simcse saved the folder with, else cls_before_pooler, and last for a decoder"
    )
    mlp_only_train: bool | None = flag(
        None,
        "With 'cls': leave the MLP out at evaluation. Default: what the folder was saved with, else False.",
        nargs="?",
        const=True,
    )
    dropout: float | None = flag(
        None,
        "Probability of hidden and attention dropout in training, whichever of them the model has; the saved "
        "configuration keeps its own. Default: the model's, which is 0 for most decoders.",
    )
    lora_r: int = flag(
        0,
        "Rank of a LoRA adapter, which is trained instead of the model's own weights (extra 'lora'); 0: none. It "
        "is merged into the saved model, and checkpoints hold it alone.",
    )
    lora_alpha: float | None = flag(None, "The adapter is scaled by alpha / rank. Default: twice --lora_r.")
    lora_dropout: float = flag(0.0, "Probability of dropout on the adapter's input.")
    lora_target_modules: str | None = flag(
        None,
        "Names of the layers that get an adapter, divided by commas, or 'all-linear'. Default: peft's for this "
        "type of model.",
    )
    lora_merge: bool = flag(
        True, "Merge the adapter into the saved model; false: save it alone, as peft does, beside the tokenizer."
    )

    def __post_init__(self) -> None:
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be at least 0 and below 1 (typically 0.1), not {self.dropout}")
        if self.lora_r < 0:
            raise ValueError(
                f"--lora_r must be a rank of at least 1 (typically 16), or 0 for none, not {self.lora_r}"
            )
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"--lora_alpha must be a positive number, not {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout must be at least 0 and below 1, not {self.lora_dropout}")
        shapes = (self.lora_alpha is not None, self.lora_dropout, self.lora_target_modules, not self.lora_merge)
        if not self.lora_r and any(shapes):
            raise ValueError(
                "--lora_alpha, --lora_dropout, --lora_target_modules and --lora_merge describe an adapter: give "
                "its rank too (--lora_r 16), or leave them out"
            )


@dataclass
class DataArguments:
    _argument_group_name = "data"

    train_file: str | None = flag(
        None,
        "Training data, UTF-8: .txt (a sentence a line), .csv, .tsv (with a header), .jsonl, each also .gz, "
        ".parquet, or a hub dataset 'owner/name'. One column: each sentence is encoded twice; two: pairs; "
        "three or more: a pair and its hard negatives. Default: the sentences in the package.",
    )
    columns: str | None = flag(
        None,
        "Names of the columns to train on, divided by commas: anchor, positive, hard negatives. Default: all, in "
        "their order.",
    )
    strict_data: bool = flag(False, "Stop at rows that cannot be used. Default: report them and go on without.")
    sts_data: str | None = flag(
        None,
        "Graded pairs to watch training on: TSV with the columns task, subset, split, score, sentence1, "
        "sentence2; the rows STSB/dev, else the first task with a split dev. Default: the pairs in the "
        "package where --train_file is left out too, else no scores.",
    )
    max_seq_length: int = flag(
        32,
        "Tokens a training sentence is cut to, its prompt included. Evaluation cuts nothing the model can read.",
    )
    query_prompt: str | None = flag(
        None,
        "Text before the first column, the anchors, such as 'query: '. It is saved as the model's default prompt, "
        "so the graded pairs get it too.",
    )
    document_prompt: str | None = flag(
        None, "Text before the other columns, or before the second view of a single one. It is saved too."
    )

    def __post_init__(self) -> None:
        if self.max_seq_length < 3:
            raise ValueError(f"--max_seq_length must be at least 3 (typically 32), not {self.max_seq_length}")


AUTO = "auto"


@dataclass
class LossArguments(loss_flags()):
    _argument_group_name = "loss"

    loss: str = flag(
        "gs_infonce",
        "'gs_infonce' is (GS-)InfoNCE; the others are those of fused_infonce.losses, without noise. A flag whose "
        "help says 'Of --loss NAME' is an option of that loss.",
        metavar="{" + ",".join(("gs_infonce", *LOSSES)) + "}",
    )
    matryoshka_dims: list[int] | None = flag(  # noqa: RUF009 (a field, as its neighbours)
        None,
        "Lengths of the prefixes of the vectors whose losses are summed, such as 64 128 384 (Matryoshka). "
        "Default: the whole vectors alone.",
        nargs="+",
    )
    matryoshka_weights: list[float] | None = flag(  # noqa: RUF009 (a field, as its neighbours)
        None, "Weights of these losses, one for each prefix. Default: 1.", nargs="+"
    )
    temp: float = flag(0.05, "Temperature τ; similarities are cosine / τ.")
    learn_temperature: bool = flag(False, "Learn τ, from --temp on, between 0.015 and 1.")
    mask_duplicates: bool = flag(
        False,
        "Rows of a batch with the same text (case and white space apart) are not used as negatives of each other.",
    )
    negatives: Literal["global", "local"] = flag(
        "global",
        "On several processes (torchrun): 'global': the batches of all of them are one batch; 'local': each "
        "process has its own negatives.",
    )
    queue_size: int = flag(
        0,
        "Embeddings of past batches to keep as further negatives; with global negatives all processes' together. "
        "--mask_duplicates does not look at them.",
    )
    mini_batch_size: str = flag(
        AUTO,
        "Sentences embedded at once. A number: gradient caching, so that memory follows it, while the loss sees "
        "the whole batch; it costs a second forward pass. 0: the whole batch. 'auto': the fastest size by a short "
        "measurement, the whole batch included, with a second forward pass for what does not fit into half of the "
        "free memory; the log and run.json name the size, and a resumed run keeps it.",
        metavar="auto|INTEGER",
    )
    do_mlm: bool = flag(
        False,
        "Also train a masked language model. Its head starts from the model's pretrained one, where there is one, "
        "is not tied to the input embeddings, and is not saved.",
    )
    mlm_weight: float = flag(0.1, "Weight of the masked language model's loss.")
    mlm_probability: float = flag(0.15, "Share of the tokens that are masked for it.")

    @property
    def loss_options(self) -> dict[str, Any]:
        """The options of ``GSInfoNCELoss``; at their defaults, where a published loss has taken them."""
        own = options_of(self.loss)
        return {name: FIELDS[name].default if name in own else getattr(self, name) for name in LOSS_FLAGS}

    @property
    def published_options(self) -> dict[str, Any]:
        """The options of the published loss; none for gs_infonce."""
        return {name: getattr(self, name) for name in options_of(self.loss)}

    def __post_init__(self) -> None:
        if not self.temp > 0:
            raise ValueError(f"--temp must be positive (typically 0.05), not {self.temp}")
        check_name(self.loss)
        fill_defaults(self)
        try:
            LossConfig(**self.loss_options)
        except (TypeError, ValueError) as error:  # whose message starts with the option's name
            raise ValueError(f"--{error}") from None
        if self.loss != "gs_infonce":
            refuse_noise(self)
        dims = self.matryoshka_dims or []
        if any(dim < 1 for dim in dims):
            raise ValueError(f"--matryoshka_dims must be numbers of at least 1, not {min(dims)}")
        if self.matryoshka_weights is not None and not dims:
            raise ValueError("--matryoshka_weights belongs to --matryoshka_dims; give both, or leave it out")
        if not all(0 < weight < math.inf for weight in self.matryoshka_weights or []):
            raise ValueError(f"--matryoshka_weights must be positive numbers, not {self.matryoshka_weights}")
        if self.matryoshka_weights is not None and len(self.matryoshka_weights) != len(dims):
            raise ValueError(
                f"--matryoshka_weights must be one number for each of the {len(dims)} --matryoshka_dims, not "
                f"{len(self.matryoshka_weights)}"
            )
        if self.label_smoothing and self.mask_duplicates:
            raise ValueError(
                "--label_smoothing cannot be combined with --mask_duplicates: it spreads the label over every "
                "column, masked ones too; leave one of them out"
            )
        if self.learn_temperature and not 0.015 <= self.temp <= 1:
            raise ValueError(f"with --learn_temperature, --temp must be from 0.015 to 1, not {self.temp}")
        if self.queue_size < 0:
            raise ValueError(f"--queue_size must be at least 0, not {self.queue_size}")
        if self.mini_batch_size != AUTO and not str(self.mini_batch_size).isdecimal():
            raise ValueError(
                f"--mini_batch_size must be auto, a number of sentences, or 0 for the whole batch, not "
                f"{self.mini_batch_size}"
            )
        if not 0 < self.mlm_probability <= 1 or not self.mlm_weight >= 0:
            raise ValueError(
                "--mlm_probability must be above 0 and at most 1, and --mlm_weight at least 0, not "
                f"{self.mlm_probability} and {self.mlm_weight}"
            )


@dataclass
class SimCSETrainingArguments(TrainingArguments):
    """``TrainingArguments`` with defaults for unsupervised SimCSE."""

    _argument_group_name = "training"

    recipe: str | None = flag(
        None, f"Published hyper-parameters, which any other flag overrides: {', '.join(RECIPES)}."
    )

    output_dir: str = flag(
        "runs/simcse",
        "Folder for the best model, the checkpoints, the log and the plot. A folder that holds files is refused, "
        "unless the run in it is resumed.",
    )
    overwrite_output_dir: bool = flag(
        False,
        "Use an --output_dir that holds files: what an earlier run wrote there is deleted; other files stay, "
        "unless the run writes a file of the same name.",
    )
    per_device_train_batch_size: int = flag(
        64, "Sentences per batch on each device; the others are its negatives."
    )
    per_device_eval_batch_size: int = flag(64, "Sentences per batch at evaluation.")
    learning_rate: float = flag(3e-5, "AdamW's peak learning rate.")
    num_train_epochs: float = flag(1.0, "Passes over the sentences.")
    logging_steps: float = flag(10, "Log every so many steps; below 1: a share of all steps.")
    eval_strategy: str = flag("steps", "When to evaluate: 'no', 'steps', 'epoch'.")
    eval_steps: float | None = flag(0.1, "Evaluate every so many steps; below 1: a share of all steps.")
    eval_on_start: bool = flag(True, "Evaluate before the first step.")
    save_strategy: str = flag(
        "best",
        "When to write a checkpoint: 'best' (when the score improves), 'steps' (every --save_steps) or 'epoch' "
        "(with --load_best_model_at_end also when the score improves), 'no'.",
    )
    save_total_limit: int | None = flag(2, "Checkpoints to keep; the best is always among them.")
    load_best_model_at_end: bool = flag(True, "End with the best checkpoint, not the last.")
    metric_for_best_model: str = flag(
        "stsb_spearman",
        "What makes a checkpoint the best: '<task>_spearman' of the dev pairs (where their task is not STSB, "
        "it takes its place), 'alignment' or 'uniformity'.",
    )
    dataloader_drop_last: bool = flag(True, "Leave out the last, smaller batch of an epoch.")
    remove_unused_columns: bool = flag(False, "Without effect: sentences have no columns.")

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # or transformers refuses bf16, which a CPU can do
        self.metric_for_best_model = (self.metric_for_best_model or "stsb_spearman").removeprefix("eval_")
        if self.greater_is_better is None:
            self.greater_is_better = self.metric_for_best_model.endswith("_spearman")
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every one is used
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False  # a queue is its process's own
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        if "no" in (self.eval_strategy, self.save_strategy):
            self.load_best_model_at_end = False  # there is no best checkpoint to load
        if self.disable_tqdm is None and not sys.stderr.isatty():
            self.disable_tqdm = True  # a bar that is drawn again and again fills a log file
        if self.deepspeed:
            raise ValueError("--deepspeed is not supported: --fsdp shards weights, gradients and optimizer alike")
        # transformers demands that checkpoints and evaluations fall together, so that the best is among the
        # checkpoints. Here an evaluation that is the best so far writes one, whatever the strategies are.
        load_best, self.load_best_model_at_end = self.load_best_model_at_end, False
        super().__post_init__()
        self.load_best_model_at_end = load_best
        checks = {
            "learning_rate": (self.learning_rate >= 0, "0 or more (typically 3e-5)"),
            "train_sampling_strategy": (
                self.train_sampling_strategy in ("random", "sequential"),
                "random or sequential",
            ),
            "bf16_full_eval": (not self.bf16_full_eval, "False: evaluation is in fp32"),
            "fp16_full_eval": (not self.fp16_full_eval, "False: evaluation is in fp32"),
            "per_device_train_batch_size": (self.per_device_train_batch_size > 0, "1 or more"),
            "per_device_eval_batch_size": (self.per_device_eval_batch_size > 0, "1 or more"),
            "label_smoothing_factor": (self.label_smoothing_factor == 0, "0: labels are not smoothed here"),
            "gradient_accumulation_steps": (self.gradient_accumulation_steps > 0, "1 or more"),
            "num_train_epochs": (self.num_train_epochs > 0 or self.max_steps > 0, "a positive number"),
            "max_steps": (self.max_steps > 0 or self.max_steps == -1, "1 or more, or -1 for --num_train_epochs"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be {expected}")
