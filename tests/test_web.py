"""Tests the page of ``specextend demo --web``: its server, and the page in a real browser."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from models import tiny_model
from test_cli import TEMPLATE, byte_tokenizer

from specextend import SpecExtend, assets, cli
from specextend.timing import Timed

# Where this is set, nothing below is skipped; `make picture` sets the other, a file to write.
WANTED = "SPECEXTEND_TEST_BROWSER" in os.environ
PICTURE = os.environ.get("SPECEXTEND_WEB_PICTURE")

if not WANTED:
    pytest.importorskip("fastapi", reason="the extra `web` is not installed")
    pytest.importorskip("uvicorn", reason="the extra `web` is not installed")

import uvicorn  # noqa: E402

from specextend.web import race as race_module  # noqa: E402
from specextend.web import server as server_module  # noqa: E402

PATIENCE = 1200 if PICTURE else 120  # seconds, for machines with other things to do
# Two functions, sixteen times: something to retrieve, and to repeat.
TEXT = "".join(
    f"def area_{i}(width, height):\n    return width * height\n\n\n"
    f"def volume_{i}(width, height, depth):\n    return area_{i}(width, height) * depth\n\n\n"
    for i in range(16)
)
NEW = 24
SWITCHES = {
    "draft": "model", "draft_cache": "retrieval", "tree_shape": "opt", "tree_nodes": 6,
    "tree_attention": True, "budget": 256, "gate": "off",
}  # fmt: skip
ORDER = {"text": TEXT, "new_tokens": NEW, **SWITCHES}


# ---- the server ----------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(*options: str):
    """Run the command in a thread, and give its port."""
    servers: list[uvicorn.Server] = []
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            self.port = sockets[0].getsockname()[1]
            servers.append(self)
            started.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn, "Server", Server)
        codes: list[int] = []
        thread = threading.Thread(
            target=lambda: codes.append(cli.main(["demo", "--web", "--port", "0", *options]))
        )
        thread.start()
        assert started.wait(PATIENCE)
    try:
        yield servers[0].port
    finally:
        servers[0].should_exit = True
        thread.join(PATIENCE)
    assert codes == [0]


@pytest.fixture(scope="module")
def port():
    """Give the port of a server with the embedded models."""
    threads = [] if PICTURE else ["--threads", "1"]  # a picture shows what all of them do
    with serving(*threads, "--max-new-tokens", str(NEW)) as port:
        yield port


def ask(port: int, path: str, body=None, method: str | None = None, **headers: str):
    """Status and text of an answer. Headers of None are left out."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    sent = {"host": f"127.0.0.1:{port}"}
    if body is not None:
        body = body if isinstance(body, str) else json.dumps(body)
        sent |= {"origin": f"http://127.0.0.1:{port}", "content-type": "application/json"}
        sent["content-length"] = str(len(body.encode()))
    sent |= headers
    connection.putrequest(method or ("POST" if body is not None else "GET"), path, skip_host=True)
    for name, value in sent.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(None if body is None else body.encode())
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, answer.headers


def run(port: int, **order) -> list[dict]:
    """Return the events of a race."""
    status, text, _ = ask(port, "/api/run", {**ORDER, **order})
    assert status == 200, text
    return [json.loads(line) for line in text.splitlines()]


def refusal(port: int, **order) -> tuple[int, str]:
    status, text, _ = ask(port, "/api/run", {**ORDER, **order})
    return status, json.loads(text)["error"]


