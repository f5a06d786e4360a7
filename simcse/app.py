"""``simcse app``: a page in the browser to search, to compare sentences, and to see how a model spreads them."""

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simcse.errors import UserError, exit_cleanly

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

with exit_cleanly("simcse.app"):
    import numpy as np
    import torch
    from matplotlib.figure import Figure
    from transformers.utils import logging

    from fused_infonce import anisotropy, uniformity
    from simcse.collator import packaged_file
    from simcse.encoder import PoolerType
    from simcse.flags import STORED_POOLER, flag, parse, pooler_flag
    from simcse.inference import SimCSE
    from simcse.plot import heat_map, sentence_maps

if TYPE_CHECKING:
    import gradio as gr

DESCRIPTION = (
    "Serve a page on this machine (127.0.0.1): search among the sentences of a file, compare sentences with each "
    "other, and see how one or two models spread them. It needs no network, and Ctrl-C ends it."
)
HOST = "127.0.0.1"
# What the page accepts, so that no input keeps the machine busy for long.
MAX_CHARACTERS = 500
MAX_COMPARED = 50
MAX_MAPPED = 500
MAX_FOUND = 50
EXAMPLES = (
    "A man is playing a guitar.\nSomeone is making music.\nA woman is slicing an onion.\n"
    "The chef chops vegetables.\nShares fell on Monday.\nThe stock market dropped."
)


@dataclass
class AppArguments:
    model_name_or_path: str = flag("minilm", "A model folder, a name on the hub, or 'minilm'.")
    pooler_type: PoolerType | None = pooler_flag(STORED_POOLER)  # noqa: RUF009 (a field, as its neighbours)
    sentences: str | None = flag(
        None,
        "The file to search, and to show in the map: .txt, a sentence per line, or the first column of a table. "
        "Default: the sentences in the package.",
    )
    compare_with: str | None = flag(
        None, "A second model for the map, such as the one that the first was trained from."
    )
    compare_pooler: PoolerType | None = flag(  # noqa: RUF009 (a field, as its neighbours)
        None, "The sentence vector of --compare_with. Default: as for --pooler_type."
    )
    port: int = flag(7860, "The port of 127.0.0.1 that the page is served on.")

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port must be from 1 to 65535, not {self.port}")
        if self.compare_pooler and not self.compare_with:
            raise ValueError("--compare_pooler belongs to --compare_with, which is not given")


