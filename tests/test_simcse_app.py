"""The page of ``simcse app``: its functions by the client API, in a browser, and how it starts and ends."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from helpers import interruptible
from test_simcse_model import SENTENCES, make_tiny_model

from simcse import SimCSE, cli

pytest.importorskip("gradio", reason="the extra 'app' is not installed")

from gradio_client import Client
from gradio_client.exceptions import AppError

from simcse import app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CORPUS = [*SENTENCES, "A woman plays the violin.", "It will snow on Monday.", "Prices rose again."]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((app.HOST, 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def models(tiny):
    both = [SimCSE(tiny, device="cpu", pooler="avg"), SimCSE(tiny, device="cpu", pooler="cls_before_pooler")]
    both[0].build_index(CORPUS)
    return both


@pytest.fixture(scope="module")
def address(models):
    page, port = app.build(models), free_port()
    app.serve(page, port)
    yield f"http://{app.HOST}:{port}"
    page.close(verbose=False)


@pytest.fixture(scope="module")
def client(address):
    return Client(address, verbose=False)


def is_png(plot: dict) -> bool:
    head, _, data = plot["plot"].partition(",")
    return head == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")


def test_search_gives_what_the_model_finds(client, models):
    note, found = client.predict("Snow.", 0.2, 3, api_name="/search")
    want = models[0].search("Snow.", threshold=0.2, top_k=3)
    assert [row[0] for row in found["data"]] == [sentence for sentence, _ in want]
    np.testing.assert_allclose([row[1] for row in found["data"]], [c for _, c in want], atol=1e-4)
    assert found["data"][0][0] == "Snow."
    assert note == ""
    note, found = client.predict("Prices, prices", 1.0, 3, api_name="/search")
    assert found["data"] == []
    assert "lower the threshold" in note


def test_similarities_are_cosines_and_a_picture(client, models):
    sentences = ["Snow.", "It costs $5, not $6_{x}.", "Prices rose."]  # dollars are no mathematics
    plot, numbers = client.predict("\n".join(sentences) + "\n\n", api_name="/similarity")
    np.testing.assert_allclose(numbers["data"], models[0].similarity(sentences, sentences), atol=1e-4)
    assert is_png(plot)


def test_map_measures_both_models(client, models):
    plot, measures = client.predict("\n".join(CORPUS), api_name="/map")
    assert is_png(plot)
    for row, model in zip(measures["data"], models, strict=True):
        cosines = model.similarity(CORPUS, CORPUS)
        apart = cosines[np.triu_indices(len(CORPUS), 1)]
        assert row[1] == pytest.approx(apart.mean(), abs=1e-4)
        assert row[2] == pytest.approx(np.log(np.exp(4 * apart - 4).mean()), abs=1e-3)
        vectors = model.encode(CORPUS, return_numpy=True).astype(float)
        shares = np.linalg.svd(vectors, compute_uv=False) / np.linalg.svd(vectors, compute_uv=False).sum()
        assert row[3] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), abs=0.1)
        variances = np.linalg.eigvalsh(np.cov(vectors.T))[::-1]
        assert row[4] == pytest.approx(100 * variances[:2].sum() / variances.sum(), abs=0.1)


def test_maps_share_one_scale():
    figure = app.sentence_maps({"wide": np.array([[1.0, 0], [-1, 0]]), "narrow": np.full((2, 2), 0.1)}, ["a", "b"])
    wide, narrow = figure.axes
    assert wide.get_xlim() == narrow.get_xlim() == narrow.get_ylim()
    assert wide.get_xlim()[1] > 1


def test_labels_of_the_heat_map_are_inside_the_picture():
    figure = app.heat_map(np.eye(3), ["word " * 20] * 3)
    figure.savefig(os.devnull, format="png")
    assert figure.axes[0].get_tightbbox().x0 >= 0


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("/search", ("", 0.3, 3), "The query has 0 sentences; one sentence is expected."),
        ("/search", ("one\ntwo", 0.3, 3), "The query has 2 sentences"),
        ("/search", ("x" * 501, 0.3, 3), "Sentence 1 has 501 characters; at most 500"),
        ("/search", ("Snow.", 2, 3), "greater than maximum value 1"),
        ("/search", ("Snow.", 0.3, 51), "greater than maximum value 50"),
        ("/similarity", ("one",), "The text has 1 sentences; 2 to 50 sentences, one per line, are expected."),
        ("/similarity", ("a\n" * 51,), "The text has 51 sentences"),
        ("/similarity", ("a\n" + "x" * 501,), "Sentence 2 has 501 characters"),
        ("/map", ("a\nb",), "The text has 2 sentences; 3 to 500"),
        ("/map", ("a\n" * 501,), "The text has 501 sentences"),
    ],
)
def test_inputs_beyond_the_limits_are_named_in_the_page(client, name, given, message):
    with pytest.raises(AppError, match="^" + message.replace(".", r"\.") if message[0] == "T" else message):
        client.predict(*given, api_name=name)


def test_limits_are_stated_and_nothing_is_shared(address, client):
    config = client.config
    shown = " ".join(str(part["props"].get("value")) for part in config["components"])
    for limit in ("up to 500 characters", "2 to 50 sentences", "3 to 500 sentences"):
        assert limit in shown
    assert config["analytics_enabled"] is False
    assert not config.get("is_space")
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    port = int(address.rsplit(":", 1)[1])
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for host in others - {"127.0.0.1"}:  # the machine's address in its network
        with socket.socket() as probe:
            assert probe.connect_ex((host, port)) != 0


class Browser:
    """Headless Chromium, by the DevTools protocol over two pipes: a message is JSON that ends with NUL."""

    def __init__(self, profile: Path):
        theirs, self.to = os.pipe()
        self.of, answers = os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --no-first-run --window-size=1300,1000"
        rest = '--remote-debugging-pipe "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"'
        given = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs, answers)]  # none is 3 or 4 already
        script = f'exec "$0" {flags} {rest} "$1" 3<&{given[0]} 4>&{given[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, CHROMIUM, f"--user-data-dir={profile}"],
            pass_fds=given,
            stderr=subprocess.DEVNULL,
        )
        for fd in (theirs, answers, *given):
            os.close(fd)
        self.rest, self.count, self.session, self.urls = b"", 0, {}, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.ask("Network.enable")

    def ask(self, method: str, **params) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params, **self.session}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                assert select.select([self.of], [], [], 60)[0], f"{method} has no answer"
                self.rest += os.read(self.of, 1 << 20)
            answer, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(answer)
            if answer.get("method") == "Network.requestWillBeSent":
                self.urls.append(answer["params"]["request"]["url"])
            if answer.get("id") == self.count:
                return answer["result"]

    def run(self, code: str):
        return self.ask("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def wait_for(self, condition: str) -> None:
        end = time.monotonic() + 60
        while not self.run(condition):
            assert time.monotonic() < end, f"not within a minute: {condition}"
            time.sleep(0.2)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.of)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_page_works_in_a_browser_without_a_network(address, tmp_path):
    browser = Browser(tmp_path / "profile")
    try:
        browser.ask("Page.navigate", url=address)
        browser.wait_for(f"document.body?.innerText.includes({json.dumps(CORPUS[0])})")  # found at the start
        for tab in ("Similarity", "Map"):
            browser.run(
                f"[...document.querySelectorAll('[role=tab]')].find(t => t.textContent.trim() == '{tab}').click()"
            )
            browser.wait_for("[...document.images].some(i => i.checkVisibility() && i.naturalWidth > 400)")
        picture = base64.b64decode(browser.ask("Page.captureScreenshot")["data"])
        (tmp_path / "page.png").write_bytes(picture)  # for a person to look at
        assert len(picture) > 10_000
        hosts = {urlsplit(url).netloc for url in browser.urls if not url.startswith(("data:", "blob:"))}
        assert hosts == {urlsplit(address).netloc}
    finally:
        browser.close()


def run(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}
    command = [sys.executable, "-m", "simcse.app", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def test_command_serves_until_ctrl_c(tiny, tmp_path):
    (tmp_path / "s.txt").write_text("\n".join(CORPUS))
    port = str(free_port())
    with run(
        "--model_name_or_path", str(tiny), "--sentences", str(tmp_path / "s.txt"), "--port", port,
        preexec_fn=interruptible,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == f"page  http://127.0.0.1:{port}  (Ctrl-C ends it)\n"
        found = Client(f"http://127.0.0.1:{port}", verbose=False).predict("Snow.", 0.9, 1, api_name="/search")[1]
        assert found["data"][0][0] == "Snow."
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert error.splitlines()[-2:] == ["", "simcse.app: interrupted"]
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sentences", "nowhere.txt"], "--sentences: the file nowhere.txt does not exist"),
        (["--port", "0"], "--port must be from 1 to 65535, not 0"),
        (["--port", "70000"], "--port must be from 1 to 65535, not 70000"),
        (["--compare_pooler", "avg"], "--compare_with"),
        (["--model_name_or_path", "./nowhere"], "the model folder ./nowhere does not exist"),
        (["--port", "taken"], "Address already in use"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with socket.socket() as taken:
        taken.bind((app.HOST, 0))
        taken.listen()
        port = str(taken.getsockname()[1] if "taken" in arguments else free_port())
        given = [*arguments[:-1], port] if "taken" in arguments else arguments
        with pytest.raises(SystemExit) as ended:
            cli.main(["app", *given, *([] if "--port" in given else ["--port", port])])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_missing_gradio_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(app, "SimCSE", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["app", "--port", str(free_port())])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert "gradio is not installed" in error
    assert "[app]" in error
    assert error.count("\n") == 1
