"""Shows the asymptotic split of InfoNCE, the spectra of two encoders and the share of noise.

``python -m experiments.theory`` prints three tables and writes a figure; docs/theory.md explains them. The curves
are those of pairs at one cosine whose sides are uniform on the sphere, where the limit is known in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_infonce import asymptotic_terms, info_nce
from fused_infonce.noise import log_mean_exp_cosine
from simcse.errors import Parser, UserError, exit_cleanly

PICTURE = "theory.png"
SIZES = tuple(1 << p for p in range(4, 15))  # 16 to 16,384
MODELS = ("minilm:cls_before_pooler", "minilm:avg")
SHARES_TAU = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SHARES_COSINE = (0.5, 0.7, 0.9)
COLOURS = ("#1f3b73", "#d62728", "#2ca02c")


@dataclass(frozen=True)
class Sphere:
    """Pairs at one cosine, both sides uniform on the sphere in R^D."""

    D: int = 32
    tau: float = 0.1
    cosine: float = 0.8

    @property
    def limit(self) -> float:
        """InfoNCE − log N as N grows: −cos/τ + log c_D(1/τ)."""
        return log_mean_exp_cosine(1 / self.tau, self.D)[0] - self.cosine / self.tau  # type: ignore[return-value]

    def pairs(self, N: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        source = torch.Generator().manual_seed(seed)
        q, z = (F.normalize(torch.randn(N, self.D, generator=source, dtype=torch.float64)) for _ in "qz")
        side = F.normalize(z - q * (q * z).sum(1, keepdim=True))
        return q, self.cosine * q + math.sqrt(1 - self.cosine**2) * side


@dataclass(frozen=True)
class Curve:
    """The three curves at one N, in nats."""

    N: int
    loss: float  # InfoNCE − log N
    terms: float  # alignment + uniformity
    bound: float  # alignment + Jensen's bound of uniformity


def curves(sphere: Sphere, sizes: Sequence[int] = SIZES) -> list[Curve]:
    """Returns the curves over N; smaller batches are the first rows of larger ones."""
    anchors, positives = sphere.pairs(max(sizes))
    found = []
    for N in sizes:
        q, k = anchors[:N].float(), positives[:N].float()
        loss = float(info_nce(q, k, temperature=sphere.tau)) - math.log(N)
        terms = {name: float(value) for name, value in asymptotic_terms(q, k, sphere.tau).items()}
        alignment = terms["alignment"]
        found.append(Curve(N, loss, alignment + terms["uniformity"], alignment + terms["bound"]))
    return found


@dataclass(frozen=True)
class Spectrum:
    label: str
    shares: list[float]  # of each singular value of the unit rows in their sum, largest first
    figures: dict[str, float]


def spectrum(spec: str, sts_data: str | None) -> Spectrum:
    """Returns the spectrum of the vectors that an encoder, NAME or NAME:POOLER, gives the watched sentences."""
    from simcse.collator import packaged_file
    from simcse.encoder import PoolerType
    from simcse.model import load_encoder
    from simcse.sts import cone, encode, read_sts_source, watched_pairs

    name, _, pooler = spec.rpartition(":")
    if pooler not in get_args(PoolerType):
        name, pooler = spec, ""
    tasks = read_sts_source(sts_data or packaged_file("sts.tsv"))
    pairs = watched_pairs(tasks) or tasks[0]
    encoder, tokenizer = load_encoder(name, cast(PoolerType, pooler) if pooler else None)
    vectors = encode(encoder, tokenizer, pairs.sentences)
    rows = torch.stack([vectors[sentence] for sentence in pairs.sentences]).double()
    values = torch.linalg.svdvals(F.normalize(rows))
    return Spectrum(f"{name}, {encoder.pooler_type}", (values / values.sum()).tolist(), cone(pairs, vectors))


def noise_share(tau: float, cosine: float, D: int = 768, num_noise: int = 192, noise_weight: float = 1.0) -> float:
    """Returns the largest share that expected noise can have in an anchor's denominator.

    T / (1 + T) with T = λ M c_D(κ) e^(−κ s_ii): further columns only make it smaller.
    """
    log_c = cast(float, log_mean_exp_cosine(1 / tau, D)[0])
    return 1 / (1 + math.exp(cosine / tau - math.log(noise_weight * num_noise) - log_c))


def noise_table() -> str:
    """Markdown: log c_D(1/τ), and the largest share of noise for several cosines of the pair."""
    lines = [
        "| τ | log c_D(1/τ) | " + " | ".join(f"pair at cosine {cosine}" for cosine in SHARES_COSINE) + " |",
        "|---" * (2 + len(SHARES_COSINE)) + "|",
    ]
    for tau in SHARES_TAU:
        log_c = log_mean_exp_cosine(1 / tau, 768)[0]
        shares = " | ".join(f"{noise_share(tau, cosine):.2g}" for cosine in SHARES_COSINE)
        lines.append(f"| {tau} | {log_c:.4f} | {shares} |")
    return "\n".join(lines)


def curve_table(found: list[Curve], limit: float) -> str:
    lines = ["| N | InfoNCE − log N | sum of the terms | with Jensen's bound |", "|---|---|---|---|"]
    lines += [f"| {c.N:,} | {c.loss:.4f} | {c.terms:.4f} | {c.bound:.4f} |" for c in found]
    return "\n".join([*lines, f"| ∞ | {limit:.4f} | {limit:.4f} | |"])


def spectrum_table(found: list[Spectrum]) -> str:
    names = list(found[0].figures)
    lines = ["| encoder | " + " | ".join(name.replace("_", " ") for name in names) + " |"]
    lines.append("|---" * (1 + len(names)) + "|")
    for one in found:
        lines.append(f"| {one.label} | " + " | ".join(f"{one.figures[name]:.4g}" for name in names) + " |")
    return "\n".join(lines)


def draw(sphere: Sphere, found: list[Curve], spectra: list[Spectrum], path: Path) -> None:
    """Writes the figure: the curves over N, and the spectra."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from simcse.files import replaced

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    sizes = [c.N for c in found]
    for values, label, colour in (
        ([c.loss for c in found], "InfoNCE − log N", COLOURS[0]),
        ([c.terms for c in found], "alignment + uniformity terms", COLOURS[1]),
        ([c.bound for c in found], "alignment term + Jensen's bound", COLOURS[2]),
    ):
        left.plot(sizes, values, "o-", color=colour, label=label, linewidth=1.8, markersize=4)
    left.axhline(sphere.limit, color="0.4", linestyle="--", linewidth=1.2, label="limit, in closed form")
    left.set_xscale("log", base=2)
    left.set_xlabel("N, pairs in the batch")
    left.set_ylabel("nats")
    left.set_title(f"Pairs at cosine {sphere.cosine} on the sphere, D = {sphere.D}, τ = {sphere.tau}")
    left.legend(frameon=False)
    for one, colour in zip(spectra, COLOURS, strict=False):
        rank = f"effective rank {one.figures['effective_rank']:.0f}"
        label = f"{one.label}: {rank}, mean cosine {one.figures['mean_cosine']:.2f}"
        right.plot(
            range(1, len(one.shares) + 1), one.shares, ".-", color=colour, label=label, linewidth=1.2, markersize=4
        )
    longest = max(len(one.shares) for one in spectra)
    right.axhline(1 / longest, color="0.4", linestyle="--", linewidth=1.2, label="flat: all equal")
    right.set_xscale("log")  # the cone is in the first value or two
    right.set_yscale("log")
    right.set_ylim(0.02 / longest, 2 * max(one.shares[0] for one in spectra))
    right.set_xlabel("index of the singular value")
    right.set_ylabel("share in the sum of all")
    right.set_title("Singular values of the unit sentence vectors")
    right.legend(frameon=False, loc="lower left", fontsize="small")
    for axes in (left, right):
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    with replaced(path) as unfinished:
        figure.savefig(unfinished, dpi=100, format="png")


