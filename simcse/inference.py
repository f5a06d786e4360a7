"""``from simcse import SimCSE``: encode sentences, compare them, search among them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simcse.encoder import PoolerType
from simcse.errors import UserError
from simcse.folder import ROLES
from simcse.index import Cells, Index
from simcse.model import load_encoder
from simcse.sts import encode_rows
from simcse.weights import first_line

Found = list[tuple[str, float]]  # sentences and their cosine similarity, best first
Vectors = np.ndarray | Tensor  # (K, D), what ``encode`` gave


class SimCSE:
    """A trained sentence encoder, with the methods of princeton-nlp/SimCSE's tool of this name.

    Args:
        model_name_or_path: a folder that simcse, transformers or sentence-transformers saved, a name on the
            hub, ``minilm`` or ``smollm2``.
        device: where it runs; default: the accelerator, else the CPU.
        num_cells, num_cells_in_search: with ``faiss_fast``, the most clusters that an index has, and how many of
            them a search looks at.
        pooler: the sentence vector; default: what the folder was saved with. A published SimCSE model (its folder
            or name on the hub has "simcse" in it) takes ``cls``, with "unsup" in it too ``cls_before_pooler``.
        query_prompt, document_prompt: texts that stand in for the folder's prompts. A search puts the one before
            its query, an index the other before its sentences; what is known to be neither gets the query's.

    Raises ``simcse.errors.UserError`` for a folder or an argument that cannot be used.
    """

    def __init__(
        self,
        model_name_or_path: str | Path,
        device: str | torch.device | None = None,
        num_cells: int = 100,
        num_cells_in_search: int = 10,
        pooler: PoolerType | None = None,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
    ):
        self.cells = Cells(num_cells, num_cells_in_search)
        there = torch.accelerator.current_accelerator(check_available=True)  # a CUDA build may find no driver
        self.device = _device(device or there or "cpu")
        self.name = str(model_name_or_path)
        self.encoder, self.tokenizer = load_encoder(self.name, pooler)
        self.encoder.to(self.device).eval()
        self.encoder.settings = self.encoder.settings.with_prompts(query_prompt, document_prompt)
        self.index: Index | None = None

    def encode(
        self,
        sentence: str | list[str],
        device: str | torch.device | None = None,
        return_numpy: bool = False,
        normalize_to_unit: bool = True,
        keepdim: bool = False,
        batch_size: int = 64,
        max_length: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> Tensor | np.ndarray:
        """Vectors on the CPU, fp32: (D,) for a string ((1, D) with ``keepdim``), (N, D) for a list of N.

        ``max_length`` cuts a sentence to so many tokens; the default is the folder's own length, as in
        sentence-transformers (the reference's default is 128). ``normalize_to_unit`` gives unit vectors.
        ``prompt`` is put before each sentence, or the folder's prompt of the name ``prompt_name``; the default is
        the folder's default prompt.
        """
        if prompt is None and prompt_name is not None:
            prompt = self._prompt(prompt_name)
        single = isinstance(sentence, str)
        sentences = [sentence] if single else _texts(sentence)
        self.encoder.to(_device(device or self.device))
        vectors = encode_rows(
            self.encoder,
            self.tokenizer,
            sentences,
            batch_size,
            max_length=max_length,
            prompt=prompt,
        )  # (N, D)
        if normalize_to_unit:
            vectors = F.normalize(vectors, dim=1)
        if single and not keepdim:
            vectors = vectors[0]
        return vectors.numpy() if return_numpy else vectors

    def similarity(
        self,
        queries: str | list[str] | Vectors,
        keys: str | list[str] | Vectors,
        device: str | torch.device | None = None,
        max_length: int | None = None,
    ) -> float | np.ndarray:
        """Cosine similarities (Q, K); (Q,) or (K,) where one side is a string, a float where both are.

        Either side may be vectors that ``encode`` gave: an array or a tensor on any device, (K, D) or (D,).
        """
        self._check_cosine()
        result = self._unit_rows(queries, device, max_length) @ self._unit_rows(keys, device, max_length).T
        return float(result) if result.ndim == 0 else result

    def build_index(
        self,
        sentences_or_file_path: str | Path | list[str],
        use_faiss: bool | None = None,
        faiss_fast: bool = False,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        max_length: int | None = None,
    ) -> None:
        """Encode sentences, or those of a file, to search among them; an earlier index is replaced.

        A file is read as ``simcse encode`` reads it: a row is a sentence, and one that cannot be used is refused.
        ``use_faiss``: None takes FAISS if it is installed, else torch; the answers are the same. ``faiss_fast``
        searches approximately, in the clusters nearest to the query.
        """
        self._check_cosine()
        sentences = _sentences(sentences_or_file_path)
        vectors = self._encode_documents(sentences, device, batch_size, max_length)
        self.index = Index(sentences, vectors, use_faiss, faiss_fast, self.cells)

    def add_to_index(
        self,
        sentences_or_file_path: str | Path | list[str],
        device: str | torch.device | None = None,
        batch_size: int = 64,
        max_length: int | None = None,
    ) -> None:
        """More sentences for the index."""
        index = self._index()
        sentences = _sentences(sentences_or_file_path)
        index.add(sentences, self._encode_documents(sentences, device, batch_size, max_length))

    def search(
        self,
        queries: str | list[str],
        device: str | torch.device | None = None,
        threshold: float = 0.6,
        top_k: int = 5,
        max_length: int | None = None,
    ) -> Found | list[Found]:
        """The ``top_k`` sentences of the index at a cosine of ``threshold`` or more, best first.

        A list of (sentence, cosine) for a string, a list of such lists for a list of queries.
        """
        index = self._index()
        prompt = self.encoder.settings.prompt_of("query")
        vectors = self.encode(
            queries, device, return_numpy=True, keepdim=True, max_length=max_length, prompt=prompt
        )
        found = index.search(vectors, threshold, top_k)
        return found[0] if isinstance(queries, str) else found

    def save_index(self, folder: str | Path) -> None:
        """Write the index's sentences and vectors to a folder."""
        self._index().save(Path(folder))

    def load_index(self, folder: str | Path, use_faiss: bool | None = None, faiss_fast: bool = False) -> None:
        """Take over an index that ``save_index`` wrote with this model."""
        self._check_cosine()
        index = Index.load(Path(folder), use_faiss, faiss_fast, self.cells)
        if index.vectors.shape[1] != self.encoder.features:
            raise UserError(
                f"the index in {folder} has {index.vectors.shape[1]} features, the model {self.encoder.features}: "
                "it was built with another model"
            )
        self.index = index

    def _encode_documents(
        self, sentences: list[str], device: str | torch.device | None, batch_size: int, max_length: int | None
    ) -> np.ndarray:
        prompt = self.encoder.settings.prompt_of("document")
        return self.encode(
            sentences, device, return_numpy=True, batch_size=batch_size, max_length=max_length, prompt=prompt
        )

    def _prompt(self, name: str) -> str:
        prompts = {**dict.fromkeys(ROLES, ""), **self.encoder.settings.prompts}
        if name not in prompts:
            raise UserError(f"{self.name} has no prompt named {name!r}; it has {', '.join(prompts)}")
        return prompts[name]

    def _index(self) -> Index:
        if self.index is None:
            raise UserError("there is no index yet; call build_index or load_index first")
        return self.index

    def _unit_rows(
        self, given: str | list[str] | Vectors, device: str | torch.device | None, max_length: int | None
    ) -> np.ndarray:
        if not isinstance(given, (np.ndarray, Tensor)):
            return self.encode(given, device, return_numpy=True, max_length=max_length)
        vectors = torch.as_tensor(given).detach().float().cpu()
        if vectors.ndim not in (1, 2) or vectors.shape[-1] != self.encoder.features:
            raise UserError(
                f"vectors of shape {tuple(vectors.shape)} cannot be compared: (K, {self.encoder.features}) or "
                f"({self.encoder.features},) is expected, as encode gives them"
            )
        return F.normalize(vectors, dim=-1).numpy()

    def _check_cosine(self) -> None:
        settings = self.encoder.settings
        if not settings.compares_by_cosine:
            raise UserError(
                f"{self.name} compares its vectors by {settings.similarity} (similarity_fn_name), and this tool "
                "by cosine similarity; compare what encode(..., normalize_to_unit=False) gives, or set "
                'similarity_fn_name to "cosine"'
            )


def _device(given: str | torch.device) -> torch.device:
    try:
        return torch.device(given)
    except RuntimeError as error:
        raise UserError(f"device {given!r} is unknown: {first_line(error)}") from None


def _sentences(given: str | Path | list[str]) -> list[str]:
    if isinstance(given, (str, Path)):
        from simcse.readers import read_sentences

        return read_sentences(given).sentences
    sentences = _texts(given)
    if not sentences:
        raise UserError("sentences must hold at least one sentence to index")
    for number, text in enumerate(sentences):
        if not text.strip():
            raise UserError(f"sentences[{number}] is blank; leave it out")
    return sentences


def _texts(given: Iterable[str]) -> list[str]:
    if not isinstance(given, Iterable) or isinstance(given, bytes):
        raise UserError(f"sentences must be a string or a list of strings, not {type(given).__name__}")
    texts = list(given)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"sentences[{number}] must be a string, not {type(text).__name__}")
    return texts
