"""Reading training files: columns of sentences from .txt, .csv, .tsv, .jsonl (each also .gz), .parquet or the hub.

A row that cannot be used is noted with its line and left out.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from simcse.columns import other_delimiter, pick, roles, suspicions
from simcse.delimited import records
from simcse.errors import UserError

FORMATS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
SHOWN = 5  # bad rows that a message lists
SAMPLE = 100  # lines that are looked at for another delimiter


@dataclass
class Table:
    """Rows of sentences, each as long as ``columns``, and the bad rows that were left out."""

    name: str
    columns: list[str]
    rows: list[tuple[str, ...]]
    bad: list[tuple[int, str]]  # line (row of a parquet file or a hub dataset), what is wrong
    warnings: list[str] = field(default_factory=list)  # what is read, and is unlikely to be meant so

    @property
    def sentences(self) -> list[str]:
        """The first column."""
        return [row[0] for row in self.rows]

    @property
    def roles(self) -> str:
        """``anchor=sent0, positive=sent1``: the part of each column."""
        return roles(self.columns)

    def report(self) -> str:
        """``3 of 100 rows left out: line 7: empty sentence; ...``, or an empty string."""
        if not self.bad:
            return ""
        return f"{len(self.bad):,} of {len(self.rows) + len(self.bad):,} rows left out: {self._listed()}"

    def refuse_bad_rows(self, remedy: str) -> None:
        """``UserError`` where a row is bad; ``remedy`` ends the message."""
        if self.bad:
            count = f"{len(self.bad):,} of {len(self.rows) + len(self.bad):,} rows cannot be used"
            raise UserError(f"{self.name}: {count}: {self._listed()} ({remedy})")

    def _listed(self) -> str:
        listed = "; ".join(f"line {line}: {reason}" for line, reason in self.bad[:SHOWN])
        return listed + (f"; and {len(self.bad) - SHOWN:,} more" if len(self.bad) > SHOWN else "")


def read_table(
    source: str | Path,
    strict: bool = False,
    columns: Sequence[str] | None = None,
    first: int | None = None,
) -> Table:
    """The rows of a file, or of the train split of a hub dataset ``owner/name``.

    ``.txt`` has one column; ``.csv`` and ``.tsv`` have a header; the columns are those of the header, the keys of
    the first object of a ``.jsonl`` file, or the string columns of a ``.parquet`` file or a hub dataset.
    ``columns`` chooses some of them by name, ``first`` so many from the left; the others are not looked at.
    ``UserError`` where nothing is left, or, with ``strict``, where a row is bad.
    """
    path = Path(source).expanduser()
    if path.is_file():
        numbered = _rows_of(path, every_key=columns is None and first is None)
    elif not path.exists() and HUB_NAME.fullmatch(str(source)) and not path.name.endswith((*FORMATS, ".gz")):
        numbered = _hub_rows(str(source))
    else:
        raise UserError(
            f"{path} is not a file that exists; expected is a file of {', '.join(FORMATS)} (all but the last also "
            ".gz), or a dataset 'owner/name' on the hub"
        )
    table = Table(str(source), [], [], [])
    try:
        names = next(numbered)
        try:
            chosen = pick(names, columns, first)
        except ValueError as error:
            raise UserError(f"--columns: in {source} {error}") from None
        table.columns = [names[i] for i in chosen]
        for line, cells in numbered:
            if isinstance(cells, str):
                table.bad.append((line, cells))
                continue
            cells = [cells[i] for i in chosen]
            reason = _fault(cells)
            if reason:
                table.bad.append((line, reason))
            else:
                table.rows.append(tuple(cell.strip() for cell in cells))
        delimited = _delimiter_warning(path)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not table.rows:
        hint = f" ({delimited})" if delimited else ""
        raise UserError(f"{source} holds no sentence that can be used; {table.report() or 'it is empty'}{hint}")
    if strict:
        table.refuse_bad_rows("fix these rows, or run without --strict_data")
    if delimited:
        table.warnings.append(delimited)
    if columns is None and _format(path) != ".txt":
        table.warnings += suspicions(table.columns, table.rows)
    if _format(path) in (".csv", ".tsv"):
        table.warnings += _line_breaks(table.rows)
    return table


def read_sentences(source: str | Path, column: str | None = None) -> Table:
    """A table of one column, by default the first; a row that cannot be used is refused, or rows would shift."""
    table = read_table(source, columns=None if column is None else [column], first=1)
    table.refuse_bad_rows(
        "every row must be a sentence, or they would no longer be numbered alike; fix these rows"
    )
    return table


def _line_breaks(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A stray mark can join lines in ways that nothing tells from a cell of several lines; the user sees it."""
    breaks = [cell.count("\n") for row in rows for cell in row if "\n" in cell]
    if not breaks:
        return []
    cells = "1 quoted cell holds" if len(breaks) == 1 else f"{len(breaks):,} quoted cells hold"
    return [f"{cells} line breaks, the longest {max(breaks) + 1:,} lines; a stray quotation mark does the same"]


