"""Predicts the cost of the loss over many GPUs by a model: ``python -m experiments.scaling``.

Only the rate of one device is measured, and that is an argument. Every rank does the same at the same time, so
one rank's clock is simulated: its products, its link, and what waits for what. A link sends and receives at once;
a block's next hop leaves when the block has come. docs/scaling.md has the model in words.
"""

from __future__ import annotations

from dataclasses import dataclass

from simcse.errors import Parser, UserError, exit_cleanly

GPUS = (8, 32, 128, 512, 1024)
PAIRS = tuple(1 << p for p in (16, 18, 20, 22, 24))


@dataclass(frozen=True)
class Machine:
    rate: float = 780e12  # FLOP/s of one device in the loss
    node: int = 8  # devices that share the fast links
    inside: float = 450e9  # bytes/s each way of a device within its node
    between: float = 50e9  # bytes/s each way of a device to another node
    latency: float = 10e-6  # seconds per hop, launch included
    agree: float = 1e-3  # seconds for the metadata, on the CPU side

    def hop(self, W: int, size: float) -> float:
        """Seconds for every device to pass ``size`` bytes to the next: the slowest link sets the pace."""
        return self.latency + size / (self.inside if self.node >= W else self.between)


@dataclass(frozen=True)
class Case:
    W: int  # GPUs
    pairs: int  # N, of all
    D: int = 768
    itemsize: int = 2  # bytes of an element of the travelling rows

    @property
    def rows(self) -> float:
        return self.pairs / self.W

    @property
    def block(self) -> float:
        """Bytes of one rank's keys."""
        return self.rows * self.D * self.itemsize

    @property
    def sums(self) -> float:
        """Bytes of the fp32 sums for them."""
        return self.rows * self.D * 4

    @property
    def product(self) -> float:
        """FLOPs of one rank's rows times one rank's columns."""
        return 2 * self.rows * self.rows * self.D


def bytes_sent(case: Case, strategy: str) -> float:
    """Returns the bytes that one rank sends forward and backward, without what is one number per column."""
    if strategy == "gather":
        return (case.W - 1) * (case.block + case.sums)
    return (case.W - 1) * 2 * case.block + (case.W > 1) * case.W * case.sums


def memory(case: Case, strategy: str) -> float:
    """Returns the bytes that one rank holds beyond its own rows, gradients and workspace."""
    if strategy == "gather":
        return 2 * case.W * (case.block + case.sums)  # as they come, and in their place
    return 2 * case.block + 3 * case.sums  # held and coming; summed, leaving and coming


def seconds(case: Case, machine: Machine, strategy: str) -> float:
    """Returns the seconds of one call, forward and backward."""
    W, product = case.W, case.product / machine.rate
    if strategy == "gather":  # all rows, then one sweep, then all sums: nothing overlaps
        hops = (W - 1) * (machine.hop(W, case.block) + machine.hop(W, case.sums))
        return machine.agree + hops + 3 * W * product
    forward = _round(W, product, machine.hop(W, case.block), None)
    backward = _round(W, 3 * product, machine.hop(W, case.block), machine.hop(W, case.sums))
    return machine.agree + forward + backward


def _round(W: int, work: float, keys: float, sums: float | None) -> float:
    """Returns the seconds of a round of W steps.

    The next keys travel during a step, its sums after it, during the step that follows.
    """
    clock = link = landed = 0.0  # now; when the link is free; when the last sums have come
    for step in range(W):
        arrived = clock
        if step + 1 < W:
            arrived = link = max(link, clock) + keys
        clock += work
        if sums is not None and W > 1:
            clock = max(clock, landed)  # sums that came are added before they go on
            landed = link = max(link, clock) + sums
        clock = max(clock, arrived)
    return max(clock, landed)


def table(machine: Machine, D: int = 768) -> str:
    """Markdown: milliseconds of gather / ring, the faster one that fits in bold; and the memory of both."""
    lines = ["| pairs | " + " | ".join(f"{W} GPUs" for W in GPUS) + " |", "|---|" + "---|" * len(GPUS)]
    for pairs in PAIRS:
        cells = []
        for W in GPUS:
            case = Case(W, pairs, D)
            times = {s: seconds(case, machine, s) for s in ("gather", "ring")}
            fits = memory(case, "gather") <= 40e9
            best = min(times, key=times.__getitem__) if fits else "ring"
            shown = {s: _milliseconds(t) for s, t in times.items()}
            shown[best] = f"**{shown[best]}**"
            cells.append(f"{shown['gather'] if fits else '–'} / {shown['ring']}")
        lines.append(f"| {_count(pairs)} | " + " | ".join(cells) + " |")
    lines += ["", "| pairs | gather, GB a GPU | ring, GB on 8 GPUs | ring, on 1024 |", "|---|---|---|---|"]
    for pairs in PAIRS:
        sizes = (Case(8, pairs, D), "gather"), (Case(8, pairs, D), "ring"), (Case(1024, pairs, D), "ring")
        lines.append(f"| {_count(pairs)} | " + " | ".join(f"{memory(*s) / 1e9:.3g}" for s in sizes) + " |")
    return "\n".join(lines)


def _milliseconds(t: float) -> str:
    return f"{t * 1e3:,.3g}" if t < 1 else f"{t * 1e3:,.0f}"


def _count(pairs: int) -> str:
    return f"{pairs >> 20}M" if pairs >= 1 << 20 else f"{pairs >> 10}k"


def main(argv: list[str] | None = None) -> None:
    default = Machine()
    parser = Parser(prog="python -m experiments.scaling", description=__doc__)
    parser.add_argument(
        "--rate", type=float, default=default.rate / 1e12, help="TFLOP/s of one device (%(default)s)"
    )
    parser.add_argument("--inside", type=float, default=default.inside / 1e9, help="GB/s in a node (%(default)s)")
    parser.add_argument("--between", type=float, default=default.between / 1e9, help="GB/s between (%(default)s)")
    parser.add_argument("--latency", type=float, default=default.latency * 1e6, help="µs per hop (%(default)s)")
    parser.add_argument("--node", type=int, default=default.node, help="devices in a node (%(default)s)")
    parser.add_argument("--d", type=int, default=768, help="features (%(default)s)")
    with exit_cleanly("python -m experiments.scaling"):
        given = parser.parse_args(argv)
        for name in ("rate", "inside", "between", "node", "d"):
            if not getattr(given, name) > 0:
                raise UserError(f"--{name} must be positive, not {getattr(given, name)}")
        if not given.latency >= 0:
            raise UserError(f"--latency must be at least 0, not {given.latency}")
        rates = given.rate * 1e12, given.node, given.inside * 1e9, given.between * 1e9, given.latency * 1e-6
        print(table(Machine(*rates), given.d))


if __name__ == "__main__":
    main()
