"""``python -m simcse.evaluate``: the STS tasks of a file, Spearman's correlation in the 'all' setting."""

import json
import math
import os
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, Literal

from simcse.errors import UserError, exit_cleanly

with exit_cleanly("simcse.evaluate"):  # these take seconds, and Ctrl-C has to be clean in them too
    import torch
    from transformers.utils import logging

    from simcse.arguments import MODEL, STORED_POOLER, flag, parse, pooler_flag
    from simcse.dataset import shipped
    from simcse.files import output_file, output_folder, write_text
    from simcse.model import PoolerType, load_encoder
    from simcse.plot import plot_densities, plot_path, plot_spectrum
    from simcse.report import anisotropy_line, evaluations, markdown, table
    from simcse.sts import Pairs, cone, cosines, encode, geometry, read_sts_source, spearman, watched_pairs

DESCRIPTION = (
    "Score a sentence encoder on graded pairs of sentences: Spearman × 100 between cosine similarity and "
    "the grades, the subsets of a task concatenated (SentEval's 'all' setting); alignment, uniformity and "
    "anisotropy on the dev split of STS-B, or of the first task that has one. Sentences are cut at the length "
    "that the model's folder states."
)

PLOTS = ("cosine_densities.png", "singular_values.png", "alignment_uniformity.png")


@dataclass
class EvaluationArguments:
    model_name_or_path: str = flag("minilm", MODEL)
    pooler_type: PoolerType | None = pooler_flag(STORED_POOLER)  # noqa: RUF009 (a field, as its neighbours)
    sts_data: str | None = flag(
        None,
        "TSV with the columns task, subset, split, score, sentence1, sentence2, quoted as Python's csv does; a "
        "folder of such files; 'mteb' or a name like mteb/stsbenchmark-sts for the sets on the hub. Default: the "
        "pairs in the package.",
    )
    mode: Literal["all", "test", "dev"] = flag(
        "all", "Which splits: 'test', 'dev' (with 'trial', as SICK-R calls it), or all that the data has."
    )
    output_json: str | None = flag(
        None,
        "File for the scores: task → Spearman × 100 (test split; task-split for another), with alignment and "
        "uniformity.",
    )
    output_md: str | None = flag(None, "File for the table as Markdown.")
    plots: str | None = flag(
        None,
        "Folder for plots of the watched pairs: cosine densities by grade, singular values (anisotropy), and the "
        "alignment-uniformity plane, with the run's path where the model's folder has a trainer_state.json.",
    )
    batch_size: int = flag(64, "Sentences a batch.")
    query_prompt: str | None = flag(
        None, "Text before the first sentence of each pair. Default: the model's default prompt."
    )
    document_prompt: str | None = flag(
        None, "Text before the second sentence of each pair. Default: that before the first."
    )

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch_size must be at least 1, not {self.batch_size}")


