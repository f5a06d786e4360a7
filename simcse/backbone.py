"""The transformer inside an encoder: its weights, its dropout, and the masked language model of its checkpoint."""

import copy
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    PreTrainedModel,
)

from simcse.errors import UserError
from simcse.lora import ADAPTER_CONFIG, base_of, merge_saved
from simcse.sources import GGUF, base_folder, load_arguments, quiet
from simcse.weights import first_line, left_over

# transformers' names for the probabilities of hidden and of attention dropout
DROPOUTS = (
    *("hidden_dropout_prob", "hidden_dropout", "dropout", "dropout_rate", "dropout_prob", "mlp_dropout"),
    *("resid_pdrop", "resid_dropout", "residual_dropout"),
    *("embd_pdrop", "embed_dropout", "embedding_dropout"),
    *("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"),
)


def load_backbone(source: Path, name: str, **changed: float) -> tuple[PreTrainedModel, bool]:
    """The transformer, and whether its own pooler is new, its weights not among the saved."""
    if (source / ADAPTER_CONFIG).is_file():
        backbone, fresh_pooler = load_backbone(base_folder(source), str(base_of(source)), **changed)
        return merge_saved(backbone, source), fresh_pooler
    try:
        with quiet():
            backbone, report = AutoModel.from_pretrained(
                **load_arguments(source),
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


def load_masked_lm(source: Path | None, config: Any) -> tuple[PreTrainedModel, list[str]]:
    """The masked language model of a checkpoint (without one, of a config), and which weights of its head are new.

    They are new where the checkpoint does not hold them, as that of a sentence encoder.
    """
    try:
        with quiet():
            if source is None:
                model = AutoModelForMaskedLM.from_config(config, trust_remote_code=False)
                missing = dict(model.named_parameters())
            else:
                model, report = AutoModelForMaskedLM.from_pretrained(
                    **load_arguments(base_folder(source)), dtype=torch.float32, output_loading_info=True
                )
                missing = report["missing_keys"]
    except ValueError:
        raise UserError(
            f"--do_mlm: transformers has no masked language model of the type {config.model_type}; leave it out"
        ) from None
    except Exception as error:  # a damaged or hostile file ends in errors of many kinds
        raise UserError(f"cannot load the masked language model in {source}: {first_line(error)}") from error
    base = f"{model.base_model_prefix}."
    return model, sorted(name for name in missing if not name.startswith(base))


def changed_dropout(source: Path, dropout: float | None) -> tuple[dict[str, float], dict[str, float]]:
    """The configuration's dropout probabilities, and what they become; both empty where nothing changes."""
    if dropout is None:
        return {}, {}
    try:
        config = AutoConfig.from_pretrained(**load_arguments(base_folder(source)))
    except Exception as error:  # a damaged file ends in errors of many kinds
        raise UserError(f"cannot load the configuration in {source}: {first_line(error)}") from error
    original_dropout = dropouts(config)
    if not original_dropout:
        raise UserError(f"--dropout: the configuration of {source} names no dropout; leave it out")
    return original_dropout, dict.fromkeys(original_dropout, dropout)


def dropouts(config: Any) -> dict[str, float]:
    """The probabilities of dropout in a configuration, by their names."""
    named = {name: getattr(config, name, None) for name in DROPOUTS}
    return {name: value for name, value in named.items() if isinstance(value, int | float)}


def is_causal(config: Any) -> bool:
    """Whether a token sees those before it only: the models that transformers has no masked language model of."""
    kind = type(config)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
