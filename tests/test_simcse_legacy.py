"""Every flag of the reference's train.py is honoured, refused by name, or said to be without effect."""

from __future__ import annotations

import dataclasses

import pytest
from test_simcse_options import folder, prepared  # noqa: F401 (a fixture)

from simcse.arguments import DataArguments, LossArguments, ModelArguments, SimCSETrainingArguments
from simcse.errors import UserError
from simcse.legacy import DROPPED, REFUSED, RENAMED, translate

# The flags that princeton-nlp/SimCSE's train.py declares, those of its scripts, and those that GS-InfoNCE adds.
REFERENCE = [
    "model_name_or_path",
    "model_type",
    "config_name",
    "tokenizer_name",
    "cache_dir",
    "use_fast_tokenizer",
    "model_revision",
    "use_auth_token",
    "temp",
    "pooler_type",
    "hard_negative_weight",
    "do_mlm",
    "mlm_weight",
    "mlp_only_train",
    "dataset_name",
    "dataset_config_name",
    "overwrite_cache",
    "validation_split_percentage",
    "preprocessing_num_workers",
    "train_file",
    "max_seq_length",
    "pad_to_max_length",
    "mlm_probability",
    "eval_transfer",
    "output_dir",
    "num_train_epochs",
    "per_device_train_batch_size",
    "learning_rate",
    "evaluation_strategy",
    "metric_for_best_model",
    "load_best_model_at_end",
    "eval_steps",
    "overwrite_output_dir",
    "do_train",
    "do_eval",
    "fp16",
    "seed",
    "no_cuda",
    "logging_steps",
    "per_gpu_train_batch_size",
    "per_gpu_eval_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "warmup_steps",
    "max_steps",
    "random_size",
    "random_std",
    "lambda_g",
]
OURS = {
    field.name
    for kind in (ModelArguments, DataArguments, LossArguments, SimCSETrainingArguments)
    for field in dataclasses.fields(kind)
}


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("spelling", ["--{}", "--{}=7"])
def test_flag_of_the_reference(name, spelling):
    flag, said = f"--{name}", []
    argv = [spelling.format(name)] + ([] if "=" in spelling else ["7"])
    if flag in REFUSED:
        with pytest.raises(UserError, match=f"{flag} is not supported: "):
            translate(argv, said.append)
        return
    translated = translate(["--do_train", *argv], said.append)[1:]
    if flag in DROPPED:
        assert translated == []
        assert said == [f"{flag} is ignored: {DROPPED[flag]}"]
        return
    today = RENAMED.get(flag, flag)
    assert today.removeprefix("--") in OURS
    assert translated == [argument.replace(flag, today, 1) for argument in argv]


@pytest.mark.parametrize(
    ("argv", "warned"),
    [
        (["--do_train", "--do_eval"], ""),
        (["--do-train", "--do-eval"], ""),
        (["--do_train=True", "--do_predict", "true"], ""),
        ([], ""),
        (["--do_eval", "false"], ""),
        (["--do_eval"], "--do_eval: simcse train trains all the same"),
        (["--do_predict", "--temp", "0.1"], "--do_predict: simcse train trains all the same"),
        (["--do_eval=true", "--do_train", "False"], "--do_eval: simcse train trains all the same"),
        (["--do_train=false"], "--do_train false: simcse train trains all the same"),
    ],
    ids=str,
)
def test_a_command_that_does_not_ask_for_training(argv, warned):
    said: list[str] = []
    translate(argv, said.append)
    assert [line[: len(warned)] for line in said] == [warned] * bool(warned)


def test_label_smoothing_is_refused(folder, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="--label_smoothing_factor is"):
        prepared(folder, tmp_path, label_smoothing_factor=0.1)
