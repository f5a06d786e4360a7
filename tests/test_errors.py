"""Every wrong argument is named, with what came and what is expected."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from fused_infonce import GSInfoNCELoss, alignment, gs_infonce, info_nce, uniformity

x, y = torch.randn(4, 3), torch.randn(4, 3)
h, own = torch.randn(6, 3), torch.randn(4, 2, 3)
ids = torch.arange(4)

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
    (ValueError, "focal_gamma must be >= 0, not -2", (x, y), {"focal_gamma": -2}),
    (ValueError, "focal_gamma cannot be combined.*leave one", (x, y), {"focal_gamma": 2, "decoupled": True}),
    (ValueError, "focal_gamma cannot be combined.*leave one", (x, y), {"focal_gamma": 2, "label_smoothing": 0.1}),
    (ValueError, "filter_margin must be finite, not inf", (x, y), {"filter_margin": math.inf}),
    (TypeError, "filter_threshold must be a number, not str", (x, y), {"filter_threshold": "0.9"}),
    (TypeError, "guide must be one matrix for each of the 2 inputs.*not Tensor", (x, y), {"guide": x}),
    (ValueError, "guide must be one matrix for each of the 3 inputs.*not 2", (x, y, h), {"guide": [x, y]}),
    (ValueError, r"guide\[1\] must be a matrix of 4 rows.*\(6, 3\)", (x, y), {"guide": [x, h]}),
    (TypeError, r"guide\[0\] must be a floating-point tensor", (x, y), {"guide": [x.int(), y]}),
    (TypeError, "group='world' must come after torch.distributed.init_process_group", (x, y), {"group": "world"}),
    (ValueError, "strategy must be one of 'auto', 'gather', 'ring', not 'star'", (x, y), {"strategy": "star"}),
    (ValueError, r"own negatives must be \(4, K, 3\).*\(2, 4, 3\)", (x, y, torch.ones(2, 4, 3)), {}),
    (ValueError, "negatives must have the anchors' 3 features, not 2", (x, y, torch.ones(4, 5, 2)), {}),
    (ValueError, r"negative_ids must have shape \(4, 2\)", (x, y, own), {"ids": ids, "negative_ids": torch.arange(8)}),
    (ValueError, "negative_ids needs both ids", (x, y, own), {"negative_ids": torch.arange(8).view(4, 2)}),
    (ValueError, r"negative_owners needs negatives \(H, 3\)", (x, y), {"negative_owners": torch.arange(4)}),
    (ValueError, r"negative_owners must have shape \(6,\)", (x, y, h), {"negative_owners": torch.arange(4)}),
    (ValueError, "negative_owners must be .* 0 to 3 .*not 5", (x, y, h), {"negative_owners": torch.arange(6)}),
    (ValueError, "negative_owners must be .* 0 to 3 .*not -1", (x, y, h), {"negative_owners": torch.arange(6) - 1}),
    (ValueError, "negatives must be a matrix", (x, y, own), {"negative_owners": torch.arange(4)}),
    (ValueError, r"guide\[2\] must have shape \(4, 2,", (x, y, own), {"guide": [x, y, h]}),
    (ValueError, "label_smoothing cannot be combined with own", (x, y, own), {"label_smoothing": 0.1}),
    (ValueError, "hardness_mode must be one of", (x, y), {"hardness_mode": "all"}),
    (
        ValueError,
        "hardness_mode='hard_negatives' weighs own hard negatives, and none came",
        (x, y, h),
        {"hardness": 1.0, "hardness_mode": "hard_negatives"},
    ),
    (ValueError, r"queue must be a matrix.*\(4, 2, 3\)", (x, y), {"queue": torch.ones(4, 2, 3)}),
    (TypeError, "anchors must be a dense tensor.*sparse_coo; call its to_dense", (x.to_sparse(), y), {}),
    (TypeError, "negatives must be a dense tensor.*sparse_coo", (x, y, h.to_sparse()), {}),
    (TypeError, "temperature must be a dense tensor", (x, y), {"temperature": torch.ones(1).to_sparse()}),
    (TypeError, "ids must be a dense tensor", (x, y), {"ids": torch.arange(4).to_sparse()}),
    (TypeError, "noise must be a dense tensor", (x, y), {"noise": x.to_sparse()}),
    (TypeError, r"guide\[1\] must be a dense tensor", (x, y), {"guide": [x, y.to_sparse()]}),
    (TypeError, "positives must be a dense tensor, not one of layout torch._mkldnn", (x, y.to_mkldnn()), {}),
    (ValueError, "anchors is on meta, where tensors have no values", (x.to("meta"), y.to("meta")), {}),
    (ValueError, "temperature is on meta", (x, y), {"temperature": torch.ones(1, device="meta")}),
    (TypeError, "temperature must be a number, not bool", (x, y), {"temperature": True}),
    (TypeError, "num_noise must be an integer, not True", (x, y), {"num_noise": True}),
    (TypeError, "workspace_bytes must be an integer, not 1.5", (x, y), {"workspace_bytes": 1.5}),
    (
        TypeError,
        "ids is torch.uint64 and negative_ids is torch.int64.*convert them to int64",
        (x, y, h),
        {"ids": torch.arange(4).to(torch.uint64), "negative_ids": torch.arange(6)},
    ),
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
        (TypeError, "temperature_range must be two numbers", {"temperature_range": 0.1}),
        (TypeError, "temperature_range must be two numbers", {"temperature_range": (0.1, 0.2, 0.3)}),
        (TypeError, "learnable_temperature must be True or False", {"learnable_temperature": "yes"}),
        (TypeError, "num_noise must be an integer", {"num_noise": 1.5}),
        (ValueError, "num_noise must be >= 0", {"num_noise": -1}),
        (ValueError, "noise_weight must be >= 0", {"noise_weight": -1.0}),
        (ValueError, "noise must be one of", {"noise": "gauss"}),
        (TypeError, "noise must be one of.*give them to forward", {"noise": torch.ones(3, 3)}),
        (ValueError, "hard_negative_weight must be finite", {"hard_negative_weight": math.inf}),
        (TypeError, "symmetric must be", {"symmetric": "yes"}),
        (ValueError, "reduction must be one of", {"reduction": "max"}),
        (TypeError, "group must be 'local', 'world', or a process group", {"group": "all"}),
        (ValueError, "strategy must be one of", {"strategy": "star"}),
        (ValueError, "backend must be one of", {"backend": "cuda"}),
        (ValueError, "takes one process's rows", {"backend": "reference", "group": "world"}),
        (ValueError, "workspace_bytes must be", {"workspace_bytes": 0}),
        (TypeError, "decoupled must be", {"decoupled": 1}),
        (ValueError, "angular_margin must be", {"angular_margin": 10}),
        (ValueError, "hardness must be >= 0", {"hardness": -1.0}),
        (ValueError, "label_smoothing must be", {"label_smoothing": 1.0}),
        (ValueError, "label_smoothing cannot be combined", {"label_smoothing": 0.1, "filter_margin": 0.1}),
        (TypeError, "filter_margin must be a number", {"filter_margin": "x"}),
        (ValueError, "filter_threshold must be finite", {"filter_threshold": math.nan}),
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
    with pytest.raises(ValueError, match="x is on meta"):
        uniformity(x.to("meta"))
    for wrong in ([1.0], x.int(), x.to_sparse()):
        for metric in (uniformity, lambda z: alignment(z, x)):
            with pytest.raises(TypeError, match="must be"):
                metric(wrong)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors():
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([x, y], layout=layout)
        for name in ("positives", "negatives", "queue"):
            with pytest.raises(TypeError, match=f"{name} must be a dense tensor, not a nested one"):
                info_nce(**{"anchors": x, "positives": y, name: nested})


def test_numbers_of_numpy_are_numbers():
    plain = {"temperature": 0.0625, "noise_weight": 0.5, "hardness": 1.0, "num_noise": 4, "workspace_bytes": 9000}
    for real, integer in ((np.float32, np.int64), (np.float64, np.int32), (np.float16, np.uint8)):
        given = {name: (integer if isinstance(v, int) and v < 9 else real)(v) for name, v in plain.items()}
        given["workspace_bytes"] = np.int64(9000)
        assert gs_infonce(x, y, noise="expected", **given) == gs_infonce(x, y, noise="expected", **plain)
        module = GSInfoNCELoss(noise="expected", **given)
        assert module(x, y) == gs_infonce(x, y, noise="expected", **plain)
        assert info_nce(x, y, label_smoothing=real(0.5)) == info_nce(x, y, label_smoothing=0.5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int32])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_ids_of_every_dtype(dtype, backend):
    ids, negative_ids = torch.tensor([0, 0, 1, 2]), torch.arange(6)
    want = info_nce(x, y, h, ids=ids, negative_ids=negative_ids, backend=backend)
    other = negative_ids.to(dtype) if dtype == torch.uint64 else negative_ids
    assert info_nce(x, y, h, ids=ids.to(dtype), negative_ids=other, backend=backend) == want
    assert info_nce(x, y, h, ids=ids.to(dtype), backend=backend) == info_nce(x, y, h, ids=ids, backend=backend)


def test_a_group_of_none_before_there_are_groups_is_reported():
    """torch.distributed.group.WORLD is None until init_process_group was called."""
    world = torch.distributed.group.WORLD
    for make in (lambda: info_nce(x, y, group=world), lambda: GSInfoNCELoss(group=world)):
        with pytest.warns(UserWarning, match="group is None before.*group='world'"):
            make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        info_nce(x, y)
        info_nce(x, y, group="local")
        loss = GSInfoNCELoss(group="world", num_noise=0)  # may be made before there are groups
    with pytest.raises(TypeError, match=r"must come after torch\.distributed\.init_process_group"):
        loss(x, y)


NAN_WAYS = [{}, {"symmetric": True}, {"temperature": 0.004}, {"decoupled": True}]


@pytest.mark.parametrize("options", NAN_WAYS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_column_that_is_masked_everywhere_still_gives_nan(options, backend, bad):
    """Its gradients are NaN; a finite loss would hide that."""
    broken = torch.cat([h, h])
    broken[7, 1] = bad
    ids, negative_ids = torch.zeros(4, dtype=torch.int64), torch.zeros(12, dtype=torch.int64)
    assert info_nce(x, y, broken, ids=ids, negative_ids=negative_ids, backend=backend, **options).isnan()
    q = x.clone().requires_grad_()
    loss = info_nce(q, y, broken, ids=ids, negative_ids=negative_ids, backend=backend, **options)
    (g,) = torch.autograd.grad(loss, q)
    assert loss.isnan()
    assert g.isnan().any()
    same = [torch.ones(n, 2) for n in (4, 4, 12)]
    guided = info_nce(x, y, broken, guide=same, filter_margin=-0.5, backend=backend, **options)
    assert guided.isnan()
    fine = info_nce(x, y, torch.cat([h, h]), ids=ids, negative_ids=negative_ids, backend=backend, **options)
    assert fine.isfinite()
