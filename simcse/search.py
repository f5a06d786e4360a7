"""``simcse search``: the sentences of a file, or of a saved index, that are closest to a query."""

from dataclasses import dataclass
from pathlib import Path

from simcse.errors import UserError, exit_cleanly

with exit_cleanly("simcse.search"):
    from transformers.utils import logging

    from simcse.encoder import PoolerType
    from simcse.files import output_folder
    from simcse.flags import MODEL, STORED_POOLER, flag, parse, pooler_flag
    from simcse.inference import SimCSE
    from simcse.report import table

DESCRIPTION = "Print the sentences that are closest to a query, by cosine similarity."


@dataclass
class SearchArguments:
    model_name_or_path: str = flag("minilm", MODEL)
    pooler_type: PoolerType | None = pooler_flag(STORED_POOLER)  # noqa: RUF009 (a field, as its neighbours)
    query: str | None = flag(None, "What to look for.")
    sentences: str | None = flag(
        None, "The file to search: .txt, a sentence per line, or the first column of a table."
    )
    index: str | None = flag(None, "Folder of an index: written with --sentences, read without.")
    top_k: int = flag(5, "Sentences to print at most.")
    threshold: float = flag(0.6, "The least cosine similarity.")
    max_length: int | None = flag(None, "Maximum tokens per sentence. Default: what the model's folder states.")
    faiss_fast: bool = flag(False, "Search approximately (FAISS).")
    query_prompt: str | None = flag(None, "Text before the query. Default: the model's prompt for queries.")
    document_prompt: str | None = flag(
        None, "Text before each of --sentences. Default: the model's prompt for documents."
    )

    def __post_init__(self) -> None:
        if not self.query or not (self.sentences or self.index):
            raise ValueError("--query is required, and so is --sentences or --index")
        if self.document_prompt is not None and not self.sentences:
            raise ValueError("--document_prompt is put before --sentences; the vectors of an index are finished")
        if self.top_k < 1:
            raise ValueError(f"--top_k must be at least 1, not {self.top_k}")


def main(argv: list[str] | None = None) -> None:
    with exit_cleanly("simcse.search"):
        logging.disable_progress_bar()
        (args,) = parse(SearchArguments, "simcse.search", DESCRIPTION, argv)
        if args.sentences and not Path(args.sentences).expanduser().is_file():
            raise UserError(f"--sentences: the file {args.sentences} does not exist")
        if args.index:
            index = output_folder("--index", args.index) if args.sentences else Path(args.index).expanduser()
        model = SimCSE(
            args.model_name_or_path,
            pooler=args.pooler_type,
            query_prompt=args.query_prompt,
            document_prompt=args.document_prompt,
        )
        if args.sentences:
            model.build_index(args.sentences, faiss_fast=args.faiss_fast, max_length=args.max_length)
            if args.index:
                model.save_index(index)
        else:
            model.load_index(index, faiss_fast=args.faiss_fast)
        found = model.search(args.query, threshold=args.threshold, top_k=args.top_k, max_length=args.max_length)
        if not found:
            print(f"nothing at a cosine of {args.threshold} or more; lower --threshold")
        else:
            print(table([("sentence", "cosine"), *((text, f"{cosine:.4f}") for text, cosine in found)]))


if __name__ == "__main__":
    main()
