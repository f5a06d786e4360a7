"""Records of .csv and .tsv text, where a stray quotation mark costs its own line and no other.

``csv.reader`` alone reads on from a cell that opens with a stray mark until some later line holds another one, and
returns everything between as one cell.
"""

import csv
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator

Record = tuple[int, int, list[str] | str]  # first line, last line, and the cells or what is wrong with the line

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


def records(lines: Iterable[str], delimiter: str) -> Iterator[Record]:
    """The records of ``lines``, quoted as Python's ``csv`` does; a quoted cell may hold line breaks.

    Where a mark is misplaced, or would join lines that are complete records themselves, the line on which the cell
    opens is reported and reading goes on with the next line.
    """
    source = iter(lines)
    pending: deque[str] = deque()
    width = 0  # that of the first record, the header
    number = 0  # lines before the current record
    while True:
        taken: list[str] = []
        reader = csv.reader(_taking(taken, pending, source), delimiter=delimiter, strict=True)
        try:
            cells: list[str] | str = next(reader)
        except StopIteration:
            return
        except csv.Error:  # text after a closing mark, or a mark that is never closed
            cells = 'misplaced quotation mark; quote it as Python\'s csv does, with "" for a mark inside a cell'
        else:
            if len(taken) > 1 and _joins_records(taken, width, delimiter):
                cells = (
                    f"stray quotation mark: it would make one cell of lines {number + 1:,} to "
                    f'{number + len(taken):,}, which are records themselves; write "" for a mark inside a cell'
                )
        if isinstance(cells, str):
            pending.extendleft(reversed(taken[1:]))
            del taken[1:]
        else:
            width = width or len(cells)
        yield number + 1, number + len(taken), cells
        number += len(taken)


def _taking(taken: list[str], pending: deque[str], source: Iterator[str]) -> Iterator[str]:
    """Lines for one ``csv.reader``, which asks for no more than its record needs; ``taken`` keeps them."""
    while True:
        line = pending.popleft() if pending else next(source, None)
        if line is None:
            return
        taken.append(line)
        yield line


def _joins_records(taken: list[str], width: int, delimiter: str) -> bool:
    """Whether the lines of one multi-line record read as records of their own.

    A line break within a quoted cell leaves lines of another width, unless the text holds delimiters too; a space
    after a comma, or digits on both sides of it, show that it belongs to the text. In a table of one column
    nothing tells the two apart.
    """
    if width < 2:
        return False

    def is_record(line: str) -> bool:
        if delimiter == "," and re.search(r"\d,\d", line):
            return False
        cells = _split_literally(line, delimiter)
        return len(cells) == width and all(cell and not cell[0].isspace() for cell in cells)

    inner = taken[1:-1]
    return is_record(taken[0]) and is_record(taken[-1]) and 2 * sum(map(is_record, inner)) >= len(inner)


def _split_literally(line: str, delimiter: str) -> list[str]:
    """The cells of one line, a mark that is not closed on it being a character like any other."""
    return re.findall(rf'("(?:[^"]|"")*"|[^{delimiter}]*){delimiter}', line.rstrip("\r\n") + delimiter)
