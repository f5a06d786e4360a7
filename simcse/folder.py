"""What the files of sentence-transformers in a model folder say about a sentence's vector.

Every setting that changes a vector is either followed or refused, so that a folder gives the same vectors here
and there.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simcse.errors import UserError

TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
MODEL_FILE = "config_sentence_transformers.json"
MODULES_FILE = "modules.json"
POOLERS = {
    "cls": "cls_before_pooler",
    "lasttoken": "last",
    "mean": "avg",
}  # a pooling of sentence-transformers → ours
ROLES = ("query", "document")  # the two prompts that sentence-transformers has methods for
PLAIN_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}
# Settings that change no vector, or only where another one is set that is refused.
WITHOUT_EFFECT = {
    TRANSFORMER_FILES[0]: {"unpad_inputs", "query_length", "document_length"},
    MODEL_FILE: {"__version__", "model_type", "requirements", "similarity_fn_name"},
    MODULES_FILE: set(),
}


@dataclass(frozen=True)
class InferenceSettings:
    """How a folder wants its sentences read and its vectors finished; the defaults change nothing."""

    max_length: int | None = None  # tokens
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    normalize: bool = False
    truncate_dim: int | None = None  # features that are kept
    similarity: str = "cosine"

    @property
    def prompt(self) -> str:
        """What is put before every sentence, unless it is known to be a query or a document."""
        return self.prompts[self.default_prompt_name] if self.default_prompt_name else ""

    def prompt_of(self, role: str) -> str:
        """What is put before a ``query`` or a ``document``: as sentence-transformers' methods for the two do.

        Where the folder has a prompt for neither, its default prompt.
        """
        return self.prompts.get(role, "") if set(ROLES) & set(self.prompts) else self.prompt

    def with_prompts(self, query: str | None, document: str | None) -> "InferenceSettings":
        """With prompts for queries and documents; a sentence that is known to be neither gets that of a query."""
        given = {role: text for role, text in zip(ROLES, (query, document), strict=True) if text is not None}
        default = self.default_prompt_name if query is None else ROLES[0]
        return replace(self, prompts={**self.prompts, **given}, default_prompt_name=default)

    @property
    def compares_by_cosine(self) -> bool:
        return self.similarity == "cosine" or (self.similarity == "dot" and self.normalize)


@dataclass(frozen=True)
class StoredPooling:
    """The pooler that a folder's modules amount to, or why no pooler here does."""

    pooler_type: str | None = None
    mlp_file: Path | None = None
    refusal: str | None = None


def read_folder(folder: Path) -> tuple[InferenceSettings, StoredPooling | None]:
    """The settings of a folder, and its pooling; None where it has no ``modules.json``."""
    modules = _read(folder / MODULES_FILE, list)
    pooling, normalize = (None, False) if modules is None else _read_modules(folder, modules)
    settings = {**_read_transformer(folder), "normalize": normalize}
    if modules is not None:
        settings |= _read_model(folder)
    return InferenceSettings(**settings), pooling


