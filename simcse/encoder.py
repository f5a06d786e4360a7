"""The sentence encoder: a transformer of ``transformers``, and one vector for each sentence."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simcse.backbone import load_backbone
from simcse.errors import UserError
from simcse.folder import InferenceSettings
from simcse.lora import has_adapter, load_adapter
from simcse.weights import first_line, read_tensors

PoolerType = Literal["cls", "cls_before_pooler", "last", "avg", "avg_top2", "avg_first_last"]
POOLER_TYPES: tuple[str, ...] = get_args(PoolerType)
MLP_FILE = "2_Dense/model.safetensors"


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
        self.original_dropout: dict[str, float] = {}  # dropout probabilities of the configuration, where changed
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
    def with_original_dropout(self) -> Iterator[None]:
        """The configuration as it came, without ``--dropout``: what is saved."""
        changed = {name: getattr(self.config, name) for name in self.original_dropout}
        vars(self.config).update(self.original_dropout)
        try:
            yield
        finally:
            vars(self.config).update(changed)

    def load_weights(self, folder: str | Path) -> None:
        """Take over the weights of a folder that ``save_encoder`` wrote from an encoder of this kind."""
        if has_adapter(self.backbone):
            load_adapter(self.backbone, Path(folder))
        else:
            saved, _ = load_backbone(Path(folder), str(folder))
            self.backbone.load_state_dict(saved.state_dict())
        if self.mlp is not None:
            load_mlp(self.mlp, Path(folder) / MLP_FILE)


def _take(rows: Tensor, places: Tensor) -> Tensor:
    """(B, L, ...) and one place for each row, (B,) → (B, ...)."""
    return rows[torch.arange(len(rows), device=rows.device), places]


def check_pooler(name: str) -> None:
    """``UserError`` for a pooler that does not exist."""
    if name not in POOLER_TYPES:
        raise UserError(f"pooler {name!r} is unknown; choose from {', '.join(POOLER_TYPES)}")


def max_tokens(encoder: SentenceEncoder, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest input the model can read, in tokens, [CLS] and [SEP] included."""
    stated = max(tokenizer.model_max_length, encoder.settings.max_length or 0)
    limit = getattr(encoder.config, "max_position_embeddings", None) or stated
    table = position_table(encoder.backbone)
    # RoBERTa and its kin number positions from padding_idx + 1.
    if getattr(table, "padding_idx", None) is not None:
        limit -= table.padding_idx + 1
    return min(limit, stated)


def default_length(encoder: SentenceEncoder, tokenizer: PreTrainedTokenizerBase) -> int:
    """The length that sentences are cut to unless told otherwise: the folder's, as in sentence-transformers."""
    limit = max_tokens(encoder, tokenizer)
    return min(limit, encoder.settings.max_length or limit)


def position_table(backbone: PreTrainedModel) -> nn.Embedding | None:
    """The vectors of absolute positions, where the model has such: BERT's, RoBERTa's or GPT-2's."""
    for name, module in backbone.named_modules():
        if name.rpartition(".")[2] in ("position_embeddings", "wpe") and isinstance(module, nn.Embedding):
            return module
    return None


def load_mlp(mlp: nn.Sequential, file: Path) -> None:
    tensors = {name.removeprefix("linear."): value for name, value in read_tensors(file).items()}
    try:
        mlp[0].load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{file} is not the MLP of this model: {first_line(error)}") from None