def main(argv: list[str] | None = None) -> None:
    with exit_cleanly("simcse.evaluate"):
        logging.disable_progress_bar()
        (args,) = parse(EvaluationArguments, "simcse.evaluate", DESCRIPTION, argv)
        _check_outputs(args)
        run = _trajectory(Path(args.model_name_or_path).expanduser()) if args.plots else {}
        tasks = read_sts_source(args.sts_data or shipped("sts.tsv"))
        wanted = {"all": None, "test": ("test",), "dev": ("dev", "trial")}[args.mode]
        tasks = [pairs for pairs in tasks if wanted is None or pairs.split in wanted]
        if not tasks:
            raise UserError(
                f"{args.sts_data or 'the package'} has no pairs of the split {args.mode}; try --mode all"
            )
        encoder, tokenizer = load_encoder(args.model_name_or_path, args.pooler_type)
        if not encoder.settings.compares_by_cosine:
            getLogger("simcse").warning(
                f"{args.model_name_or_path} compares its vectors by {encoder.settings.similarity}; it is scored "
                "by cosine similarity"
            )
        if torch.accelerator.is_available():
            encoder.to(torch.accelerator.current_accelerator())

        query = encoder.settings.prompt if args.query_prompt is None else args.query_prompt
        document = query if args.document_prompt is None else args.document_prompt
        tasks = [pairs.with_prompts(query, document) for pairs in tasks]
        sentences = [s for pairs in tasks for s in pairs.sentences]
        vectors = encode(encoder, tokenizer, sentences, args.batch_size, prompt="")
        scores = {pairs.name: spearman(pairs, vectors) for pairs in tasks}
        tests = [scores[pairs.name] for pairs in tasks if pairs.split == "test"]
        watched = watched_pairs(tasks)
        shape = geometry(watched, vectors) if watched else {}

        rows = [("task", "pairs", "Spearman × 100")]
        rows += [(pairs.name, f"{len(pairs.scores):,}", f"{scores[pairs.name]:.2f}") for pairs in tasks]
        if len(tests) > 1:
            rows.append(("mean of test splits", "", f"{sum(tests) / len(tests):.2f}"))
        heading = f"{args.model_name_or_path}, {encoder.pooler_type}"
        note = ""
        if shape:
            measures = ", ".join(f"{name} {value:.4f}" for name, value in shape.items())
            note = f"{watched.name}: {measures} (lower is better)"
            note += f"\n\n{anisotropy_line(watched.name, cone(watched, vectors), encoder.features)}"
        if args.output_json:
            text = json.dumps({name: _number(value) for name, value in (scores | shape).items()}, indent=2)
            write_text(Path(args.output_json).expanduser(), text + "\n")
        if args.output_md:
            write_text(Path(args.output_md).expanduser(), f"{heading}\n\n{markdown(rows)}\n\n{note}\n")
        if args.plots:
            _plot(args, heading, watched or tasks[0], vectors, shape, run)
        # Last: a reader that goes away (`| head`) ends the command here.
        print(f"\n{heading}\n\n{table(rows)}" + (f"\n\n{note}" if note else ""))
        if args.plots:
            print(f"plots  {args.plots}")


def _check_outputs(args: EvaluationArguments) -> None:
    source = Path(args.sts_data or "").expanduser()
    inputs = list(source.glob("*.tsv")) if source.is_dir() else [source]
    if args.output_json:
        output_file("--output_json", args.output_json, {"--sts_data": inputs})
    if args.output_md:
        output_file("--output_md", args.output_md, {"--sts_data": inputs, "--output_json": [args.output_json]})
    if args.plots and output_folder("--plots", args.plots).is_dir():
        for name in PLOTS:
            output_file("--plots", os.path.join(args.plots, name))


def _plot(
    args: EvaluationArguments,
    heading: str,
    pairs: Pairs,
    vectors: dict[str, torch.Tensor],
    shape: dict[str, float],
    run: dict[str, Any],
) -> None:
    folder = Path(args.plots).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{pairs.name}, {heading}"
    densities, spectrum, path = (folder / name for name in PLOTS)
    plot_densities(cosines(pairs, vectors).tolist(), pairs.scores, title, densities)
    rows = torch.stack([vectors[sentence] for sentence in dict.fromkeys(pairs.sentences)])  # (S, D)
    plot_spectrum(torch.linalg.svdvals(rows.double()).tolist(), title, spectrum)
    points = run.get("points") or ([{"step": 0, **shape}] if "alignment" in shape else [])
    if points:
        plot_path(points, title, path, run.get("best"))


def _trajectory(model: Path) -> dict[str, Any]:
    """The evaluations of the run that a model's folder keeps the log of; empty without."""
    file = model / "trainer_state.json"
    if not file.is_file():
        return {}
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        points = [point for point in evaluations(state["log_history"]) if "alignment" in point]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error!r}); --plots reads the run's path from it") from None
    return {"points": points, "best": state.get("best_global_step")} if points else {}


def _number(value: float) -> float | None:
    """JSON knows no NaN: null, where a correlation is undefined."""
    return None if math.isnan(value) else round(value, 4)


if __name__ == "__main__":
    main()
