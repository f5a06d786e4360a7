"""``python -m simcse.evaluate``: the STS tasks of a file, and SentEval's transfer tasks of a folder."""

import json
import os
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any, Literal

from simcse.errors import UserError, exit_cleanly

with exit_cleanly("simcse.evaluate"):  # these take seconds, and Ctrl-C has to be clean in them too
    import torch
    from transformers.utils import logging

    from simcse.collator import packaged_file
    from simcse.encoder import PoolerType
    from simcse.files import output_file, output_folder, write_text
    from simcse.flags import MODEL, STORED_POOLER, flag, parse, pooler_flag
    from simcse.model import load_encoder
    from simcse.plot import plot_densities, plot_path, plot_spectrum
    from simcse.report import anisotropy_line, evaluations, markdown, table
    from simcse.scores import STS_TASKS, TRANSFER_TASKS, add_row_of_averages, sts_rows, transfer_rows, write_json
    from simcse.sts import Pairs, cone, correlations, cosines, encode, geometry, read_sts_source, watched_pairs

DESCRIPTION = (
    "Score a sentence encoder on graded pairs of sentences: Spearman × 100 between cosine similarity and "
    "the grades, the subsets of a task concatenated (SentEval's 'all' setting), beside the means over the subsets "
    "and Pearson; alignment, uniformity and anisotropy on the dev split of STS-B, or of the first task that has "
    "one. With --task_set transfer or full: the accuracy of a logistic regression on the vectors, on SentEval's "
    "transfer tasks. Sentences are cut at the length that the model's folder states."
)
SPLITS = {"all": None, "test": ("test",), "fasttest": ("test",), "dev": ("dev", "trial")}

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
    task_set: Literal["sts", "transfer", "full", "na"] | None = flag(
        None,
        "'sts': the tasks of --sts_data (the default); 'transfer': those of --transfer_data; 'full': both; 'na': "
        "those of --tasks.",
    )
    tasks: list[str] | None = flag(  # noqa: RUF009 (a field, as its neighbours)
        None,
        "Only these tasks, such as STS12 STSB MR CR; the reference's names STSBenchmark and SICKRelatedness are "
        "STSB and SICKR. Without --task_set, or with 'na'.",
        nargs="+",
    )
    transfer_data: str | None = flag(
        None,
        "Folder of the transfer tasks in SentEval's layout (its data or data/downstream): "
        f"{', '.join(TRANSFER_TASKS)}. Needs the extra 'transfer'.",
    )
    mode: Literal["all", "test", "dev", "fasttest"] = flag(
        "all",
        "Which splits: 'test', 'dev' (with 'trial', as SICK-R calls it), or all that the data has. Transfer tasks "
        "have 10 folds and the test accuracy; with 'dev' 5 folds and the accuracy that chose the regularization, "
        "with 'fasttest' 5 folds and the test accuracy.",
    )
    output_json: str | None = flag(
        None,
        "File for the scores: task → Spearman × 100 (test split; task-split for another), with alignment and "
        "uniformity, and transfer task → accuracy × 100.",
    )
    details_json: str | None = flag(
        None,
        "File for all that was measured: for each STS task Spearman and Pearson of every subset, concatenated "
        "('all') and averaged ('mean', 'wmean'); for each transfer task SentEval's devacc, acc, f1, ndev, ntest.",
    )
    output_md: str | None = flag(None, "File for the table as Markdown.")
    plots: str | None = flag(
        None,
        "Folder for plots of the watched pairs: cosine densities by grade, singular values (anisotropy), and the "
        "alignment-uniformity plane, with the run's path where the model's folder has a trainer_state.json.",
    )
    batch_size: int = flag(64, "Sentences per batch.")
    truncate_dim: int | None = flag(
        None, "Keep this many features of each vector (Matryoshka). Default: what the folder states, else all."
    )
    query_prompt: str | None = flag(
        None,
        "Text before the first sentence of each pair, and before the sentences of transfer tasks. Default: "
        "the model's default prompt.",
    )
    document_prompt: str | None = flag(
        None, "Text before the second sentence of each pair. Default: that before the first."
    )

    def __post_init__(self) -> None:
        if self.truncate_dim is not None and self.truncate_dim < 1:
            raise ValueError(f"--truncate_dim must be at least 1, not {self.truncate_dim}")
        if self.batch_size < 1:
            raise ValueError(f"--batch_size must be at least 1, not {self.batch_size}")
        if self.tasks and self.task_set not in (None, "na"):
            raise ValueError(f"--tasks and --task_set {self.task_set} exclude each other; leave one out")
        if self.task_set == "na" and not self.tasks:
            raise ValueError("--task_set na takes the tasks of --tasks; name them")
        if self.transfer_tasks and not self.transfer_data:
            raise ValueError(
                f"--transfer_data is required for {', '.join(self.transfer_tasks)}: the folder of SentEval's data"
            )
        if self.plots and not self.scores_sts:
            raise ValueError("--plots shows graded pairs, and no STS task was chosen; leave it out")

    @property
    def transfer_tasks(self) -> list[str]:
        if self.tasks:
            return [task for task in TRANSFER_TASKS if task in self.tasks]
        return list(TRANSFER_TASKS) if self.task_set in ("transfer", "full") else []

    @property
    def sts_tasks(self) -> set[str] | None:
        """The names of STS tasks that were chosen; None for all that the data has."""
        if not self.tasks:
            return None
        return {{"STSBenchmark": "STSB", "SICKRelatedness": "SICKR"}.get(t, t) for t in self.tasks} - set(
            TRANSFER_TASKS
        )

    @property
    def scores_sts(self) -> bool:
        return bool(self.sts_tasks) if self.tasks else self.task_set != "transfer"


