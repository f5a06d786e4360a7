"""An option of the loss is a field of ``LossConfig``, from which every other list of options is made."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from cases import VARIANTS, build
from helpers import rows

from fused_infonce import GSInfoNCELoss, contrastive_stats, gs_infonce, info_nce
from fused_infonce.config import FIELDS, MUST_AGREE_ACROSS_RANKS, LossConfig, make_config

OTHER = {  # another value than the default, as a user may write it on a command line
    "num_noise": 7, "noise_weight": 0.5, "noise": "expected", "hard_negative_weight": 1.5, "symmetric": True,
    "reduction": "sum", "strategy": "ring", "backend": "torch", "workspace_bytes": 10_000, "decoupled": True,
    "angular_margin": 0.2, "hardness": 2.0, "label_smoothing": 0.1, "filter_margin": 0.1, "filter_threshold": 0.9,
    "min_temperature": 0.02, "focal_gamma": 2.0, "hardness_mode": "hard_negatives",
}  # fmt: skip


def other(name):
    assert name in OTHER, f"give test_config.OTHER a value of the new option {name}"
    return OTHER[name]


def keywords(function):
    return {p.name: p for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY}


@pytest.mark.parametrize("name", FIELDS)
def test_the_written_signature_has_the_field_s_default(name):
    assert keywords(gs_infonce)[name].default == FIELDS[name].default


@pytest.mark.parametrize("function", [info_nce, contrastive_stats, GSInfoNCELoss], ids=lambda f: f.__name__)
def test_generated_signatures_show_names_defaults_and_annotations(function):
    source, shown = keywords(gs_infonce), keywords(function)
    for name in set(shown) & set(FIELDS):
        assert shown[name].default == source[name].default
        assert shown[name].annotation is not inspect.Parameter.empty
    own = {"learnable_temperature", "temperature_range"} if function is GSInfoNCELoss else set()
    assert set(shown) - own <= set(source)
    missing = {
        info_nce: {"num_noise", "noise_weight", "noise"},
        contrastive_stats: {"min_temperature", "symmetric", "reduction", "strategy", "backend"},
        GSInfoNCELoss: {"min_temperature"},
    }
    assert set(FIELDS) - set(shown) == missing[function]


@pytest.mark.parametrize("name", ["num_noise", "noise_weight", "noise", "generator", "nonsense"])
def test_info_nce_refuses_what_it_does_not_show(name):
    with pytest.raises(TypeError, match=rf"info_nce\(\) got an unexpected keyword argument '{name}'"):
        info_nce(rows(3, 4), rows(3, 4), **{name: None})


@pytest.mark.parametrize("name", ["symmetric", "reduction", "backend", "nonsense"])
def test_stats_refuse_what_they_do_not_show(name):
    with pytest.raises(TypeError, match=rf"contrastive_stats\(\) got an unexpected keyword argument '{name}'"):
        contrastive_stats(rows(3, 4), rows(3, 4), **{name: None})


@pytest.mark.parametrize("name", ["min_temperature", "queue", "nonsense"])
def test_the_module_refuses_what_it_does_not_show(name):
    with pytest.raises(TypeError, match=rf"GSInfoNCELoss\(\) got an unexpected keyword argument '{name}'"):
        GSInfoNCELoss(**{name: None})


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "min_temperature"])
def test_the_module_s_options_are_attributes_that_can_be_assigned(name):
    value, loss = other(name), GSInfoNCELoss(**{name: other(name)})
    assert getattr(loss, name) == value
    assert f"{name}={value!r}" in repr(loss)
    later = GSInfoNCELoss()
    assert getattr(later, name) == FIELDS[name].default
    setattr(later, name, value)
    assert later.config == loss.config
    before = later.config
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
        setattr(later, name, [])
    assert later.config == before


def test_an_assigned_option_is_used_and_copied():
    q, k = rows(8, 5, seed=1), rows(8, 5, seed=2)
    loss = GSInfoNCELoss(num_noise=0)
    loss.hardness = 3.0
    for module in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert module(q, k) == info_nce(q, k, hardness=3.0) != info_nce(q, k)


def test_the_operator_takes_every_field():
    schema = torch.ops.fused_infonce.gs_infonce.default._schema
    kinds = {argument.name: str(argument.type) for argument in schema.arguments}
    assert set(FIELDS) <= set(kinds)
    assert kinds["hardness"] == kinds["filter_margin"] == "Optional[float]"
    assert kinds["symmetric"] == "bool"
    assert kinds["workspace_bytes"] == "Optional[int]"


def test_ranks_agree_on_all_but_the_implementation():
    assert set(FIELDS) - set(MUST_AGREE_ACROSS_RANKS) == {"backend", "workspace_bytes"}


def test_a_config_is_checked_once_per_set_of_options():
    options = {"hardness": 2.0, "symmetric": True}
    assert make_config(options) is make_config(dict(options))
    assert make_config({"noise_weight": 1}) == LossConfig()
    for wrong in ({"symmetric": 1}, {"symmetric": []}, {"num_noise": True}):  # 1 == True, also as a key
        make_config({"symmetric": True, "num_noise": 1})
        with pytest.raises(TypeError, match="must be"):
            make_config(wrong)


@pytest.mark.parametrize(
    "noise", [{"num_noise": 0}, {"noise": "expected", "num_noise": 50}], ids=["none", "noise"]
)
@pytest.mark.parametrize("name", VARIANTS)
def test_stats_follow_every_variant(name, noise):
    inputs, options, _ = build(VARIANTS[name].given(**noise), 12, 8)
    stats = contrastive_stats(*inputs, **options)
    assert stats["loss"].item() == pytest.approx(gs_infonce(*inputs, **options).item(), rel=1e-9)
    q, k = (torch.nn.functional.normalize(x, dim=1) for x in inputs[:2])
    s = q @ k.T
    assert stats["accuracy"] == (s <= s.diagonal()[:, None] + 1e-12).all(1).double().mean()
    others = s[~torch.eye(12, dtype=torch.bool)]
    assert stats["negative_cosine"].item() == pytest.approx(others.mean().item(), rel=1e-9)
