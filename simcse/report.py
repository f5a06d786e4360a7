"""What a run prints: a line for each log entry, and the closing table."""

from typing import Any

# metric → title, format, the better direction
METRICS = {
    "spearman": ("Spearman × 100", ".2f", "higher"),
    "alignment": ("alignment", ".4f", "lower"),
    "uniformity": ("uniformity", ".4f", "lower"),
}


def anisotropy_line(name: str, figures: dict[str, float], features: int) -> str:
    """Figures of ``fused_infonce.anisotropy`` for the sentences of the pairs ``name``, as text."""
    return (
        f"{name}: mean cosine {figures['mean_cosine']:.4f}, share of the largest singular value "
        f"{figures['top_singular_share']:.4f} (lower is better), effective rank "
        f"{figures['effective_rank']:.1f} in {features} features (higher is better)"
    )


def evaluations(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trainer's log → one dict for each evaluation: ``step`` and those of ``METRICS`` that were measured."""
    points = []
    for entry in log_history:
        point = {
            metric: value
            for metric in METRICS
            for key, value in entry.items()
            if key.startswith("eval_") and key.endswith(metric)
        }
        if point:
            points.append({"step": entry["step"], **point})
    return points


def log_line(logs: dict[str, Any], step: int, max_steps: int) -> str:
    """One log entry of Trainer as a line of text."""
    if "train_runtime" in logs:
        return (
            f"{step} steps in {logs['train_runtime']:.1f} s, "
            f"{logs['train_samples_per_second']:.1f} sentences a second, mean loss {logs['train_loss']:.4f}"
        )
    cells = [f"step {step:>{len(str(max_steps))}}/{max_steps}"]
    for key, value in logs.items():
        name = key.removeprefix("eval_").removesuffix("_spearman")
        if key.endswith("_spearman"):
            cells.append(f"{name} Spearman {value:6.2f}")
        elif key.startswith("eval_"):
            cells.append(f"{name} {value:7.4f}")
        elif key in (
            "loss",
            "grad_norm",
            "mlm_loss",
            "temperature",
            "accuracy",
            "positive_cosine",
            "negative_cosine",
        ):
            cells.append(f"{name.replace('_', ' ')} {value:.4f}")
        elif key == "noise_share":
            cells.append(f"noise share {value:.1e}")
        elif key == "learning_rate":
            cells.append(f"learning rate {value:.2e}")
    return "   ".join(cells)


def training_card(about: str, points: list[dict[str, Any]], state: Any) -> str:
    """``about`` a run, and its scores before and after, in Markdown: for the model card."""
    if len(points) < 2:
        return about
    best = next((point for point in points if point["step"] == state.best_global_step), points[-1])
    lines = [f"| watched pairs | step {points[0]['step']} | step {best['step']} |", "|---|---|---|"]
    for metric, (name, form, _) in METRICS.items():
        if metric in points[0] and metric in best:
            lines.append(f"| {name} | {points[0][metric]:{form}} | {best[metric]:{form}} |")
    return about + "\n" + "\n".join(lines) + "\n"


def closing_table(title: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """Before → after for each metric, and which way is better."""
    rows = [(title, f"step {before['step']}", f"step {after['step']}", "change", "better")]
    for metric, (name, form, better) in METRICS.items():
        if metric in before and metric in after:
            old, new = before[metric], after[metric]
            rows.append((name, f"{old:{form}}", f"{new:{form}}", f"{new - old:+{form}}", better))
    return table(rows)


def markdown(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells as a Markdown table, the first row a header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells as aligned text, the first row a header; the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
    lines = [form.format(*row) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)