def main(argv: list[str] | None = None) -> None:
    with exit_cleanly("simcse.app"):
        logging.disable_progress_bar()
        (args,) = parse(AppArguments, "simcse.app", DESCRIPTION, argv)
        if args.sentences and not Path(args.sentences).expanduser().is_file():
            raise UserError(f"--sentences: the file {args.sentences} does not exist")
        _check_port(args.port)
        import gradio  # noqa: F401 (not above: --help works without it, and its absence shows before the work)

        models = [SimCSE(args.model_name_or_path, pooler=args.pooler_type)]
        if args.compare_with:
            models.append(SimCSE(args.compare_with, pooler=args.compare_pooler))
        models[0].build_index(args.sentences or packaged_file("sentences.txt"))
        page = build(models)
        try:
            serve(page, args.port)
        except OSError as error:  # taken since it was tried
            raise UserError(f"--port: cannot serve on port {args.port} ({error}); choose another one") from None
        print(f"page  http://{HOST}:{args.port}  (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)


def build(models: list[SimCSE]) -> "gr.Blocks":
    """The page for one model, which has an index, and perhaps a second one for the map."""
    import gradio as gr

    model = models[0]
    indexed = model.index.sentences
    shared = {"concurrency_id": "model", "concurrency_limit": 1}  # one request at a time uses the models
    with gr.Blocks(title="SimCSE", analytics_enabled=False) as page:
        gr.Markdown(
            f"## Sentence embeddings of {_code(model.name)}\n"
            f"A sentence may have up to {MAX_CHARACTERS} characters. Everything runs on this machine."
        )
        with gr.Tab("Search"):
            gr.Markdown(f"The closest of {len(indexed):,} sentences, by cosine similarity.")
            query = gr.Textbox("A man is playing a guitar.", label="Query", max_lines=3)
            with gr.Row():
                threshold = gr.Slider(-1, 1, 0.3, step=0.05, label="Least cosine similarity")
                top_k = gr.Slider(1, MAX_FOUND, 5, step=1, label="Sentences at most")
            button = gr.Button("Search", variant="primary")
            note = gr.Markdown()
            found = gr.Dataframe(
                headers=["sentence", "cosine"], datatype=["str", "number"], type="array", label="Found",
                interactive=False, wrap=True, column_widths=["85%", "15%"],
            )  # fmt: skip
            gr.on(
                [page.load, button.click, query.submit], _shown(lambda *given: search(model, *given)),
                [query, threshold, top_k], [note, found], api_name="search", **shared,
            )  # fmt: skip
        with gr.Tab("Similarity") as tab:
            gr.Markdown(f"2 to {MAX_COMPARED} sentences, one per line: the cosine similarity of each two.")
            compared = gr.Textbox(EXAMPLES, lines=6, max_lines=15, label="Sentences")
            button = gr.Button("Compare", variant="primary")
            heat = gr.Plot(label="Cosine similarities", format="png")
            with gr.Accordion("Numbers", open=False):
                numbers = gr.Dataframe(type="array", interactive=False, label="Cosine similarities")
            gr.on(
                [tab.select, button.click], _shown(lambda text: similarities(model, text)), compared,
                [heat, numbers], api_name="similarity", **shared,
            )  # fmt: skip
        with gr.Tab("Map") as tab:
            gr.Markdown(
                f"3 to {MAX_MAPPED} sentences, one per line, on the two directions in which their unit vectors "
                "differ most (PCA). The scale is the same for all models: where points crowd, vectors are alike "
                "whatever the sentence says (anisotropy), and the mean cosine is high."
                + ("" if len(models) > 1 else " Start the app with `--compare_with` to see a second model.")
            )
            shown = [sentence for sentence in indexed if len(sentence) <= MAX_CHARACTERS][:200]
            mapped = gr.Textbox("\n".join(shown), lines=4, max_lines=8, label="Sentences")
            button = gr.Button("Draw", variant="primary")
            maps = gr.Plot(label="Map", format="png")
            measures = gr.Dataframe(
                headers=["model", "mean cosine", "uniformity", "effective rank", "variance shown (%)"],
                type="array", interactive=False,
                label="Anisotropy: lower mean cosine and uniformity, higher rank are better",
            )  # fmt: skip
            gr.on(
                [tab.select, button.click], _shown(lambda text: draw_maps(models, text)), mapped, [maps, measures],
                api_name="map", **shared,
            )  # fmt: skip
    return page


def serve(page: "gr.Blocks", port: int) -> None:
    """Serve the page from a thread: on this machine only, without a share link, calls home or other hosts."""
    # gradio asks its own address whether it answers, which must not go through a proxy.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST]))
    page.launch(
        server_name=HOST, server_port=port, share=False, prevent_thread_lock=True, quiet=True, ssr_mode=False,
        enable_monitoring=False, mcp_server=False, pwa=False, footer_links=[], max_file_size="100kb",
    )  # fmt: skip


def search(model: SimCSE, query: str, threshold: float, top_k: float) -> tuple[str, list[list[str | float]]]:
    """A note for the page, and the rows (sentence, cosine) that were found."""
    (query,) = _sentences(query, 1, 1, "query")
    rows = model.search(query, threshold=threshold, top_k=int(top_k))
    note = "" if rows else f"No sentence has a cosine of {threshold:g} or more; lower the threshold."
    return note, [[sentence, round(cosine, 4)] for sentence, cosine in rows]


def similarities(model: SimCSE, text: str) -> tuple[Figure, list[list[float]]]:
    """A heat map of the sentences in ``text``, a line each, and its numbers."""
    sentences = _sentences(text, 2, MAX_COMPARED)
    cosines = model.similarity(sentences, sentences)
    return heat_map(cosines, sentences), np.round(cosines, 4).tolist()


def draw_maps(models: list[SimCSE], text: str) -> tuple[Figure, list[list[str | float]]]:
    """The sentences in ``text`` by the two principal components of each model, and a row of measures per model."""
    sentences = _sentences(text, 3, MAX_MAPPED)
    maps, rows = {}, []
    for number, model in enumerate(models, 1):
        vectors = model.encode(sentences)  # (S, D), unit rows
        centred = (vectors - vectors.mean(0)).double()
        u, s, _ = torch.linalg.svd(centred, full_matrices=False)
        measures = {name: float(value) for name, value in anisotropy(vectors.double()).items()}
        variance = float(100 * s[:2].square().sum() / s.square().sum().clamp_min(1e-30))
        name = f"{Path(model.name).name}, {model.encoder.pooler_type}"
        title = f"{name}\nmean cosine {measures['mean_cosine']:.2f}"
        maps[title if title not in maps else f"{title} ({number})"] = (u[:, :2] * s[:2]).numpy()
        rows.append(
            [
                name,
                round(measures["mean_cosine"], 4),
                round(float(uniformity(vectors)), 4),
                round(measures["effective_rank"], 1),
                round(variance, 1),
            ]
        )
    return sentence_maps(maps, sentences), rows


def _sentences(text: str, least: int, most: int, what: str = "text") -> list[str]:
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if not least <= len(sentences) <= most:
        expected = f"{least} to {most} sentences, one per line, are" if most > 1 else "one sentence is"
        raise UserError(f"The {what} has {len(sentences)} sentences; {expected} expected.")
    for number, sentence in enumerate(sentences, 1):
        if len(sentence) > MAX_CHARACTERS:
            raise UserError(
                f"Sentence {number} has {len(sentence):,} characters; at most {MAX_CHARACTERS} are accepted."
            )
    return sentences


def _shown(answer: Callable[..., Any]) -> Callable[..., Any]:
    """``answer``, with a ``UserError`` as a message in the page."""
    import gradio as gr

    @wraps(answer)
    def answered(*given: Any) -> Any:
        try:
            return answer(*given)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return answered


def _check_port(port: int) -> None:
    with socket.socket() as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"--port: cannot serve on port {port} of {HOST} ({error.strerror}); choose another one"
            ) from None


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"


if __name__ == "__main__":
    main()
