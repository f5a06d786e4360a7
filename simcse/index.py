"""Sentences by their unit vectors: exact search by torch or FAISS, approximate by FAISS."""

import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from simcse.errors import UserError, install
from simcse.files import replaced, write_text

VECTORS_FILE = "vectors.safetensors"
SENTENCES_FILE = "sentences.json"


@dataclass(frozen=True)
class Cells:
    """How many clusters an approximate index has at most, and how many of them a search looks at."""

    most: int = 100
    searched: int = 10

    def __post_init__(self) -> None:
        for name, value in (("num_cells", self.most), ("num_cells_in_search", self.searched)):
            if type(value) is not int or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")


class Index:
    """``vectors`` (S, D), unit rows, fp32; row i belongs to ``sentences[i]``."""

    def __init__(
        self,
        sentences: list[str],
        vectors: np.ndarray,
        use_faiss: bool | None = None,
        faiss_fast: bool = False,
        cells: Cells | None = None,
    ):
        for name, value, choices in (
            ("use_faiss", use_faiss, (True, False, None)),
            ("faiss_fast", faiss_fast, (True, False)),
        ):
            if value not in choices:
                raise UserError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
        installed = importlib.util.find_spec("faiss") is not None
        if (use_faiss or faiss_fast) and not installed:
            raise UserError(f"FAISS is not installed; leave use_faiss out, or {install('search')}")
        if faiss_fast and use_faiss is False:
            raise UserError("faiss_fast asks for FAISS and use_faiss=False refuses it; leave one out")
        self.sentences = list(sentences)
        self.vectors = vectors
        self.uses_faiss = installed if use_faiss is None else use_faiss
        self.faiss_fast = faiss_fast
        self.cells = cells or Cells()
        self._faiss = self._build() if self.uses_faiss else None

    def add(self, sentences: list[str], vectors: np.ndarray) -> None:
        self.sentences += sentences
        self.vectors = np.concatenate([self.vectors, vectors])
        if self._faiss is not None:
            self._faiss.add(vectors)

    def search(self, queries: np.ndarray, threshold: float, top_k: int) -> list[list[tuple[str, float]]]:
        """For each query (Q, D) the best ``top_k`` rows of cosine ``threshold`` or more."""
        if type(top_k) is not int or top_k < 0 or math.isnan(threshold):
            raise UserError(
                f"top_k must be a whole number from 0 on and threshold a number, not {top_k!r}, {threshold}"
            )
        top_k = min(top_k, len(self.sentences))
        if top_k == 0:  # FAISS refuses it
            return [[] for _ in queries]
        if self._faiss is not None:
            cosines, rows = self._faiss.search(queries, top_k)
        else:
            with torch.no_grad():
                product = torch.from_numpy(queries) @ torch.from_numpy(self.vectors).T  # (Q, S)
                cosines, rows = (part.numpy() for part in product.topk(top_k, dim=1))
        return [
            [
                (self.sentences[i], float(c))
                for i, c in zip(found, scores, strict=True)
                if i >= 0 and c >= threshold
            ]
            for found, scores in zip(rows, cosines, strict=True)
        ]

    def _build(self):
        import faiss

        count, features = self.vectors.shape
        index = faiss.IndexFlatIP(features)
        if self.faiss_fast:
            clusters = min(self.cells.most, max(1, count // 39))  # FAISS asks for 39 points per cluster
            index = faiss.IndexIVFFlat(index, features, clusters, faiss.METRIC_INNER_PRODUCT)
            index.train(self.vectors)
            index.nprobe = min(self.cells.searched, clusters)
        index.add(self.vectors)
        return index

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(folder / VECTORS_FILE) as unfinished:
            save_file({"vectors": np.ascontiguousarray(self.vectors)}, unfinished)
        write_text(folder / SENTENCES_FILE, json.dumps(self.sentences, ensure_ascii=False))

    @classmethod
    def load(
        cls,
        folder: Path,
        use_faiss: bool | None = None,
        faiss_fast: bool = False,
        cells: Cells | None = None,
    ) -> "Index":
        try:
            vectors = load_file(folder / VECTORS_FILE)["vectors"]
            sentences = json.loads((folder / SENTENCES_FILE).read_text(encoding="utf-8"))
        except Exception as error:  # a damaged file ends in errors of many kinds
            raise UserError(f"{folder} does not hold an index that save_index wrote: {error!r}") from None
        if not isinstance(sentences, list) or not all(isinstance(text, str) for text in sentences):
            raise UserError(f"{folder / SENTENCES_FILE} is not a list of sentences, as save_index writes")
        if vectors.ndim != 2 or vectors.dtype != np.float32 or not sentences:
            raise UserError(
                f"{folder / VECTORS_FILE} holds {vectors.dtype} of shape {vectors.shape}; save_index writes "
                "float32, sentences × features"
            )
        if len(sentences) != len(vectors):
            raise UserError(f"the index in {folder} has {len(sentences)} sentences and {len(vectors)} vectors")
        norms = np.linalg.norm(vectors, axis=1)
        if not np.all((np.abs(norms - 1) < 1e-3) | (norms == 0)):
            raise UserError(
                f"the vectors in {folder / VECTORS_FILE} are not unit vectors, as save_index writes them"
            )
        return cls(sentences, vectors, use_faiss, faiss_fast, cells)
