"""Sentences by their unit vectors: exact search by torch or FAISS, approximate by FAISS."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from simcse.errors import UserError, install
from simcse.files import replaced, write_text

VECTORS_FILE = "vectors.safetensors"
SENTENCES_FILE = "sentences.json"


class Index:
    """``vectors`` (S, D), unit rows, fp32; row i belongs to ``sentences[i]``."""

    def __init__(
        self, sentences: list[str], vectors: np.ndarray, use_faiss: bool | None = None, faiss_fast: bool = False
    ):
        installed = importlib.util.find_spec("faiss") is not None
        if (use_faiss or faiss_fast) and not installed:
            raise UserError(f"FAISS is not installed; leave use_faiss out, or {install('search')}")
        if faiss_fast and use_faiss is False:
            raise UserError("faiss_fast asks for FAISS and use_faiss=False refuses it; leave one out")
        self.sentences = list(sentences)
        self.vectors = vectors
        self.uses_faiss = installed if use_faiss is None else use_faiss
        self.faiss_fast = faiss_fast
        self._faiss = self._build() if self.uses_faiss else None

    def add(self, sentences: list[str], vectors: np.ndarray) -> None:
        self.sentences += sentences
        self.vectors = np.concatenate([self.vectors, vectors])
        if self._faiss is not None:
            self._faiss.add(vectors)

    def search(self, queries: np.ndarray, threshold: float, top_k: int) -> list[list[tuple[str, float]]]:
        """For each query (Q, D) the best ``top_k`` rows of cosine ``threshold`` or more."""
        top_k = min(top_k, len(self.sentences))
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
            clusters = min(100, max(1, count // 39))  # FAISS asks for 39 points a cluster
            index = faiss.IndexIVFFlat(index, features, clusters, faiss.METRIC_INNER_PRODUCT)
            index.train(self.vectors)
            index.nprobe = min(10, clusters)
        index.add(self.vectors)
        return index

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(folder / VECTORS_FILE) as unfinished:
            save_file({"vectors": np.ascontiguousarray(self.vectors)}, unfinished)
        write_text(folder / SENTENCES_FILE, json.dumps(self.sentences, ensure_ascii=False))

    @classmethod
    def load(cls, folder: Path, use_faiss: bool | None = None, faiss_fast: bool = False) -> "Index":
        try:
            vectors = load_file(folder / VECTORS_FILE)["vectors"]
            sentences = json.loads((folder / SENTENCES_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"{folder} contains no index that save_index wrote: {error}") from None
        if len(sentences) != len(vectors):
            raise UserError(f"the index in {folder} has {len(sentences)} sentences and {len(vectors)} vectors")
        return cls(sentences, vectors, use_faiss, faiss_fast)
