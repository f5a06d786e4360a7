"""The tokenizer of a model, with what training needs of it."""

from logging import getLogger
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from simcse.errors import UserError
from simcse.sources import base_folder, load_arguments, quiet
from simcse.weights import first_line


def load_tokenizer(source: Path, name: str) -> PreTrainedTokenizerBase:
    try:
        with quiet():
            own = any(source.glob("tokenizer*"))  # peft saves none with an adapter
            tokenizer = AutoTokenizer.from_pretrained(**load_arguments(source if own else base_folder(source)))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"cannot load the tokenizer in {name}: {first_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up where no file is
        raise UserError(f"{name} holds no tokenizer: save_pretrained of the tokenizer writes tokenizer.json")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer in {name} has no padding token, which batches need, and no end-of-sequence token "
                "to take its place; set its pad_token and save it"
            )
        tokenizer.pad_token = tokenizer.eos_token
        getLogger("simcse").warning(
            f"the tokenizer in {name} has no padding token; its end-of-sequence token {tokenizer.eos_token} takes "
            "that place, here and in what is saved"
        )
    return tokenizer


def check_vocabulary(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    table = backbone.get_input_embeddings()
    if isinstance(table, nn.Embedding) and len(tokenizer) > table.num_embeddings:
        raise UserError(
            f"the tokenizer in {name} has {len(tokenizer):,} tokens and the model {table.num_embeddings:,}: they "
            "do not belong together"
        )


def lower_case(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """``do_lower_case`` as sentence-transformers follows it: before any other normalisation."""
    from tokenizers.normalizers import Lowercase, Sequence

    if not tokenizer.is_fast:
        raise UserError(f"{name} sets do_lower_case, which is supported with fast tokenizers only")
    backend = tokenizer.backend_tokenizer
    backend.normalizer = Sequence([Lowercase()] + ([backend.normalizer] if backend.normalizer else []))
