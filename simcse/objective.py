"""What is trained: the encoder, the contrastive loss, and what else has weights or a memory of past batches."""

import inspect
import itertools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers.modeling_outputs import BaseModelOutput

from fused_infonce import GSInfoNCELoss, contrastive_stats
from simcse.arguments import AUTO, LossArguments
from simcse.backbone import load_masked_lm
from simcse.encoder import SentenceEncoder
from simcse.loss_flags import check_flags, named_as_flag
from simcse.mini_batches import MiniBatches, embed_in_mini_batches
from simcse.published import LOSSES, PLACES, Columns, published_loss

STATS_OPTIONS = inspect.signature(contrastive_stats).parameters


class Objective(nn.Module):
    """An encoder and its objective: SimCSE's loss with Gaussian negatives, optionally a queue and MLM.

    ``loss`` holds the temperature, which may be learned; ``queue`` the latest Q positives' vectors, without
    gradients, at first none; ``mlm`` the head of the auxiliary masked language model.
    """

    accepts_loss_kwargs = False  # read by transformers.Trainer: the loss is a mean over the batch

    def __init__(self, encoder: SentenceEncoder, options: LossArguments, group: ProcessGroup | None = None):
        """group: the processes whose batches are one; None: this one's is."""
        super().__init__()
        self.encoder = encoder
        self.options = options
        self.loss = GSInfoNCELoss(
            options.temp,
            learnable_temperature=options.learn_temperature,
            group="local" if group is None else group,
            **options.loss_options,
        )
        size = options.mini_batch_size
        self.mini_batches = MiniBatches(0 if size == AUTO else int(size))  # the trainer chooses in place of 'auto'
        self.queue_size = options.queue_size // (dist.get_world_size(group) if group is not None else 1)
        # Not persistent: sharded weights are loaded by name and shape, and the queue grows.
        self.register_buffer("queue", torch.empty(0, encoder.config.hidden_size), persistent=False)
        self.mlm = MLMHead(encoder) if options.do_mlm else None

    def forward(self, masked_ids: Tensor | None = None, labels: Tensor | None = None, **tokens: Tensor) -> Any:
        """Tokens (R, L) → vectors (R, D), and the sum of the MLM losses of ``labels`` (R, L), 0 without.

        As one batch or in mini batches: one call all the same, so DistributedDataParallel reduces gradients once.
        """
        given = {"masked_ids": masked_ids, "labels": labels, **tokens}
        inputs = {name: x for name, x in given.items() if x is not None}
        return embed_in_mini_batches(self.embed, inputs, self.mini_batches)

    def embed(
        self, masked_ids: Tensor | None = None, labels: Tensor | None = None, **tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        vectors = self.encoder.embed(**tokens)
        if labels is None:
            return vectors, vectors.new_zeros(())
        hidden = self.encoder.backbone(**{**tokens, "input_ids": masked_ids}).last_hidden_state  # (R, L, D)
        return vectors, self.mlm(hidden, labels)

    def columns(self, vectors: Tensor, views: int, ids: Tensor | None) -> Columns:
        """Vectors of V views of B rows, (V·B, D), as what the loss takes."""
        rows = len(vectors) // views
        anchors, positives, negatives = vectors[:rows], vectors[rows : 2 * rows], vectors[2 * rows :]
        return Columns(
            anchors,
            positives,
            negatives if views > 2 else None,
            self.queue if len(self.queue) else None,
            ids[:rows] if ids is not None else None,
            ids[2 * rows :] if ids is not None and views > 2 else None,
        )

    def check_loss(self, device: torch.device, views: int, rows: int) -> None:
        """Raises the loss's error for options that it refuses together, or on this device, before any training."""
        if self.options.loss in LOSSES:
            check_flags(self.options, views, rows, alone=self.loss.group == "local")
        x = torch.eye(2, self.encoder.config.hidden_size, device=device).repeat(views, 1)
        ids = torch.arange(2, device=device).repeat(views) if self.options.mask_duplicates else None
        group, self.loss.group = self.loss.group, "local"
        try:  # the generator draws nothing of the run's
            with named_as_flag(self.options.published_options):
                self.contrastive_loss(self.columns(x, views, ids), torch.Generator())
        finally:
            self.loss.group = group

    def contrastive_loss(self, columns: Columns, generator: torch.Generator) -> Tensor:
        """The loss of ``--loss``, of the whole vectors or summed over the prefixes of ``--matryoshka_dims``."""
        dims, features = self.options.matryoshka_dims, columns.anchors.shape[1]
        if dims and max(dims) > features:
            raise ValueError(f"--matryoshka_dims must be at most the model's {features} features, not {max(dims)}")
        weights = self.options.matryoshka_weights or [1.0] * len(dims or [features])
        total: Any = 0
        for dim, weight in zip(dims or [features], weights, strict=True):
            total = total + weight * self._loss_of(columns if dim == features else columns.prefix(dim), generator)
        return total

    def _loss_of(self, columns: Columns, generator: torch.Generator) -> Tensor:
        if self.options.loss not in LOSSES:
            return self.loss(**vars(columns), generator=generator)
        self.loss.project()
        places = {name: getattr(self.options, name) for name in PLACES}
        options = {**self.options.published_options, **places}
        return published_loss(self.options.loss, columns, self.loss.temperature, self.loss.group, options)

    def enqueue(self, positives: Tensor) -> None:
        if self.queue_size:
            newest = positives.detach().to(self.queue.dtype)
            self.queue = torch.cat([newest, self.queue])[: self.queue_size]

    @torch.no_grad()
    def stats(self, columns: Columns, generator: torch.Generator) -> dict[str, float]:
        """``contrastive_stats`` of a batch, and the temperature."""
        temperature = self.loss.temperature
        measured = contrastive_stats(
            **vars(columns),
            temperature=temperature,
            generator=generator,
            **{name: getattr(self.loss, name) for name in self.options.loss_options if name in STATS_OPTIONS},
        )
        measured.pop("loss")  # Trainer logs its mean over the steps
        return {**{name: float(value) for name, value in measured.items()}, "temperature": float(temperature)}

    def extra_state(self) -> dict[str, Tensor]:
        """Weights and memory beside the encoder's, which its own folder holds."""
        names = {name for name, _ in itertools.chain(self.named_parameters(), self.named_buffers())}
        state = {**self.state_dict(), "queue": self.queue}
        state = {name: value for name, value in state.items() if not name.startswith("encoder.")}
        state = {name: value for name, value in state.items() if name in names}  # what two names share, once
        return {name: value.contiguous() for name, value in state.items() if value.numel()}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.queue = state.pop("queue", self.queue[:0]).to(self.queue.device)
        self.load_state_dict(state, strict=False)

    # What flags of TrainingArguments ask of a model.

    def activation_checkpointing_enable(self, **options: Any) -> None:
        self.encoder.backbone.activation_checkpointing_enable(**options)

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of layers, each of which ``--fsdp`` shards as one unit.

        Not one that holds the input embeddings, as BertEmbeddings: accelerate shards these as a unit of their own,
        and a weight can be in one only.
        """
        backbone = self.encoder.backbone
        embeddings = backbone.get_input_embeddings()
        around = {type(module).__name__ for module in backbone.modules() if embeddings in module.modules()}
        return sorted(set(backbone._no_split_modules or ()) - around)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.backbone.get_input_embeddings()


class MLMHead(nn.Module):
    """Hidden states → logits over the vocabulary: the head of the checkpoint's masked language model.

    As in the reference it starts from the pretrained weights, and its last matrix from the input embeddings where
    the checkpoint shares the two; it is trained apart from them. ``missing`` names the weights that the checkpoint
    does not hold, which start anew.
    """

    def __init__(self, encoder: SentenceEncoder):
        super().__init__()
        self.model, self.missing = load_masked_lm(encoder.source, encoder.config)
        setattr(self.model, self.model.base_model_prefix, _HiddenStates())  # the encoder is the backbone

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Sum of the cross-entropies where ``labels`` is not −100."""
        chosen = labels != -100
        logits = self.model(inputs_embeds=hidden[chosen]).logits
        return F.cross_entropy(logits.float(), labels[chosen], reduction="sum")


class _HiddenStates(nn.Module):
    """Stands for the backbone of a masked language model that is given its hidden states."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=inputs_embeds)
