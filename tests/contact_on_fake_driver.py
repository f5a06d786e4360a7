"""Compiles, without a GPU, what first contact launches for a small case.

    python tests/contact_on_fake_driver.py

Prints the results of the jobs ``warm`` and ``launchers.measure``, a line of JSON each, and the kernels compiled.
"""

from __future__ import annotations

import json

from fake_device import TARGETS, FakeDriver, install

from bench.candidates import load
from bench.cases import Case
from bench.contact import jobs, launchers


class Driver(FakeDriver):
    """Notes what is loaded."""

    def load_binary(self, name, binary, shared, device):
        loaded.append(name)
        return super().load_binary(name, binary, shared, device)


loaded: list[str] = []
target = next(target for target in TARGETS if target.name == "sm_90")
install(Driver(target), lambda a, b, out, add: None)
case, candidates = Case(2048, 64, dtype="bf16"), [load()["ours-triton"]]
for job, more in ((jobs.warm, {}), (launchers.measure, {"timed": False})):
    for event, facts in job(case, candidates, "cpu", 0.0, **more):
        if event == "result":
            print(json.dumps(facts))
print(json.dumps(sorted(set(loaded))))
