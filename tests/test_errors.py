"""Every wrong argument is named, with what came and what is expected."""

from __future__ import annotations

import math

import pytest
import torch

from fused_infonce import GSInfoNCELoss, alignment, gs_infonce, info_nce, uniformity

x, y = torch.randn(4, 3), torch.randn(4, 3)
h = torch.randn(6, 3)

WRONG = [
    (TypeError, "anchors must be a torch.Tensor, not list", ([[1.0]], y), {}),
    (TypeError, "positives must be a torch.Tensor, not NoneType", (x, None), {}),
    (TypeError, "anchors must be float64.*not torch.int64", (torch.ones(4, 3, dtype=torch.int64), y), {}),
    (ValueError, r"anchors must be a matrix.*\(3,\)", (torch.ones(3), y), {}),
    (ValueError, r"anchors must be a matrix.*at least one.*\(0, 3\)", (torch.ones(0, 3), torch.ones(0, 3)), {}),
    (ValueError, "positives must have one row for each of the 4 anchors, not 6", (x, h), {}),
    (ValueError, "positives must have the anchors' 3 features, not 2", (x, y[:, :2]), {}),
    (ValueError, "negatives must have the anchors' 3 features, not 2", (x, y, h[:, :2]), {}),
    (ValueError, "queue must have the anchors' 3 features, not 1", (x, y), {"queue": h[:, :1]}),
    (ValueError, "positives is on meta", (x, y.to("meta")), {}),
    (ValueError, "temperature must be > 0, not 0", (x, y), {"temperature": 0}),
    (ValueError, "temperature must be > 0, not -0.1", (x, y), {"temperature": -0.1}),
    (ValueError, "temperature must be finite, not nan", (x, y), {"temperature": math.nan}),
    (TypeError, "temperature must be a number, not str", (x, y), {"temperature": "0.05"}),
    (ValueError, r"temperature must be.*one element.*\(2,\)", (x, y), {"temperature": torch.ones(2)}),
    (ValueError, "temperature must be.*floating-point.*int64", (x, y), {"temperature": torch.tensor(1)}),
    (ValueError, "min_temperature must be > 0 or None, not 0", (x, y), {"min_temperature": 0}),
    (ValueError, "num_noise must be >= 0, not -1", (x, y), {"num_noise": -1}),
    (TypeError, "num_noise must be an integer, not 1.5", (x, y), {"num_noise": 1.5}),
    (ValueError, "noise_weight must be >= 0, not -1", (x, y), {"noise_weight": -1}),
    (ValueError, "noise_weight must be finite, not inf", (x, y), {"noise_weight": math.inf}),
    (ValueError, "noise must be one of 'sampled', 'expected' or a tensor.*'gauss'", (x, y), {"noise": "gauss"}),
    (ValueError, r"noise must be a matrix \(M, 3\).*\(5, 2\)", (x, y), {"noise": torch.ones(5, 2)}),
    (TypeError, "noise must hold floating-point.*int64", (x, y), {"noise": torch.ones(5, 3, dtype=torch.int64)}),
    (TypeError, "generator must be a torch.Generator or None, not int", (x, y), {"generator": 3}),
    (ValueError, "negatives: 6 rows came.*multiple of the 4 anchors", (x, y, h), {"hard_negative_weight": 1.0}),
    (ValueError, "hard_negative_weight must be finite", (x, y), {"hard_negative_weight": math.inf}),
    (TypeError, r"ids must be an integer tensor \(4,\), not torch.float32", (x, y), {"ids": torch.ones(4)}),
    (ValueError, r"ids must have shape \(4,\).*\(3,\)", (x, y), {"ids": torch.arange(3)}),
    (TypeError, "ids must be an integer tensor.*not list", (x, y), {"ids": [1, 2, 3, 4]}),
    (ValueError, r"negative_ids must have shape \(6,\)", (x, y, h), {"negative_ids": torch.arange(4)}),
    (ValueError, "negative_ids needs both ids and negatives", (x, y, h), {"negative_ids": torch.arange(6)}),
    (TypeError, "symmetric must be True or False, not 'yes'", (x, y), {"symmetric": "yes"}),
    (ValueError, "reduction must be one of 'mean', 'sum', 'none', not 'max'", (x, y), {"reduction": "max"}),
    (ValueError, "backend must be one of .*not 'cuda'", (x, y), {"backend": "cuda"}),
    (ValueError, "workspace_bytes must be a positive", (x, y), {"workspace_bytes": 0}),
    (TypeError, "decoupled must be True or False, not 1", (x, y), {"decoupled": 1}),
    (ValueError, "angular_margin must be an angle in radians.*not 10", (x, y), {"angular_margin": 10}),
    (ValueError, "hardness must be >= 0, not -1", (x, y), {"hardness": -1.0}),
    (ValueError, "label_smoothing must be a share.*not 1", (x, y), {"label_smoothing": 1.0}),
    (
        ValueError,
        "label_smoothing cannot be combined with ids or a filter",
        (x, y),
        {"label_smoothing": 0.1, "ids": torch.arange(4)},
    ),
    (ValueError, "filter_margin must be finite, not inf", (x, y), {"filter_margin": math.inf}),
    (TypeError, "filter_threshold must be a number, not str", (x, y), {"filter_threshold": "0.9"}),
    (TypeError, "guide must be one matrix for each of the 2 inputs.*not Tensor", (x, y), {"guide": x}),
    (ValueError, "guide must be one matrix for each of the 3 inputs.*not 2", (x, y, h), {"guide": [x, y]}),
    (ValueError, r"guide\[1\] must be a matrix of 4 rows.*\(6, 3\)", (x, y), {"guide": [x, h]}),
    (TypeError, r"guide\[0\] must be a floating-point tensor", (x, y), {"guide": [x.int(), y]}),
    (TypeError, "group must be a process group.*'world'", (x, y), {"group": "world"}),
]


@pytest.mark.parametrize(("error", "message", "args", "options"), WRONG, ids=[w[1][:50] for w in WRONG])
def test_loss(error, message, args, options):
    with pytest.raises(error, match=message):
        gs_infonce(*args, **options)


def test_triton_says_what_is_missing(monkeypatch):
    with pytest.raises(ValueError, match=r"backend='triton' cannot run this call: .*float64.*'torch'"):
        gs_infonce(x.double(), y.double(), backend="triton")
    with pytest.raises(ValueError, match="at most 8192 features, not 8193"):
        gs_infonce(torch.ones(2, 8193), torch.ones(2, 8193), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="need tensors on a GPU"):
        gs_infonce(x, y, backend="triton")


def test_info_nce_has_no_noise_arguments():
    with pytest.raises(TypeError, match="num_noise"):
        info_nce(x, y, num_noise=3)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "temperature must be a float, not Tensor", {"temperature": torch.tensor(0.1)}),
        (ValueError, "temperature must be a number > 0, not 0", {"temperature": 0}),
        (ValueError, "temperature_range must be", {"temperature_range": (0.5, 0.1)}),
        (ValueError, "temperature 2.0 must lie in", {"temperature": 2.0, "learnable_temperature": True}),
    ],
)
def test_module(error, message, options):
    with pytest.raises(error, match=message):
        GSInfoNCELoss(**options)


def test_metrics():
    with pytest.raises(ValueError, match=r"one shape.*\(4, 3\) and \(6, 3\)"):
        alignment(x, h)
    with pytest.raises(ValueError, match="at least two rows"):
        uniformity(x[:1])
    with pytest.raises(ValueError, match="t must be > 0"):
        uniformity(x, t=0)
