"""The checks of a call's tensors: each error names the argument, what came and what is expected."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .config import finite

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_inputs(*inputs: Tensor | None) -> list[Tensor]:
    names = ("anchors", "positives", "negatives", "queue")
    present = [(name, x) for name, x in zip(names, inputs, strict=True) if x is not None or name in names[:2]]
    for name, x in present:
        check_matrix(name, x)
    anchors, positives = present[0][1], present[1][1]
    assert anchors is not None
    assert positives is not None
    if anchors.shape[0] != positives.shape[0]:
        raise ValueError(
            f"positives must have one row for each of the {anchors.shape[0]} anchors, not {positives.shape[0]}; "
            "further columns go to negatives or queue"
        )
    matrices = [(name, x) for name, x in present if x is not None]
    _check_alike(matrices)
    return [x for _, x in matrices]


def check_rows_and_columns(rows: Any, columns: Any) -> list[Tensor]:
    matrices = [("rows", rows), ("columns", columns)]
    for name, x in matrices:
        check_matrix(name, x)
    _check_alike(matrices)
    return [rows, columns]


def _check_alike(matrices: list[tuple[str, Tensor]]) -> None:
    """ValueError unless all have the features and the device of the first, which must hold values."""
    first, rows = matrices[0]
    for name, x in matrices[1:]:
        if x.shape[1] != rows.shape[1]:
            raise ValueError(f"{name} must have the {first}' {rows.shape[1]} features, not {x.shape[1]}")
        check_device(name, x, rows.device, first)
    if rows.device.type == "meta":
        raise ValueError(f"{first} is on meta, where tensors have no values; move it to another device")


def check_row_limits(name: str, limits: Tensor, N: int, device: torch.device) -> Tensor:
    """One number per row, detached. → (N, 1)"""
    _check_dense(name, limits)
    if not limits.is_floating_point():
        raise TypeError(f"{name} must be a number or a floating-point tensor ({N},), not {limits.dtype}")
    if limits.shape != (N,):
        raise ValueError(f"{name} must have shape ({N},), one limit per row, not {_shape(limits)}")
    check_device(name, limits, device, "rows")
    return limits.detach()[:, None]


def check_log_weights(log_weights: Any, T: int, device: torch.device) -> Tensor:
    """One number per column, detached, contiguous. → (T,)"""
    if not isinstance(log_weights, Tensor) or not log_weights.is_floating_point():
        kind = log_weights.dtype if isinstance(log_weights, Tensor) else type(log_weights).__name__
        raise TypeError(f"log_weights must be a floating-point tensor ({T},), not {kind}")
    _check_dense("log_weights", log_weights)
    if log_weights.shape != (T,):
        raise ValueError(f"log_weights must have shape ({T},), one per column, not {_shape(log_weights)}")
    check_device("log_weights", log_weights, device, "rows")
    return log_weights.detach().contiguous()


def check_row_and_column_ids(
    row_ids: Any, column_ids: Any, N: int, T: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Both as int64, contiguous; pairs of ids become (N, 2) and (T, 2)."""
    row_ids = _check_ids("row_ids", row_ids, N, device, pairs=True)
    column_ids = _check_ids("column_ids", column_ids, T, device, pairs=True)
    if (row_ids is None) != (column_ids is None):
        missing = "row_ids" if row_ids is None else "column_ids"
        raise ValueError(f"row_ids and column_ids are compared with each other, and {missing} is missing")
    if row_ids is not None and row_ids.ndim != column_ids.ndim:
        raise ValueError("row_ids and column_ids must both be one id per row, or both be pairs of ids")
    return tuple(None if x is None else x.long().contiguous() for x in (row_ids, column_ids))  # type: ignore[return-value]


