"""Low-rank adapters of the transformer (Hu et al. 2021, LoRA), by way of ``peft`` (extra ``lora``).

While an encoder is trained its transformer holds the adapter. A checkpoint has the adapter alone, as peft saves
it; the finished model has it merged into the weights, unless it is to be saved alone too. An adapter that is read
from a folder is merged into the model that it is for.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from simcse.errors import UserError, install
from simcse.weights import first_line, read_tensors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # before the names in a file of peft


def add_adapter(
    backbone: PreTrainedModel,
    base: str,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | None = None,
) -> None:
    """Freeze the transformer and put a trainable adapter on its linear layers.

    Args:
        base: what peft and transformers load the transformer from when they read the adapter.
        alpha: the adapter is scaled by alpha / rank; None: twice the rank, which scales it by 2.
        target_modules: names of layers, divided by commas, or ``all-linear``; None: what peft takes for a model
            of this type, mostly the projections of attention to queries and values.
    """
    _check_installed("--lora_r")
    from peft import LoraConfig

    targets: Any = target_modules
    if target_modules and target_modules != "all-linear":
        targets = [name.strip() for name in target_modules.split(",")]
    config = LoraConfig(
        r=rank, lora_alpha=alpha or 2 * rank, lora_dropout=dropout, target_modules=targets, bias="none"
    )
    try:
        backbone.add_adapter(config)
    except ValueError as error:  # no layer has such a name, or peft does not know the type of the model
        raise UserError(
            f"--lora_target_modules {target_modules or 'is not given'}: {first_line(error)}; name layers of "
            f"{type(backbone).__name__}, or all-linear"
        ) from None
    config.base_model_name_or_path = base
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler.requires_grad_(False)  # it takes no part


def has_adapter(backbone: PreTrainedModel) -> bool:
    return hasattr(backbone, "peft_config")


def adapter_weights(backbone: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter's tensors by the names that peft gives them in a file."""
    from peft import get_peft_model_state_dict

    # False: "auto" would ask the hub for the size of the vocabulary.
    state = get_peft_model_state_dict(backbone, save_embedding_layers=False)
    return {PREFIX + name.removeprefix(PREFIX): tensor.contiguous() for name, tensor in state.items()}


def save_adapter(backbone: PreTrainedModel, folder: Path) -> None:
    """The adapter alone, as peft saves it. (With a ``config.json`` beside it transformers expects all weights.)"""
    config = backbone.peft_config["default"]
    config.inference_mode = True
    try:
        config.save_pretrained(folder)
    finally:
        config.inference_mode = False
    save_file(adapter_weights(backbone), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def load_adapter(backbone: PreTrainedModel, folder: Path) -> None:
    """Take over the adapter of a folder that ``save_adapter`` wrote from an encoder of this kind."""
    from peft import set_peft_model_state_dict

    tensors, own = read_tensors(folder / ADAPTER_WEIGHTS), adapter_weights(backbone)
    if {name: x.shape for name, x in tensors.items()} != {name: x.shape for name, x in own.items()}:
        raise UserError(f"{folder / ADAPTER_WEIGHTS} is not the adapter of this run: its tensors are others")
    set_peft_model_state_dict(backbone, tensors)


def merged_weights(backbone: PreTrainedModel) -> dict[str, Tensor]:
    """The transformer's weights with the adapter added to them, by their names without one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in backbone.state_dict().items()
        if ".lora_" not in name
    }
    for name, layer in backbone.named_modules():
        if isinstance(layer, BaseTunerLayer):
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = weight + layer.get_delta_weight("default").detach().to(weight)
    return state


def base_of(folder: Path) -> str:
    """The name or path of the model that the adapter in a folder is for."""
    file = folder / ADAPTER_CONFIG
    if (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG}) and a model of its own (config.json), which is not "
            "supported; delete the first for the model alone, or merge the adapter with peft"
        )
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not isinstance(base, str):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{file} is damaged: it must be JSON with base_model_name_or_path, the model that the adapter is for"
        ) from None
    return base


def merge_saved(backbone: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The transformer with the adapter that peft saved in a folder merged into its weights."""
    _check_installed(f"the adapter in {folder}")
    from peft import PeftModel

    names = {name for name, _ in backbone.named_parameters()}
    try:
        merged = PeftModel.from_pretrained(backbone, folder, local_files_only=True).merge_and_unload()
    except Exception as error:  # a damaged file ends in errors of many kinds
        raise UserError(f"cannot load the adapter in {folder}: {first_line(error)}") from error
    if {name for name, _ in merged.named_parameters()} != names:
        raise UserError(f"the adapter in {folder} cannot be merged into the weights, which is the only way here")
    return merged.requires_grad_(True)


def _check_installed(what: str) -> None:
    if find_spec("peft") is None:
        raise UserError(f"{what}: the package peft is not installed; {install('lora')}")
