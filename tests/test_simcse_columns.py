"""Tables are read as they were meant: stray quotation marks, the parts of the columns, other delimiters."""

import csv
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_simcse_model import make_tiny_model

from simcse import SimCSE, cli, train
from simcse.errors import UserError
from simcse.readers import read_sentences, read_table
from simcse.sts import COLUMNS, read_sts

DELIMITERS = {"csv": ",", "tsv": "\t"}
PAIRS = [(f"anchor number {i} here", f"positive {i}.") for i in range(300)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def write_raw(path, rows, header=("sent0", "sent1")):
    """Cells joined without any quoting, as programs write that know nothing of it."""
    delimiter = DELIMITERS[path.suffix[1:]]
    path.write_text("".join(delimiter.join(row) + "\n" for row in (header, *rows)), encoding="utf-8")
    return path


def write_quoted(path, rows, header):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=DELIMITERS[path.suffix[1:]]).writerows([header, *rows])
    return path


# Where the marks stand: (row, column, before or after the text)
STRAY = {
    "two that open": [(50, 0, "before"), (200, 0, "before")],
    "two that open, in both columns": [(50, 1, "before"), (200, 0, "before")],
    "one that opens, one that closes": [(50, 0, "before"), (200, 0, "after")],
    "the same in the second column": [(50, 1, "before"), (200, 1, "after")],
    "across columns": [(50, 1, "before"), (200, 0, "after")],
    "on lines that follow each other": [(50, 0, "before"), (51, 0, "after")],
    "one alone": [(50, 0, "before")],
    "in the last row": [(299, 1, "before")],
}


@pytest.mark.parametrize("kind", DELIMITERS)
@pytest.mark.parametrize("marks", STRAY.values(), ids=STRAY)
def test_stray_mark_costs_its_own_line_and_is_reported(tmp_path, kind, marks):
    rows = [list(row) for row in PAIRS]
    for row, column, where in marks:
        cell = rows[row][column]
        rows[row][column] = f'"{cell}' if where == "before" else f'{cell}"'
    path = write_raw(tmp_path / f"a.{kind}", rows)
    table = read_table(path)
    opening = [row for row, _, where in marks if where == "before"]
    assert [line for line, _ in table.bad] == [row + 2 for row in opening]  # the header is line 1
    assert all("quotation mark" in reason for _, reason in table.bad)
    assert table.rows == [tuple(row) for i, row in enumerate(rows) if i not in opening]
    with pytest.raises(UserError, match=rf"line {opening[0] + 2}: .*quotation mark.*--strict_data"):
        read_table(path, strict=True)


def joined(rows, opening, closing, header=("sent0", "sent1")):
    """(name, header, rows) of a table where lines 102 to 702 stand between two marks."""
    rows = [list(row) for row in rows]
    rows[100], rows[700] = opening(rows[100]), closing(rows[700])
    return header, rows


MANY = [(f"Sentence number {i} is here", f"Phrase number {i} stands there") for i in range(1000)]
TRIPLETS = [(*row, "negative") for row in MANY]
SPACED = [(a, " " + b) for a, b in MANY]
NUMBERED = [(f"Sentence {i}", f"{i} phrases stand there") for i in range(1000)]
HALF_EMPTY = [(*row, "") for row in MANY]
JOINED = {
    "right width, first line with another number of cells": (
        *joined(
            TRIPLETS,
            lambda row: ["In 2019", "2 men", f'"{row[0]}'],
            lambda row: [*row[:2], 'foo"'],
            ("sent0", "sent1", "hard_neg"),
        ),
        [],
    ),
    "right width, last line with digits": (
        *joined(MANY, lambda row: [row[0], f'"{row[1]}'], lambda row: ["In 2019", '2 men"']),
        [],
    ),
    "right width, a further cell after the mark": (
        *joined(MANY, lambda row: [row[0], f'"{row[1]}', " really"], lambda row: [row[0], row[1] + '"']),
        [],
    ),
    "right width, spaces after the delimiter": (
        *joined(SPACED, lambda row: [row[0], f'"{row[1]}'], lambda row: [row[0], row[1] + '"']),
        [],
    ),
    "right width, digits around every delimiter": (
        *joined(NUMBERED, lambda row: [row[0], f'"{row[1]}'], lambda row: [row[0], row[1] + '"']),
        [],
    ),
    "right width, a column that is empty": (
        *joined(
            HALF_EMPTY,
            lambda row: ['"' + row[0], *row[1:]],
            lambda row: [row[0] + '"', *row[1:]],
            ("a", "b", "note"),
        ),
        [],
    ),
    "closed on a line with a further cell": (
        *joined(MANY, lambda row: ['"' + row[0], row[1]], lambda row: [*row, ' too"']),
        [702],
    ),
    "closed on a line with fewer cells": (
        *joined(MANY, lambda row: ['"' + row[0], row[1]], lambda row: [row[0] + '"']),
        [702],
    ),
    "opened on a line with a further cell": (
        *joined(MANY, lambda row: ["x", "y", f'"{row[0]}'], lambda row: [row[0], row[1] + '"']),
        [],
    ),
}


