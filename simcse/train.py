"""``python -m simcse.train``: SimCSE on a file of sentences, pairs or triplets, watched on STS pairs."""

import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from simcse.errors import UserError, exit_cleanly, is_local_rank_zero

with exit_cleanly("simcse.train"):  # these take seconds, and Ctrl-C has to be clean in them too
    from transformers import set_seed
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy
    from transformers.utils import logging

    from fused_infonce.config import FIELDS, NOISE_OPTIONS
    from simcse.arguments import (
        DataArguments,
        LossArguments,
        ModelArguments,
        SimCSETrainingArguments,
    )
    from simcse.backbone import dropouts
    from simcse.collator import packaged_file
    from simcse.elastic import join_again, mark_end, restarts, run_of_this_launch
    from simcse.encoder import max_tokens
    from simcse.flags import asking, column_names, parse
    from simcse.legacy import translate
    from simcse.lora import add_adapter
    from simcse.model import base_name, load_encoder
    from simcse.plot import plot_path
    from simcse.published import options_of
    from simcse.readers import read_table
    from simcse.recipes import with_recipe
    from simcse.report import closing_table, evaluations, training_card
    from simcse.resuming import check_settings, find_checkpoint
    from simcse.runs import PLOT_FILE, Run, check_output_dir, digest, inside
    from simcse.storage import saving
    from simcse.sts import read_sts, watched_pairs
    from simcse.trainer import SimCSETrainer

DESCRIPTION = (
    "Train a sentence encoder with SimCSE and GS-InfoNCE. Without arguments it runs on what is at hand, "
    "in minutes on a CPU: the encoder of the extra 'demo', sentences and graded pairs in the package."
)
# What the few sentences in the package need, put before the user's own flags.
DEMO_FLAGS = ["--num_train_epochs", "3"]
EVALUATION_FLAGS = (
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "per_device_eval_batch_size",
    "metric_for_best_model",
    "greater_is_better",
    "load_best_model_at_end",
)
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
UNLISTED_TRACKERS = ("azure_ml", "flyte")  # which transformers does not list though they are installed
# Settings of Trainer that a checkpoint's state fits, beside those of the model, the data and the loss.
KEPT = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_drop_last"),
    *("train_sampling_strategy", "seed", "data_seed", "num_train_epochs", "max_steps"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "fp16", "fsdp", "neftune_noise_alpha", "metric_for_best_model"),
)
# Flags of the loss that a resumed run may change: they say where and in which parts it is computed.
MAY_CHANGE = {"mini_batch_size", *(name for name, field in FIELDS.items() if not field.metadata["changes_loss"])}


def main(argv: list[str] | None = None) -> None:
    with exit_cleanly("simcse.train"):
        logging.disable_progress_bar()  # of loading weights; training has its own
        trainer = prepare(argv)
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        trainer.card = training_card(trainer.card, evaluations(trainer.state.log_history), trainer.state)
        trainer.save_model()
        trainer.save_state()
        if trainer.is_world_process_zero():
            print_summary(trainer)
            mark_end(trainer.args.output_dir)
        trainer.accelerator.end_training()


