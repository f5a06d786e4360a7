"""Training text: a sentence a line, and the batch that encodes each sentence twice."""

import gzip
import zlib
from importlib import resources
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from simcse.errors import UserError


def shipped(name: str) -> Path:
    """The path of a file in ``simcse/data``, which is installed with the package."""
    return Path(str(resources.files("simcse") / "data" / name))


def read_sentences(path: str | Path) -> list[str]:
    """The sentences of a ``.txt`` or ``.txt.gz`` file, one a line, UTF-8; blank lines are skipped."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"there is no file {path}; --train_file takes a .txt or .txt.gz file, a sentence a line")
    if not path.name.endswith((".txt", ".txt.gz")):
        raise UserError(f"{path} is neither .txt nor .txt.gz; --train_file takes plain text, a sentence a line")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            sentences = [sentence for line in lines if (sentence := line.strip())]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: {error.reason} in UTF-8; save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if any("\0" in sentence for sentence in sentences):
        raise UserError(f"{path} is not text: it has NUL bytes; save it as UTF-8")
    if not sentences:
        raise UserError(f"{path} holds no sentence; put one on each line")
    return sentences


class TwoViews:
    """B sentences → token ids and masks of 2B rows: row i and row B + i hold sentence i.

    The two rows differ only by the dropout that the model draws for each: SimCSE's positive pair.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __call__(self, sentences: list[str]) -> dict[str, Tensor]:
        tokens = self.tokenizer(
            sentences, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )  # (B, L)
        return {name: rows.repeat(2, 1) for name, rows in tokens.items()}  # (2B, L)