@functools.cache
def embedded():
    """Load the target itself, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.target_path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def written_behind(ids: list[int], new: int = NEW) -> list[int]:
    """Return what the target itself writes behind tokens."""
    prompt = torch.tensor([ids])
    out = embedded()[0].generate(prompt, max_new_tokens=new, do_sample=False)
    return out[0, len(ids) :].tolist()


@functools.cache
def expected() -> list[int]:
    """Return what the target itself writes behind the text."""
    ids = embedded()[1](TEXT).input_ids
    assert 600 < len(ids) < 800
    return written_behind(ids)


def cached(events: list[dict]) -> dict[str, int]:
    """Return how many tokens of the prompt were there, by column."""
    return {e["column"]: e["cached"] for e in events if "cached" in e}


def test_events(port):
    """Both columns write what the target does, in turns; acceptance and chunks are told."""
    start, *events, done = run(port)
    assert start["event"] == "start" and start["retrieves"]
    assert "".join(start["chunks"]) == TEXT
    rounds = {
        name: [e for e in events if e["event"] == "round" and e["column"] == name]
        for name in ("plain", "spec")
    }
    assert done["event"] == "done" and done["difference"] is None and not done["stopped"]
    for name, result in done["columns"].items():
        assert result["tokens"] == expected()
        pieces = [piece for each in rounds[name] for piece in each["pieces"]]
        assert len(pieces) == NEW
        assert result["accepted"] == sum(each["accepted"] for each in rounds[name])
        assert result["rate"] > 0 and result["seconds"]["verify"] > 0
    assert len(rounds["plain"]) == NEW > len(rounds["spec"])
    chunks = [each["chunks"] for each in rounds["spec"] if "chunks" in each]
    assert len(chunks) > 1 and all(len(ids) == 256 // start["chunk_size"] for ids in chunks)
    assert all(0 in ids for ids in chunks)  # the sink
    assert not any("chunks" in each for each in rounds["plain"])
    # In turns: neither of them is through before the other one begins.
    names = [each["column"] for each in events if each["event"] == "round"]
    assert names != sorted(names) and names != sorted(names, reverse=True)


@pytest.mark.parametrize("draft", ["eagle3", "longspec", "ngram", "self"])
def test_every_draft(port, draft):
    *_, done = run(port, draft=draft, new_tokens=6)
    assert done["columns"]["spec"]["tokens"] == expected()[:6]


def test_sampling_draws_the_same_in_both(port):
    torch.manual_seed(0)
    *_, done = run(port, temperature=1.0, new_tokens=8)
    assert done["difference"] is None
    assert len(done["columns"]["spec"]["tokens"]) == 8


def test_further_questions(port):
    """Each goes on from document, questions and answers, of which nothing is read again. A new
    race, or another draft, has both columns read all of it."""
    tokenizer = embedded()[1]
    ids, question = tokenizer(TEXT).input_ids, "# The surface of it:"
    first = run(port)
    assert cached(first) == {"plain": 0, "spec": 0}
    answer, key = expected(), first[-1]["conversation"]
    assert first[-1]["answer"] == tokenizer.decode(answer)
    for _ in range(2):
        there = len(ids) + NEW - 1  # the last token of an answer has been read by nobody
        ids += [*answer, *tokenizer("\n\n" + question).input_ids]
        start, *events, done = run(port, conversation=key, text="", instruction=question)
        assert start["prompt_tokens"] == len(ids)
        assert "".join(start["chunks"]) == tokenizer.decode(ids)
        assert cached(events) == {"plain": there, "spec": there}
        answer = written_behind(ids)
        assert [each["tokens"] for each in done["columns"].values()] == [answer] * 2
        assert (done["conversation"], done["answer"]) == (key, tokenizer.decode(answer))
    ids += answer
    start, *events, done = run(port, conversation=key, draft="ngram", new_tokens=4)
    assert start["prompt_tokens"] == len(ids) and cached(events) == {"plain": 0, "spec": 0}
    assert done["columns"]["spec"]["tokens"] == written_behind(ids, 4)
    again = run(port, new_tokens=4)
    assert cached(again) == {"plain": 0, "spec": 0} and again[-1]["conversation"] != key
    status, error = refusal(port, conversation=key)
    assert status == 400 and error.startswith("This conversation has made room for another")


def test_turns_by_time():
    """Prefills first; then whoever has had less time. Fixed seconds instead of a clock."""

    class Column:
        def __init__(self, name, took, rounds):
            self.name, self.took, self.left = name, took, rounds
            self.timed = Timed()

        def round(self):
            if not self.left:
                return None
            self.left -= 1
            if self.timed.tokens:
                self.timed.to_last += self.took
            self.timed.tokens.append(0)
            return self.name

    order: list[str] = []
    columns = [Column("p", 1.0, 7), Column("s", 2.0, 4)]
    race_module.Race._take_turns(columns, order.append, threading.Event())
    assert "".join(order) == "ps" + "psp" * 3


@pytest.mark.parametrize(
    "order, status, text",
    [
        ({"text": ""}, 400, "The document is empty"),
        ({"text": " \n"}, 400, "The document is empty"),
        ({"document": "no such thing"}, 400, "there is no document 'no such thing'"),
        ({"text": TEXT * 30}, 400, "has 17408 positions, but the prompt's"),
        ({"text": "x" * 1_000_001}, 422, "text: string should have at most 1000000 characters"),
        ({"draft": "nobody"}, 400, "there is no draft 'nobody', only model, eagle3"),
        ({"budget": 100}, 400, "budget must be a positive multiple of chunk_size=32, got 100"),
        ({"new_tokens": 0}, 422, "new tokens: input should be greater than or equal to 1"),
        ({"temperature": -1}, 422, "temperature: input should be greater than or equal to 0"),
        ({"draft": "self", "draft_cache": "full"}, 400, 'draft="self" needs draft_cache='),
        ({"surprise": 1}, 422, "surprise: extra inputs are not permitted"),
    ],
)
def test_refused_orders(port, order, status, text):
    got, error = refusal(port, **order)
    assert got == status and text in error


def test_refused_requests(port):
    """Other names, other origins, no length, too long: nothing of it reaches a model."""
    assert ask(port, "/")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "192.168.0.1"):
        assert ask(port, "/", host=host)[0] == 403
    assert ask(port, "/", host=None)[0] in (400, 403)
    for host in ("localhost", f"localhost:{port}", f"[::1]:{port}"):
        assert ask(port, "/", host=host)[0] == 200
    for origin in (None, "null", "http://evil.example", f"https://127.0.0.1:{port}"):
        assert ask(port, "/api/stop", {}, origin=origin)[0] == 403
    assert ask(port, "/api/stop", {})[0] == 200
    tall = {"content-length": str(server_module.MAX_BYTES + 1)}
    assert ask(port, "/api/run", "{}", **tall)[0] == 413
    assert ask(port, "/api/run", "{}", **{"content-length": None})[0] == 411
    assert ask(port, "/api/run", "{")[0] == 422
    for path in ("/docs", "/openapi.json", "/../server.py", "/%2e%2e/server.py"):
        assert ask(port, path)[0] == 404
    headers = ask(port, "/")[2]
    assert headers["content-security-policy"].startswith("default-src 'self';")
    assert "access-control-allow-origin" not in headers


def test_names_of_the_server():
    def knows(host, name):
        return server_module.Guard(None, host)._knows(name)

    assert knows("0.0.0.0", "192.168.0.1:80") and not knows("0.0.0.0", "evil.example")
    assert knows("::1", "[::1]:80") and not knows("::1", "[::2]:80")
    assert not knows("127.0.0.1", "[broken")


class Slow:
    """Rounds that take a while, so that one can do something meanwhile."""

    def __init__(self, monkeypatch, seconds: float = 0.05):
        self.closed: list[SpecExtend] = []
        stream = SpecExtend.stream

        def slow(spec, *args, **kwargs):
            try:
                for step in stream(spec, *args, **kwargs):
                    time.sleep(seconds)
                    yield step
            finally:
                self.closed.append(spec)

        monkeypatch.setattr(SpecExtend, "stream", slow)


def wait_for(what) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


@contextlib.contextmanager
def racing(port: int):
    """Give the answer of a long race, from where both columns write."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    headers = {"origin": f"http://127.0.0.1:{port}", "content-type": "application/json"}
    connection.request("POST", "/api/run", json.dumps({**ORDER, "new_tokens": 500}), headers)
    answer = connection.getresponse()
    while True:
        event = json.loads(answer.readline())
        if event["event"] == "round" and event["column"] == "spec":
            break
    yield answer
    answer.close()
    connection.close()


