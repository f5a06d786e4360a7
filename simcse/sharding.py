"""Training with sharded weights (``--fsdp``, torch's ``fully_shard``): where it differs from whole weights."""

import copy
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from simcse.arguments import LossArguments
from simcse.errors import UserError
from simcse.lora import has_adapter
from simcse.model import SentenceEncoder, with_weights

# What a checkpoint holds in place of optimizer.pt, by accelerate's names.
CHECKPOINT_FILES = ["pytorch_model_fsdp.bin", "optimizer.bin"]


def check_sharding(config: dict[str, Any], options: LossArguments, encoder: SentenceEncoder) -> None:
    """``UserError`` for what cannot be sharded."""
    refused = {
        "--learn_temperature": options.learn_temperature,  # used outside of the sharded module's forward
        "--do_mlm": options.do_mlm,
        "--lora_r": has_adapter(encoder.backbone),
        "--fsdp_config version 1": int(config.get("version", 2)) != 2,
        "--fsdp_config state_dict_type SHARDED_STATE_DICT": "SHARDED" in config.get("state_dict_type", ""),
    }
    for name, given in refused.items():
        if given:
            raise UserError(f"--fsdp cannot be combined with {name}; leave one of them out")


def shard_on_cpus(accelerator: Accelerator, plugin_args: dict[str, Any]) -> None:
    """Have accelerate (1.15) shard the weights of processes on CPUs, as it does on GPUs.

    It takes the plugin over for devices of its list only, in which CPUs are missing, and would train whole copies
    of the weights without a word. The state is shared by all of accelerate's objects in this process.
    """
    state = accelerator.state
    if state.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**plugin_args)
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def unsharded(encoder: SentenceEncoder, weights: dict[str, Tensor]) -> SentenceEncoder:
    """The encoder with the whole ``weights`` of its objective, by their names there."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}

    plain = copy.copy(encoder)
    plain._modules = dict(encoder._modules)  # the copy shares it otherwise
    plain.backbone = with_weights(encoder.backbone, encoder.config, part("encoder.backbone."))
    if encoder.mlp is not None:
        width = encoder.config.hidden_size
        plain.mlp = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        plain.mlp.load_state_dict(part("encoder.mlp."))
    return plain


class ShardedEncoder:
    """The encoder of a sharded objective, for evaluation: all processes call it together.

    ``embed`` goes through the objective, whose hooks gather the weights that no layer gathers by itself.
    """

    def __init__(self, objective: Any):
        self.objective = objective
        register_fsdp_forward_method(objective, "embed")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective.encoder, name)

    def embed(self, **tokens: Tensor) -> Tensor:
        return self.objective.embed(**tokens)[0]
