'The page "Try it": the same stems as in Python, in a real browser, from a plain server under a sub-path.'
import base64
import contextlib
import functools
import http.server
import importlib.util
import json
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")

from deepdemix.foundations.codecs import read
from deepdemix.foundations.encoding import write
from deepdemix.foundations.toy_band import toy_song
from deepdemix.separation import Separator

ROOT = Path(__file__).parent.parent
STATIC = ROOT / "nbs/_site/_static"
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
         " --disable-component-update --disable-sync".split())
WAIT = 300_000


@pytest.fixture(scope="session")
def maker():
    "The script that makes what the page needs."
    spec = importlib.util.spec_from_file_location("site_live", ROOT / "nbs/_site/live.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page():
    "The page's own part, as it stands in its notebook."
    cells = json.loads((ROOT / "nbs/pages/try_it.ipynb").read_text(encoding="utf-8"))["cells"]
    body = next(text for text in ("".join(cell["source"]) for cell in cells) if 'id="live"' in text)
    return ('<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="viewport"'
            ' content="width=device-width"><link rel="icon" href="data:,"><title>Try'
            f' it</title><body>{body}</body></html>')


def written(folder, maker, **settings):
    "A site of one page, two folders down."
    at = folder / "some/where"
    (at / "pages").mkdir(parents=True)
    (at / "pages/try_it.html").write_text(page(), encoding="utf-8")
    shutil.copytree(STATIC, at / "_static")
    return at, maker.make(at / "_static/live", **settings)


# Building

def test_without_npm_the_page_says_so(maker, tmp_path, monkeypatch):
    monkeypatch.setattr(maker.shutil, "which", lambda name: None)
    at, missing = written(tmp_path, maker, cache=tmp_path / "cache")
    assert missing == "npm is missing"
    assert json.loads((at / "_static/live/about.json").read_text()) == dict(ready=False, missing=missing)
    assert not list(at.rglob("*.wasm"))


def test_another_archive_is_refused(maker, tmp_path, monkeypatch):
    "A file of the right name that is not the one that was tested."
    monkeypatch.setattr(maker.shutil, "which", lambda name: None)
    (tmp_path / f"onnxruntime-web-{maker.VERSION}.tgz").write_bytes(b"something else")
    with pytest.raises(maker.Missing): maker.package(tmp_path)


def test_no_runtime_is_kept_in_the_repository():
    kept = [p.name for p in STATIC.rglob("*")]
    assert not [name for name in kept if name.endswith((".wasm", ".onnx", ".mjs"))]
    assert {"live.js", "worker.js", "live.css"} <= set(kept)


def test_the_desk_takes_sounds_from_the_page(maker, tmp_path):
    "The places in the desk's script that the page fills."
    assert set(maker.desk(tmp_path)) >= {"drums", "bass", "other", "vocals"}
    text = (tmp_path / "desk.html.txt").read_text(encoding="utf-8")
    assert (text.index("window.given = window.parent.given") < text.index('id="data"')
            and text.count("{data}") == 1 and text.count("{title}") == 2)
    assert "given.buffer(stem)" in text and "given.gain" in text


# In a browser

@pytest.fixture(scope="module")
def folder(maker, tmp_path_factory):
    "A site of one page."
    folder = tmp_path_factory.mktemp("site")
    _, missing = written(folder, maker)
    if missing: pytest.skip(missing)
    return folder


@contextlib.contextmanager
def served(folder, **headers):
    "The address of the page on a server that adds some headers."
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
        def end_headers(self):
            for name, value in headers.items(): self.send_header(name.replace("_", "-"), value)
            super().end_headers()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/some/where/pages/try_it.html"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def site(folder):
    "The address of the page on a plain server."
    with served(folder) as address: yield address


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium: pytest.skip("no Chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, address, **settings):
    "The page, which must not raise errors, miss files or ask anyone else."
    context = browser.new_context(**settings)
    context.set_default_timeout(WAIT)
    tab, wrong = context.new_page(), []
    tab.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda e: wrong.append(str(e)))
    tab.on(
        "request",
        lambda r: (wrong.append(r.url)
                   if not r.url.startswith((address.split("/some")[0], "data:", "blob:", "about:"))
                   else None),
    )
    tab.goto(address)
    try:
        yield tab
        assert not wrong, wrong
    finally: context.close()


def finished(tab):
    "Wait until the desk can play."
    tab.locator("#live-desk iframe").wait_for()
    frame = tab.frame_locator("#live-desk iframe")
    frame.locator("#play:enabled").wait_for()
    return frame


def stem(tab, name):
    "The samples (channels, time) of a stem."
    text = tab.evaluate("""name => { const b = live.sounds[name]; return Array.from({ length: b.numberOfChannels }, (_, c) => { const x = new Uint8Array(b.getChannelData(c).slice().buffer);
        let s = ""; for (let i = 0; i < x.length; i += 32768) s += String.fromCharCode(...x.subarray(i, i + 32768)); return btoa(s); }); }""", name)
    return np.stack([np.frombuffer(base64.b64decode(x), np.float32) for x in text])


def apart(tab, name, expected):
    "The largest difference of a stem of the same shape."
    found = stem(tab, name)
    assert found.shape == tuple(expected.shape)
    return float(np.abs(found - expected.numpy()).max())


@pytest.mark.browser
def test_the_same_stems_as_in_python(site, browser, tmp_path):
    "A song of two chunks; then solo, and what is saved."
    write(tmp_path / "song.wav", toy_song(11, duration=24.).sum(0) / 2, 44100, "FLOAT")
    expected = Separator.from_pretrained("default", device="cpu").separate(tmp_path / "song.wav")
    with opened(browser, site, accept_downloads=True) as tab:
        tab.set_input_files("#live-file", tmp_path / "song.wav")
        frame = finished(tab)
        for name, y in expected.items(): assert apart(tab, name, y) < 1e-4
        assert re.search(r"times as fast", tab.locator("#live-status").inner_text())
        frame.locator(".row[data-stem=bass] .solo").click()
        with tab.expect_download() as saved: frame.locator("#save-mix").click()
        mix, rate = read(saved.value.path())
        assert rate == 44100 and float((mix - expected["bass"].clamp(-1, 1)).abs().max()) < 2e-3
        with tab.expect_download() as saved: frame.locator(".row[data-stem=vocals] .save").click()
        assert (saved.value.suggested_filename == "song - separated - vocals.wav"
                and read(saved.value.path())[0].shape == expected["vocals"].shape)


@pytest.mark.browser
def test_the_toy_band_by_keyboard_on_a_phone_and_offline(site, browser):
    "Everything by keys, no scrolling sideways, and no network once the page is there."
    with opened(browser, site, viewport=dict(width=390, height=844)) as tab:
        tab.wait_for_function("live.files && live.worker")
        tab.context.set_offline(True)
        tab.focus("#live-toy")
        tab.keyboard.press("Enter")
        frame = finished(tab)
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        desk = "document.querySelector('#live-desk iframe').contentWindow.desk"
        tab.wait_for_function(f"{desk}.position() > .2 && {desk}.level() > -60")
        frame.locator("#play").focus()
        tab.keyboard.press("Space")
        assert not tab.evaluate(f"{desk}.state.playing")
        tab.focus("#live-again")
        tab.keyboard.press("Enter")
        assert tab.locator("#live-toy").is_visible() and tab.evaluate(
            "!live.sounds && document.activeElement.id === 'live-toy'"
        )


@pytest.mark.browser
def test_the_funk_band(site, browser):
    "The song that comes with the package, as it is in Python but for 16 bits."
    from deepdemix.foundations.sample_song import sample_song
    with opened(browser, site) as tab:
        tab.wait_for_function("live.files && live.worker")
        tab.click("#live-funk")
        finished(tab)
        assert tab.locator("#live-status").inner_text().startswith("The funk band came apart")
        assert apart(tab, "mixture", sample_song().sum(0)) < 1e-4


@pytest.mark.browser
def test_cancel(site, browser):
    "It stops at once, and the next song goes through."
    with opened(browser, site) as tab:
        tab.wait_for_function("live.files && live.worker")
        tab.click("#live-toy")
        tab.wait_for_function("/^separating/.test(document.getElementById('live-status').textContent)")
        tab.click("#live-cancel")
        assert (
            tab.locator("#live-status").inner_text() == "cancelled" and tab.locator("#live-toy").is_visible()
        )
        tab.click("#live-toy")
        finished(tab)


@pytest.mark.browser
@pytest.mark.parametrize(
    "content,words", [(b"this is no sound", "decode"), (b"", "decode"), (None, "silent")]
)
def test_files_that_are_no_songs(content, words, site, browser, tmp_path):
    if content is None: write(tmp_path / "x.wav", torch.zeros(2, 4410), 44100)
    else: (tmp_path / "x.wav").write_bytes(content)
    with opened(browser, site) as tab:
        tab.set_input_files("#live-file", tmp_path / "x.wav")
        tab.wait_for_function("document.getElementById('live').classList.contains('trouble')")
        assert (tab.locator("#live-status").inner_text() == tab.evaluate(f"live.words.{words}")
                and tab.locator("#live-toy").is_visible())


@pytest.mark.browser
def test_a_tab_without_webassembly(site, browser):
    with opened(browser, site) as tab:
        tab.add_init_script("delete globalThis.WebAssembly")
        tab.reload()
        tab.wait_for_function("document.getElementById('live').classList.contains('trouble')")
        assert "WebAssembly" in tab.locator("#live-status").inner_text()


@pytest.mark.browser
def test_too_little_memory(site, browser):
    "What the worker says of memory becomes words for a person."
    with opened(browser, site) as tab:
        tab.wait_for_function("live.files && live.worker")
        tab.evaluate(
            "live.ready.then(() => { live.worker.postMessage = function () { this.onmessage({ data: { kind:"
            " 'error', text: 'std::bad_alloc' } }); }; })"
        )
        tab.click("#live-toy")
        tab.wait_for_function("document.getElementById('live').classList.contains('trouble')")
        assert "too little memory" in tab.locator("#live-status").inner_text()


@pytest.mark.browser
def test_mono(site, browser, tmp_path):
    "One channel, dropped on the page, goes in twice and comes back as one."
    write(tmp_path / "mono.wav", toy_song(12, duration=3.).sum(0).mean(0, keepdim=True) / 2, 44100, "FLOAT")
    expected = Separator.from_pretrained("default", device="cpu").separate(tmp_path / "mono.wav")
    with opened(browser, site) as tab:
        tab.evaluate("""text => { const bytes = Uint8Array.from(atob(text), x => x.charCodeAt(0)), dropped = new DataTransfer();
            dropped.items.add(new File([bytes], "mono.wav")); document.getElementById("live").dispatchEvent(new DragEvent("drop", { dataTransfer: dropped })); }""",
            base64.b64encode((tmp_path / "mono.wav").read_bytes()).decode())
        finished(tab)
        for name, y in expected.items(): assert apart(tab, name, y) < 1e-4


@pytest.mark.browser
def test_an_isolated_page_uses_threads(folder, browser, tmp_path):
    "With the headers that allow shared memory: more than one thread, the same stems."
    write(tmp_path / "song.wav", toy_song(13, duration=3.).sum(0) / 2, 44100, "FLOAT")
    expected = Separator.from_pretrained("default", device="cpu").separate(tmp_path / "song.wav")
    with served(
        folder, Cross_Origin_Opener_Policy="same-origin", Cross_Origin_Embedder_Policy="require-corp"
    ) as address, opened(browser, address) as tab:
        assert tab.evaluate("crossOriginIsolated")
        tab.add_init_script("Object.defineProperty(navigator, 'hardwareConcurrency', { value: 2 })")
        tab.reload()
        tab.wait_for_function("live.files && live.worker")
        tab.evaluate("live.ready")
        assert len(tab.workers) > 1
        tab.set_input_files("#live-file", tmp_path / "song.wav")
        finished(tab)
        for name, y in expected.items(): assert apart(tab, name, y) < 1e-4