@pytest.mark.parametrize("kind", DELIMITERS)
@pytest.mark.parametrize(("header", "rows", "further"), JOINED.values(), ids=JOINED)
def test_no_line_between_two_stray_marks_is_lost(tmp_path, kind, header, rows, further):
    path = write_raw(tmp_path / f"a.{kind}", rows, header)
    table = read_table(path, columns=header[:2])
    assert [line for line, _ in table.bad] == [102, *further]
    assert "stray quotation mark" in table.bad[0][1]
    left_out = {line - 2 for line, _ in table.bad}
    assert table.rows == [
        tuple(cell.strip() for cell in row[:2]) for i, row in enumerate(rows) if i not in left_out
    ]
    with pytest.raises(UserError, match=r"line 102: stray quotation mark.*--strict_data"):
        read_table(path, strict=True, columns=header[:2])


@pytest.mark.parametrize("kind", DELIMITERS)
@pytest.mark.parametrize("mark", [("sent0", '"sent1'), ('"sent0', "sent1")])
def test_stray_mark_in_the_header_is_refused(tmp_path, kind, mark):
    rows = [[*row] for row in PAIRS]
    rows[200][1] += '"'
    with pytest.raises(UserError, match="line 1, the header: stray quotation mark"):
        read_table(write_raw(tmp_path / f"a.{kind}", rows, mark))


@pytest.mark.parametrize("kind", DELIMITERS)
def test_text_after_a_closing_mark_is_reported_not_joined(tmp_path, kind):
    path = write_raw(tmp_path / f"a.{kind}", [("one", "two"), ('"Yes" she said', "yes"), ("three", "four")])
    table = read_table(path)
    assert [line for line, _ in table.bad] == [3]
    assert table.rows == [("one", "two"), ("three", "four")]


@pytest.mark.parametrize("kind", DELIMITERS)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_well_formed_cells_are_read_as_csv_wrote_them(tmp_path, kind, width):
    pieces = [
        "Hello",
        ', she said, "no"',
        "\n",
        "\r\n",
        " 1,000 people\nand",
        '"',
        ". ",
        "\t" if kind == "csv" else ", ",
    ]
    draw = random.Random(0)
    rows = [tuple("x" + "".join(draw.choices(pieces, k=6)) + "x" for _ in range(width)) for _ in range(200)]
    path = write_quoted(tmp_path / f"a.{kind}", rows, [f"text{i}" for i in range(width)])
    table = read_table(path)
    assert not table.bad
    assert table.rows == rows


PARAGRAPHS = (
    "Dear all,\nthank you, once more.\n\nYours, Ann",
    'He said: "well, no",\nand left, at 10,30.\nShe, too',
    "roses, red\nviolets, blue\nsugar,sweet",
    "one line, nothing more",
    "- first, second\n- third, fourth\n- fifth, sixth\n- seventh, eighth\n- ninth, tenth",
)


@pytest.mark.parametrize("kind", DELIMITERS)
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_paragraphs_in_cells_are_read_as_csv_wrote_them(tmp_path, kind, width, end):
    draw = random.Random(1)
    rows = [tuple(draw.choice(PARAGRAPHS).replace("\n", end) for _ in range(width)) for _ in range(400)]
    table = read_table(write_quoted(tmp_path / f"a.{kind}", rows, [f"text{i}" for i in range(width)]))
    assert table.rows == rows
    assert any("line breaks, the longest 5 lines" in warning for warning in table.warnings)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_cells_of_several_lines_are_pointed_out(tmp_path, width):
    path = tmp_path / "a.csv"
    rest = ",b" * (width - 1)
    path.write_text(f'text{",other" * (width - 1)}\nfirst{rest}\n"second\nthird\nfourth"{rest}\nfifth{rest}\n')
    table = read_table(path)
    assert [row[0] for row in table.rows] == ["first", "second\nthird\nfourth", "fifth"]
    assert any("1 quoted cell holds line breaks, the longest 3 lines" in warning for warning in table.warnings)