def _format(path: Path) -> str:
    """``.csv`` of a.csv and of a.csv.gz; of a dataset on the hub an empty string."""
    return Path(path.name.removesuffix(".gz")).suffix if path.is_file() else ""


DELIMITER_OF = {".txt": None, ".csv": ",", ".tsv": "\t"}


def _delimiter_warning(path: Path) -> str | None:
    kind = _format(path)
    if kind not in DELIMITER_OF:
        return None
    with _lines(path) as lines:
        header, *others = [*islice(lines, SAMPLE)] or [""]
    return other_delimiter(header, others, DELIMITER_OF[kind])


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


Numbered = Iterator[
    Any
]  # the names of the columns, then for each row (line, cells or what is wrong with the line)


def _rows_of(path: Path, every_key: bool) -> Numbered:
    kind = _format(path)
    if kind == ".parquet" and path.suffix != ".gz":
        return _parquet_rows(path)
    if kind == ".txt":
        return _text_rows(path)
    if kind in (".csv", ".tsv"):
        return _csv_rows(path)
    if kind == ".jsonl":
        return _json_rows(path, every_key)
    raise UserError(f"{path}: unsupported file type; use one of {', '.join(FORMATS)}")


def _lines(path: Path, **options: Any) -> Any:
    """The open file; bytes that are no UTF-8 come as surrogates, so that one row is lost and not the file."""
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", **options)


def _text_rows(path: Path) -> Numbered:
    yield ["line"]
    with _lines(path) as lines:
        for number, line in enumerate(lines, 1):
            yield number, (line,)


def _csv_rows(path: Path) -> Numbered:
    with _lines(path, newline="") as lines:
        rows = records(lines, DELIMITER_OF[_format(path)])
        _, _, header = next(rows, (1, 1, []))
        if isinstance(header, str):
            raise UserError(f"{path}, line 1, the header: {header}")
        yield [name.strip() for name in header]
        for line, _, cells in rows:
            if not isinstance(cells, str):
                if not cells:
                    cells = "empty line"
                elif len(cells) != len(header):
                    cells = f"{len(cells)} columns where the header has {len(header)}"
            yield line, cells


def _json_rows(path: Path, every_key: bool) -> Numbered:
    """``every_key``: refuse a key that the first object lacks, because its values would be ignored silently."""
    columns: list[str] | None = None
    with _lines(path) as lines:
        numbered = ((number, _json_object(line)) for number, line in enumerate(lines, 1))
        bad = []  # lines before the first object, which names the columns
        for number, row in numbered:
            if isinstance(row, dict):
                columns = list(row)
                numbered = chain(bad, [(number, row)], numbered)
                break
            bad.append((number, row))
        yield columns or []
        for number, row in bad if columns is None else numbered:
            if isinstance(row, dict):
                further = [key for key in row if key not in columns] if every_key else []
                row = (
                    f"the first object has no key {further[0]!r}"
                    if further
                    else [row.get(column) for column in columns]
                )
            yield number, row


def _json_object(line: str) -> dict[str, Any] | str:
    """The object of a line, or what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "not JSON" if line.strip() else "empty line"
    return row if isinstance(row, dict) else "not a JSON object"


def _parquet_rows(path: Path) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    strings = [column.name for column in file.schema_arrow if _is_text(column.type)]
    if not strings:
        raise UserError(f"{path} has no column of strings")
    yield strings
    number = 0
    try:
        for batch in file.iter_batches(columns=strings):
            for cells in zip(*(batch.column(name).to_pylist() for name in strings), strict=True):
                number += 1
                yield number, cells
    except pa.ArrowException as error:
        raise UserError(f"cannot read {path} after row {number:,}: {error}") from None


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):  # a categorical column of pandas
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _hub_rows(name: str) -> Numbered:
    from datasets import Value, load_dataset

    try:
        dataset = load_dataset(name, split="train")  # code in a dataset is not run since datasets 4
    except Exception as error:  # datasets and the hub raise many kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"there is no file {name}, and the hub dataset cannot be fetched ({first})") from None
    strings = [
        column for column, kind in dataset.features.items() if kind in (Value("string"), Value("large_string"))
    ]
    if not strings:
        raise UserError(f"the dataset {name} has no column of strings")
    yield strings
    for number, row in enumerate(dataset, 1):
        yield number, [row[column] for column in strings]
