"""Reading training files: columns of sentences from .txt, .csv, .tsv, .jsonl (each also .gz), .parquet or the hub.

A row that cannot be used is noted with its line and left out.
"""

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simcse.errors import UserError

FORMATS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
SHOWN = 5  # bad rows that a message lists


@dataclass
class Table:
    """Rows of sentences, each as long as the table is wide, and the bad rows that were left out."""

    name: str
    rows: list[tuple[str, ...]]
    bad: list[tuple[int, str]]  # line (row of a parquet file or a hub dataset), what is wrong

    def report(self) -> str:
        """``3 of 100 rows left out: line 7: empty sentence; ...``, or an empty string."""
        if not self.bad:
            return ""
        listed = "; ".join(f"line {line}: {reason}" for line, reason in self.bad[:SHOWN])
        more = f"; and {len(self.bad) - SHOWN:,} more" if len(self.bad) > SHOWN else ""
        return f"{len(self.bad):,} of {len(self.rows) + len(self.bad):,} rows left out: {listed}{more}"


def read_table(source: str | Path, strict: bool = False) -> Table:
    """The rows of a file, or of the train split of a hub dataset ``owner/name``.

    ``.txt`` has one column; ``.csv`` and ``.tsv`` have a header; the width is that of the header, of the first
    object of a ``.jsonl`` file, or of the string columns of a ``.parquet`` file. ``UserError`` where nothing is
    left, or, with ``strict``, where a row is bad.
    """
    path = Path(source).expanduser()
    if path.is_file():
        numbered = _rows_of(path)
    elif not path.exists() and HUB_NAME.fullmatch(str(source)) and not path.name.endswith((*FORMATS, ".gz")):
        numbered = _hub_rows(str(source))
    else:
        raise UserError(
            f"there is no file {path}; --train_file takes {', '.join(FORMATS)} (all but the last also .gz), "
            "or a dataset 'owner/name' on the hub"
        )
    rows: list[tuple[str, ...]] = []
    bad: list[tuple[int, str]] = []
    try:
        for line, cells in numbered:
            reason = cells if isinstance(cells, str) else _fault(cells)
            if reason:
                bad.append((line, reason))
            else:
                rows.append(tuple(cell.strip() for cell in cells))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    table = Table(str(source), rows, bad)
    if not rows:
        raise UserError(f"{source} holds no sentence that can be used; {table.report() or 'it is empty'}")
    if strict and bad:
        raise UserError(f"{source}: {table.report()} (--strict_data stops here; mend them, or leave it out)")
    return table


def _fault(cells: Iterable[Any]) -> str | None:
    for number, cell in enumerate(cells, 1):
        if cell is None:
            return f"column {number} is missing"
        if not isinstance(cell, str):
            return f"column {number} is {type(cell).__name__}, not text"
        if not cell.strip():
            return "empty sentence"
        if "\0" in cell:
            return "NUL bytes, not text"
        if any("\ud800" <= character <= "\udfff" for character in cell):
            return "broken UTF-8"
    return None


Numbered = Iterator[tuple[int, Any]]  # line, cells or what is wrong with the line


def _rows_of(path: Path) -> Numbered:
    kind = path.name.removesuffix(".gz")
    if kind.endswith(".parquet") and not path.name.endswith(".gz"):
        return _parquet_rows(path)
    for suffix, read in ((".txt", _text_rows), (".csv", _csv_rows), (".tsv", _csv_rows), (".jsonl", _json_rows)):
        if kind.endswith(suffix):
            return read(path)
    raise UserError(f"{path} is of no format that --train_file takes: {', '.join(FORMATS)}")


def _lines(path: Path, **options: Any) -> Any:
    """The open file; bytes that are no UTF-8 come as surrogates, so that one row is lost and not the file."""
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", **options)


def _text_rows(path: Path) -> Numbered:
    with _lines(path) as lines:
        for number, line in enumerate(lines, 1):
            yield number, (line,)


def _csv_rows(path: Path) -> Numbered:
    delimiter = "\t" if path.name.removesuffix(".gz").endswith(".tsv") else ","
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _lines(path, newline="") as lines:
        rows = csv.reader(lines, delimiter=delimiter)
        try:
            header = next(rows, [])
            for cells in rows:
                if not cells:
                    yield rows.line_num, "empty line"
                elif len(cells) != len(header):
                    yield rows.line_num, f"{len(cells)} columns where the header has {len(header)}"
                else:
                    yield rows.line_num, cells
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.line_num}: {error}") from None


def _json_rows(path: Path) -> Numbered:
    columns: list[str] = []
    with _lines(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:
                yield number, "no JSON" if line.strip() else "empty line"
                continue
            if not isinstance(row, dict):
                yield number, "no JSON object"
                continue
            columns = columns or list(row)
            yield number, [row.get(column) for column in columns]


def _parquet_rows(path: Path) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise UserError(f"cannot read {path}: {error}") from None
    strings = [column.name for column in file.schema_arrow if _is_text(column.type)]
    if not strings:
        raise UserError(f"{path} has no column of strings")
    number = 0
    for batch in file.iter_batches(columns=strings):
        for cells in zip(*(batch.column(name).to_pylist() for name in strings), strict=True):
            number += 1
            yield number, cells


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind)


def _hub_rows(name: str) -> Numbered:
    from datasets import Value, load_dataset

    try:
        dataset = load_dataset(name, split="train")
    except Exception as error:  # datasets and the hub raise many kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"there is no file {name}, and the hub dataset cannot be fetched ({first})") from None
    strings = [
        column for column, kind in dataset.features.items() if kind in (Value("string"), Value("large_string"))
    ]
    if not strings:
        raise UserError(f"the dataset {name} has no column of strings")
    for number, row in enumerate(dataset, 1):
        yield number, [row[column] for column in strings]
