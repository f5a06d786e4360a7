"""Calls of the public API compile for a GPU that is not here, and their kernels fit it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from compile_calls import buffers_of_pending_products

SCRIPT = Path(__file__).with_name("compile_calls.py")
KERNELS = Path(__file__).parents[1] / "kernels" / "infonce"


def test_every_call_compiles_for_sm_90(record_property):
    """Nothing spills, all fits in shared memory, products use the matrix units and have the buffers they need."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--targets", "sm_90", "--calls", "everyday"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    table = done.stdout.partition("problem:")[0].rstrip()
    record_property("table", table)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
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
