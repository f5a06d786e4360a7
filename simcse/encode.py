"""``simcse encode``: a file of sentences → their vectors, as .npy or .parquet."""

import sys
from dataclasses import dataclass

from simcse.errors import UserError, exit_cleanly

with exit_cleanly("simcse.encode"):
    import numpy as np
    from transformers.utils import logging

    from simcse.encoder import PoolerType
    from simcse.files import output_file, replaced
    from simcse.flags import MODEL, STORED_POOLER, flag, parse, pooler_flag
    from simcse.inference import SimCSE
    from simcse.readers import read_sentences

DESCRIPTION = (
    "Write the vectors of the sentences in a file, in its order: .npy (N, D), or .parquet with the sentences."
)


@dataclass
class EncodeArguments:
    model_name_or_path: str = flag("minilm", MODEL)
    pooler_type: PoolerType | None = pooler_flag(STORED_POOLER)  # noqa: RUF009 (a field, as its neighbours)
    input: str | None = flag(None, "The sentences: .txt, or a column of .csv, .tsv, .jsonl, .parquet.")
    columns: str | None = flag(None, "The name of the column that holds the sentences. Default: the first.")
    output: str | None = flag(None, "File to write, .npy or .parquet.")
    batch_size: int = flag(64, "Sentences per batch.")
    max_length: int | None = flag(None, "Maximum tokens per sentence. Default: what the model's folder states.")
    normalize: bool = flag(True, "Write unit vectors.")
    prompt_name: str | None = flag(
        None,
        "The sentences get the model's prompt of this name, such as 'query' or 'document'. Default: its default "
        "prompt.",
    )
    query_prompt: str | None = flag(None, "Text before each sentence, as before a query in training.")
    document_prompt: str | None = flag(None, "Text before each sentence, as before a document in training.")

    def __post_init__(self) -> None:
        if not self.input or not self.output:
            raise ValueError("--input and --output are required")
        if self.batch_size < 1 or (self.max_length is not None and self.max_length < 3):
            raise ValueError(
                f"--batch_size must be at least 1 and --max_length at least 3, not {self.batch_size} and "
                f"{self.max_length}"
            )
        if [self.prompt_name, self.query_prompt, self.document_prompt].count(None) < 2:
            raise ValueError(
                "--prompt_name, --query_prompt and --document_prompt exclude each other: a file holds queries or "
                "documents"
            )


def main(argv: list[str] | None = None) -> None:
    with exit_cleanly("simcse.encode"):
        logging.disable_progress_bar()
        (args,) = parse(EncodeArguments, "simcse.encode", DESCRIPTION, argv)
        output = output_file("--output", args.output, {"--input": [args.input]})
        if output.suffix not in (".npy", ".parquet"):
            raise UserError(f"--output {output}: unsupported file type; use .npy or .parquet")
        table = read_sentences(args.input, args.columns)
        for warning in table.warnings:
            print(f"simcse.encode: warning: {args.input}: {warning}", file=sys.stderr)
        sentences = table.sentences
        vectors = SimCSE(args.model_name_or_path, pooler=args.pooler_type).encode(
            sentences,
            return_numpy=True,
            normalize_to_unit=args.normalize,
            batch_size=args.batch_size,
            max_length=args.max_length,
            prompt=args.document_prompt if args.query_prompt is None else args.query_prompt,
            prompt_name=args.prompt_name,
        )
        with replaced(output) as unfinished, unfinished.open("wb") as file:
            if output.suffix == ".npy":
                np.save(file, vectors)
            else:
                import pyarrow as pa
                import pyarrow.parquet as pq

                features = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
                pq.write_table(pa.table({"sentence": sentences, "embedding": features}), file)
        print(f"{len(vectors):,} vectors of {vectors.shape[1]} features, {table.roles}  {output}")


if __name__ == "__main__":
    main()
