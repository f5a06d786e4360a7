"""Published hyper-parameters as ``--recipe``: flags that come before the user's own, which override them.

SimCSE: the table "Hyperparameters" in the README of princeton-nlp/SimCSE, with the flags of its
``run_unsup_example.sh`` and ``run_sup_example.sh`` (Gao et al., EMNLP 2021, appendix A). GS-InfoNCE: the
``run.sh`` of its code (COLING 2022), whose noise is 192 vectors for every model.
"""

from typing import Any

from simcse.errors import UserError

COMMON = {"max_seq_length": 32, "temp": 0.05, "pooler_type": "cls"}
UNSUPERVISED = {**COMMON, "mlp_only_train": True, "num_train_epochs": 1, "eval_steps": 125, "num_noise": 0}
SUPERVISED = {
    **COMMON,
    "num_train_epochs": 3,
    "eval_steps": 125,
    "num_noise": 0,
    "per_device_train_batch_size": 512,
}


def _recipe(base: dict[str, Any], model: str, rate: float, batch: int, **others: Any) -> dict[str, Any]:
    settings = {"model_name_or_path": model, "learning_rate": rate, "per_device_train_batch_size": batch}
    return {**base, **settings, **others}


BERT, BERT_LARGE, ROBERTA, ROBERTA_LARGE = (
    "bert-base-uncased",
    "bert-large-uncased",
    "roberta-base",
    "roberta-large",
)
RECIPES: dict[str, dict[str, Any]] = {
    "simcse-bert-base": _recipe(UNSUPERVISED, BERT, 3e-5, 64),
    "simcse-bert-large": _recipe(UNSUPERVISED, BERT_LARGE, 1e-5, 64),
    "simcse-roberta-base": _recipe(UNSUPERVISED, ROBERTA, 1e-5, 512),
    "simcse-roberta-large": _recipe(UNSUPERVISED, ROBERTA_LARGE, 3e-5, 512),
    "sup-simcse-bert-base": _recipe(SUPERVISED, BERT, 5e-5, 512),
    "sup-simcse-bert-large": _recipe(SUPERVISED, BERT_LARGE, 1e-5, 512),
    "sup-simcse-roberta-base": _recipe(SUPERVISED, ROBERTA, 5e-5, 512),
    "sup-simcse-roberta-large": _recipe(SUPERVISED, ROBERTA_LARGE, 1e-5, 512),
    "gs-infonce-bert-base": _recipe(UNSUPERVISED, BERT, 3e-5, 64, num_noise=192, dropout=0.2),
    "gs-infonce-bert-large": _recipe(UNSUPERVISED, BERT_LARGE, 1e-5, 64, num_noise=192, dropout=0.2),
    "gs-infonce-roberta-base": _recipe(UNSUPERVISED, ROBERTA, 1e-5, 64, num_noise=192, dropout=0.1),
    "gs-infonce-roberta-large": _recipe(UNSUPERVISED, ROBERTA_LARGE, 2e-5, 128, num_noise=192, dropout=0.1),
}


def with_recipe(argv: list[str]) -> list[str]:
    """The command line with the flags of its ``--recipe`` put first, where the user's override them."""
    name = None
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag == "--recipe":
            name = value if equals else (argv[i + 1] if i + 1 < len(argv) else "")
    if name is None:
        return argv
    if name not in RECIPES:
        raise UserError(f"--recipe {name or '(nothing)'} is not known; choose from {', '.join(RECIPES)}")
    flags = [text for key, value in RECIPES[name].items() for text in (f"--{key}", str(value))]
    return [*flags, *argv]
