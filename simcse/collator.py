"""What is trained on: the sentences in the package, and the batch that holds V views of each row."""

from hashlib import blake2b
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Row = tuple[str, ...]


def packaged_file(name: str) -> Path:
    """The path of a file in ``simcse/data``, which is installed with the package."""
    return Path(str(resources.files("simcse") / "data" / name))


class Views:
    """B rows of sentences → token ids and masks of V·B rows, view after view: row v·B + i is view v of row i.

    A row of one sentence gives it twice: the two views differ only by the dropout that the model draws for each,
    SimCSE's positive pair. A row of several gives anchor, positive, and then its hard negatives.

    With ``mask_duplicates`` the batch also has ``ids`` (V·B,): see :func:`duplicate_ids`. Where the batch is only
    a part of a larger one, ``is_full_batch=False``, they are :func:`text_keys`, for the whole to be numbered by.

    ``query_prompt`` is put before the first view, ``document_prompt`` before the others.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        mask_duplicates: bool = False,
        is_full_batch: bool = True,
        query_prompt: str = "",
        document_prompt: str = "",
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.mask_duplicates = mask_duplicates
        self.is_full_batch = is_full_batch
        self.query_prompt = query_prompt
        self.document_prompt = document_prompt

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        views = list(zip(*(row * 2 if len(row) == 1 else row for row in rows), strict=True))  # V of B
        texts = [text for view in views for text in view]
        prompts = [self.query_prompt] * len(rows) + [self.document_prompt] * (len(texts) - len(rows))
        tokens = self.tokenizer(
            [prompt + text for prompt, text in zip(prompts, texts, strict=True)],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )  # (V·B, L)
        batch = dict(tokens)
        if self.mask_duplicates:
            keys = text_keys(texts)
            batch["ids"] = duplicate_ids(keys, len(rows)) if self.is_full_batch else torch.tensor(keys)
        return batch


def text_keys(texts: list[str]) -> list[int]:
    """A hash of 63 bits for each text, in every process the same; case and white space do not count."""
    alike = (" ".join(text.casefold().split()) for text in texts)
    return [int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1 for text in alike]


def duplicate_ids(keys: list[int], rows: int) -> Tensor:
    """(V·B,) integers, equal where the texts of two keys say that they are no negatives of each other.

    Rows that share an anchor or a positive get one id, and so does a hard negative that is such a text; every
    other hard negative has an id of its own.
    """
    parent: dict[int, int] = {}

    def root(key: int) -> int:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for anchor, positive in zip(keys[:rows], keys[rows : 2 * rows], strict=True):
        parent[root(positive)] = root(anchor)
    number = {key: i for i, key in enumerate(parent)}
    ids = [number[root(key)] if key in parent else len(number) + i for i, key in enumerate(keys)]
    return torch.tensor(ids)
