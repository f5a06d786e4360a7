"""Reading tensors from files, and telling the weights of an encoder from those of other heads."""

import pickle
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from simcse.errors import UserError

# What pretraining and classification put on a transformer: it takes no part in the sentence vector.
HEADS = re.compile(
    r"(cls|lm_head|lm_predictions|mask_predictions|predictions|generator_predictions|generator_lm_head"
    r"|discriminator_predictions|vocab_transform|vocab_layer_norm|vocab_projector|sop_classifier|seq_relationship"
    r"|pre_classifier|classifier|qa_outputs|score|head|pooler)\..*|decoder\.(weight|bias)|.*\b(position_ids|inv_freq)"
)


def left_over(names: Iterable[str], prefix: str = "") -> list[str]:
    """Those of ``names``, which the transformer does not take, that are part of no other head.

    ``prefix`` is what a model with a head has before the names of its transformer, such as ``bert.``.
    """
    return sorted(name for name in names if not HEADS.fullmatch(name.removeprefix(prefix)))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a ``.bin`` file without executing anything in it."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{file} holds more than tensors, or is damaged; it is not loaded") from None
    except Exception as error:  # damaged files end in errors of many kinds
        raise UserError(f"cannot read the weights in {file}: {first_line(error)}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    ):
        raise UserError(f"{file} holds something else than named tensors")
    return tensors


def first_line(error: Exception) -> str:
    """What an error of another library says first, without a full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
