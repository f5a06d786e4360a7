"""The flags of the reference's scripts (SimCSE, GS-InfoNCE) as today's, with a warning where a meaning changed."""

from collections.abc import Callable

# old flag → today's
RENAMED = {
    "--evaluation_strategy": "--eval_strategy",
    "--random_size": "--num_noise",
    "--lambda_g": "--noise_weight",
}
MEANING = {
    "--lambda_g": "the reference never uses lambda_g (its weight is 1); here it is the weight of the noise",
}
# old flag → why it is gone
DROPPED = {
    "--random_std": "the scale of the noise has no effect under cosine similarity",
    "--overwrite_cache": "nothing is cached",
    "--preprocessing_num_workers": "sentences are tokenised batch by batch (--dataloader_num_workers)",
    "--validation_file": "training is watched on --sts_data",
    "--validation_split_percentage": "training is watched on --sts_data",
    "--pad_to_max_length": "a batch is padded to its longest sentence, which changes no score",
    "--use_fast_tokenizer": "the fast tokenizer is taken where there is one",
    "--eval_transfer": "transfer tasks run through mteb on the saved folder (docs/trainer.md)",
}


def translate(argv: list[str], warn: Callable[[str], None]) -> list[str]:
    """``argv`` in today's flags; ``warn`` gets a line for each flag that was dropped or means something else."""
    result: list[str] = []
    dropping = False  # the values of a dropped flag go with it
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            flag = flag.replace("-", "_").replace("__", "--", 1)
            dropping = flag in DROPPED
            if dropping:
                warn(f"{flag} is ignored: {DROPPED[flag]}")
                dropping = not equals
                continue
            if flag in MEANING:
                warn(f"{flag} is now {RENAMED[flag]}: {MEANING[flag]}")
            if flag in RENAMED:
                argument = RENAMED[flag] + equals + value
        elif dropping:
            dropping = False
            continue
        result.append(argument)
    return result