def test_busy_and_stopped(port, monkeypatch):
    """A second order is told to wait; a stop ends the first one; the next one is as ever."""
    slow = Slow(monkeypatch)
    with racing(port) as answer:
        assert refusal(port) == (409, "Busy with another generation; stop it, or wait for its end.")
        assert ask(port, "/api/stop", {})[0] == 200
        done = json.loads(answer.read().splitlines()[-1])
    assert done["event"] == "done" and done["stopped"] and done["difference"] is None
    assert len(slow.closed) == 2
    *_, done = run(port, new_tokens=4)
    assert done["columns"]["spec"]["tokens"] == expected()[:4]


def test_reader_goes_away(port, monkeypatch):
    slow = Slow(monkeypatch)
    with racing(port):
        assert not slow.closed
    wait_for(lambda: len(slow.closed) == 2)
    wait_for(lambda: refusal(port, text="")[0] == 400)  # no longer busy


def test_failure_is_told(port, monkeypatch, caplog):
    """A fault happens: the page says so, the log has the rest, the next order works."""

    def broken(*args, **kwargs):
        raise AssertionError("as if")

    with monkeypatch.context() as patch:
        patch.setattr(SpecExtend, "stream", broken)
        assert refusal(port) == (400, "An internal error; the terminal shows it.")
    assert "as if" in caplog.text
    *_, done = run(port, new_tokens=2)
    assert done["difference"] is None


