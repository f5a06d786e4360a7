"""``from simcse import SimCSE``: encode sentences, compare them, search among them."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simcse.errors import UserError
from simcse.index import Index
from simcse.model import PoolerType, load_encoder
from simcse.sts import encode_rows

Found = list[tuple[str, float]]  # sentences and their cosine similarity, best first


class SimCSE:
    """A trained sentence encoder, with the methods of princeton-nlp/SimCSE's tool of this name.

    Args:
        model_name_or_path: a folder that simcse, transformers or sentence-transformers saved, a name on the
            hub, or ``minilm``.
        device: where it runs; default: the accelerator, else the CPU.
        pooler: the sentence vector; default: what the folder was saved with. A plain checkpoint of the reference
            on the hub takes ``cls`` where supervised, ``cls_before_pooler`` where unsupervised.

    Raises ``simcse.errors.UserError`` for a folder that cannot be read.
    """

    def __init__(
        self,
        model_name_or_path: str | Path,
        device: str | torch.device | None = None,
        pooler: PoolerType | None = None,
    ):
        name = str(model_name_or_path)
        usual: PoolerType | None = None
        if "simcse" in name and not Path(name).is_dir():
            usual = "cls_before_pooler" if "unsup" in name else "cls"
        self.encoder, self.tokenizer = load_encoder(name, pooler, default_pooler=usual)
        there = torch.accelerator.current_accelerator(check_available=True)  # a CUDA build may find no driver
        self.device = torch.device(device or there or "cpu")
        self.encoder.to(self.device).eval()
        self.index: Index | None = None

    def encode(
        self,
        sentence: str | list[str],
        device: str | torch.device | None = None,
        return_numpy: bool = False,
        normalize_to_unit: bool = True,
        keepdim: bool = False,
        batch_size: int = 64,
        max_length: int = 128,
    ) -> Tensor | np.ndarray:
        """Vectors on the CPU, fp32: (D,) for a string ((1, D) with ``keepdim``), (N, D) for a list of N.

        ``max_length`` cuts a sentence to so many tokens. ``normalize_to_unit`` gives unit vectors.
        """
        single = isinstance(sentence, str)
        self.encoder.to(device or self.device)
        vectors = encode_rows(
            self.encoder,
            self.tokenizer,
            [sentence] if single else list(sentence),
            batch_size,
            max_length=max_length,
        )  # (N, D)
        if normalize_to_unit:
            vectors = F.normalize(vectors, dim=1)
        if single and not keepdim:
            vectors = vectors[0]
        return vectors.numpy() if return_numpy else vectors

    def similarity(
        self,
        queries: str | list[str],
        keys: str | list[str] | np.ndarray,
        device: str | torch.device | None = None,
    ) -> float | np.ndarray:
        """Cosine similarities (Q, K); (Q,) or (K,) where one side is a string, a float where both are.

        ``keys`` may be vectors (K, D) that ``encode`` gave.
        """
        first = self.encode(queries, device, return_numpy=True)
        if isinstance(keys, np.ndarray):
            second = F.normalize(torch.from_numpy(keys).float(), dim=-1).numpy()
        else:
            second = self.encode(keys, device, return_numpy=True)
        result = first @ second.T
        return float(result) if result.ndim == 0 else result

    def build_index(
        self,
        sentences_or_file: str | Path | list[str],
        use_faiss: bool | None = None,
        faiss_fast: bool = False,
        device: str | torch.device | None = None,
        batch_size: int = 64,
    ) -> None:
        """Encode sentences, or the lines of a text file, to search among them; an earlier index is replaced.

        ``use_faiss``: None takes FAISS if it is installed, else torch; the answers are the same. ``faiss_fast``
        searches approximately, in the clusters nearest to the query.
        """
        sentences = _sentences(sentences_or_file)
        vectors = self.encode(sentences, device, return_numpy=True, batch_size=batch_size)
        self.index = Index(sentences, vectors, use_faiss, faiss_fast)

    def add_to_index(
        self,
        sentences_or_file: str | Path | list[str],
        device: str | torch.device | None = None,
        batch_size: int = 64,
    ) -> None:
        """More sentences for the index."""
        index = self._index()
        sentences = _sentences(sentences_or_file)
        index.add(sentences, self.encode(sentences, device, return_numpy=True, batch_size=batch_size))

    def search(
        self,
        queries: str | list[str],
        device: str | torch.device | None = None,
        threshold: float = 0.6,
        top_k: int = 5,
    ) -> Found | list[Found]:
        """The ``top_k`` sentences of the index at a cosine of ``threshold`` or more, best first.

        A list of (sentence, cosine) for a string, a list of such lists for a list of queries.
        """
        vectors = self.encode(queries, device, return_numpy=True, keepdim=True)
        found = self._index().search(vectors, threshold, top_k)
        return found[0] if isinstance(queries, str) else found

    def save_index(self, folder: str | Path) -> None:
        """Write the index's sentences and vectors to a folder."""
        self._index().save(Path(folder))

    def load_index(self, folder: str | Path, use_faiss: bool | None = None, faiss_fast: bool = False) -> None:
        """Take over an index that ``save_index`` wrote with this model."""
        index = Index.load(Path(folder), use_faiss, faiss_fast)
        if index.vectors.shape[1] != self.encoder.config.hidden_size:
            raise UserError(
                f"the index in {folder} has {index.vectors.shape[1]} features, the model "
                f"{self.encoder.config.hidden_size}: it was built with another model"
            )
        self.index = index

    def _index(self) -> Index:
        if self.index is None:
            raise UserError("there is no index yet; call build_index or load_index first")
        return self.index


def _sentences(given: str | Path | list[str]) -> list[str]:
    if isinstance(given, (str, Path)):
        from simcse.table import read_table

        return [row[0] for row in read_table(given).rows]
    if not given:
        raise UserError("sentences must hold at least one sentence to index")
    return list(given)
