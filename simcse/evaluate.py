"""``python -m simcse.evaluate``: the STS tasks of a file, Spearman's correlation in the 'all' setting."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from simcse.errors import UserError, exit_cleanly

with exit_cleanly("simcse.evaluate"):  # these take seconds, and Ctrl-C has to be clean in them too
    import torch
    from transformers.utils import logging

    from simcse.arguments import POOLERS, flag, parse
    from simcse.dataset import shipped
    from simcse.model import PoolerType, load_encoder
    from simcse.report import table
    from simcse.sts import encode, geometry, read_sts, spearman, watched_pairs

DESCRIPTION = (
    "Score a sentence encoder on graded pairs of sentences: Spearman × 100 between cosine similarity and "
    "the grades, the subsets of a task concatenated (SentEval's 'all' setting); alignment and uniformity on "
    "the dev split of STS-B, or of the first task that has one. Only what the model cannot read is cut."
)


@dataclass
class EvaluationArguments:
    model_name_or_path: str = flag(
        "minilm",
        "A model folder, a name on the Hugging Face hub, or 'minilm', the encoder of the extra 'demo'.",
    )
    pooler: PoolerType | None = flag(  # noqa: RUF009 (a field, as its neighbours)
        None, f"The sentence vector. {POOLERS} Default: what the folder was saved with, else avg."
    )
    sts_data: str | None = flag(
        None,
        "TSV with the columns task, subset, split, score, sentence1, sentence2, quoted as Python's csv does. "
        "Default: the pairs in the package.",
    )
    output_json: str | None = flag(
        None,
        "File for the scores: task → Spearman × 100 (test split; task-split for another), with alignment and "
        "uniformity.",
    )
    batch_size: int = flag(64, "Sentences a batch.")

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch_size is {self.batch_size}; wanted is 1 or more")


def main(argv: list[str] | None = None) -> None:
    with exit_cleanly("simcse.evaluate"):
        logging.disable_progress_bar()
        (args,) = parse(EvaluationArguments, "simcse.evaluate", DESCRIPTION, argv)
        tasks = read_sts(args.sts_data or shipped("sts.tsv"))
        if args.output_json and not Path(args.output_json).parent.is_dir():
            raise UserError(f"there is no folder {Path(args.output_json).parent} for --output_json; make it first")
        encoder, tokenizer = load_encoder(args.model_name_or_path, args.pooler)
        if torch.accelerator.is_available():
            encoder.to(torch.accelerator.current_accelerator())

        vectors = encode(encoder, tokenizer, [s for pairs in tasks for s in pairs.sentences], args.batch_size)
        scores = {pairs.name: spearman(pairs, vectors) for pairs in tasks}
        tests = [scores[pairs.name] for pairs in tasks if pairs.split == "test"]
        watched = watched_pairs(tasks)
        shape = geometry(watched, vectors) if watched else {}

        rows = [("task", "pairs", "Spearman × 100")]
        rows += [(pairs.name, f"{len(pairs.scores):,}", f"{scores[pairs.name]:.2f}") for pairs in tasks]
        if len(tests) > 1:
            rows.append(("mean of test splits", "", f"{sum(tests) / len(tests):.2f}"))
        print(f"\n{args.model_name_or_path}, {encoder.pooler_type}\n\n{table(rows)}")
        if shape:
            measures = ", ".join(f"{name} {value:.4f}" for name, value in shape.items())
            print(f"\n{watched.name}: {measures} (lower is better)")
        if args.output_json:
            text = json.dumps({name: _number(value) for name, value in (scores | shape).items()}, indent=2)
            Path(args.output_json).write_text(text + "\n", encoding="utf-8")


def _number(value: float) -> float | None:
    """JSON knows no NaN: null, where a correlation is undefined."""
    return None if math.isnan(value) else round(value, 4)


if __name__ == "__main__":
    main()
