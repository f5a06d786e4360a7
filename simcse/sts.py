"""Semantic textual similarity: the file of graded pairs, and what an encoder scores on it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr, spearmanr
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fused_infonce import alignment, anisotropy, uniformity
from simcse.delimited import records
from simcse.encoder import SentenceEncoder, default_length, max_tokens
from simcse.errors import UserError

# The hub's STS sets, as mteb takes them → the task
HUB_SETS = {
    **{f"mteb/sts{year}-sts": f"STS{year}" for year in (12, 13, 14, 15, 16)},
    "mteb/stsbenchmark-sts": "STSB",
    "mteb/sickr-sts": "SICKR",
}
COLUMNS = ("task", "subset", "split", "score", "sentence1", "sentence2")


@dataclass
class Pairs:
    """The graded pairs of one task and split, its subsets one after the other: SentEval's 'all' setting."""

    task: str
    split: str
    first: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    subsets: list[str] = field(default_factory=list)  # of each pair, or empty: one subset

    @property
    def name(self) -> str:
        """``STSB`` for the test split, as tables name it; ``STSB-dev`` for another."""
        return self.task if self.split == "test" else f"{self.task}-{self.split}"

    @property
    def sentences(self) -> list[str]:
        """Both sentences of every pair, repeats included."""
        return self.first + self.second

    def with_prompts(self, first: str, second: str) -> "Pairs":
        """The pairs with a text before the first and one before the second sentence of each."""
        return replace(
            self, first=[first + text for text in self.first], second=[second + text for text in self.second]
        )


def read_sts(path: str | Path) -> list[Pairs]:
    """The tasks of a TSV file with the columns ``task, subset, split, score, sentence1, sentence2``.

    A header row, tabs, quoted as Python's ``csv`` does, UTF-8. One ``Pairs`` for each task and split, in the
    order of the file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"there is no file {path}; --sts_data takes TSV with the columns {', '.join(COLUMNS)}")
    tasks: dict[tuple[str, str], Pairs] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = records(file, "\t")
        try:
            _, _, header = next(lines, (1, 1, []))
            absent = [column for column in COLUMNS if column not in header]
            if absent:
                raise UserError(f"the first line of {path} lacks the columns {', '.join(absent)} (TSV, a header)")
            for line, _, cells in lines:
                if isinstance(cells, str):
                    raise UserError(f"{path}, line {line}: {cells}")
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"{path}, line {line}: {len(cells)} tab-separated cells; the header has {len(header)}"
                    )
                row = dict(zip(header, cells, strict=True))
                pairs = tasks.setdefault((row["task"], row["split"]), Pairs(row["task"], row["split"]))
                pairs.first.append(row["sentence1"])
                pairs.second.append(row["sentence2"])
                pairs.scores.append(_score(row["score"], path, line))
                pairs.subsets.append(row["subset"])
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not text: {error.reason} in UTF-8; save it as UTF-8") from None
    if not tasks:
        raise UserError(f"{path} holds no pair; it has a header and nothing below")
    return list(tasks.values())


def read_sts_source(source: str | Path) -> list[Pairs]:
    """``read_sts`` of a file, of every ``.tsv`` in a folder, or, for ``mteb``, of the hub's seven STS sets."""
    if str(source) in ("mteb", *HUB_SETS):
        names = HUB_SETS if str(source) == "mteb" else [str(source)]
        return [pairs for name in names for pairs in _hub_sts(name)]
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return read_sts(source)
    files = sorted(folder.glob("*.tsv"))
    if not files:
        raise UserError(f"the folder {folder} holds no .tsv file of graded pairs")
    return [pairs for file in files for pairs in read_sts(file)]


def _hub_sts(name: str) -> list[Pairs]:
    from datasets import load_dataset

    try:
        splits = load_dataset(name)  # code in a dataset is not run since datasets 4
    except Exception as error:  # datasets and the hub raise many kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot fetch {name} from the hub ({first}); name a file with --sts_data") from None
    result = []
    for hub_split, split in (("validation", "dev"), ("dev", "dev"), ("test", "test")):
        if hub_split in splits:
            rows = splits[hub_split]
            columns = (list(rows[column]) for column in ("sentence1", "sentence2", "score"))
            result.append(Pairs(HUB_SETS[name], split, *columns))
    return result


def watched_pairs(tasks: list[Pairs]) -> Pairs | None:
    """What training is watched on: the dev split of STS-B, else the first dev split, else None."""
    dev = [pairs for pairs in tasks if pairs.split == "dev"]
    return next((pairs for pairs in dev if pairs.task == "STSB"), dev[0] if dev else None)


def encode(
    encoder: SentenceEncoder,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Iterable[str],
    batch_size: int = 64,
    progress: bool = True,
    prompt: str | None = None,
) -> dict[str, Tensor]:
    """Each distinct sentence → its vector (D,) on the CPU; cut only at the folder's own length."""
    sentences = list(dict.fromkeys(sentences))
    vectors = encode_rows(encoder, tokenizer, sentences, batch_size, progress, prompt=prompt)
    return dict(zip(sentences, vectors, strict=True))


