"""The folder that a trained encoder is saved as: transformers, sentence-transformers and simcse read it.

config.json, model.safetensors     AutoModel; its pooler is the MLP of ``cls`` where the class has one
adapter_config.json, adapter_model.safetensors  in place of both an adapter of peft that is saved alone
tokenizer.json, ...                AutoTokenizer
modules.json                       what sentence-transformers does with a sentence, in order
sentence_bert_config.json, 1_Pooling/config.json, config_sentence_transformers.json
2_Dense/                           the MLP of ``cls`` as sentence-transformers' Dense layer
3_Normalize/                       where the folder that training started from has it
simcse_config.json                 pooler and mlp_only_train, for simcse, and the files of this list
README.md                          the model card
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any, NoReturn

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from simcse.backbone import with_weights
from simcse.encoder import MLP_FILE, SentenceEncoder, default_length
from simcse.folder import MODEL_FILE, MODULES_FILE, TRANSFORMER_FILES
from simcse.lora import ADAPTER_CONFIG, has_adapter, merged_weights, save_adapter
from simcse.model import CONFIG_FILE

# pooler → sentence-transformers' name; the two that are missing take more than the last layer
POOLING = {"cls": "cls", "cls_before_pooler": "cls", "last": "lasttoken", "avg": "mean"}
INSIDE = "sentence_transformers.models."  # read by every version since 2
UNFINISHED_MODEL = ".unfinished-model"  # a model while it is written
MARKERS = ("config.json", ADAPTER_CONFIG)
MODULE_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")


def save_encoder(
    encoder: SentenceEncoder,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    card: str = "",
    merge: bool = True,
) -> None:
    """Write the folder that the head of this file describes; ``card`` goes into the model card.

    An adapter is merged into the weights, or with ``merge=False`` saved alone.

    All is written beside and then moved. What cuts it off leaves an older model as it was or, within the moves, a
    folder without ``config.json`` and ``adapter_config.json``, which nothing takes for a model. The older model's
    other files are deleted, so that no module stays which the new model does not have.
    """
    folder = Path(folder)
    beside = folder / UNFINISHED_MODEL
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        _write_all(encoder, tokenizer, beside, card, merge)
        for marker in MARKERS:
            (folder / marker).unlink(missing_ok=True)
        delete_model(folder)
        files = [path for path in beside.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.parent == beside and path.name in MARKERS):
            target = folder / path.relative_to(beside)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def delete_model(folder: Path) -> None:
    """Delete the files of the model that is saved in ``folder``, as its ``simcse_config.json`` lists them.

    Where there is no such list, those of the modules of sentence-transformers that stand beside the transformer.
    """
    for name in _files_of_model(folder):
        place = PurePath(name)
        if place.is_absolute() or ".." in place.parts:
            continue
        with suppress(OSError):  # it has gone already
            (folder / place).unlink()
        if place.parent.name:
            with suppress(OSError):  # other files are in it
                (folder / place.parent).rmdir()


def _files_of_model(folder: Path) -> list[str]:
    with suppress(OSError, ValueError, KeyError, TypeError):
        listed = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["files"]
        return [str(name) for name in listed]
    modules = {str(Path(MLP_FILE).parent)}
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        modules |= {str(module["path"]) for module in content if module["path"]}
    return [f"{module}/{name}" for module in modules for name in MODULE_FILES]


def _write_all(
    encoder: SentenceEncoder, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str, merge: bool
) -> None:
    backbone, adapted = encoder.backbone, has_adapter(encoder.backbone)
    if adapted and merge:
        backbone = with_weights(backbone, backbone.config, merged_weights(backbone))
    weights = backbone.state_dict()
    if encoder.mlp is not None:
        linear = encoder.mlp[0].state_dict()
        for name, value in linear.items():
            if f"pooler.dense.{name}" in weights:
                weights[f"pooler.dense.{name}"] = value
        (folder / MLP_FILE).parent.mkdir(parents=True, exist_ok=True)
        save_file({f"linear.{name}": value.contiguous() for name, value in linear.items()}, folder / MLP_FILE)
    with encoder.with_original_dropout():
        if adapted and not merge:
            save_adapter(backbone, folder)
        else:
            backbone.save_pretrained(folder, state_dict=weights)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # or the file keeps the length of the last batch
    tokenizer.save_pretrained(folder)
    _save_modules(encoder, folder, default_length(encoder, tokenizer))
    (folder / "README.md").write_text(model_card(encoder, card, adapted and not merge), encoding="utf-8")
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    settings = {"pooler_type": encoder.pooler_type, "mlp_only_train": encoder.mlp_only_train}
    _write(folder / CONFIG_FILE, {**settings, "files": sorted([*files, CONFIG_FILE])})


def _save_modules(encoder: SentenceEncoder, folder: Path, length: int) -> None:
    hidden = encoder.config.hidden_size
    modules = [("", INSIDE + "Transformer")]
    settings = encoder.settings
    _write(folder / TRANSFORMER_FILES[0], {"max_seq_length": length, "do_lower_case": settings.lower_case})
    further = {
        "prompts": dict(settings.prompts),
        "default_prompt_name": settings.default_prompt_name,
        "truncate_dim": settings.truncate_dim,
    }
    _write(
        folder / MODEL_FILE,
        {"similarity_fn_name": "cosine", **{name: value for name, value in further.items() if value}},
    )
    if encoder.pooler_type not in POOLING:
        modules.append(("", f"{UnsupportedPooling.__module__}.{UnsupportedPooling.__name__}"))
    else:
        modules.append(("1_Pooling", INSIDE + "Pooling"))
        way = POOLING[encoder.pooler_type]
        _write(
            folder / "1_Pooling" / "config.json",
            {
                "word_embedding_dimension": hidden,
                "pooling_mode_cls_token": way == "cls",
                "pooling_mode_mean_tokens": way == "mean",
                "pooling_mode_lasttoken": way == "lasttoken",
            },
        )
    if encoder.mlp is not None:
        _write(
            folder / MLP_FILE.replace("model.safetensors", "config.json"),
            {
                "in_features": hidden,
                "out_features": hidden,
                "bias": True,
                "activation_function": "torch.nn.modules.activation.Tanh",
            },
        )
        if not encoder.mlp_only_train:
            modules.append((str(Path(MLP_FILE).parent), INSIDE + "Dense"))
    if settings.normalize:
        modules.append(("3_Normalize", INSIDE + "Normalize"))
        _write(folder / "3_Normalize" / "config.json", {})
    _write(
        folder / MODULES_FILE,
        [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)],
    )


class UnsupportedPooling:
    """Stands in ``modules.json`` for a pooler that sentence-transformers lacks, where it would mean-pool."""

    @classmethod
    def load(cls, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            "this model pools more than the last layer (avg_top2 or avg_first_last), which sentence-transformers "
            "cannot express; load it with: from simcse import SimCSE"
        )


def model_card(encoder: SentenceEncoder, body: str, adapter_alone: bool = False) -> str:
    """The README.md of a saved folder: how to use it, and ``body`` about data, recipe and scores."""
    adapter = ""
    if adapter_alone:
        base = encoder.backbone.peft_config["default"].base_model_name_or_path
        adapter = f" with this LoRA adapter, which loads on top of `{base}`"
    pooling = encoder.pooler_type + (" (the MLP is left out at inference)" if encoder.mlp_only_train else "")
    if encoder.pooler_type in POOLING:
        usage = (
            "from sentence_transformers import SentenceTransformer\n\n"
            'model = SentenceTransformer("path/to/this/folder")\n'
            'embeddings = model.encode(["A sentence.", "Another one."])'
        )
        note = ""
    else:
        usage = 'from simcse import SimCSE\n\nmodel = SimCSE("path/to/this/folder")\nmodel.encode(["A sentence."])'
        note = (
            f"\nsentence-transformers cannot express the pooler {encoder.pooler_type}: it refuses this folder.\n"
        )
    return (
        "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n"
        "tags:\n- sentence-transformers\n- feature-extraction\n- sentence-similarity\n- simcse\n---\n\n"
        "# Sentence encoder\n\n"
        f"{type(encoder.backbone).__name__}{adapter}, {encoder.config.hidden_size} features, pooler "
        f"`{pooling}`, compared by cosine similarity. "
        f"Trained with fused-infonce.\n{note}\n```python\n{usage}\n```\n" + (f"\n{body.strip()}\n" if body else "")
    )


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
