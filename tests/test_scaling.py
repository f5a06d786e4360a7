"""The model of many GPUs: docs/scaling.md shows what it prints, and it does what it says."""

from pathlib import Path

import pytest

from experiments import scaling
from fused_infonce.distributed import GATHER_BYTES, choose_strategy

MACHINE = scaling.Machine()


def test_the_documents_table_is_what_the_script_prints(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scaling"])
    scaling.main()
    assert capsys.readouterr().out.strip() in Path(__file__).parents[1].joinpath("docs/scaling.md").read_text()


def test_one_gpu_pays_for_its_products_only():
    case = scaling.Case(W=1, pairs=1 << 16)
    products = 2 * case.pairs**2 * case.D / MACHINE.rate
    for strategy, count in (("gather", 3), ("ring", 4)):
        assert scaling.seconds(case, MACHINE, strategy) == pytest.approx(MACHINE.agree + count * products)
        assert scaling.bytes_sent(case, strategy) == 0


def test_a_ring_hides_its_traffic_behind_long_products_and_no_other():
    long, short = scaling.Case(W=64, pairs=64 << 16), scaling.Case(W=64, pairs=64 << 8)
    assert scaling.seconds(long, MACHINE, "ring") == pytest.approx(4 * 64 * long.product / MACHINE.rate, rel=0.02)
    link = scaling.bytes_sent(short, "ring") / MACHINE.between
    assert scaling.seconds(short, MACHINE, "ring") > link > 4 * 64 * short.product / MACHINE.rate


def test_the_model_and_the_library_count_the_same_memory():
    case = scaling.Case(W=8, pairs=1 << 18)
    fits = scaling.memory(case, "gather") <= GATHER_BYTES
    assert fits
    assert choose_strategy("auto", case.pairs, case.D, case.itemsize) == "gather"
    larger = scaling.Case(W=8, pairs=1 << 20)
    assert scaling.memory(larger, "gather") > GATHER_BYTES
    assert choose_strategy("auto", larger.pairs, larger.D, larger.itemsize) == "ring"