def test_own_models(tmp_path):
    """Models of one's own come with a chat template, an unusable draft and a document."""
    for name, options in (("target", {}), ("draft", dict(seed=1, hidden_size=16, head_dim=8))):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = TEMPLATE
        model = tiny_model(vocab_size=257, **options)
        model.generation_config.stop_strings = ["All work and no play"]  # needs a tokenizer
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "report.txt").write_text("All work and no play. " * 4)
    models = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft")]
    document = ["--document", str(tmp_path / "report.txt")]
    with serving(*models, *document, "--chunk-size", "8", "--budget", "64") as port:
        offer = json.loads(ask(port, "/api/offer")[1])
        assert offer["has_template"] and offer["documents"]["file"] == "report.txt"
        draft = {"draft": str(tmp_path / "draft"), "budget": 64}
        start, *events, done = run(
            port, **draft, document="file", length=9, instruction="Why?", new_tokens=30
        )
        for name, result in done["columns"].items():
            rounds = [e for e in events if e["event"] == "round" and e["column"] == name]
            pieces = [piece for each in rounds for piece in each["pieces"]]
            text = tokenizer.decode(result["tokens"], skip_special_tokens=True)
            assert "".join(pieces) + result["tail"] == text
            assert [each.get("gap") for each in rounds] == ["", *[None] * (len(rounds) - 1)]
        asked = "<user>All work \n\nWhy?<assistant>"
        assert "".join(start["chunks"]) == asked
        assert done["difference"] is None
        # The answer is rendered from its text: what was read serves up to where tokens differ.
        order = {**draft, "conversation": done["conversation"], "new_tokens": 5}
        status, error = refusal(port, **order)
        assert (status, error) == (400, "There is no question.")
        start, *events, further = run(port, **order, instruction="So?")
        text = f"{asked}{done['answer']}<user>So?<assistant>"
        assert start["prompt_tokens"] == len(tokenizer(text).input_ids)
        assert further["difference"] is None
        found = cached(events)
        assert found["plain"] == found["spec"] >= len(asked)


@pytest.mark.parametrize(
    "options, text",
    [
        (["--port", "70000", "--web"], "--port must be in [0, 65536), got 70000"),
        (["--port", "1"], "--host and --port go with --web"),
        (["--web", "--draft", "none"], "the demonstration needs a draft"),
        (["--web", "--host", "203.0.113.1"], "cannot listen on 203.0.113.1, port 8765"),
    ],
)
def test_wrong_options(capsys, options, text):
    with contextlib.suppress(SystemExit):
        assert cli.main(["demo", *options]) == 1
    assert text in capsys.readouterr().err


# ---- the page ------------------------------------------------------------------------------------


def missing() -> str | None:
    """Say what the browser's tests need and this machine lacks."""
    for name in ("chromium", "chromedriver"):
        if shutil.which(name) is None:
            return f"there is no {name} (Debian: apt install chromium chromium-driver)"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    return None


