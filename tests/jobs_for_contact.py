"""Jobs of first contact that fail in every way; ``bench.worker`` imports them by name."""

from __future__ import annotations

import os
import time

from bench.gate import Wrong


def fine(case, candidates, device, seconds):
    yield "result", {"status": "ok", "seconds": [1.0, 0.5]}


def silent(case, candidates, device, seconds):
    yield from ()


def raising(case, candidates, device, seconds):
    yield "result", {"status": "ok", "candidate": "the first part"}
    raise RuntimeError("this job raises")


def wrong(case, candidates, device, seconds):
    yield "alive", {}
    raise Wrong({"dq": 0.5, "dk": 0.1})


def crashing(case, candidates, device, seconds):
    yield "start", {"candidate": "the one that crashes"}
    os.abort()


def hanging(case, candidates, device, seconds):
    yield "alive", {}
    time.sleep(600)


def interrupted(case, candidates, device, seconds):
    yield "alive", {}
    raise KeyboardInterrupt
