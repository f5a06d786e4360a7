"""``python -m simcse.train``: SimCSE on a file of sentences, pairs or triplets, watched on STS pairs."""

import shlex
import sys
from pathlib import Path

from simcse.errors import UserError, exit_cleanly, is_first

with exit_cleanly("simcse.train"):  # these take seconds, and Ctrl-C has to be clean in them too
    from transformers import set_seed
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy, get_last_checkpoint
    from transformers.utils import logging

    from simcse.arguments import DataArguments, LossArguments, ModelArguments, SimCSETrainingArguments, parse
    from simcse.dataset import shipped
    from simcse.elastic import checkpoint_of_this_run, join_again, mark_end, mark_start
    from simcse.files import output_folder
    from simcse.legacy import translate
    from simcse.model import load_encoder, max_tokens
    from simcse.plot import plot_path
    from simcse.recipes import with_recipe
    from simcse.report import closing_table, evaluations, training_card
    from simcse.sts import read_sts, watched_pairs
    from simcse.table import read_table
    from simcse.trainer import SimCSETrainer

DESCRIPTION = (
    "Train a sentence encoder with SimCSE and GS-InfoNCE. Without arguments it runs on what is at hand, "
    "in minutes on a CPU: the encoder of the extra 'demo', sentences and graded pairs in the package."
)
# What the few sentences in the package need, put before the user's own flags.
DEMO_FLAGS = ["--num_train_epochs", "3"]
PLOT_FILE = "alignment_uniformity.png"


def main(argv: list[str] | None = None) -> None:
    with exit_cleanly("simcse.train"):
        logging.disable_progress_bar()  # of loading weights; training has its own
        trainer = prepare(argv)
        if trainer.is_world_process_zero():
            mark_start(trainer.args.output_dir)
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        trainer.card = training_card(trainer.card, evaluations(trainer.state.log_history), trainer.state)
        trainer.save_model()
        trainer.save_state()
        if trainer.is_world_process_zero():
            conclude(trainer)
            mark_end(trainer.args.output_dir)
        trainer.accelerator.end_training()


def prepare(argv: list[str] | None = None) -> SimCSETrainer:
    """The trainer that a command line asks for. Checks every input before anything is written."""
    argv = translate(sys.argv[1:] if argv is None else argv, _warn)
    command = shlex.join(["python", "-m", "simcse.train", *argv])
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
    args.output_dir = str(output_folder("--output_dir", args.output_dir))
    table = read_table(data_args.train_file or shipped("sentences.txt"), data_args.strict_data)
    if table.bad:
        _warn(f"{table.name}: {table.report()}")
    sts_file = data_args.sts_data or (None if data_args.train_file else shipped("sts.tsv"))
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
    if args.resume_from_checkpoint:
        args.resume_from_checkpoint = _checkpoint(args)
    args.resume_from_checkpoint = checkpoint_of_this_run(args.output_dir) or args.resume_from_checkpoint
    if pairs is None:
        args.eval_strategy = IntervalStrategy.NO
        args.eval_on_start = args.load_best_model_at_end = False
        args.metric_for_best_model = None
        if args.save_strategy == SaveStrategy.BEST:
            args.save_strategy = SaveStrategy.STEPS
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
    limit = max_tokens(encoder, tokenizer)
    if data_args.max_seq_length > limit:
        raise UserError(
            f"--max_seq_length {data_args.max_seq_length} is more than the {limit} tokens the model reads"
        )
    try:  # transformers checks what the flags ask of this machine, then makes the folder
        trainer = SimCSETrainer(encoder, tokenizer, args, loss_args, table.rows, pairs, data_args.max_seq_length)
    except OSError as error:
        raise UserError(f"cannot write to --output_dir {args.output_dir}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{error} (--help lists the flags)") from None
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
        f"{batch} a batch"
        + (f" on {args.world_size} processes, negatives {loss_args.negatives}" if args.world_size > 1 else "")
        + (f"; {len(pairs.scores):,} pairs of {pairs.name}" if pairs else ", no pairs")
    )
    return trainer


def _warn(message: str) -> None:
    if is_first():
        print(f"simcse.train: warning: {message}", file=sys.stderr)


def _checkpoint(args: SimCSETrainingArguments) -> str:
    """The folder that ``--resume_from_checkpoint`` means; ``true`` is the latest in ``--output_dir``."""
    folder = args.resume_from_checkpoint
    if str(folder).lower() == "true":
        folder = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        if folder is None:
            raise UserError(f"--resume_from_checkpoint: {args.output_dir} contains no checkpoint")
    if not Path(folder, "trainer_state.json").is_file():
        raise UserError(f"{folder} is not a checkpoint (trainer_state.json is missing)")
    return folder


def conclude(trainer: SimCSETrainer) -> None:
    """Print the table before → after and where everything is; draw the plot."""
    output = Path(trainer.args.output_dir)
    points = evaluations(trainer.state.log_history)
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    if len(points) > 1:
        title = f"{trainer.eval_dataset.name}, {trainer.model.encoder.pooler_type}"
        after = next((point for point in points if point["step"] == best), points[-1])
        print("\n" + closing_table(title, points[0], after) + "\n")
        if "alignment" in points[0]:
            plot_path(points, title, output / PLOT_FILE, best)
            print(f"plot   {output / PLOT_FILE}")
    print(f"model  {output}" + (f" (the best, step {best})" if best else ""))
    print(f"try    python -m simcse.evaluate --model_name_or_path {output}")


if __name__ == "__main__":
    main()