class Page:
    """Drives the page in a browser by few requests, each of which costs milliseconds."""

    def __init__(self, driver, port: int):
        self.driver, self.url = driver, f"http://127.0.0.1:{port}/"

    def open(self) -> None:
        self.driver.get(self.url)
        self.wait("document.getElementById('facts').textContent !== ''")

    def js(self, code: str, *args):
        return self.driver.execute_script(f"return {code}", *args)

    def wait(self, condition: str) -> None:
        wait_for(lambda: self.js(condition))

    def text(self, selector: str) -> str:
        return self.js("document.querySelector(arguments[0]).textContent", selector)

    def set(self, **fields) -> None:
        """Values of fields by name, as if a person had changed them."""
        self.driver.execute_script(
            """for (const [name, value] of Object.entries(arguments[0])) {
                 const field = document.getElementById("order").elements.namedItem(name);
                 field.value = value;
                 field.dispatchEvent(new Event("change", { bubbles: true }));
               }""",
            fields,
        )

    def click(self, name: str) -> None:
        from selenium.webdriver.common.by import By

        self.driver.find_element(By.ID, name).click()

    def generate(self, button: str = "go") -> None:
        """Press the button, and wait for the end."""
        self.click(button)
        self.wait("!document.getElementById('go').disabled")

    def error(self) -> str | None:
        return self.js("(e => e.hidden ? null : e.textContent)(document.getElementById('error'))")

    def written(self, column: str) -> str:
        return self.js(
            "[...document.querySelectorAll(arguments[0])].map(e => e.textContent).join('')",
            f"#{column} .text span:not(.before)",
        )

    def size(self, width: int, height: int, scale: float = 1) -> None:
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            dict(width=width, height=height, deviceScaleFactor=scale, mobile=width < 500),
        )

    def requests(self) -> list[str]:
        """Addresses of all requests since the last call, those of the browser's own pages apart."""
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        urls = [
            m["params"]["request"]["url"]
            for m in messages
            if m["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith(("chrome:", "data:"))]


@pytest.fixture(scope="module")
def page(port, tmp_path_factory):
    lacking = missing()
    if lacking and not WANTED:
        pytest.skip(lacking)
    assert not lacking, lacking
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for switch in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "disable-dev-shm-usage", f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(f"--{switch}")
    options.add_argument("about:blank")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        page = Page(driver, port)
        page.size(1200, 1000)
        yield page
    finally:
        driver.quit()


def test_page_generates(page):
    """Loads from its own origin alone, writes the same in both columns, marks what was accepted,
    lights the chunks that the draft reads."""
    page.open()
    page.set(document="", text=TEXT, budget="256")
    page.generate()
    assert page.error() is None
    assert page.text("#verdict") == f"The same text: all of {NEW} tokens are identical"
    tokenizer = embedded()[1]
    wanted = tokenizer.decode(expected())
    assert page.written("plain") == page.written("spec") == wanted
    marks = page.js(
        "['accepted', 'target'].map(c => document.querySelectorAll(`#spec .text .${c}`).length)"
    )
    assert sum(marks) == NEW and min(marks) > 0
    assert page.js("document.querySelectorAll('#plain .text .accepted').length") == 0
    cells, lit = page.js(
        "['.cell', '.cell.lit'].map(c => document.querySelectorAll(`#strip ${c}`).length)"
    )
    assert lit == 8 < cells  # 256 tokens in chunks of 32
    assert page.text("#chunk")  # of a lit one
    page.js("document.querySelector('.cell').click()")
    assert page.text("#chunk") == tokenizer.decode(tokenizer(TEXT).input_ids[:32])
    assert float(page.text("#spec .rate")) > 0 and float(page.text("#spec .acceptance")) > 1
    assert (
        len(page.js("[...document.querySelectorAll('#phases td')].map(e => e.textContent)")) == 12
    )
    urls = page.requests()
    assert page.url + "script.js" in urls and page.url + "api/run" in urls
    assert [url for url in urls if not url.startswith(page.url)] == []
    assert page.driver.get_log("browser") == []


def test_page_asks_further(page):
    """The conversation is on show, and what was read for each answer; another document ends it."""
    page.open()
    assert page.js("document.getElementById('further').disabled")
    page.set(document="", text=TEXT, budget="256")
    page.generate()
    tokenizer = embedded()[1]
    ids, question = tokenizer(TEXT).input_ids, "# The surface of it:"
    assert page.text("#plain .read") == f"Prompt of {len(ids)} tokens, all of them read"
    page.set(instruction=question)
    page.generate("further")
    assert page.error() is None
    there = len(ids) + NEW - 1
    ids += [*expected(), *tokenizer("\n\n" + question).input_ids]
    answer = tokenizer.decode(written_behind(ids))
    assert page.written("plain") == page.written("spec") == answer
    read = f"{len(ids)} tokens: {there} were there, {len(ids) - there} read"
    assert page.text("#plain .read") == page.text("#spec .read") == f"Prompt of {read}"
    turns = page.js("[...document.querySelectorAll('#turns li *')].map(e => e.textContent)")
    assert turns[1] == tokenizer.decode(expected())
    assert turns[3:] == [question, answer, f"Both: {read}"]
    assert page.text("#talk-about") == "about a text of your own"
    page.set(text=TEXT + "\n")
    assert page.js("document.getElementById('further').disabled")
    page.set(text=TEXT)
    assert not page.js("document.getElementById('further').disabled")
    page.set(text=TEXT[:1000], instruction="", new_tokens="3")
    page.generate()
    assert page.js("document.querySelectorAll('#turns li').length") == 1


def test_page_shows_text_as_text(page):
    hostile = "<script>document.title = 'caught'</script><img src=x onerror='document.title=1'>\n"
    page.set(document="", text=hostile * 30, new_tokens="3")
    page.generate()
    assert page.error() is None
    assert hostile.strip() in page.text("#plain .text .before")
    assert page.js("document.title") == "specextend"
    assert page.js("document.querySelectorAll('img, #race script').length") == 0
    page.requests()


def test_page_shows_errors(page):
    page.set(document="", text="", new_tokens=str(NEW))
    page.generate()
    assert page.error().startswith("The document is empty")
    page.set(text=TEXT * 30)
    page.generate()
    assert "has 17408 positions" in page.error()
    page.set(text="x" * 1_000_001)
    page.generate()
    assert page.error() == "The text is too long: at most 1,000,000 characters."
    page.driver.get_log("browser")  # the browser notes the statuses, too


def test_page_stops(page, monkeypatch):
    """And what comes after a stop is right."""
    with monkeypatch.context() as patch:
        Slow(patch)
        page.set(document="", text=TEXT, new_tokens="400")
        page.click("go")
        page.wait("document.querySelectorAll('#spec .text .target').length > 2")
        page.click("stop")
        page.wait("!document.getElementById('go').disabled")
    assert page.error() is None
    assert page.text("#status") == "Stopped."
    assert page.text("#verdict").startswith("Stopped. The same text, as far as both came")
    page.set(new_tokens="6")
    page.generate()
    assert page.text("#verdict") == "The same text: all of 6 tokens are identical"


def test_page_fits_a_phone(page):
    page.size(360, 740, 2)
    page.driver.execute_script("document.getElementById('switches').open = true")
    try:
        width, wider = page.js(
            """[document.documentElement.scrollWidth, [...document.querySelectorAll("body *")]
                 .filter(e => e.getBoundingClientRect().right > 360.5).map(e => e.outerHTML)]"""
        )
    finally:
        page.driver.execute_script("document.getElementById('switches').open = false")
        page.size(1200, 1000)
    assert width == 360 and wider == []


if PICTURE:

    def test_picture(page):
        """The quick start shows the demonstration's document, at the end of a generation."""
        page.open()
        page.set(length="8000", new_tokens="128")
        page.generate()
        assert page.error() is None
        page.driver.execute_script("window.scrollTo(0, 0); document.activeElement.blur()")
        bottom = page.js("document.getElementById('columns').getBoundingClientRect().bottom")
        clip = dict(x=0, y=0, width=1200, height=bottom, scale=1)
        shot = page.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
        )
        Path(PICTURE).write_bytes(base64.b64decode(shot["data"]))