def check_matrix(name: str, x: Any) -> None:
    """TypeError or ValueError where it is not a matrix of floating-point numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, not {x.dtype}; convert it first")
    _check_dense(name, x)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} must be a matrix (rows, features) with at least one of each, not {_shape(x)}")


def check_own_negatives(anchors: Tensor, negatives: Any, owners: Any) -> tuple[Tensor, Tensor | None]:
    """Own hard negatives and their owners. Owners on the CPU are read; elsewhere an index beyond the anchors
    fails where it is used, as any index of torch's does on that device.
    """
    N, D = anchors.shape
    if not isinstance(negatives, Tensor):
        raise ValueError(f"negative_owners needs negatives (H, {D}), not {type(negatives).__name__}")
    if negatives.dtype not in _DTYPES:
        raise TypeError(f"negatives must be float64, float32, bfloat16 or float16, not {negatives.dtype}")
    _check_dense("negatives", negatives)
    check_device("negatives", negatives, anchors.device)
    if negatives.shape[-1] != D:
        raise ValueError(f"negatives must have the anchors' {D} features, not {negatives.shape[-1]}")
    if owners is None:
        if negatives.shape[0] != N or negatives.shape[1] == 0:
            raise ValueError(
                f"own negatives must be ({N}, K, {D}), K >= 1 of each anchor, not {_shape(negatives)}"
            )
        return negatives, None
    check_matrix("negatives", negatives)
    _check_ids("negative_owners", owners, negatives.shape[0], anchors.device)
    owners = owners.long()
    if owners.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(x) for x in owners.aminmax())
        if low < 0 or high >= N:
            raise ValueError(
                f"negative_owners must be the rows of anchors that negatives belong to, 0 to {N - 1} (with a "
                f"group: of this rank), not {low if low < 0 else high}"
            )
    return negatives, torch.where(owners < 0, N, owners)  # −1 would be taken for the last row


def check_noise_vectors(noise: Tensor, anchors: Tensor) -> Tensor:
    _check_dense("noise", noise)
    if noise.ndim != 2 or noise.shape[1] != anchors.shape[1]:
        raise ValueError(f"noise must be a matrix (M, {anchors.shape[1]}) like the anchors, not {_shape(noise)}")
    if not noise.is_floating_point():
        raise TypeError(f"noise must hold floating-point vectors, not {noise.dtype}")
    check_device("noise", noise, anchors.device)
    return noise.detach()


def check_temperature(temperature: Any, device: torch.device) -> float | Tensor:
    """Returns the temperature, a Python float if it is a number."""
    if isinstance(temperature, Tensor):
        _check_dense("temperature", temperature)
        if temperature.numel() != 1 or temperature.ndim > 1 or not temperature.is_floating_point():
            raise ValueError(
                "temperature must be a float or a floating-point tensor of one element, "
                f"not a {temperature.dtype} tensor of shape {tuple(temperature.shape)}"
            )
        if temperature.device.type != "cpu":
            check_device("temperature", temperature, device)
        return temperature
    number = finite("temperature", temperature)
    if not number > 0:
        raise ValueError(f"temperature must be > 0, not {temperature}")
    return number


def check_generator(generator: Any) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, not {type(generator).__name__}")


def check_both_ids(
    ids: Any, negative_ids: Any, H: int | None, N: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Both as int64, contiguous; H: None without negatives. A pair of ids becomes (N, 2)."""
    ids = _check_ids("ids", ids, N, device, pairs=True)
    _check_ids("negative_ids", negative_ids, H or 0, device)
    if ids is None or negative_ids is None or H is None:
        if negative_ids is not None:
            raise ValueError("negative_ids needs both ids and negatives: it is compared with the anchors' ids")
        return None if ids is None else ids.long().contiguous(), None
    if torch.uint64 in (ids.dtype, negative_ids.dtype) and ids.dtype.is_signed != negative_ids.dtype.is_signed:
        raise TypeError(
            f"ids is {ids.dtype} and negative_ids is {negative_ids.dtype}, which no integer dtype holds both of; "
            "convert them to int64"
        )
    return ids.long().contiguous(), negative_ids.long().contiguous()


def _check_ids(name: str, ids: Any, count: int, device: torch.device, pairs: bool = False) -> Tensor | None:
    if ids is None:
        return None
    if pairs and isinstance(ids, (tuple, list)):
        if len(ids) != 2 or not all(isinstance(x, Tensor) for x in ids):
            wanted = f"an integer tensor ({count},) or a pair of them"
            raise TypeError(f"{name} must be {wanted}, not {type(ids).__name__} of {len(ids)}")
        for i, x in enumerate(ids):
            _check_ids(f"{name}[{i}]", x, count, device)
        return torch.stack([x.long() for x in ids], 1)
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be an integer tensor ({count},), not {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor ({count},), not {ids.dtype}")
    _check_dense(name, ids)
    if ids.shape != (count,) and not (pairs and ids.shape == (count, 2)):
        raise ValueError(f"{name} must have shape ({count},), one id a row, not {_shape(ids)}")
    check_device(name, ids, device)
    return ids


def check_transforms(given: Iterable[Any]) -> None:
    """NotImplementedError where a derivative or a batch dimension would be lost."""
    tensors = [x for x in given if isinstance(x, Tensor)]
    remedy = (
        "only reverse mode is supported, by loss.backward() or torch.autograd.grad, without a second derivative; "
        "backend='reference' (float64, the whole matrix) supports the others"
    )
    if torch._C._are_functorch_transforms_active():
        differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if differentiated or any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
            raise NotImplementedError(
                "gs_infonce does not support torch.func's transforms (grad, vjp, jvp, jacrev, jacfwd, hessian, "
                f"vmap): {remedy}"
            )
    elif any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):  # type: ignore[no-untyped-call]
        raise NotImplementedError(f"gs_infonce does not support forward-mode differentiation: {remedy}")


def check_guide(guide: Any, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    wanted = f"guide must be one matrix for each of the {len(tensors)} inputs, in their order"
    if isinstance(guide, Tensor) or not isinstance(guide, Sequence):
        raise TypeError(f"{wanted}, not {type(guide).__name__}")
    if len(guide) != len(tensors):
        raise ValueError(f"{wanted}, not {len(guide)}")
    for i, (x, rows) in enumerate(zip(guide, tensors, strict=True)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(
                f"guide[{i}] must be a floating-point tensor, not {getattr(x, 'dtype', type(x).__name__)}"
            )
        _check_dense(f"guide[{i}]", x)
        if x.ndim != 2 or x.shape[0] != rows.shape[0] or x.shape[1:] != guide[0].shape[1:]:
            raise ValueError(
                f"guide[{i}] must be a matrix of {rows.shape[0]} rows and guide[0]'s features, not {_shape(x)}"
            )
        check_device(f"guide[{i}]", x, tensors[0].device)
    rows, *columns = (x.detach() for x in guide)
    return rows, torch.cat(columns)


def check_device(name: str, x: Tensor, device: torch.device, others: str = "anchors") -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, but the {others} are on {device}; move it there")


def _check_dense(name: str, x: Tensor) -> None:
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, not a nested one; torch.cat its parts, or pad them")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, not one of layout {x.layout}; call its to_dense()")


def _shape(x: Tensor) -> str:
    return f"a tensor of shape {tuple(x.shape)}"
