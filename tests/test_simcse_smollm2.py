"""The study on SmolLM2, in small: every run of the grid, none twice, table and figure."""

import gzip
import json

import pytest
from test_simcse_decoders import make_decoder
from test_simcse_sts import write_sts

from experiments import smollm2
from simcse.collator import packaged_file
from simcse.readers import read_table


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_decoder(folder / "model")
    sentences = [row[0] for row in read_table(packaged_file("sentences.txt")).rows]
    with gzip.open(folder / smollm2.DATA["unsupervised"], "wt", encoding="utf-8") as file:
        file.write("\n".join(sentences[:64]))
    rows = [sentences[i : i + 3] for i in range(40)]
    lines = ["sent0,sent1,hard_neg", *(",".join(f'"{x.replace(chr(34), "")}"' for x in row) for row in rows)]
    (folder / smollm2.DATA["supervised"]).write_text("\n".join(lines), encoding="utf-8")
    grades = [5.0, 4.2, 3.0, 2.5, 1.0, 0.0]
    pairs = [
        (task, "x", split, grades[i % 6], sentences[i], sentences[i + 1])
        for task, split in (("STSB", "dev"), ("STSB", "test"), ("STS12", "test"))
        for i in range(12)
    ]
    write_sts(folder / "sts_eval.tsv", pairs)
    return folder


def run(source, out, *further):
    flags = ["--model", source / "model", "--source", source, "--out", out, "--sentences", 16, "--batch", 8]
    smollm2.main([*map(str, flags), "--evaluations", "1", "--seeds", "0", "--fp32", *further])


def test_grid_is_run_once_and_shown(source, tmp_path, capsys):
    page = tmp_path / "study.md"
    page.write_text(f"above\n{smollm2.BEGIN}\nold\n{smollm2.END}\nbelow\n", encoding="utf-8")
    out = tmp_path / "out"
    run(source, out, "--poolers", "avg", "--data", "unsupervised")
    first = {file.name: file.read_bytes() for file in out.glob("*.json")}
    assert set(first) == {
        "none-avg-0-before-0.json",
        *(f"unsupervised-avg-8-{loss}-0.json" for loss in ("infonce", "lambda1", "tenth")),
    }
    run(source, out, "--data", "unsupervised", "supervised", "--losses", "infonce", "--readme", str(page))
    found = {file.name: json.loads(file.read_bytes()) for file in out.glob("*.json")}
    assert len(found) == 4 + 4
    assert all((out / name).read_bytes() == content for name, content in first.items())  # not repeated
    for one in found.values():
        assert set(one["tasks"]) == {"STSB", "STS12"}
        assert one["average"] == pytest.approx(sum(one["tasks"].values()) / 2)
        assert sum(one["spectrum"]) == pytest.approx(1)
    tenth, at_one = (found[f"unsupervised-avg-8-{loss}-0.json"] for loss in ("tenth", "lambda1"))
    share = at_one["noise_share"]
    # λ·S / (1 + λ·S) = 1/10, where S is the noise's part beside the rest at λ = 1.
    assert tenth["noise_weight"] * share / (1 - share) == pytest.approx(1 / 9)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert (
        f"| avg | supervised | InfoNCE | 8 | 2 | 1 | 0 | {found['supervised-avg-8-infonce-0.json']['dev']:.2f} |"
        in text
    )
    assert "Not run: 0 of" in text
    assert (out / smollm2.PICTURE).stat().st_size > 10_000


def test_what_is_missing_is_listed_and_other_settings_are_refused(source, tmp_path, capsys):
    run(source, tmp_path, "--poolers", "avg", "--data", "unsupervised", "--losses", "infonce", "--dev_only")
    capsys.readouterr()
    smollm2.main(["--report", "--out", str(tmp_path), "--seeds", "0", "--batch", "8", "--poolers", "avg"])
    shown = capsys.readouterr().out
    assert "Not run: 5 of 7 runs of the grid." in shown
    assert "- unsupervised, avg, batch 8: lambda1, seeds 0; tenth, seeds 0" in shown
    with pytest.raises(SystemExit) as ended:
        run(source, tmp_path, "--poolers", "avg")
    assert ended.value.code == 2
    assert "choose another --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(source, tmp_path, "--poolers", "avg", "--data", "unsupervised", "--losses", "tenth", "--dev_only")
    assert "add lambda1 to --losses" in capsys.readouterr().err
