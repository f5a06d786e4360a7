"""``python -m simcse.convert``: a checkpoint of the reference's code → the folder of ``simcse.layout``."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from simcse.errors import UserError, exit_cleanly

with exit_cleanly("simcse.convert"):
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torch import Tensor
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils import logging

    from simcse.arguments import flag, parse
    from simcse.files import output_folder
    from simcse.layout import save_encoder
    from simcse.model import CONFIG_FILE, PoolerType, load_encoder

DESCRIPTION = (
    "Read a checkpoint that the code of princeton-nlp/SimCSE (or GS-InfoNCE) wrote and write a folder that "
    "simcse, sentence-transformers and transformers read. Weights come from model.safetensors, or from "
    "pytorch_model.bin as tensors only: nothing in it is executed."
)
PREFIX = re.compile(r"^(bert|roberta)\.")


@dataclass
class ConvertArguments:
    path: str | None = flag(None, "The checkpoint's folder: config.json, weights, tokenizer.")
    output_dir: str | None = flag(None, "Folder to write.")
    pooler_type: PoolerType | None = flag(  # noqa: RUF009 (a field, as its neighbours)
        None,
        "The pooler it was trained with. Default: cls where the checkpoint has an MLP, else cls_before_pooler.",
    )
    mlp_only_train: bool = flag(False, "It was trained with --mlp_only_train: the MLP is left out at inference.")

    def __post_init__(self) -> None:
        if not self.path or not self.output_dir:
            raise ValueError("--path and --output_dir are required")


def main(argv: list[str] | None = None) -> None:
    with exit_cleanly("simcse.convert"):
        logging.disable_progress_bar()
        (args,) = parse(ConvertArguments, "simcse.convert", DESCRIPTION, argv)
        source, output = Path(args.path).expanduser(), output_folder("--output_dir", args.output_dir)
        if output.is_dir() and source.is_dir() and output.samefile(source):
            raise UserError("--output_dir and --path name the same folder; choose another --output_dir")
        if output.is_dir() and any(output.iterdir()) and not (output / CONFIG_FILE).is_file():
            raise UserError(f"--output_dir {output} holds files that simcse did not write; choose a new folder")
        convert(source, output, args.pooler_type, args.mlp_only_train)
        print(f"model  {output}")


def convert(source: Path, output: Path, pooler: PoolerType | None = None, mlp_only_train: bool = False) -> None:
    """Write ``output`` from the checkpoint ``source``; ``UserError`` where weights are missing, or left over."""
    weights, mlp = split_weights(read_weights(source))
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True)
        backbone = AutoModel.from_config(config)
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the configuration or tokenizer in {source}: {str(error).splitlines()[0]}"
        ) from None
    if mlp:
        weights |= {f"pooler.dense.{name}": value for name, value in mlp.items()}
    missing, unknown = backbone.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.startswith("pooler.") and not name.endswith("position_ids")]
    unknown = [name for name in unknown if not name.startswith("pooler.") and not name.endswith("position_ids")]
    if missing or unknown:
        raise UserError(
            f"the weights in {source} are not those of its config.json: {len(missing)} missing, "
            f"{len(unknown)} unknown, such as {(missing + unknown)[0]}"
        )
    pooler = pooler or ("cls" if mlp or "pooler.dense.weight" in weights else "cls_before_pooler")
    with tempfile.TemporaryDirectory() as plain:  # by way of the loader that every folder goes through
        backbone.save_pretrained(plain)
        tokenizer.save_pretrained(plain)
        encoder, tokenizer = load_encoder(plain, pooler, mlp_only_train, new_mlp=False)
    if encoder.mlp is not None and mlp:
        encoder.mlp[0].load_state_dict(mlp)
    save_encoder(encoder, tokenizer, output, f"Converted from the SimCSE checkpoint `{source.name}`.")


def read_weights(source: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's folder."""
    if not (source / "config.json").is_file():
        raise UserError(f"{source} is not a checkpoint folder (config.json is missing)")
    safe, pickled = source / "model.safetensors", source / "pytorch_model.bin"
    try:
        if safe.is_file():
            return load_file(safe)
        if pickled.is_file():
            return torch.load(pickled, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read the weights in {source}: {str(error).splitlines()[0]}") from None
    except Exception as error:  # pickle's UnpicklingError is what weights_only refuses with
        if type(error).__name__ != "UnpicklingError":
            raise
        raise UserError(f"{pickled} holds more than tensors, and is not loaded") from None
    raise UserError(f"{source} holds neither model.safetensors nor pytorch_model.bin")


def split_weights(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The backbone's weights without ``bert.`` or ``roberta.``, and the MLP's; MLM heads are left out."""
    mlp = {
        name.removeprefix("mlp.dense."): value for name, value in weights.items() if name.startswith("mlp.dense.")
    }
    prefixed = {PREFIX.sub("", name): value for name, value in weights.items() if PREFIX.match(name)}
    if not prefixed:  # an AutoModel folder already
        prefixed = {
            name: value for name, value in weights.items() if not name.startswith(("mlp.", "lm_head.", "cls."))
        }
    return prefixed, mlp


if __name__ == "__main__":
    main()
