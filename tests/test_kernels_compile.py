"""Calls of the public API compile for a GPU that is not here, and their kernels fit it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import disassembly
from compile_calls import buffers_of_pending_products

FOLDER = Path(__file__).parent
KERNELS = Path(__file__).parents[1] / "kernels" / "infonce"


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own: this one interprets kernels, and cannot compile them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(FOLDER / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)


def test_no_kernel_is_compiled_for_each_batch_size():
    done = script("count_variants.py")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_every_call_compiles_for_sm_90(record_property):
    """Nothing spills, all fits in shared memory, products use the matrix units and have the buffers they need.

    After the products of a tile without special entries, `exp_similarity` needs at most 600 instructions per warp,
    10 of them comparisons and selections, and 200 registers.
    """
    done = script("compile_calls.py", "--targets", "sm_90", "--calls", "everyday")
    table = done.stdout.partition("problem:")[0].rstrip()
    record_property("table", table)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert re.search(r"exp_similarity: \d+ instructions after a tile's products", table), table
    launched = set(re.findall(r"(\w+)_kernel\[\(", "".join(file.read_text() for file in KERNELS.glob("*.py"))))
    assert launched == set(re.findall(r"^sm_90 +([a-z]\w+)", table, re.MULTILINE))


PENDING_PRODUCTS = """
  scf.if %c {
    %b = ttg.local_alloc : () -> !ttg.memdesc<2x64x64xbf16, #shared, #smem, mutable>
    %e = ttg.local_alloc : () -> !ttg.memdesc<2x64x64xbf16, #shared, #smem, mutable>
    %r:2 = scf.for %i = %0 to %1 iter_args(%acc = %z, %k = %0) -> (tensor<64x64xf32, #mma>, i32) {
      %b_1 = ttg.memdesc_index %b[%k] : !ttg.memdesc<2x64x64xbf16, #shared> -> !ttg.memdesc<64x64xbf16, #shared>
      %e_2 = ttg.memdesc_index %e[%k] : !ttg.memdesc<2x64x64xbf16, #shared> -> !ttg.memdesc<64x64xbf16, #shared>
      %d = ttng.warp_group_dot %e_2, %b_1, %acc {inputPrecision = 0 : i32, isAsync = true} : some types
      %d_3:3 = ttng.warp_group_dot_wait %d, %e_2, %b_1 {pendings = 1 : i32} : some types
    }
    %last = ttng.warp_group_dot_wait %r#0 {pendings = 0 : i32} : tensor<64x64xf32, #mma>
  } else {
    %b = ttg.local_alloc : () -> !ttg.memdesc<2x64x64xbf16, #shared, #smem, mutable>
    %e = ttg.local_alloc : () -> !ttg.memdesc<1x64x64xbf16, #shared, #smem, mutable>
    %r:2 = scf.for %i = %0 to %1 iter_args(%acc = %z, %k = %0) -> (tensor<64x64xf32, #mma>, i32) {
      %b_1 = ttg.memdesc_index %b[%k] : !ttg.memdesc<2x64x64xbf16, #shared> -> !ttg.memdesc<64x64xbf16, #shared>
      %e_2 = ttg.memdesc_index %e[%0] : !ttg.memdesc<1x64x64xbf16, #shared> -> !ttg.memdesc<64x64xbf16, #shared>
      %t = ttg.memdesc_trans %e_2 {order = array<i32: 1, 0>} : !ttg.memdesc<64x64xbf16, #shared> -> another
      %d = ttng.warp_group_dot %t, %b_1, %acc {inputPrecision = 0 : i32, isAsync = true} : some types
      %d_3:3 = ttng.warp_group_dot_wait %d, %t, %b_1 {pendings = 1 : i32} : some types
    }
  }
"""


def test_a_missing_buffer_of_a_pending_product_is_seen():
    """The second product is what Triton makes of a tile that is transposed, multiplied and summed in one loop."""
    found = [buffers for _, _, buffers in buffers_of_pending_products(PENDING_PRODUCTS)]
    assert found == [(2, 2), (1, 2)]


LISTING = """
.text.kernel:
        /*0000*/                   S2R R0, SR_CTAID.X ;
        /*0010*/               @P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0020*/                   CS2R R24, SRZ ;
.L_x_2:
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0040*/              @!P1 BRA `(.L_x_2) ;
        /*0050*/                   FADD R24, R24, R1 ;
        /*0060*/               @P1 BRA P2, `(.L_x_3) ;
        /*0070*/                   ISETP.GE.AND P3, PT, R2, R3, PT ;
        /*0080*/                   FSEL R24, R24, -INF , !P3 ;
.L_x_3:
        /*0090*/                   MUFU.EX2 R24, R24 ;
        /*00a0*/{spill}
        /*00b0*/               @P4 BRA `(.L_x_1) ;
.L_x_9:
        /*00c0*/                   EXIT ;
"""


def test_the_shortest_way_after_the_products_passes_by_the_masks():
    listing = LISTING.format(spill="                   NOP ;")
    assert disassembly.epilogue(listing) == ["FADD", "BRA", "MUFU.EX2", "NOP", "BRA"]


def test_the_stack_is_seen_in_inner_loops_only():
    outside = LISTING.format(spill="                   STL [R1], R24 ;")
    assert not disassembly.uses_stack_in_inner_loop(outside)
    assert disassembly.uses_stack_in_inner_loop(outside.replace("HGMMA.64x256x16.F32.BF16 R24,", "LDL R24,"))