def _parser() -> Parser:
    parser = Parser(prog="python -m experiments.theory", description=__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(MODELS),
        metavar="NAME[:POOLER]",
        help="one to three encoders whose spectra are drawn, as before and after a training: folders or names, as "
        "simcse.evaluate takes them (default: %(default)s)",
    )
    parser.add_argument("--sts_data", help="graded pairs, as simcse.evaluate takes them (default: the package's)")
    parser.add_argument("--out", default="runs/theory", help=f"folder for {PICTURE} (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    with exit_cleanly(parser.prog):
        args = parser.parse_args(argv)
        from transformers.utils import logging

        from simcse.files import output_file, output_folder

        logging.disable_progress_bar()
        if len(args.models) > len(COLOURS):
            raise UserError(f"--models takes up to {len(COLOURS)} encoders, not {len(args.models)}")
        folder = output_folder("--out", args.out)
        if folder.is_dir():
            output_file("--out", str(folder / PICTURE))
        spectra = [spectrum(spec, args.sts_data) for spec in args.models]
        sphere = Sphere()
        found = curves(sphere)
        folder.mkdir(parents=True, exist_ok=True)
        draw(sphere, found, spectra, folder / PICTURE)
        print(curve_table(found, sphere.limit), spectrum_table(spectra), noise_table(), sep="\n\n")
        print(f"\nfigure  {folder / PICTURE}")


if __name__ == "__main__":
    main()
