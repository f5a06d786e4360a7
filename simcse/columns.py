"""Which column of a table plays which part, and what suggests that it is not the one that was meant."""

import re
from collections.abc import Iterable, Sequence

FEW = 20  # values that a column of labels has at most
DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "vertical bar"}
UNNAMED = re.compile(r"|Unnamed: ?\d+|index|__index_level_\d+__", re.IGNORECASE)


def roles(columns: Sequence[str]) -> str:
    """``anchor=sent0, positive=sent1, hard negative=hard_neg``; of one column, ``sentence=text``."""
    if len(columns) == 1:
        return f"sentence={columns[0]}"
    parts = ["anchor", "positive"] + ["hard negative"] * (len(columns) - 2)
    return ", ".join(f"{part}={column or '(unnamed)'}" for part, column in zip(parts, columns, strict=True))


def pick(columns: Sequence[str], wanted: Sequence[str] | None, first: int | None) -> list[int]:
    """The positions of the columns ``wanted``, or of the ``first`` so many, or of all.

    ``ValueError`` for a name that the table does not have, or has twice.
    """
    if wanted is None:
        return list(range(len(columns)))[:first]
    for name in wanted:
        if list(columns).count(name) != 1:
            how = "two columns are" if name in columns else "no column is"
            raise ValueError(f"{how} named {name!r}; the columns are {', '.join(columns)}")
    return [columns.index(name) for name in wanted]


def suspicions(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A sentence for each column that is unlikely to hold sentences: unnamed, numbers, a constant, labels."""
    found = []
    for number, name in enumerate(columns):
        shown = f"column {number + 1} ({name or 'unnamed'})"
        cells = [row[number] for row in rows]
        if UNNAMED.fullmatch(name):
            found.append(f"{shown} has no name of its own; pandas writes its index like that")
        elif len(name.split()) > 3:
            found.append(f"{shown}: its name reads like a sentence; the first line is taken as the header")
        if rows and _are_numbers(cells):
            found.append(f"{shown} holds numbers")
        elif len(rows) > 2 and (distinct := _distinct(cells)) and distinct <= len(rows) / FEW + 1:
            found.append(f"{shown} holds " + ("one text only" if distinct == 1 else f"{distinct} texts only"))
    return [f"{text}; choose columns with --columns" for text in found]


def other_delimiter(header: str, lines: Iterable[str], delimiter: str | None) -> str | None:
    """A sentence where the lines look like cells between other marks than ``delimiter`` (None: plain lines)."""
    sample = [header, *lines]
    if delimiter is not None and delimiter in header:
        return None
    for other, name in DELIMITERS.items():
        if other == delimiter or (delimiter is None and other != "\t"):
            continue
        count = header.count(other)
        if count and sum(line.count(other) == count for line in sample) * 2 > len(sample):
            remedy = "name it .tsv" if delimiter is None else "save it with commas (.csv) or tabs (.tsv)"
            return f"its lines seem to be divided by a {name}, which is read as text; {remedy}"
    return None


def _are_numbers(cells: Iterable[str]) -> bool:
    for cell in cells:
        try:
            float(cell)
        except ValueError:
            return False
    return True


def _distinct(cells: Iterable[str]) -> int | None:
    """How many different cells there are; None where they are more than ``FEW``."""
    values: set[str] = set()
    for cell in cells:
        values.add(cell)
        if len(values) > FEW:
            return None
    return len(values)