def test_stray_mark_in_graded_pairs_is_refused_with_its_line(tmp_path):
    rows = [("T", "s", "dev", "1", f"first {i}", f"second {i}") for i in range(9)]
    rows[3] = (*rows[3][:4], '"' + rows[3][4], rows[3][5])
    rows[6] = (*rows[6][:5], rows[6][5] + '"')
    with pytest.raises(UserError, match=r"line 5: .*quotation mark"):
        read_sts(write_raw(tmp_path / "sts.tsv", rows, COLUMNS))


def test_encode_keeps_one_vector_per_line(tiny, tmp_path, capsys):
    rows = [("a" + str(i), "b") for i in range(20)]
    good = write_raw(tmp_path / "good.csv", rows)
    run = ["encode", "--model_name_or_path", str(tiny), "--output", str(tmp_path / "v.npy"), "--input"]
    cli.main([*run, str(good)])
    assert len(np.load(tmp_path / "v.npy")) == 20
    assert "sentence=sent0" in capsys.readouterr().out
    (tmp_path / "v.npy").unlink()
    rows[4], rows[11] = ('"a4', "b"), ('a11"', "b")
    with pytest.raises(SystemExit):
        cli.main([*run, str(write_raw(tmp_path / "bad.csv", rows))])
    assert "line 6: stray quotation mark" in capsys.readouterr().err
    assert not (tmp_path / "v.npy").exists()


@pytest.mark.parametrize(
    ("raw", "line"),
    [(b"one\n\nthree\n", 2), (b"one\ntwo\nStra\xdfe\n", 3), (b"one\n   \n", 2), (b"a\0b\none\n", 1)],
    ids=["empty", "latin-1", "blank", "NUL"],
)
def test_index_and_search_refuse_lines_that_they_cannot_number(tiny, tmp_path, raw, line, capsys):
    path = tmp_path / "corpus.txt"
    path.write_bytes(raw)
    model = SimCSE(tiny, device="cpu", pooler="avg")
    with pytest.raises(UserError, match=f"line {line}: "):
        model.build_index(path)
    assert model.index is None
    model.build_index(["one"])
    with pytest.raises(UserError, match=f"line {line}: "):
        model.add_to_index(path)
    with pytest.raises(SystemExit):
        cli.main(["search", "--model_name_or_path", str(tiny), "--query", "x", "--sentences", str(path)])
    assert f"line {line}: " in capsys.readouterr().err


def test_index_of_a_file_has_its_lines_in_order(tiny, tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("one\ntwo\nthree\n")
    model = SimCSE(tiny, device="cpu", pooler="avg")
    model.build_index(path, max_length=5)
    assert model.index.sentences == ["one", "two", "three"]


def files_of(folder, rows, header):
    """The same table in each format that has names."""
    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), folder / "a.parquet")
    (folder / "a.jsonl").write_text("\n".join(json.dumps(dict(zip(header, row, strict=True))) for row in rows))
    write_quoted(folder / "a.csv", rows, header)
    write_quoted(folder / "a.tsv", rows, header)
    return [folder / f"a.{kind}" for kind in ("csv", "tsv", "jsonl", "parquet")]


def test_columns_are_named_and_chosen_in_every_format(tmp_path):
    rows = [(f"bad {i}", f"a {i}", f"b {i}") for i in range(5)]
    for path in files_of(tmp_path, rows, ("hard", "first", "second")):
        assert read_table(path).roles == "anchor=hard, positive=first, hard negative=second"
        table = read_table(path, columns=["first", "second", "hard"])
        assert table.roles == "anchor=first, positive=second, hard negative=hard"
        assert table.rows == [(a, b, c) for c, a, b in rows]
        assert read_table(path, columns=["second"]).roles == "sentence=second"
        with pytest.raises(UserError, match="no column is named 'third'; the columns are hard, first, second"):
            read_table(path, columns=["third"])
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    with pytest.raises(UserError, match="two columns are named 'a'"):
        read_table(tmp_path / "twice.csv", columns=["a"])


def test_columns_that_are_not_chosen_are_not_looked_at(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,one\n,two\n")
    assert read_table(tmp_path / "a.csv", columns=["text"]).rows == [("one",), ("two",)]
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "one"}\n{"id": 2, "text": "two", "more": []}\n')
    assert read_table(tmp_path / "a.jsonl", columns=["text"]).rows == [("one",), ("two",)]
    assert read_sentences(tmp_path / "a.csv", "text").sentences == ["one", "two"]


