"""``--loss``, ``--matryoshka_dims`` and ``--truncate_dim`` reach what they name, or are refused at the start."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from test_simcse_options import folder, prepared  # noqa: F401 (a fixture)
from test_simcse_sts import write_sts
from test_simcse_train import flags

from fused_infonce import info_nce, losses
from simcse import evaluate, train
from simcse.published import LOSSES

PAIRS = ("debiased", "hcl")


def command(folder, output, **change):  # noqa: F811
    """``flags`` with lists."""
    plain = {name: x for name, x in change.items() if not isinstance(x, list)}
    lists = [[f"--{name}", *map(str, x)] for name, x in change.items() if isinstance(x, list)]
    return [*flags(folder, output, **{"per_device_train_batch_size": 8, **plain}), *itertools.chain(*lists)]


def columns_of(trainer, views):
    torch.manual_seed(1)
    rows = torch.randn(6 * views, trainer.model.encoder.config.hidden_size)
    return trainer.model.columns(rows, views, None)


@pytest.mark.parametrize("name", LOSSES)
def test_a_published_loss_is_what_is_trained(folder, tmp_path, name):  # noqa: F811
    views = 2 if name in PAIRS else 3
    data = {} if views == 2 else {"train_file": folder / "train.jsonl"}
    trainer = prepared(folder, tmp_path, loss=name, temp=0.1, **data)
    given = columns_of(trainer, views)
    found = trainer.model.contrastive_loss(given, torch.Generator())
    own = (
        [] if given.negatives is None else [given.negatives.view(-1, 6, given.negatives.shape[1]).transpose(0, 1)]
    )
    assert found == getattr(losses, name)(given.anchors, given.positives, *own, temperature=0.1)


def test_prefixes(folder, tmp_path):  # noqa: F811
    change = {"num_noise": 0, "matryoshka_dims": [4, 16], "matryoshka_weights": [0.5, 2.0]}
    trainer = train.prepare(command(folder, tmp_path / "run", sts_data=None, **change))
    given = columns_of(trainer, 2)
    rows = [given.anchors, given.positives]
    want = losses.matryoshka(info_nce, (4, 16), (0.5, 2.0))(*rows)
    assert trainer.model.contrastive_loss(given, torch.Generator()) == pytest.approx(want.item(), rel=1e-6)


REFUSED = {
    "an option of the other loss": (
        {"loss": "gte", "angular_margin": 0.1},
        "--loss gte cannot be combined with --",
    ),
    "a queue": ({"loss": "hcl", "queue_size": 8}, "--loss hcl cannot be combined with --queue_size"),
    "noise": ({"loss": "gte", "num_noise": 64}, "--num_noise 64 cannot be combined with --loss gte"),
    "duplicates": ({"loss": "llave", "mask_duplicates": True}, "cannot be combined with --mask_duplicates"),
    "prefix": ({"matryoshka_dims": [4, 4096]}, "--matryoshka_dims must be at most the model's"),
    "no prefix": ({"matryoshka_dims": [0]}, "--matryoshka_dims must be numbers of at least 1"),
    "weights alone": ({"matryoshka_weights": [1]}, "--matryoshka_weights belongs to --matryoshka_dims"),
    "weight NaN": (
        {"matryoshka_dims": [4], "matryoshka_weights": ["nan"]},
        "--matryoshka_weights must be positive numbers, not [nan]",
    ),
    "one pair": (
        {"loss": "hcl", "per_device_train_batch_size": 1},
        "--loss hcl needs at least 2 pairs per batch, not --per_device_train_batch_size 1",
    ),
    "weights": ({"matryoshka_dims": [4], "matryoshka_weights": [1, 2]}, "--matryoshka_weights must be one number"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_ends_at_the_start(folder, tmp_path, capsys, change, message):  # noqa: F811
    with pytest.raises(SystemExit) as ended:
        train.main(command(folder, tmp_path / "run", sts_data=None, **change))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_pairs_only(folder, tmp_path, capsys):  # noqa: F811
    change = {"loss": "debiased", "train_file": folder / "train.jsonl"}
    with pytest.raises(SystemExit):
        train.main(command(folder, tmp_path / "run", sts_data=None, **change))
    assert "--loss debiased takes pairs, not 4 columns" in capsys.readouterr().err


def test_a_run_with_prefixes_and_its_score_by_one_of_them(folder, tmp_path, capsys):  # noqa: F811
    change = {"loss": "qwen3_embedding", "matryoshka_dims": [4, 16], "max_steps": 2}
    train.main(command(folder, tmp_path / "run", sts_data=None, **change))
    first = capsys.readouterr().out.splitlines()[0]
    assert "the loss qwen3_embedding, summed over prefixes of 4, 16 features" in first
    assert "noise" not in first
    scores = []
    for extra in ([], ["--truncate_dim", "4"]):
        file = tmp_path / f"scores{len(extra)}.json"
        evaluate.main(["--model_name_or_path", str(tmp_path / "run"), "--output_json", str(file), *extra])
        scores.append(json.loads(file.read_text()))
    assert scores[0] != scores[1]
    assert ", 4 features" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.main(["--model_name_or_path", str(tmp_path / "run"), "--truncate_dim", "4096"])
    assert "--truncate_dim 4096 is more than the" in capsys.readouterr().err


def test_the_example_of_the_page_at_a_tiny_size(folder, tmp_path, capsys):  # noqa: F811
    """The four commands of docs/losses.md, with other files and sizes in the place of theirs."""
    page = (Path(__file__).parents[1] / "docs" / "losses.md").read_text(encoding="utf-8")
    block = re.search(r"```sh\n(python -m simcse.train .*?)```", page, re.DOTALL).group(1)
    write_sts(tmp_path / "sts.tsv", [("STSB", "x", "test", i, f"the {i} cats", f"{i} dogs") for i in range(6)])
    own = {
        "$SIMCSE_DATA/nli_triplets.csv": folder / "train.jsonl",
        "$SIMCSE_DATA/sts_eval.tsv": tmp_path / "sts.tsv",
        "runs/nli-qwen3": tmp_path / "qwen3",
        "runs/nli-infonce": tmp_path / "infonce",
        "64": 8,
        "60": 2,
    }
    modules = []
    for line in block.replace("\\\n", " ").splitlines():
        _, _, module, *given = line.split()
        given = [str(own.get(word, word)) for word in given]
        model = ["--model_name_or_path", str(folder / "model")] if module == "simcse.train" else []
        {"simcse.train": train, "simcse.evaluate": evaluate}[module].main([*given, *model])
        modules.append(module)
    assert modules == ["simcse.train"] * 2 + ["simcse.evaluate"] * 2
    out = capsys.readouterr().out
    assert "the loss qwen3_embedding; no pairs" in out
    assert "; InfoNCE; no pairs" in out
    assert out.count("STSB") >= 2
