"""Records of .csv and .tsv text, where a stray quotation mark costs its own line and no other.

``csv.reader`` alone reads on from a cell that opens with a stray mark until some later line holds another one, and
returns everything between as one cell.
"""

import csv
import re
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator

Record = tuple[int, int, list[str] | str]  # first line, last line, and the cells or what is wrong with the line

FEW = 3  # inner lines that are not enough to tell records from text
WHOLE = re.compile(r'"(?:[^"]|"")*"')  # a quoted cell
SAMPLE = 1000  # records that show how the file writes its delimiters

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


def records(lines: Iterable[str], delimiter: str) -> Iterator[Record]:
    """The records of ``lines``, quoted as Python's ``csv`` does; a quoted cell may hold line breaks.

    Where a mark is misplaced, or joins lines that are records themselves or that make no record of the header's
    width together, the line on which the cell opens is reported and reading goes on with the next line.
    """
    source = iter(lines)
    pending: deque[str] = deque()
    style = _Style(delimiter)
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
            if len(taken) == 1:
                style.see(taken[0], len(cells))
            elif style.is_joined(taken, len(cells)):
                cells = (
                    f"stray quotation mark: it would make one record of lines {number + 1:,} to "
                    f'{number + len(taken):,}; write "" for a mark inside a cell'
                )
            else:
                style.width = style.width or len(cells)
        if isinstance(cells, str):
            pending.extendleft(reversed(taken[1:]))
            del taken[1:]
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


class _Style:
    """How the records of a file look, as far as those on one line show it: it tells further ones from text.

    Text has delimiters too, but mostly of a kind that is rare between cells: with a space after it, between two
    digits, or at the end of the line; and in a record with several such cells a line may close one and open the
    next. A line counts as a record only if what it has of this is usual in the file.
    """

    def __init__(self, delimiter: str) -> None:
        self.delimiter = delimiter
        self.width = 0  # that of the header
        self.seen = 0
        self.traits: Counter[str] = Counter()

    def see(self, line: str, width: int) -> None:
        """Learn from a record on one line; the first one is the header."""
        if not self.width:
            self.width = width
        elif width == self.width and self.seen < SAMPLE:
            self.seen += 1
            self.traits.update(_traits(_split_literally(line, self.delimiter)))

    def is_joined(self, taken: list[str], width: int) -> bool:
        """Whether a stray mark, and not a cell with line breaks, made one record of the lines ``taken``."""
        split = [_split_literally(line, self.delimiter) for line in taken]
        if self.width:
            return width != self.width or self._are_records(split, width)
        return any(self._are_records(split, w) for w in (width, len(split[0])))  # the header itself

    def _are_records(self, lines: list[list[str]], width: int) -> bool:
        """In a table of one column nothing tells records from the lines of a cell."""
        if width < 2:
            return False
        first, *inner, last = lines
        seen, traits = self.seen, self.traits.copy()
        if len(inner) > 3 * FEW:  # enough to show the style of the file themselves
            alike = [cells for cells in inner if len(cells) == width]
            seen += len(alike)
            traits.update(trait for cells in alike for trait in _traits(cells))

        def is_record(cells: list[str], allowed: str = "") -> bool:
            unusual = (trait for trait in _traits(cells) if 4 * traits[trait] <= seen and trait != allowed)
            return len(cells) == width and next(unusual, None) is None

        hits = sum(map(is_record, inner))
        if len(inner) >= FEW:
            return 2 * hits >= len(inner)
        return hits == len(inner) and is_record(first, "halved") and is_record(last, "halved")


def _traits(cells: list[str]) -> set[str]:
    """What is more usual of the lines of a text than of records."""
    found = set()
    for before, after in zip(["", *cells], cells, strict=False):
        if not after:
            found.add("empty")
        elif after[0].isspace():
            found.add("spaced")
        elif before[-1:].isdigit() and after[0].isdigit():
            found.add("digits")
        if (after[:1] == '"' or after[-1:] == '"') and not WHOLE.fullmatch(after):
            found.add("halved")
    return found


def _split_literally(line: str, delimiter: str) -> list[str]:
    """The cells of one line, a mark that is not closed on it being a character like any other."""
    return re.findall(rf'("(?:[^"]|"")*"|[^{delimiter}]*){delimiter}', line.rstrip("\r\n") + delimiter)