def test_key_that_the_first_object_lacks_is_not_left_out_silently(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "1x", "b": "2x"}\n{"a": "3x", "b": "4x", "hard": "5x"}\n')
    assert read_table(tmp_path / "a.jsonl").bad == [(2, "the first object has no key 'hard'")]


def test_categorical_columns_of_parquet_are_text(tmp_path):
    column = pa.array(["x y", "z", "x y"]).dictionary_encode()
    pq.write_table(pa.table({"text": column, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet").rows == [("x y",), ("z",), ("x y",)]


@pytest.mark.parametrize(
    ("name", "text", "warning"),
    [
        (
            "index.csv",
            ",sent0,sent1\n" + "".join(f"{i},a {i},b {i}\n" for i in range(5)),
            r"unnamed.*no name of its",
        ),
        ("saved.csv", "Unnamed: 0,a,b\n0,x x,y\n1,z,w\n", "Unnamed: 0.*no name of its own"),
        ("label.csv", "a,b,label\n" + "".join(f"x {i},y {i},1\n" for i in range(5)), r"\(label\) holds numbers"),
        ("score.tsv", "a\tb\tscore\n" + "".join(f"x {i}\ty {i}\t{i}.5\n" for i in range(5)), "score.*numbers"),
        (
            "same.csv",
            "a,b,c\n" + "".join(f"x {i},y {i},entailment\n" for i in range(5)),
            r"\(c\) holds one text only",
        ),
        ("few.csv", "a,c\n" + "".join(f"x {i},{'yes' if i % 2 else 'no'}\n" for i in range(60)), "2 texts only"),
        ("semicolon.csv", "a;b\n" + "".join(f"x {i};y {i}\n" for i in range(5)), "divided by a semicolon"),
        ("tabs.csv", "a\tb\n" + "".join(f"x {i}\ty {i}\n" for i in range(5)), "divided by a tab"),
        ("bars.tsv", "a|b\n" + "".join(f"x {i}|y {i}\n" for i in range(5)), "divided by a vertical bar"),
        ("commas.tsv", "a,b\n" + "".join(f"x {i},y {i}\n" for i in range(5)), "divided by a comma"),
        ("table.txt", "a\tb\n" + "".join(f"x {i}\ty {i}\n" for i in range(5)), "divided by a tab"),
        ("headless.csv", "A man plays the guitar.,Music is played.\nx,y\n", "reads like a sentence"),
    ],
    ids=lambda value: value if isinstance(value, str) and value[-4:] in (".csv", ".tsv", ".txt") else "",
)
def test_unlikely_columns_and_delimiters_are_warned_of(tmp_path, name, text, warning):
    import re

    (tmp_path / name).write_text(text)
    assert any(re.search(warning, line) for line in read_table(tmp_path / name).warnings)


def test_other_delimiter_is_named_where_no_row_is_left(tmp_path):
    (tmp_path / "a.csv").write_text("a;b\n" + "x, y, z;w\n" * 5)
    with pytest.raises(UserError, match="divided by a semicolon"):
        read_table(tmp_path / "a.csv")


def test_ordinary_tables_give_no_warning(tmp_path):
    rows = [(f"text; number {i}, {i}", f"more {i} | text") for i in range(100)]
    assert not read_table(write_quoted(tmp_path / "a.csv", rows, ("sent0", "sent1"))).warnings
    assert not read_table(write_quoted(tmp_path / "b.csv", [(a,) for a, _ in rows], ("text",))).warnings
    (tmp_path / "a.txt").write_text("".join(f"{a}\n" for a, _ in rows))
    assert not read_table(tmp_path / "a.txt").warnings


def test_training_prints_the_parts_and_warns(tiny, tmp_path, capsys):
    rows = [(str(i), f"a {i} b", f"c {i} d", "1") for i in range(30)]
    path = write_quoted(tmp_path / "t.csv", rows, ("", "sent0", "sent1", "label"))
    run = ["--model_name_or_path", str(tiny), "--train_file", str(path), "--output_dir", str(tmp_path / "out")]
    run += ["--per_device_train_batch_size", "10", "--report_to", "none"]
    train.prepare(run)
    printed = capsys.readouterr()
    assert "anchor=(unnamed), positive=sent0, hard negative=sent1, hard negative=label" in printed.out
    assert "column 1 (unnamed) has no name of its own" in printed.err
    assert "column 4 (label) holds numbers" in printed.err
    train.prepare([*run, "--columns", "sent0, sent1"])
    printed = capsys.readouterr()
    assert "anchor=sent0, positive=sent1\n" in printed.out
    assert "column" not in printed.err
