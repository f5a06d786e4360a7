"""The flags of the reference's scripts (SimCSE, GS-InfoNCE) as today's, with a warning where a meaning changed."""

from collections.abc import Callable

from simcse.errors import UserError

# old flag → today's
RENAMED = {
    "--evaluation_strategy": "--eval_strategy",
    "--random_size": "--num_noise",
    "--lambda_g": "--noise_weight",
    "--no_cuda": "--use_cpu",
    "--per_gpu_train_batch_size": "--per_device_train_batch_size",
    "--per_gpu_eval_batch_size": "--per_device_eval_batch_size",
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
# old flag → what to do instead, where leaving it out would train something else
REFUSED = {
    "--model_type": "save a new model and its tokenizer with save_pretrained, and name the folder",
    "--config_name": "put the config.json into the model folder",
    "--tokenizer_name": "put the tokenizer's files into the model folder",
    "--cache_dir": "set the environment variable HF_HOME",
    "--model_revision": "hf download NAME --revision REVISION --local-dir FOLDER, and name the folder",
    "--use_auth_token": "log in with hf auth login, or set HF_TOKEN",
    "--dataset_name": "--train_file takes the name of a hub dataset",
    "--dataset_config_name": "save that configuration's rows to a file for --train_file",
}
OFF = ("false", "f", "no", "n", "0")


def translate(argv: list[str], warn: Callable[[str], None]) -> list[str]:
    """``argv`` in today's flags; ``warn`` gets a line for each flag that was dropped or means something else.

    Raises:
        UserError: a flag that has no counterpart and would change what is trained.
    """
    _warn_if_not_told_to_train(argv, warn)
    result: list[str] = []
    dropping = False  # the values of a dropped flag go with it
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            flag = _underscored(flag)
            dropping = flag in DROPPED
            if dropping:
                warn(f"{flag} is ignored: {DROPPED[flag]}")
                dropping = not equals
                continue
            if flag in REFUSED:
                raise UserError(f"{flag} is not supported: {REFUSED[flag]}")
            if flag in MEANING:
                warn(f"{flag} is now {RENAMED[flag]}: {MEANING[flag]}")
            if flag in RENAMED:
                argument = RENAMED[flag] + equals + value
        elif dropping:
            dropping = False
            continue
        result.append(argument)
    return result


def _underscored(flag: str) -> str:
    return flag.replace("-", "_").replace("__", "--", 1)


def _warn_if_not_told_to_train(argv: list[str], warn: Callable[[str], None]) -> None:
    """The reference trains with ``--do_train`` only; here there is nothing else to do."""
    asked = {}
    for argument, following in zip(argv, [*argv, "--"][1:], strict=True):
        flag, equals, value = argument.partition("=")
        value = value if equals else ("" if following.startswith("--") else following)
        asked[_underscored(flag)] = value.lower() not in OFF
    others = [flag for flag in ("--do_eval", "--do_predict") if asked.get(flag)]
    if not asked.get("--do_train", not others):
        warn(
            f"{' '.join(others) or '--do_train false'}: simcse train trains all the same; simcse evaluate scores "
            "a model as it is"
        )