def prepare(argv: list[str] | None = None) -> SimCSETrainer:
    """The trainer that a command line asks for. Checks every input before anything is written."""
    argv = translate(sys.argv[1:] if argv is None else argv, _warn)
    command = shlex.join(["python", "-m", "simcse.train", *argv])
    given = {arg.partition("=")[0].lstrip("-").replace("-", "_") for arg in argv if arg.startswith("--")}
    argv = with_recipe(argv)
    if not any(arg.startswith(("--train_file", "--train-file")) for arg in argv):
        argv = [*DEMO_FLAGS, *argv]
    join_again()
    model_args, data_args, loss_args, args = parse(
        (ModelArguments, DataArguments, LossArguments, SimCSETrainingArguments),
        "simcse.train",
        DESCRIPTION,
        argv,
    )
    table = read_table(
        data_args.train_file or packaged_file("sentences.txt"),
        data_args.strict_data,
        column_names(data_args.columns),
    )
    for warning in [table.report(), *table.warnings]:
        if warning:
            _warn(f"{table.name}: {warning}")
    sts_file = data_args.sts_data or (None if data_args.train_file else packaged_file("sts.tsv"))
    pairs = watched_pairs(read_sts(sts_file)) if sts_file else None
    if sts_file and pairs is None:
        raise UserError(f"{sts_file} has no rows of the split 'dev' to watch; add some, or leave --sts_data out")

    batch = args.train_batch_size * args.world_size
    if batch > len(table.rows):
        raise UserError(
            f"a batch of {batch} sentences is more than the {len(table.rows)} in "
            f"{data_args.train_file or 'the package'}; lower --per_device_train_batch_size, or train on more"
        )
    if loss_args.queue_size % args.world_size and loss_args.negatives == "global":
        raise UserError(
            f"--queue_size {loss_args.queue_size} is not a multiple of the {args.world_size} processes "
            "that share it"
        )
    output = Path(args.output_dir)
    checkpoint = _checkpoint(args, output)
    if pairs is None:
        _train_unwatched(args, given)
    else:
        watched = f"{pairs.task.lower()}_spearman"
        if args.metric_for_best_model == "stsb_spearman":
            args.metric_for_best_model = watched
        measured = [watched, "uniformity"] + ["alignment"] * (max(pairs.scores) > 4)
        if args.metric_for_best_model not in measured:
            raise UserError(
                f"--metric_for_best_model {args.metric_for_best_model} is not measured on {pairs.name}; "
                f"choose from {', '.join(measured)}"
            )

    set_seed(args.seed)  # a new MLP draws its weights
    encoder, tokenizer = load_encoder(
        model_args.model_name_or_path,
        model_args.pooler_type,
        model_args.mlp_only_train,
        new_mlp=True,
        default_pooler="cls_before_pooler",
        dropout=model_args.dropout,
    )
    if model_args.lora_r:
        add_adapter(
            encoder.backbone,
            base_name(encoder, model_args.model_name_or_path),
            model_args.lora_r,
            model_args.lora_alpha,
            model_args.lora_dropout,
            model_args.lora_target_modules,
        )
    encoder.settings = encoder.settings.with_prompts(data_args.query_prompt, data_args.document_prompt)
    varied = [*dropouts(encoder.config).values(), model_args.lora_dropout, args.neftune_noise_alpha]
    if len(table.rows[0]) == 1 and not any(varied) and data_args.query_prompt == data_args.document_prompt:
        _warn(
            f"{model_args.model_name_or_path} has no dropout, so the two views of a sentence are the same; give "
            "--dropout 0.1"
        )
    limit = max_tokens(encoder, tokenizer)
    if data_args.max_seq_length > limit:
        raise UserError(
            f"--max_seq_length {data_args.max_seq_length} is more than the {limit} tokens the model reads"
        )
    settings = {
        "train_file": f"{len(table.rows)} {digest(text for row in table.rows for text in row)}",
        "sts_data": f"{len(pairs.scores)} {digest(iter(pairs.sentences))}" if pairs else None,
        "model_name_or_path": digest(iter(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get))),
        "pooler_type": encoder.pooler_type,
        "mlp_only_train": encoder.mlp_only_train,
        "dropout": model_args.dropout,
        **{name: getattr(model_args, name) for name in LORA},
        "query_prompt": data_args.query_prompt,
        "document_prompt": data_args.document_prompt,
        "max_seq_length": data_args.max_seq_length,
        **{name: value for name, value in vars(loss_args).items() if name not in MAY_CHANGE},
        **{name: getattr(args, name) for name in KEPT},
        "processes": args.world_size,
    }
    if checkpoint is not None:
        check_settings(checkpoint, settings, _warn)
    is_new = not output.exists()
    try:
        trainer = _trainer(
            *(encoder, tokenizer, args, loss_args, table.rows, pairs, data_args.max_seq_length),
            *(data_args.query_prompt or "", data_args.document_prompt or "", model_args.lora_merge),
        )
        trainer.run = Run.new(settings)
        if checkpoint is not None:
            trainer.check_resumable(checkpoint)
    except UserError:
        if is_new:
            with suppress(OSError):
                output.rmdir()
        raise
    args.resume_from_checkpoint = str(checkpoint) if checkpoint is not None else None
    if checkpoint is None and trainer.model.mlm is not None and trainer.model.mlm.missing:  # a checkpoint has it
        _warn(
            f"--do_mlm: {model_args.model_name_or_path} has no pretrained head of a masked language model; a new "
            f"one is trained ({', '.join(trainer.model.mlm.missing)})"
        )
    trainer.card = (
        f"Trained from `{model_args.model_name_or_path}` on {len(table.rows):,} rows of {len(table.rows[0])} "
        f"columns of `{Path(table.name).name}`"
        + (f", recipe `{args.recipe}`" if args.recipe else "")
        + f":\n\n```sh\n{command}\n```\n"
    )
    if not trainer.is_world_process_zero():
        return trainer
    kind = {1: "sentences", 2: "pairs"}.get(
        len(table.rows[0]), f"pairs with {len(table.rows[0]) - 2} hard negatives"
    )
    print(
        f"{model_args.model_name_or_path}, {encoder.pooler_type}: {len(table.rows):,} {kind}, "
        f"{batch} per batch"
        + (f" on {args.world_size} processes, negatives {loss_args.negatives}" if args.world_size > 1 else "")
        + f"; {_loss_name(loss_args)}"
        + (f"; {len(pairs.scores):,} pairs of {pairs.name}" if pairs else "; no pairs")
    )
    print(f"columns  {table.roles}")
    if checkpoint is not None:
        print(f"goes on from {checkpoint}")
    return trainer