def main(argv: list[str] | None = None) -> None:
    with exit_cleanly("simcse.evaluate"):
        logging.disable_progress_bar()
        (args,) = parse(EvaluationArguments, "simcse.evaluate", DESCRIPTION, argv)
        transfer_files = _transfer_files(args)
        _check_outputs(args, [file for files in transfer_files.values() for file in files])
        run = _trajectory(Path(args.model_name_or_path).expanduser()) if args.plots else {}
        tasks = _sts_tasks(args) if args.scores_sts else []
        folds = 5 if args.mode in ("dev", "fasttest") else 10
        transfer_tasks = []
        if transfer_files:
            from simcse.transfer import read_transfer, score_transfer

            transfer_tasks = [read_transfer(name, files, folds) for name, files in transfer_files.items()]
        encoder, tokenizer = load_encoder(args.model_name_or_path, args.pooler_type)
        if args.truncate_dim is not None:
            if args.truncate_dim > encoder.config.hidden_size:
                raise UserError(
                    f"--truncate_dim {args.truncate_dim} is more than the {encoder.config.hidden_size} features "
                    f"of {args.model_name_or_path}"
                )
            encoder.settings = replace(encoder.settings, truncate_dim=args.truncate_dim)
        if tasks and not encoder.settings.compares_by_cosine:
            getLogger("simcse").warning(
                f"{args.model_name_or_path} compares its vectors by {encoder.settings.similarity}; it is scored "
                "by cosine similarity"
            )
        if torch.accelerator.is_available():
            encoder.to(torch.accelerator.current_accelerator())

        query = encoder.settings.prompt if args.query_prompt is None else args.query_prompt
        document = query if args.document_prompt is None else args.document_prompt
        tasks = [pairs.with_prompts(query, document) for pairs in tasks]
        heading = f"{args.model_name_or_path}, {encoder.pooler_type}"
        if args.truncate_dim is not None:
            heading += f", {args.truncate_dim} features"
        tables, notes = [], []
        scores: dict[str, float] = {}
        details: dict[str, Any] = {}
        if tasks:
            sentences = [s for pairs in tasks for s in pairs.sentences]
            vectors = encode(encoder, tokenizer, sentences, args.batch_size, prompt="")
            measured = {pairs.name: correlations(pairs, vectors) for pairs in tasks}
            details |= measured
            scores |= {name: values["all"]["spearman"]["all"] for name, values in measured.items()}
            watched = watched_pairs(tasks)
            shape = geometry(watched, vectors) if watched else {}
            scores |= shape
            tables.append(sts_rows(tasks, measured))
            add_row_of_averages(tables, notes, {t: n for n, t in STS_TASKS.items()}, scores)
            if shape:
                measures = ", ".join(f"{name} {value:.4f}" for name, value in shape.items())
                notes.append(f"{watched.name}: {measures} (lower is better)")
                notes.append(anisotropy_line(watched.name, cone(watched, vectors), encoder.features))
        if transfer_tasks:
            results = {}
            for task in transfer_tasks:  # one after the other: SST2 alone has 70,000 sentences
                task_vectors = encode(encoder, tokenizer, task.sentences, args.batch_size, prompt=query)
                results[task.name] = score_transfer(task, task_vectors, folds)
            details |= results
            shown = "devacc" if args.mode == "dev" else "acc"
            scores |= {name: result[shown] for name, result in results.items()}
            tables.append(transfer_rows(transfer_tasks, results))
            add_row_of_averages(tables, notes, {task: task for task in TRANSFER_TASKS}, scores)

        note = "\n\n".join(notes)
        if args.output_json:
            write_json(args.output_json, scores)
        if args.details_json:
            write_json(args.details_json, details)
        if args.output_md:
            text = "\n\n".join([heading, *map(markdown, tables), note])
            write_text(Path(args.output_md).expanduser(), text + "\n")
        if args.plots:
            _plot(args, heading, watched or tasks[0], vectors, shape, run)
        # Last: a reader that goes away (`| head`) ends the command here.
        print("\n" + "\n\n".join([heading, *map(table, tables), *notes]))
        if args.plots:
            print(f"plots  {args.plots}")