def encode_rows(
    encoder: SentenceEncoder,
    tokenizer: PreTrainedTokenizerBase,
    sentences: list[str],
    batch_size: int = 64,
    progress: bool = True,
    max_length: int | None = None,
    prompt: str | None = None,
) -> Tensor:
    """N sentences → (N, D) on the CPU; fp32, no dropout. Sentences of like length share a batch.

    ``max_length``: tokens that a sentence is cut to; by default ``default_length``. ``prompt``: what is put
    before each; by default the folder's default prompt. The closing steps of the folder's settings apply.
    """
    limit = max_tokens(encoder, tokenizer)
    if batch_size < 1 or (max_length is not None and not 3 <= max_length <= limit):
        raise UserError(
            f"batch_size must be at least 1 and max_length 3 to {limit}, the model's limit, not {batch_size} "
            f"and {max_length}"
        )
    if not sentences:
        return torch.empty(0, encoder.features)
    prompt = encoder.settings.prompt if prompt is None else prompt
    tokens = tokenizer(
        [prompt + sentence for sentence in sentences],
        truncation=True,
        max_length=max_length or default_length(encoder, tokenizer),
        return_attention_mask=True,
    )
    lengths = [len(ids) for ids in tokens["input_ids"]]
    order = sorted(range(len(sentences)), key=lengths.__getitem__, reverse=True)

    training = encoder.training
    encoder.eval()
    vectors = torch.empty(len(sentences), encoder.features)  # (N, D)
    with torch.no_grad(), torch.autocast(encoder.device.type, enabled=False):
        starts = range(0, len(order), batch_size)
        for start in tqdm(
            starts,
            desc="encoding",
            unit="batch",
            leave=False,
            disable=None if progress and len(starts) > 1 else True,  # None: on terminals only
        ):
            chosen = order[start : start + batch_size]
            batch = tokenizer.pad(
                {name: [rows[i] for i in chosen] for name, rows in tokens.items()},
                padding="max_length",
                max_length=max(
                    1, lengths[chosen[0]]
                ),  # an empty text may be no token at all, which no model reads
                return_tensors="pt",
            )
            vectors[chosen] = encoder.finish(encoder.embed(**batch.to(encoder.device)).float()).cpu()
    encoder.train(training)
    return vectors


def cosines(pairs: Pairs, vectors: dict[str, Tensor]) -> Tensor:
    """The cosine of each pair, (P,), float64."""
    first = torch.stack([vectors[sentence] for sentence in pairs.first])  # (P, D)
    second = torch.stack([vectors[sentence] for sentence in pairs.second])
    return F.cosine_similarity(first.double(), second.double())


def spearman(pairs: Pairs, vectors: dict[str, Tensor]) -> float:
    """Spearman's rank correlation × 100 between cosine similarity and the grades; NaN where undefined."""
    return _correlation(spearmanr, cosines(pairs, vectors).numpy(), np.asarray(pairs.scores))


def correlations(pairs: Pairs, vectors: dict[str, Tensor]) -> dict[str, Any]:
    """Spearman's and Pearson's correlation × 100 of every subset, and SentEval's three aggregates of them.

    ``{"all": {"spearman": {"all", "mean", "wmean"}, "pearson": ...}, "subsets": {name: {"spearman", "pearson",
    "nsamples"}}}``: ``all`` of the subsets concatenated, ``mean`` over the subsets, ``wmean`` weighted by their
    numbers of pairs. NaN where a correlation is undefined.
    """
    cosine, grades = cosines(pairs, vectors).numpy(), np.asarray(pairs.scores)
    names = np.asarray(pairs.subsets or [pairs.task] * len(grades))
    measures = {"spearman": spearmanr, "pearson": pearsonr}
    subsets = {}
    for name in dict.fromkeys(names.tolist()):
        rows = names == name
        subsets[name] = {
            measure: _correlation(correlate, cosine[rows], grades[rows]) for measure, correlate in measures.items()
        } | {"nsamples": int(rows.sum())}
    sizes = [subset["nsamples"] for subset in subsets.values()]
    aggregates = {}
    for measure, correlate in measures.items():
        values = [subset[measure] for subset in subsets.values()]
        aggregates[measure] = {
            "all": _correlation(correlate, cosine, grades),
            "mean": float(np.mean(values)),
            "wmean": float(np.average(values, weights=sizes)),
        }
    return {"all": aggregates, "subsets": subsets}


def _correlation(correlate: Callable[..., Any], cosine: np.ndarray, grades: np.ndarray) -> float:
    if len(cosine) < 2 or np.isnan(cosine).any() or np.ptp(cosine) == 0 or np.ptp(grades) == 0:
        return math.nan
    return 100 * float(correlate(cosine, grades).statistic)


def geometry(pairs: Pairs, vectors: dict[str, Tensor]) -> dict[str, float]:
    """Alignment over the pairs graded above 4 (of 5), uniformity over all sentences; lower is better.

    Wang & Isola 2020, measured as SimCSE does on STS-B. No alignment where no pair is above 4.
    """
    result = {}
    alike = [i for i, score in enumerate(pairs.scores) if score > 4]
    if alike:
        first = torch.stack([vectors[pairs.first[i]] for i in alike])  # (P, D)
        second = torch.stack([vectors[pairs.second[i]] for i in alike])
        result["alignment"] = float(alignment(first, second))
    result["uniformity"] = float(uniformity(torch.stack([vectors[sentence] for sentence in pairs.sentences])))
    return result


def cone(pairs: Pairs, vectors: dict[str, Tensor]) -> dict[str, float]:
    """``anisotropy`` of all sentences, those that ``geometry`` takes the uniformity of; in float64."""
    rows = torch.stack([vectors[sentence] for sentence in pairs.sentences])  # (S, D)
    return {name: float(value) for name, value in anisotropy(rows.double()).items()}


def _score(cell: str, path: Path, line: int) -> float:
    try:
        score = float(cell)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise UserError(f"{path}, line {line}: the score is {cell!r}; a number is wanted")
    return score