def _warn(message: str) -> None:
    if is_local_rank_zero():
        print(f"simcse.train: warning: {message}", file=sys.stderr)


def _checkpoint(args: SimCSETrainingArguments, output: Path) -> Path | None:
    """What the run goes on from, None where it starts; refuses a folder that is not this run's."""
    if not restarts() and args.process_index == 0:
        mark_end(output)
    launched = run_of_this_launch(output)
    own = Run(launched, {}).checkpoints(output) if launched else []
    given = args.resume_from_checkpoint
    if own:
        return own[-1]
    checkpoint = find_checkpoint(output, given, _warn) if given and given.lower() != "false" else None
    if not launched and (checkpoint is None or not inside(checkpoint, output)):
        check_output_dir(output, args.overwrite_output_dir)
    return checkpoint


def _train_unwatched(args: SimCSETrainingArguments, given: set[str]) -> None:
    """Without pairs nothing is evaluated; what the user asked of evaluations has no effect."""
    idle = [name for name in EVALUATION_FLAGS if name in given and getattr(args, name) not in (False, None, "no")]
    if args.save_strategy == SaveStrategy.BEST and "save_strategy" in given:
        idle.append("save_strategy")
    if idle:
        flags = ", ".join(f"--{name}" for name in idle)
        _warn(f"without --sts_data nothing is evaluated: {flags} {'have' if len(idle) > 1 else 'has'} no effect")
    if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise UserError(
            f"--lr_scheduler_type {args.lr_scheduler_type.value} follows a score: give --sts_data, or another one"
        )
    args.eval_strategy = IntervalStrategy.NO
    args.eval_on_start = args.load_best_model_at_end = False
    args.metric_for_best_model = None
    if args.save_strategy == SaveStrategy.BEST:
        args.save_strategy = SaveStrategy.STEPS


def _trainer(encoder: Any, tokenizer: Any, args: SimCSETrainingArguments, *inputs: Any) -> SimCSETrainer:
    """transformers checks what the flags ask of this machine, then makes the folder."""
    available = {*get_available_reporting_integrations(), *UNLISTED_TRACKERS}
    for name in set(args.report_to) & set(INTEGRATION_TO_CALLBACK) - available:
        raise UserError(f"--report_to {name}: its package is not installed; install it, or take --report_to none")
    try:
        trainer = SimCSETrainer(encoder, tokenizer, args, *inputs)
        trainer.model.check_loss(args.device, trainer.views, args.per_device_train_batch_size)
    except OSError as error:
        raise UserError(f"cannot write to --output_dir: {error.strerror or error}") from None
    except (ValueError, ImportError) as error:
        raise UserError(f"{error} (--help lists the flags)") from None
    except RuntimeError as error:  # of a tracker that --report_to names
        if "install" not in str(error):
            raise
        raise UserError(f"--report_to: {error}") from None
    with asking("--optim", args.optim):
        trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    return trainer


def _loss_name(options: LossArguments) -> str:
    prefixes = f", summed over prefixes of {', '.join(map(str, options.matryoshka_dims or []))} features"
    return _loss_of_a_prefix(options) + (prefixes if options.matryoshka_dims else "")


def _loss_of_a_prefix(options: LossArguments) -> str:
    if options.loss != "gs_infonce":
        own, shown = options_of(options.loss), options.published_options
        changed = [f", --{name} {shown[name]}" for name in own if shown[name] != own[name].default]
        return f"the loss {options.loss}{''.join(changed)}"
    given = {name: value for name, value in options.loss_options.items() if value != FIELDS[name].default}
    variants = [f"--{name} {value}" for name, value in given.items() if name not in NOISE_OPTIONS]
    others = f", {' '.join(variants)}" if variants else ""
    if not options.num_noise or not options.noise_weight:
        return f"InfoNCE{others}"
    noise = "the expectation of " if options.noise == "expected" else ""
    return f"GS-InfoNCE with {noise}{options.num_noise} noise vectors (--num_noise 0 is SimCSE's InfoNCE){others}"


def print_summary(trainer: SimCSETrainer) -> None:
    """Print the table before → after and where everything is; draw the plot."""
    output = Path(trainer.args.output_dir)
    points = evaluations(trainer.state.log_history)
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    if len(points) > 1:
        title = f"{trainer.eval_dataset.name}, {trainer.model.encoder.pooler_type}"
        after = next((point for point in points if point["step"] == best), points[-1])
        print("\n" + closing_table(title, points[0], after) + "\n")
        points = [point for point in points if {"alignment", "uniformity"} <= set(point)]
        if points:
            with saving(output / PLOT_FILE):
                plot_path(points, title, output / PLOT_FILE, best)
            print(f"plot   {output / PLOT_FILE}")
    print(f"model  {output}" + (f" (the best, step {best})" if best else ""))
    print(f"try    python -m simcse.evaluate --model_name_or_path {output}")


if __name__ == "__main__":
    main()
