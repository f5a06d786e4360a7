"""Candidates that a benchmark must survive; given to it with --also."""

import os
import time

import torch

from bench.cases import TEMPERATURE
from bench.registry import candidate
from fused_infonce.testing import naive


@candidate("wrong-loss")
def _wrong_loss(case):
    return lambda batch: 1.01 * naive(batch.q, batch.k).detach() + naive(batch.q, batch.k) * 0


@candidate("wrong-gradient")
def _wrong_gradient(case):
    """The right value, and gradients of the anchors alone."""
    return lambda batch: naive(batch.q, batch.k.detach()) + 0 * batch.k.sum()


@candidate("no-gradient")
def _no_gradient(case):
    return lambda batch: naive(batch.q, batch.k.detach())


@candidate("nan")
def _nan(case):
    return lambda batch: naive(batch.q, batch.k) * torch.nan


@candidate("raising")
def _raising(case):
    def loss(batch):
        raise RuntimeError("this one raises")

    return loss


@candidate("crashing")
def _crashing(case):
    """From 24 anchors on."""
    return lambda batch: os.abort() if len(batch.q) >= 24 else naive(batch.q, batch.k)


@candidate("greedy")
def _greedy(case):
    return lambda batch: torch.empty(2**50).sum()


@candidate("not-here", package="no-such-package")
def _not_here(case):
    import no_such_module  # noqa: F401


@candidate("hanging")
def _hanging(case):
    """From 24 anchors on."""

    def loss(batch):
        if len(batch.q) >= 24:
            time.sleep(1000)
        return naive(batch.q, batch.k, TEMPERATURE)

    return loss
