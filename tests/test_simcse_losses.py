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

from fused_infonce import contrastive_stats, info_nce, losses
from simcse import evaluate, train
from simcse.loss_flags import PUBLISHED_FLAGS
from simcse.published import LOSSES, UNFIT, users

PAIRS = ("clip", "debiased", "hcl")
# option → its flag's words, the loss that has it, and the value that reaches the loss
OPTIONS = [
    ("gte", "directions", ["query_to_doc", "doc_to_query"], ["query_to_doc", "doc_to_query"]),
    ("gte", "hardness_mode", "all_negatives", "all_negatives"),
    ("gte", "hardness_strength", 2.0, 2.0),
    ("qwen3_embedding", "margin", 0.01, 0.01),
    ("qwen3_embedding", "margin", "inf", None),
    ("qwen3_embedding", "doc_to_doc", "false", False),
    ("embedding_gemma", "hardness", 0.0, 0.0),
    ("llave", "hardness", 2.0, 2.0),
    ("focal", "gamma", 2.0, 2.0),
    ("debiased", "tau_plus", 0.02, 0.02),
    ("hcl", "tau_plus", 0.02, 0.02),
    ("hcl", "beta", 0.5, 0.5),
]


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
    assert found == getattr(losses, name)(*rows_of(given, name), temperature=0.1)


def rows_of(given, name):
    own = []
    if given.negatives is not None:
        own = [given.negatives]
        if name != "focal":
            own = [given.negatives.view(-1, 6, given.negatives.shape[1]).transpose(0, 1)]
    return [given.anchors, given.positives, *own]


@pytest.mark.parametrize(("name", "option", "words", "value"), OPTIONS)
def test_an_option_s_flag_reaches_the_loss_and_the_first_line(
    folder,  # noqa: F811
    tmp_path,
    capsys,
    name,
    option,
    words,
    value,
):
    views = 2 if name in PAIRS else 3
    change = {"loss": name, option: words, "sts_data": None, "temp": 0.5, "max_steps": 1}
    data = {} if views == 2 else {"train_file": folder / "train.jsonl", "columns": "a,b,c"}
    more = {"hardness_strength": 1.0} if option == "hardness_mode" else {}
    more |= {"hardness_mode": "all_negatives"} if option == "hardness_strength" else {}
    trainer = train.prepare(command(folder, tmp_path / "run", **change, **data, **more))
    assert f"the loss {name}, --" in capsys.readouterr().out
    given = columns_of(trainer, views)
    found = trainer.model.contrastive_loss(given, torch.Generator())
    own = getattr(losses, name)
    assert found == own(*rows_of(given, name), temperature=0.5, **{option: value}, **more)
    assert found != own(*rows_of(given, name), temperature=0.5, **more)


def test_every_option_of_every_loss_is_a_flag_that_help_explains(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert {(name, option) for name, option, *_ in OPTIONS} | {("gte", "partition_mode")} == {
        (name, option) for name, own in LOSSES.items() for option in own.options
    }
    for option in PUBLISHED_FLAGS:
        first = LOSSES[users(option)[0]].options[option]
        assert re.search(rf"--{option} .*Of --loss {users(option)[0]}", shown)
        assert len(first.meaning) > 10
        assert first.meaning in shown


def test_every_loss_is_trained_or_refused_with_a_reason():
    parts = {"contrast", "log_add", "own_negatives", "pair_cosines"}
    assert set(LOSSES) | set(UNFIT) == set(losses.__all__) - parts


def test_the_figures_in_the_log_are_those_of_infonce(folder, tmp_path):  # noqa: F811
    trainer = prepared(folder, tmp_path, loss="llave", hardness=3.0, train_file=folder / "train.jsonl")
    given = columns_of(trainer, 3)
    logged = trainer.model.stats(given, torch.Generator())
    wanted = contrastive_stats(given.anchors, given.positives, given.negatives, num_noise=0)
    assert all(logged[figure] == wanted[figure].item() for figure in wanted if figure != "loss")


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
    "an option of another published loss": (
        {"loss": "gte", "beta": 0.5},
        "--beta belongs to --loss hcl, not to gte; leave one of them out",
    ),
    "an option without its loss": (
        {"margin": 0.1},
        "--margin belongs to --loss qwen3_embedding, not to gs_infonce",
    ),
    "an option of both": ({"loss": "hcl", "hardness": 1.0}, "cannot be combined with --hardness"),
    "a value": ({"loss": "hcl", "beta": 0}, "error: --beta must be > 0"),
    "directions": (
        {"loss": "gte", "directions": ["doc_to_doc"]},
        "error: --directions must contain 'query_to_doc'",
    ),
    "partition": ({"loss": "gte", "partition_mode": "per_direction"}, "error: --partition_mode='per_direction'"),
    "labels": ({"loss": "supcon"}, "--loss supcon needs a label for each row"),
    "classes": ({"loss": "cross_entropy"}, "call fused_infonce.losses.cross_entropy"),
    "a teacher": ({"loss": "soft_labels"}, "call fused_infonce.losses.soft_labels"),
    "a guide": ({"loss": "gistembed"}, "call fused_infonce.losses.gistembed"),
    "prefixes": ({"loss": "matryoshka"}, "which --matryoshka_dims does here"),
    "no loss": ({"loss": "triplet"}, "--loss must be one of gs_infonce, gte, "),
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
