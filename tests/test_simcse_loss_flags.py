"""Every option of the loss is a flag of the trainer: it reaches the loss, the log and the run's settings."""

from __future__ import annotations

import json

import pytest
import torch
from test_config import other
from test_simcse_options import folder, prepared  # noqa: F401 (a fixture)
from test_simcse_train import flags

from fused_infonce import contrastive_stats, gs_infonce
from fused_infonce.config import FIELDS
from simcse import train
from simcse.arguments import LOSS_FLAGS, LossArguments
from simcse.flags import parse

WITHOUT_RESULT = ("backend", "strategy", "workspace_bytes")


def test_all_but_what_the_trainer_decides_itself_are_flags():
    assert set(FIELDS) - set(LOSS_FLAGS) == {"reduction", "min_temperature"}


@pytest.mark.parametrize("name", LOSS_FLAGS)
def test_a_flag_is_parsed_and_has_the_field_s_default(name):
    value = other(name)
    (options,) = parse(LossArguments, "simcse.train", "", [f"--{name}", str(value)])
    assert options.loss_options == {**{flag: FIELDS[flag].default for flag in LOSS_FLAGS}, name: value}


def test_help_says_what_each_option_means(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name in LOSS_FLAGS:
        assert f"--{name}" in shown
        assert FIELDS[name].metadata["meaning"][:30] in shown


@pytest.mark.parametrize("name", [name for name in LOSS_FLAGS if name not in (*WITHOUT_RESULT, "num_noise")])
def test_a_flag_changes_the_loss_and_the_figures_that_are_logged(folder, tmp_path, name):  # noqa: F811
    change = {name: other(name), "num_noise": 7 if "noise" in name else 0, "train_file": folder / "train.jsonl"}
    trainer = prepared(folder, tmp_path, **change)
    torch.manual_seed(1)
    rows = [torch.randn(6, trainer.model.encoder.config.hidden_size) for _ in range(3)]
    columns = trainer.model.columns(torch.cat(rows), 3, None)
    options = {"num_noise": change["num_noise"], name: change[name]}
    draws = (torch.Generator().manual_seed(3) for _ in range(4))
    found = trainer.model.loss(**vars(columns), generator=next(draws))
    assert found.item() == gs_infonce(*rows, **options, generator=next(draws)).item()
    logged, figures = (
        trainer.model.stats(columns, next(draws)),
        {k: x for k, x in options.items() if k != "symmetric"},
    )
    wanted = contrastive_stats(*rows, **figures, generator=next(draws))
    assert all(logged[figure] == wanted[figure].item() for figure in wanted if figure != "loss")


REFUSED = {
    "label smoothing, duplicates": (
        {"label_smoothing": 0.1, "mask_duplicates": True},
        "--label_smoothing cannot be",
    ),
    "label smoothing, filter": ({"label_smoothing": 0.1, "filter_margin": 0.1}, "--label_smoothing cannot be"),
    "margin": ({"angular_margin": 10}, "--angular_margin must be an angle in radians"),
    "hardness": ({"hardness": -1}, "--hardness must be >= 0, not -1.0"),
    "share": ({"label_smoothing": 1.5}, "--label_smoothing must be a share"),
    "threshold": ({"filter_threshold": "nan"}, "--filter_threshold must be finite"),
    "weight": ({"noise_weight": "inf"}, "--noise_weight must be finite"),
    "workspace": ({"workspace_bytes": 0}, "--workspace_bytes must be a positive number of bytes"),
    "backend": ({"backend": "cuda"}, "--backend: invalid choice: 'cuda'"),
    "backend of this machine": ({"backend": "triton"}, "backend='triton' cannot run this call"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_value_ends_at_the_start(folder, tmp_path, capsys, monkeypatch, change, message):  # noqa: F811
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if torch.cuda.is_available() and change.get("backend") == "triton":
        pytest.skip("the kernels run on this machine")
    with pytest.raises(SystemExit) as ended:
        train.main(flags(folder, tmp_path / "run", sts_data=None, per_device_train_batch_size=8, **change))
    *warnings, error = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert error.startswith("simcse.train: error: ")
    assert message in error
    assert all(line.startswith("simcse.train: warning: ") for line in warnings)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_what_changes_the_loss_and_nothing_else(folder, tmp_path, capsys):  # noqa: F811
    usual = {"sts_data": None, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 1}
    train.main(flags(folder, tmp_path / "run", **usual, max_steps=1, hardness=2.0, backend="torch"))
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert set(LOSS_FLAGS) - set(settings) == set(WITHOUT_RESULT)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    again = {**usual, "max_steps": 2, "resume_from_checkpoint": checkpoint, "hardness": 2.0}
    with pytest.raises(SystemExit):
        train.main(flags(folder, tmp_path / "other", **{**again, "hardness": 0.5}))
    assert "--hardness 0.5 (was 2.0)" in capsys.readouterr().err
    train.main(flags(folder, tmp_path / "other", **again, workspace_bytes=1_000_000))