def _sts_tasks(args: EvaluationArguments) -> list[Pairs]:
    source = args.sts_data or "the package"
    tasks = read_sts_source(args.sts_data or packaged_file("sts.tsv"))
    if args.sts_tasks is not None:
        absent = sorted(args.sts_tasks - {pairs.task for pairs in tasks})
        if absent:
            there = dict.fromkeys(pairs.task for pairs in tasks)
            raise UserError(
                f"--tasks: {source} has the STS tasks {', '.join(there)}, not {', '.join(absent)}; transfer tasks "
                f"are {', '.join(TRANSFER_TASKS)}"
            )
        tasks = [pairs for pairs in tasks if pairs.task in args.sts_tasks]
    chosen = SPLITS[args.mode]
    tasks = [pairs for pairs in tasks if chosen is None or pairs.split in chosen]
    if not tasks:
        raise UserError(f"{source} has no pairs of the split {args.mode}; try --mode all")
    return tasks


def _transfer_files(args: EvaluationArguments) -> dict[str, list[Path]]:
    if not args.transfer_tasks:
        return {}
    from simcse.transfer import files_of

    return files_of(args.transfer_data, args.transfer_tasks)


def _check_outputs(args: EvaluationArguments, transfer_files: list[Path]) -> None:
    source = Path(args.sts_data or "").expanduser()
    inputs = list(source.glob("*.tsv")) if source.is_dir() else [source]
    others: dict[str, list[Any]] = {"--sts_data": inputs, "--transfer_data": transfer_files}
    for name in ("output_json", "details_json", "output_md"):
        given = getattr(args, name)
        if given is not None:
            output_file(f"--{name}", given, others)
            others[f"--{name}"] = [given]
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


if __name__ == "__main__":
    main()
