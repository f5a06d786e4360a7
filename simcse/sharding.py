"""Training with sharded weights (``--fsdp``, torch's ``fully_shard``): where it differs from whole weights."""

import copy
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from simcse.arguments import LossArguments, SimCSETrainingArguments
from simcse.backbone import with_weights
from simcse.encoder import SentenceEncoder
from simcse.errors import UserError
from simcse.lora import has_adapter

# The files of a checkpoint in place of optimizer.pt, by the names that accelerate and transformers give them.
CHECKPOINT_FILES = ["pytorch_model_fsdp.bin", "optimizer.bin"]


def check_sharding(args: SimCSETrainingArguments, options: LossArguments, encoder: SentenceEncoder) -> None:
    """``UserError`` for what cannot be sharded."""
    if args.world_size == 1:
        raise UserError(
            "--fsdp divides the weights among processes, and this is a single one; start it by torchrun"
        )
    config = args.fsdp_config
    refused = {
        "--learn_temperature": options.learn_temperature,  # used, and clamped in place, outside of the forward
        "--do_mlm": options.do_mlm,
        "--lora_r": has_adapter(encoder.backbone),
        "--fp16": args.fp16,
        "--fsdp_config version 1": int(config.get("version", 2)) != 2,
        "--fsdp_config xla": config.get("xla"),
        "--fsdp_config activation_checkpointing": config.get("activation_checkpointing"),  # mini batches do that
        "--fsdp_config state_dict_type SHARDED_STATE_DICT": "SHARDED" in config.get("state_dict_type", ""),
    }
    for name, given in refused.items():
        if given:
            raise UserError(f"--fsdp cannot be combined with {name}; leave one of them out")


def enable_sharding(accelerator: Accelerator, plugin_args: dict[str, Any]) -> None:
    """Have accelerate shard the weights, on CPUs too, in fp32.

    accelerate (1.15) takes the plugin over on its list of accelerators only; on CPUs it would train whole copies
    of the weights without a word. Its state is shared by all its objects in this process. Under ``--bf16`` it
    would gather weights and sum gradients in bf16, in evaluation too; autocast around the forward computes what a
    single process does.
    """
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_args)
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin.mixed_precision_policy = None


def check_sharded(model: nn.Module) -> None:
    """``UserError`` where accelerate, of another version or on another device, left weights whole."""
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if whole:
        raise UserError(f"--fsdp: accelerate did not shard {whole[0]} on this device; leave --fsdp out")


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
