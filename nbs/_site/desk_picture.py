"""The picture of the listening desk on the first page, from the desk itself: `python
nbs/_site/desk_picture.py`

Twelve seconds of the toy band, taken apart by the bundled default, in a headless Chromium; it needs
Playwright.
"""
import io
import shutil
import tempfile
from pathlib import Path

from listing import root
from PIL import Image
from playwright.sync_api import sync_playwright

from deepdemix.foundations.toy_band import toy_song
from deepdemix.listening import desk_html
from deepdemix.separation import Separator

WIDTH, SHAPE, SCALE, COLORS = 1120, 1.6, 1.5, 128
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]


def page() -> str:
    "A desk with what the default makes of the toy band."
    song = toy_song(2, 12.0).sum(0)
    stems = Separator.from_pretrained("default", device="cpu").separate(song, 44100)
    return desk_html({"default": stems, "original": song}, 44100, "The toy band")


def picture(page: str) -> bytes:
    "A PNG of the upper part of a desk, with a loop and the cursor in it."
    with sync_playwright() as p, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "desk.html"
        path.write_text(page, encoding="utf-8")
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        tab = browser.new_page(
            viewport=dict(width=WIDTH, height=900), device_scale_factor=SCALE, color_scheme="light"
        )
        tab.goto(path.as_uri())
        tab.wait_for_selector("#play:enabled")
        tab.evaluate("desk.region(3, 6); desk.go(4.2)")
        tab.wait_for_timeout(300)
        made = tab.screenshot(clip=dict(x=0, y=0, width=WIDTH, height=round(WIDTH / SHAPE)))
        browser.close()
    return made


def main() -> None:
    out = io.BytesIO()
    Image.open(io.BytesIO(picture(page()))).convert("RGB").quantize(COLORS).save(out, "PNG", optimize=True)
    (root / "nbs/images/desk.png").write_bytes(out.getvalue())


if __name__ == "__main__": main()