def _read_transformer(folder: Path) -> dict[str, Any]:
    file = next((folder / name for name in TRANSFORMER_FILES if (folder / name).is_file()), None)
    config = _read(file, dict) if file else None
    if config is None:
        return {}
    length, lower = config.pop("max_seq_length", None), config.pop("do_lower_case", False)
    _check(file, "max_seq_length", length, length is None or (type(length) is int and length > 0))
    _check(file, "do_lower_case", lower, lower in (True, False, None))
    modality = config.pop("modality_config", None) or {"text": PLAIN_TEXT}
    _check(file, "modality_config", modality, isinstance(modality, dict) and modality.get("text") == PLAIN_TEXT)
    _check_rest(file, config, {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"})
    return {"max_length": length, "lower_case": bool(lower)}


def _read_model(folder: Path) -> dict[str, Any]:
    file = folder / MODEL_FILE
    config = _read(file, dict)
    if config is None:
        return {}
    prompts, default = config.pop("prompts", None) or {}, config.pop("default_prompt_name", None)
    is_text = isinstance(prompts, dict) and all(isinstance(prompt, str) for prompt in prompts.values())
    _check(file, "prompts", prompts, is_text)
    _check(file, "default_prompt_name", default, default is None or default in list(prompts))
    size = config.pop("truncate_dim", None)
    _check(file, "truncate_dim", size, size is None or (type(size) is int and size > 0))
    kind = config.get("model_type", "SentenceTransformer")
    _check(file, "model_type", kind, kind == "SentenceTransformer")
    similarity = config.get("similarity_fn_name") or "cosine"
    _check_rest(file, config, {})
    return {
        "prompts": prompts,
        "default_prompt_name": default,
        "truncate_dim": size,
        "similarity": str(similarity),
    }


def _read_modules(folder: Path, modules: list[Any]) -> tuple[StoredPooling, bool]:
    try:
        chain = [(str(module["type"]), folder / module["path"]) for module in modules]
    except (TypeError, KeyError):
        raise UserError(f"{folder / MODULES_FILE} is damaged: a module has a type and a path") from None
    foreign = [kind for kind, _ in chain if not kind.startswith("sentence_transformers.")]
    working = [(kind.rsplit(".", 1)[-1], place) for kind, place in chain]
    working = [module for module in working if module[0] != "Dropout"]  # it does nothing outside of training
    normalize = bool(working) and working[-1][0] == "Normalize"
    if normalize:
        working.pop()
    names = [name for name, _ in working]
    if foreign:
        return StoredPooling(refusal=f"its module {foreign[0]} is not one of sentence-transformers"), normalize
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Dense"]) or working[0][1] != folder:
        return StoredPooling(refusal=f"its modules are {', '.join(names)}"), normalize
    mode = _read_pooling(working[1][1])
    if mode not in POOLERS:
        return StoredPooling(refusal=f"its pooling is {mode}"), normalize
    if len(working) == 2:
        return StoredPooling(POOLERS[mode]), normalize
    if mode == "cls" and _is_mlp(working[2][1]):
        weights = [working[2][1] / name for name in ("model.safetensors", "pytorch_model.bin")]
        return StoredPooling("cls", next((file for file in weights if file.is_file()), weights[0])), normalize
    return StoredPooling(refusal=f"its pooling {mode} is followed by a Dense module"), normalize


def _read_pooling(place: Path) -> str:
    """The name of the one pooling, or in words what is not followed here."""
    config = _read(place / "config.json", dict)
    if config is None:
        raise UserError(f"{place / 'config.json'} is missing, which {MODULES_FILE} names")
    flags = [name for name in config if name.startswith("pooling_mode_")]
    old = [re.sub("pooling_mode_|_tokens?$", "", name) for name in flags if config[name]]
    modes = config.get("pooling_mode", old or ["mean"])
    modes = [modes] if isinstance(modes, str) else modes
    if config.get("include_prompt", True) is not True:
        return "one that leaves the prompt's tokens out (include_prompt)"
    known = {"pooling_mode", "include_prompt", "word_embedding_dimension", "embedding_dimension", *flags}
    if set(config) - known or not isinstance(modes, list):
        return f"set by {', '.join(sorted(set(config) - known)) or 'pooling_mode'}"
    return " and ".join(map(str, modes))


def _is_mlp(place: Path) -> bool:
    """Whether a Dense layer is the MLP of ``cls``: linear with a bias, as wide as it is long, and tanh."""
    config = _read(place / "config.json", dict) or {}
    embedding = "sentence_embedding"
    return (
        config.get("in_features") == config.get("out_features")
        and config.get("bias", True) is True
        and str(config.get("activation_function", "Tanh")).rsplit(".", 1)[-1] == "Tanh"
        and config.get("module_input_name", embedding) == embedding
        and (config.get("module_output_name") or embedding) == embedding
        and not config.get("use_residual")
    )


def _read(file: Path, kind: type) -> Any:
    """The JSON of a file; None where there is no such file."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from None
    if not isinstance(content, kind):
        raise UserError(f"{file} is damaged: it holds {type(content).__name__}, not {kind.__name__}")
    return content


def _check(file: Path, name: str, value: Any, good: bool) -> None:
    if not good:
        raise UserError(
            f"{file} sets {name} to {json.dumps(value)}, which would change the vectors and is not supported; "
            "use sentence-transformers for this folder, or remove the setting"
        )


def _check_rest(file: Path, config: dict[str, Any], usual: dict[str, Any]) -> None:
    """Refuse the settings that were not read, unless they are empty, have no effect or their ``usual`` value."""
    ignored = WITHOUT_EFFECT.get(file.name, WITHOUT_EFFECT[TRANSFORMER_FILES[0]])
    for name, value in config.items():
        _check(file, name, value, name in ignored or value in (None, {}, []) or usual.get(name) == value)
