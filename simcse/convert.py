"""``python -m simcse.convert``: a checkpoint of the reference's code → the folder of ``simcse.saved_model``."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from simcse.errors import UserError, exit_cleanly

with exit_cleanly("simcse.convert"):
    from torch import Tensor
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils import logging

    from simcse.encoder import PoolerType, check_pooler
    from simcse.flags import flag, parse, pooler_flag
    from simcse.model import load_encoder
    from simcse.runs import check_output_dir
    from simcse.saved_model import save_encoder
    from simcse.sources import LOCAL
    from simcse.storage import saving
    from simcse.weights import first_line, left_over, read_tensors

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
    pooler_type: PoolerType | None = pooler_flag(  # noqa: RUF009 (a field, as its neighbours)
        "cls where the checkpoint has an MLP, else cls_before_pooler"
    )
    mlp_only_train: bool = flag(False, "It was trained with --mlp_only_train: the MLP is left out at inference.")

    overwrite_output_dir: bool = flag(
        False,
        "Use an --output_dir that holds files: a model that simcse wrote there is deleted; other files stay, "
        "unless the new model has a file of the same name.",
    )

    def __post_init__(self) -> None:
        if not self.path or not self.output_dir:
            raise ValueError("--path and --output_dir are required")


def main(argv: list[str] | None = None) -> None:
    with exit_cleanly("simcse.convert"):
        logging.disable_progress_bar()
        (args,) = parse(ConvertArguments, "simcse.convert", DESCRIPTION, argv)
        source, output = Path(args.path).expanduser(), Path(args.output_dir).expanduser()
        if output.is_dir() and source.is_dir() and output.samefile(source):
            raise UserError("--output_dir and --path name the same folder; choose another --output_dir")
        check_output_dir(output, args.overwrite_output_dir)
        with saving(output):
            convert(source, output, args.pooler_type, args.mlp_only_train)
        print(f"model  {output}")


def convert(source: Path, output: Path, pooler: PoolerType | None = None, mlp_only_train: bool = False) -> None:
    """Write ``output`` from the checkpoint ``source``; ``UserError`` where weights are missing, or left over."""
    if pooler is not None:
        check_pooler(pooler)
    weights, mlp = split_weights(read_weights(source))
    try:
        config = AutoConfig.from_pretrained(source, **LOCAL)
        backbone = AutoModel.from_config(config, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, **LOCAL)
    except Exception as error:  # a damaged file ends in errors of many kinds
        raise UserError(f"cannot read the configuration or tokenizer in {source}: {first_line(error)}") from error
    if mlp:
        weights |= {f"pooler.dense.{name}": value for name, value in mlp.items()}
    try:
        missing, unknown = backbone.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # tensors of another shape
        raise UserError(f"the weights in {source} are not those of its config.json: {first_line(error)}") from None
    missing, unknown = left_over(missing), left_over(unknown)
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
        try:
            encoder.mlp[0].load_state_dict(mlp)
        except RuntimeError as error:
            raise UserError(f"the MLP in {source} is not that of this model: {first_line(error)}") from None
    save_encoder(encoder, tokenizer, output, f"Converted from the SimCSE checkpoint `{source.name}`.")


def read_weights(source: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's folder."""
    if not (source / "config.json").is_file():
        raise UserError(f"{source} is not a checkpoint folder: it has no config.json")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (source / name).is_file():
            return read_tensors(source / name)
    raise UserError(f"{source} holds neither model.safetensors nor pytorch_model.bin")


def split_weights(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The backbone's weights without ``bert.`` or ``roberta.``, and the MLP's; MLM heads are left out.

    In an AutoModel folder nothing has a prefix. What belongs to none of them stays, and the model refuses it.
    """
    mlp = {
        name.removeprefix("mlp.dense."): value for name, value in weights.items() if name.startswith("mlp.dense.")
    }
    others = {name: value for name, value in weights.items() if not name.startswith("mlp.dense.")}
    if any(map(PREFIX.match, others)):
        kept = {*filter(PREFIX.match, others), *left_over(others)}
    else:
        kept = {name for name in others if not name.startswith(("lm_head.", "cls."))}
    return {PREFIX.sub("", name): value for name, value in others.items() if name in kept}, mlp


if __name__ == "__main__":
    main()
