"""The compiled kernels are right when their PTX is executed, however late asynchronous operations take effect."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

from ptx.formats import PTXError
from ptx.instructions import decode
from ptx.machine import Launch, Mode
from ptx.memory import GlobalMemory
from ptx.program import Program

SCRIPT = Path(__file__).with_name("run_ptx.py")


ARCHITECTURES = ("sm_80", "sm_90")


def script(*arguments: str) -> str:
    """Output of processes of their own, one per architecture: this one cannot compile what it interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_calls_are_right_when_their_ptx_is_executed():
    output = script("--calls", "everyday")
    folder = SCRIPT.parents[1] / "kernels" / "infonce"
    launched = set(re.findall(r"(\w+_kernel)\[\(", "".join(file.read_text() for file in folder.glob("*.py"))))
    for architecture in ARCHITECTURES:
        executed = re.search(rf"^{architecture} kernels executed: (.*)$", output, re.MULTILINE)[1]
        assert set(executed.split(", ")) == launched


def test_most_faults_in_the_ptx_are_noticed():
    """Each kind somewhere, barriers, waits and masks among them, and half of all."""
    output = script("--faults", "1")
    kinds = ["a barrier is missing", "copies are not waited for", "a load has no mask", "a store has no mask"]
    for architecture in ARCHITECTURES:
        of_hopper = ["products are not waited for", "an mbarrier is not waited for"] * (architecture == "sm_90")
        for kind in kinds + of_hopper:
            assert f"{architecture} {kind}: " in output, kind


# ---------------------------------------------------------------------- the interpreter itself


def run(body: str, mode: Mode, content: np.ndarray, threads: int = 64, shared: int = 512) -> np.ndarray:
    """What a kernel with one pointer leaves in memory."""
    text = f"""
    .visible .entry kernel(.param .u64 kernel_param_0)
    .reqntid {threads}
    {{
        .reg .pred %p<8>;
        .reg .b32 %r<32>;
        .reg .b64 %rd<16>;
        ld.param.b64 %rd0, [kernel_param_0];
        mov.u32 %r0, %tid.x;
        mul.wide.u32 %rd1, %r0, 4;
        add.s64 %rd2, %rd0, %rd1;
        shl.b32 %r1, %r0, 2;
        {body}
        ret;
    }}
    """
    found = content.copy()
    memory = GlobalMemory({1 << 20: found.view(np.uint8)})
    Launch(decode(Program(text)), (1, 1, 1), threads, shared, (memory.address(1 << 20),)).run(memory, mode)
    memory.copy_back()
    return found


NUMBERS = np.arange(1, 65, dtype=np.uint32)
REVERSE = """
    ld.global.b32 %r2, [%rd2];
    st.shared.b32 [%r1], %r2;
    {barrier}
    sub.s32 %r3, 252, %r1;
    ld.shared.b32 %r4, [%r3];
    {second}
    st.global.b32 [%rd2], %r4;
"""
SCHEDULES = [Mode("early", "random", seed) for seed in range(8)]


def test_a_missing_barrier_shows_in_a_random_order():
    barriers = {"barrier": "bar.sync 0;", "second": "bar.sync 0;"}
    assert all((run(REVERSE.format(**barriers), mode, NUMBERS) == NUMBERS[::-1]).all() for mode in SCHEDULES)
    broken = REVERSE.format(barrier="", second="")
    assert any((run(broken, mode, NUMBERS) != NUMBERS[::-1]).any() for mode in SCHEDULES)


COPY = """
    cp.async.ca.shared.global [%r1 + 0], [%rd2 + 0], 0x4, 0x4;
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %r2, [%r1];
    add.s32 %r2, %r2, 1;
    st.global.b32 [%rd2], %r2;
"""


def test_a_copy_that_is_not_waited_for_shows_when_it_is_late():
    right = COPY.format(wait="cp.async.wait_group 0;")
    for mode in (Mode("early"), Mode("late"), Mode("random")):
        assert (run(right, mode, NUMBERS) == NUMBERS + 1).all()
    wrong = COPY.format(wait="cp.async.wait_group 1;")
    assert (run(wrong, Mode("early"), NUMBERS) == NUMBERS + 1).all()
    assert (run(wrong, Mode("late"), NUMBERS) != NUMBERS + 1).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.b32 [%rd2 + 4], %r0;", "outside of every tensor"),
        ("st.global.b32 [%rd2 + 2], %r0;", "outside of every tensor|misaligned"),
        ("st.global.b32 [%rd0 + 2], %r0;", "misaligned"),
        ("st.shared.b32 [%r1 + 512], %r0;", "shared access outside"),
        ("setp.lt.s32 %p0, %r0, 5;\n@%p0 shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;", "some lanes of a warp"),
        ("setp.lt.s32 %p0, %r0, 32;\n@%p0 bra $L;\nbar.sync 0;\n$L:", "deadlocked"),
        ("frobnicate.b32 %r2, %r0;", "unknown instruction"),
        ("$L: bra $L;", "does not end"),
    ],
)
def test_what_ptx_forbids_is_an_error(body, message):
    with pytest.raises(PTXError, match=message):
        run(body, Mode("early"), NUMBERS)


@pytest.mark.parametrize(
    ("instruction", "exact"),
    [
        ("mul.hi.u32 %r3, %r2, 0xD2511F53;", lambda x: x * 0xD2511F53 >> 32),
        ("shf.l.wrap.b32 %r3, %r2, %r2, 7;", lambda x: ((x << 32 | x) << 7 >> 32) & 0xFFFFFFFF),
        ("prmt.b32 %r3, %r2, 0, 0x0123U;", lambda x: int.from_bytes(x.to_bytes(4, "little"), "big")),
        ("bfe.u32 %r3, %r2, 3, 5;", lambda x: x >> 3 & 31),
        ("bfe.s32 %r3, %r2, 28, 4;", lambda x: ((x >> 28) - 16 if x >> 31 else x >> 28) & 0xFFFFFFFF),
        ("shr.s32 %r3, %r2, 40;", lambda x: 0xFFFFFFFF if x >> 31 else 0),
        ("div.s32 %r3, %r2, -3;", lambda x: (abs(x - (x >> 31 << 32)) // 3 * (1 if x >> 31 else -1)) & 0xFFFFFFFF),
        ("rem.s32 %r3, %r2, 7;", lambda x: (abs(x - (x >> 31 << 32)) % 7 * (-1 if x >> 31 else 1)) & 0xFFFFFFFF),
        ("mad.lo.s32 %r3, %r2, 5, 9;", lambda x: (5 * x + 9) & 0xFFFFFFFF),
    ],
)
def test_arithmetic_is_that_of_whole_numbers(instruction, exact):
    values = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)
    assert elementwise(instruction, values).tolist() == [exact(int(x)) for x in values]


def elementwise(instruction: str, values: np.ndarray) -> np.ndarray:
    """%r3 of each lane, whose number is in %r2."""
    return run(f"ld.global.b32 %r2, [%rd2];\n{instruction}\nst.global.b32 [%rd2], %r3;", Mode("early"), values)


def test_bf16_is_rounded_to_nearest_with_ties_to_even():
    numbers = {0x3F818000: 0x3F82, 0x3F808000: 0x3F80, 0x3F808001: 0x3F81, 0x7F7FFFFF: 0x7F80, 0x7F800001: 0x7FFF}
    values = np.resize(np.array(list(numbers), np.uint32), 64)
    found = elementwise("cvt.rn.bf16x2.f32 %r3, 0f3F800000, %r2;", values)
    assert found.tolist() == [0x3F800000 | numbers[int(x)] for x in values]
