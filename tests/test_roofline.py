"""``python -m bench roofline``: launches of a real call, their instructions, the arithmetic of predicted times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

import disassembly
from fake_device import TARGETS
from test_kernels_compile import LISTING

from bench import cli
from bench.cases import Case
from bench.roofline import command, model

ROOT = Path(__file__).parents[1]
# Ten multiprocessors of 1 GHz; the memory's rate that is reached is 1 GB/s.
GPU = model.GPU("made up", "sm_90", 10, 1e13, 1000, 8 << 30, 1e9 / model.MEMORY_SHARE, 100 << 10)
KERNEL = {
    "phase": "similarity.exp_similarity", "flops": 10**6, "bytes": 5 * 10**6, "programs": 10,
    "block": [64, 128, 32], "tiles": [[25, 4]], "step": 100, "rest": 600, "exponentials": 32,
    "warps": 8, "registers": 64, "shared": 60 << 10,
}  # fmt: skip
ROWS = {"phase": "rows.close_rows", "flops": 0, "bytes": 100, "programs": 7, "block": None, "tiles": [[7, 0]],
        "step": 0, "rest": 1000, "exponentials": 0, "warps": 4, "registers": 32, "shared": 0}  # fmt: skip
LIBRARY = {"phase": "products.grad_products", "flops": 2 * 256 * 100 * 512, "bytes": 1000,
           "library": {"M": 256, "K": 100, "D": 512}}  # fmt: skip
TORCH = {"phase": "torch", "flops": 0, "bytes": 2 * 10**6, "operation": "aten.add.Tensor"}


# ------------------------------------------------------------------ instructions


def test_a_tile_is_steps_of_products_and_the_shortest_way_around_them():
    step, rest = disassembly.instructions(LISTING.format(spill="                   NOP ;"))
    assert step == ["HGMMA.64x256x16.F32.BF16", "BRA"]
    assert rest == ["CS2R", "FADD", "BRA", "MUFU.EX2", "NOP", "BRA"]


def test_a_kernel_without_products_counts_each_instruction_once_and_no_function():
    listing = LISTING.replace("HGMMA.64x256x16.F32.BF16", "FFMA").format(spill="                   NOP ;")
    called = "\n.L_x_30:\n        /*0100*/                   FMUL R0, R0, R1 ;\n"
    step, rest = disassembly.instructions(listing + called)
    assert step == []
    assert sorted(rest) == sorted(
        [
            "S2R",
            "BRA",
            "CS2R",
            "FFMA",
            "BRA",
            "FADD",
            "BRA",
            "ISETP.GE.AND",
            "FSEL",
            "MUFU.EX2",
            "NOP",
            "BRA",
            "EXIT",
        ]
    )


@pytest.fixture(scope="module")
def launches():
    case = Case(1024, 768, dtype="bf16")
    ((_, found),) = command.launches("h100", [case])
    return found


def test_the_launches_are_those_of_a_call(launches):
    N, D = 1024, 768
    by_phase = {launch["phase"]: launch for launch in launches}
    assert list(by_phase) == [
        "normalise.normalise_pairs", "similarity.exp_similarity", "rows.close_rows", "products.grad_products",
        "torch", "normalise.normalise_backward",
    ]  # fmt: skip
    similarity, products = by_phase["similarity.exp_similarity"], by_phase["products.grad_products"]
    assert (similarity["flops"], products["flops"]) == (2 * N * N * D, 4 * N * N * D)
    assert similarity["tiles"] == [[(N // 64) ** 2, D // 64]]
    assert products["tiles"] == [[N // 64 * D // 64, N // 64]] * 2
    # Operands and E in bf16, partial sums and the rows' shifts in fp32.
    assert similarity["bytes"] == 2 * (2 * N * D + N * N) + 4 * (N * N // 64 + N)
    # Both rows in fp32 and their copies in bf16, two centres, five vectors.
    assert by_phase["normalise.normalise_pairs"]["bytes"] == 2 * N * D * (4 + 2) + 4 * (2 * D + 5 * N)


def test_instructions_are_counted_in_the_compiled_code(launches):
    found = next(launch for launch in launches if launch["phase"] == "similarity.exp_similarity")
    entries = 64 * 64 // (found["warps"] * 32)  # of a thread
    assert found["exponentials"] == entries
    assert found["rest"] > 4 * entries  # an addition, an exponential, a sum and a rounding each
    assert 4 < found["step"] < found["rest"]
    assert all(0 < launch["registers"] <= 255 for launch in launches if "tiles" in launch)


def test_a_gpu_is_as_large_as_the_device_that_takes_its_place():
    targets = {target.name: target for target in TARGETS}
    for gpu in model.GPUS.values():
        target = targets[gpu.target]
        assert gpu.multiprocessors == target.multiprocessors
        assert gpu.shared == target.shared_memory + model.RESERVED_SHARED
        assert 1.3e9 < gpu.clock < 2e9


# ------------------------------------------------------------------ times


def test_one_program_multiplies_and_then_finishes_its_tile():
    """25 tiles on 10 multiprocessors take 3 rounds of 4 steps and the rest."""
    products = 2 * 64 * 128 * 32 / (1000 * model.KERNEL_SHARE)  # 524 clocks/share; instructions take 200
    tile = 4 * products + 1200 + model.FILL  # 600 · 8 / 4 instructions; exponentials take 32 · 8 · 32 / 16 = 512
    spent, limit = model.tiled_seconds(KERNEL, GPU)
    assert spent == pytest.approx(3 * tile / 1e9)
    assert limit == "products, then instructions"
    # 5 MB at 1 GB/s take longer.
    assert model.seconds(KERNEL, GPU) == (pytest.approx(5e-3), "memory")


def test_several_programs_overlap_up_to_the_longest_limit():
    both = KERNEL | {"programs": 30, "shared": 20 << 10, "bytes": 0}
    assert model.resident(both, GPU) == 3
    products = 4 * 2 * 64 * 128 * 32 / (1000 * model.KERNEL_SHARE)
    assert model.seconds(both, GPU) == (pytest.approx(3 * products / 1e9), "products")
    slow = both | {"step": 1000}  # 4 · 1000 · 8 / 4 + 1200 clocks
    assert model.seconds(slow, GPU) == (pytest.approx(3 * 9200 / 1e9), "instructions")
    exponential = both | {"exponentials": 640}  # 640 · 8 · 32 / 16 clocks
    assert model.seconds(exponential, GPU) == (pytest.approx(3 * 10240 / 1e9), "exponentials")


@pytest.mark.parametrize(
    ("changed", "programs"),
    [({}, 1), ({"shared": 20 << 10}, 4), ({"shared": 0, "registers": 128}, 2), ({"shared": 0, "warps": 32}, 1)],
)
def test_programs_of_a_multiprocessor_share_its_memory_registers_and_threads(changed, programs):
    assert model.resident(KERNEL | {"programs": 40} | changed, GPU) == programs


def test_a_product_of_the_library_takes_whole_rounds_of_tiles():
    tile = 2 * 128 * 256 * 100 / (1e12 * model.LIBRARY_SHARE)
    # 2 · 2 tiles of 128 × 256 on 10 multiprocessors: one round of halves of them. 11 · 2: 5 rounds.
    assert model.library_seconds(LIBRARY["library"], GPU) == pytest.approx(tile / 2)
    assert model.library_seconds({"M": 1400, "K": 100, "D": 512}, GPU) == pytest.approx(2.5 * tile)


def test_phases_add_their_launches_and_a_gap_each():
    found = {phase.phase: phase for phase in model.phases([KERNEL, ROWS, LIBRARY, TORCH, TORCH, KERNEL], GPU)}
    assert list(found) == ["similarity.exp_similarity", "rows.close_rows", "products.grad_products", "torch"]
    similarity, rows, library, torch = found.values()
    assert similarity.predicted_ms == pytest.approx(2 * (5 + 1e3 * model.GAP))
    assert (similarity.launches, similarity.flops, similarity.bytes) == (2, 2 * 10**6, 10**7)
    assert similarity.instructions == 2 * 25 * 8 * (4 * 100 + 600)
    assert (similarity.per_tile, rows.per_tile) == ("4 × 100 + 600", "1000")
    assert rows.instructions == 7 * 4 * 1000
    assert rows.predicted_ms == pytest.approx(1e3 * (28000 / 4 / 10 / 1e9 + model.GAP))
    assert (library.instructions, torch.instructions) == (None, None)
    assert torch.predicted_ms == pytest.approx(2 * (2 + 1e3 * model.GAP))


def test_the_floor_is_bare_products_at_their_rate_or_that_of_memory():
    h100 = model.GPUS["h100"]
    N, D = 32768, 768
    assert model.floor_ms(3 * 2 * N * N * D, N, N, D, h100) == pytest.approx(6 * N * N * D / 780e12 * 1e3)
    narrow = 2 * (N * N + 2 * N * 8) / (h100.memory_rate * model.MEMORY_SHARE)
    assert model.floor_ms(2 * N * N * 8, N, N, 8, h100) == pytest.approx(narrow * 1e3)


# ------------------------------------------------------------------ the command


@pytest.fixture
def made_up(monkeypatch):
    """Launches that nothing was compiled for."""
    monkeypatch.setattr(
        command, "launches", lambda gpu, cases: [(case, [KERNEL, LIBRARY, TORCH]) for case in cases]
    )


def test_it_prints_json_with_everything_that_the_predictions_rest_on(made_up, capsys, tmp_path):
    arguments = [
        "roofline",
        "--gpu",
        "a100",
        "h200",
        "--n",
        "4096",
        "--m",
        "8192",
        "--mode",
        "symmetric",
        "forward",
    ]
    cli.main([*arguments, "--json", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "roofline.json").read_text(encoding="utf-8")
    found = json.loads(printed)
    assert found["command"] == f"python -m bench {' '.join(arguments)} --json --out {tmp_path / 'out'}"
    assert list(found["assumptions"]) == ["a100", "h200"]
    assert found["assumptions"]["a100"]["clock"] == pytest.approx(1.41e9, rel=1e-3)
    assert [(one["gpu"], one["case"]["mode"]) for one in found["predictions"]] == [
        ("a100", "symmetric"), ("a100", "forward"), ("h200", "symmetric"), ("h200", "forward"),
    ]  # fmt: skip
    one = found["predictions"][0]
    assert (one["case"]["negatives"], one["floor_products"]) == (4096, 4)
    assert one["predicted_ms"] == pytest.approx(sum(phase["predicted_ms"] for phase in one["phases"]), rel=1e-3)


def test_it_says_predicted_and_leaves_the_measurement_open(made_up, capsys, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- roofline: begin (x) -->\nold\n<!-- roofline: end -->\nafter\n", encoding="utf-8")
    cli.main(["roofline", "--mode", "one-way", "--page", str(page)])
    printed = capsys.readouterr().out
    assert page.read_text(encoding="utf-8") == (
        f"before\n<!-- roofline: begin (x) -->\n{printed}<!-- roofline: end -->\nafter\n"
    )
    title, _, header, _, *lines = printed.splitlines()
    assert title.endswith("predicted**")
    assert header.endswith("| predicted, ms | measured, ms |")
    assert all(line.endswith("|  |") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--n", "1"], "--n must be at least 2, not 1"),
        (["--d", "0"], "--d must be at least 1, not 0"),
        (
            ["--n", "64", "--m", "63"],
            "--m must be at least the 64 of --n, for every anchor has its positive, not 63",
        ),
        (["--gpu", "h1"], "invalid choice: 'h1'"),
        (["--dtype", "fp32"], "invalid choice: 'fp32'"),
        (["--mode", "gte"], "invalid choice: 'gte'"),
        (["--out", __file__], "--out must name a folder"),
        (["--page", __file__], "must be a file with one block between the lines '<!-- roofline: begin"),
        (["--page", "missing.md"], "must be a file with one block"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments, says, capsys, monkeypatch):
    monkeypatch.setattr(command, "launches", lambda *_: pytest.fail("it compiles before it has checked"))
    with pytest.raises(SystemExit) as end:
        cli.main(["roofline", *arguments])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert says in said
    assert len(said.splitlines()) == 1


def test_products_without_matrix_units_are_refused(monkeypatch, capsys):
    class Done:
        returncode, stderr = 0, ""
        stdout = json.dumps([[KERNEL | {"step": 0}]])

    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: Done)
    with pytest.raises(SystemExit):
        cli.main(["roofline", "--n", "64", "--mode", "one-way"])
    assert "bf16 one-way N=64 D=768 is too small" in capsys.readouterr().err


def test_a_failure_to_compile_names_the_call_and_the_reason(monkeypatch, capsys):
    class Done:
        returncode, stdout, stderr = 1, "", "Traceback\nOutOfResources: shared memory\n"

    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: Done)
    with pytest.raises(SystemExit):
        cli.main(["roofline", "--mode", "one-way"])
    said = capsys.readouterr().err
    assert (
        "kernels of bf16 one-way N=32768 D=768 cannot be compiled for H100: OutOfResources: shared memory" in said
    )


def test_the_tables_of_the_tuning_page_are_those_of_the_committed_predictions():
    found = json.loads((ROOT / "bench" / "results" / "roofline.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    assert command.filled(page, found) == page, f"write it anew: {found['command']}"
    assert f"({found['command']})" in page
