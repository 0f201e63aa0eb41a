"The listening desk: its script in node, its server on this machine, and the page in a real browser."
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from deepdemix.audio import SOURCE_COLORS, SOURCES
from deepdemix.foundations.encoding import write
from deepdemix.foundations.files import UserError
from deepdemix.foundations.toy_band import toy_song
from deepdemix.listening import DeskServer, desk_html, embed, serve
from deepdemix.networks.recurrent import Recurrent
from deepdemix.separation import Cancelled, Separator
from deepdemix.serving.desk import FLAC_LIMIT, LONG, desk_text
from deepdemix.serving.desk_queue import SongQueue
from deepdemix.serving.songs import SeparatedSong, open_song

RATE = 16000
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
         " --disable-component-update --disable-sync".split())


def tone(frequency, level, seconds=3.0):
    return level * torch.sin(2 * torch.pi * frequency * torch.arange(round(seconds * RATE)) / RATE)[None]


def script_of(page): return page.rsplit("<script>", 1)[1].split("</script>")[0]


def data_of(page): return json.loads(page.split('id="data">')[1].split("</script>")[0])


def untrained():
    return Separator(
        Recurrent(single=16, hidden=16, layers=1, window_length=512, hop_length=128, sample_rate=RATE),
        "untrained",
    )


@pytest.fixture(scope="module")
def page():
    """Two models of known levels, and the original: drums are a tone at -20 dB in A and at -40 dB in B; the
    rest is silent or quieter."""
    stems = {
        "drums": tone(440, 0.1 * 2**0.5), "bass": tone(100, 0.01 * 2**0.5), "other": tone(1000, 0.0),
        "vocals": tone(700, 0.001 * 2**0.5),
    }
    return desk_html(
        {"A": stems, "B": {name: x * 0.1 for name, x in stems.items()}, "original": sum(stems.values())},
        RATE, "Levels",
    )


@pytest.fixture(scope="module")
def node():
    found = shutil.which("node")
    if not found: pytest.skip("node is not installed")
    return found


def run_rules(node, code):
    "What node prints, as JSON, after the desk's rules and this code."
    done = subprocess.run(
        [node, "-e", desk_text("rules.js") + code], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_page_holds_every_stem_and_nothing_from_outside(page):
    data = data_of(page)
    assert [x["name"] for x in data["sets"]] == ["A", "B", "original"]
    assert [x["name"] for x in data["sets"][0]["stems"]] == list(SOURCES)
    assert data["duration"] == 3.0 and data["rate"] == RATE
    shell = page.replace(page.split('id="data">')[1].split("</script>")[0], "")
    assert not re.search(r"https?:|//[a-z]|\burl\(.?[a-z]|@import|\bsrc=|XMLHttpRequest|WebSocket",
                         shell.replace('href="data:,"', ""))
    assert "default-src 'none'" in shell


def test_every_control_has_a_name(page):
    for tag in re.findall(r"<(?:input|meter|select)\b[^>]*>", page.split("<body")[1].split("<script")[0]):
        before = page.split(tag)[0]
        assert "aria-label" in tag or before.rfind("<label") > before.rfind("</label>"), tag


def test_script_is_valid(page, node, tmp_path):
    for name, text in (("desk", script_of(page)), ("front", script_of(SongQueue({}).front()))):
        (tmp_path / f"{name}.js").write_text(text, encoding="utf-8")
        done = subprocess.run(
            [node, "--check", tmp_path / f"{name}.js"], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
    (tmp_path / "broken.js").write_text(script_of(page)[:-40], encoding="utf-8")
    assert subprocess.run(
        [node, "--check", tmp_path / "broken.js"], capture_output=True, timeout=30
    ).returncode


@pytest.mark.parametrize(
    "mute,solo,expected",
    [("", "", "abc"), ("a", "", "bc"), ("abc", "", ""), ("", "b", "b"), ("b", "b", "b"), ("a", "bc", "bc"),
     ("ac", "", "b")],
)
def test_mute_and_solo(node, mute, solo, expected):
    tracks = {n: dict(mute=n in mute, solo=n in solo, db=0) for n in "abc"}
    got = run_rules(node, f"console.log(JSON.stringify(audible([...'abc'], {json.dumps(tracks)})))")
    assert got == [n in expected for n in "abc"]


def test_only_the_chosen_set_counts(node):
    """The original is heard although a stem that it doesn't have is soloed; gains are decibels, and -40 is
    off."""
    sets = [dict(stems=[dict(name="a"), dict(name="b")]), dict(stems=[dict(name="mixture")])]
    tracks = {"a": dict(mute=False, solo=True, db=-6),
              "b": dict(mute=False, solo=False, db=0),
              "mixture": dict(mute=False, solo=False, db=0)}
    both = run_rules(
        node,
        f"const s = {json.dumps(sets)}, t = {json.dumps(tracks)}; console.log(JSON.stringify([gains(s, {{set:"
        " 0, tracks: t}), gains(s, {set: 1, tracks: t}), loudness(-40)]))",
    )
    assert both[0] == [[pytest.approx(10 ** -.3), 0], [0]]
    assert both[1:] == [[[0, 0], [1]], 0]


def test_the_clock_goes_round_in_a_loop(node):
    cases = [(dict(at=0, loop=False), 5, 5), (dict(at=0, loop=True), 1.5, 1.5), (dict(at=0, loop=True), 3, 1),
             (dict(at=1.5, loop=True), 4, 1.5), (dict(at=0, loop=True), 3.25, 1.25)]
    for state, elapsed, expected in cases:
        assert run_rules(
            node, f"console.log(instant({json.dumps(dict(state) | {'from': 1, 'to': 3})}, {elapsed}))"
        ) == pytest.approx(expected)
    assert run_rules(node, "console.log(JSON.stringify([0, 9.97, 59.99, 60, 125.5].map(clock)))") == [
        "0:00.0", "0:09.9", "0:59.9", "1:00.0", "2:05.5",
    ]


def test_levels_survive_the_way_into_the_page():
    """Between sets and between stems, the ratio of levels is that of the waveforms, though one of them
    passes full scale."""
    import base64
    import io

    import soundfile
    data = data_of(desk_html({"a": {"drums": tone(440, 2.)}, "b": {"drums": tone(440, .5)}}, RATE))
    peaks = [abs(soundfile.read(io.BytesIO(base64.b64decode(x["stems"][0]["sound"])))[0]).max()
             for x in data["sets"]]
    assert peaks[0] == pytest.approx(.99, abs=1e-3) and peaks[0] / peaks[1] == pytest.approx(4, rel=1e-3)


def test_long_songs_travel_as_mp3_and_the_page_says_so(monkeypatch):
    monkeypatch.setattr("deepdemix.serving.desk.FLAC_LIMIT", 1000)
    data = data_of(desk_html({"a": tone(440, .5)}, RATE))
    assert data["format"] == "mp3" and data["remarks"] == [LONG]
    monkeypatch.undo()
    assert FLAC_LIMIT > 3 * RATE and data_of(desk_html({"a": tone(440, .5)}, RATE))["remarks"] == []


def test_frame_gives_back_the_page(page):
    import html
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', embed(page))[1]) == page


def test_the_picture_of_the_desk_fits_a_page():
    """On the first page and in the README: half as wide again as it is tall, and light.
    `nbs/_site/desk_picture.py` makes it."""
    from PIL import Image
    path = Path(__file__).parent.parent / "nbs/images/desk.png"
    width, height = Image.open(path).size
    assert 1.5 < width / height < 1.65 and path.stat().st_size < 200_000


@pytest.mark.musdb
def test_true_stems_of_a_musdb_song(musdb_path):
    song = open_song(next(iter(sorted((musdb_path / "test").glob("*.stem.mp4")))))
    assert song.sample_rate == 44100 and list(song.stems) == list(SOURCES) and ".stem" not in song.title
    assert song.references and song.label == "true stems"
    error = (sum(song.stems.values()) - song.mixture).square().mean() / song.mixture.square().mean()
    assert 10 * error.log10() < -15


# Machado, Oliveira and Fernandes (2009): how those see linear RGB whose green, red or blue cones are missing.
BLIND = {
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}


def linear(color):
    c = torch.tensor([int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)], dtype=torch.float64)
    return torch.where(c <= .04045, c / 12.92, ((c + .055) / 1.055) ** 2.4)


def lab(rgb):
    "Linear RGB as CIELAB, in which a distance of about 2 is just seen."
    xyz = (
        torch.tensor(
            [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
             [0.0193339, 0.1191920, 0.9503041]],
            dtype=torch.float64,
        )
        @ rgb.clamp(0, 1)
        / torch.tensor([0.95047, 1, 1.08883], dtype=torch.float64)
    )
    x, y, z = torch.where(xyz > .008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def nearest(colors, matrix):
    "The smallest distance between any two colours, as seen through a matrix."
    seen = [lab(matrix @ linear(c)) for c in colors]
    return min(float((a - b).norm()) for i, a in enumerate(seen) for b in seen[:i])


def test_colours_survive_colour_blindness():
    "Five colours stay 15 apart for everyone; red, green and brown of the same lightness would not."
    for name, matrix in BLIND.items():
        assert nearest(SOURCE_COLORS.values(), torch.tensor(matrix, dtype=torch.float64)) > 15, name
    assert nearest(["#a05000", "#6b6b00"], torch.tensor(BLIND["deutan"], dtype=torch.float64)) < 15


def test_colours_stand_out_from_their_ground():
    "3 to 1 against the desk's cards, light and dark, as WCAG asks of graphics."
    light = lambda c: float(linear(c) @ torch.tensor([.2126, .7152, .0722], dtype=torch.float64))
    cards = re.findall(r"--card: (#\w+)", desk_text("desk.css"))
    assert len(cards) == 2
    for card, colors in zip(cards, (SOURCE_COLORS, SOURCE_COLORS | {"mixture": "#aaa49a"})):
        for name, color in colors.items():
            high, low = sorted((light(color), light(card)), reverse=True)
            assert (high + .05) / (low + .05) >= 3, (name, card)


@contextlib.contextmanager
def serving(models):
    server = DeskServer(models)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try: yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def ask(server, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    try: return answer.status, answer.read().decode()
    finally: connection.close()


def send(server, name, body, model="untrained", **headers):
    "The status and text of the answer to a song."
    return ask(server, "POST", f"/songs?name={name}&model={model}", body, **dict(X_Desk="1") | headers)


def finished(server, limit=30):
    "The songs of a server that has nothing left to do."
    def songs(): return json.loads(ask(server, "GET", "/songs")[1])["songs"]
    end = time.monotonic() + limit
    while any(x["state"] in ("waiting", "working") for x in songs()):
        assert time.monotonic() < end, "the songs don't end"
        time.sleep(.05)
    return songs()


def test_server_takes_songs_and_serves_their_desks(tmp_path):
    "Several, one after the other, without a restart."
    write(tmp_path / "song.wav", toy_song(1, 1., RATE).sum(0), RATE)
    sound = (tmp_path / "song.wav").read_bytes()
    with serving({"untrained": untrained()}) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert ask(server, "GET", "/song/1")[0] == 404
        for name in ("my+song.wav", "another.wav"): assert send(server, name, sound)[0] == 202
        songs = finished(server)
        assert [(x["id"], x["name"], x["state"], x["error"]) for x in songs] == [
            (1, "my song", "ready", None), (2, "another", "ready", None),
        ]
        for number, title in ((1, "my song"), (2, "another")):
            data = data_of(ask(server, "GET", f"/song/{number}")[1])
            assert data["title"] == title and [x["name"] for x in data["sets"]] == ["untrained", "original"]
        assert ask(server, "POST", "/remove?id=1", X_Desk="1")[0] == 200
        assert ask(server, "GET", "/song/1")[0] == 404 and ask(server, "GET", "/song/2")[0] == 200
        assert ask(server, "POST", "/remove?id=1", X_Desk="1")[0] == 404


def fetched(server, path):
    "A sound that a server has."
    import io
    import urllib.request

    import soundfile
    return soundfile.read(
        io.BytesIO(urllib.request.urlopen(f"{server.address}{path}").read()), dtype="float32", always_2d=True
    )


def test_a_served_song_is_lossless_at_any_length(tmp_path, monkeypatch):
    "FLAC of 24 bits, where a page of its own would already be MP3; the original comes back to the last bit."
    monkeypatch.setattr("deepdemix.serving.desk.FLAC_LIMIT", 1000)
    sound = tone(440, .5).expand(2, -1)
    write(tmp_path / "song.wav", sound, RATE, subtype="PCM_24")
    with serving({"untrained": untrained()}) as server:
        send(server, "song.wav", (tmp_path / "song.wav").read_bytes())
        finished(server)
        data = data_of(ask(server, "GET", "/song/1")[1])
        assert data["format"] == "flac" and data["remarks"] == []
        x, rate = fetched(server, f"song/{data['sets'][1]['stems'][0]['url']}")
        assert rate == RATE and abs(torch.from_numpy(x.T) - sound).max() <= 2 ** -23


def stem_folder(folder, *names):
    "Tones of known levels, as stems in a folder."
    for name, frequency, loud in zip(SOURCES, (440, 100, 1000, 700), (.1, .01, 0., .001)):
        if name in (names or SOURCES):
            write(folder / f"{name}.wav", tone(frequency, loud * 2 ** .5), RATE, subtype="FLOAT")
    return folder


def test_stems_are_played_as_they_are(tmp_path):
    "Nothing is separated, called true or scored, unless somebody says that they are the truth."
    stem_folder(tmp_path / "tones")
    def broken(): raise AssertionError("stems that are there must not be separated")
    with serving({"model": broken}) as server:
        server.queue.add(tmp_path / "tones", "model", "tones")
        assert finished(server)[0]["about"] == "stems, played as they are"
        sets = data_of(ask(server, "GET", "/song/1")[1])["sets"]
        assert [x["name"] for x in sets] == ["stems", "sum of the stems"] and not any(
            y["note"] for x in sets for y in x["stems"]
        )
    with serving({"untrained": untrained()}) as server:
        for name, x in zip(SOURCES, toy_song(1, 2., RATE)): write(tmp_path / f"band/{name}.wav", x, RATE)
        server.queue.add(tmp_path / "band", "untrained", "band", references=True)
        assert finished(server)[0]["about"] == "separated with untrained, beside the true stems"
        sets = data_of(ask(server, "GET", "/song/1")[1])["sets"]
        assert [x["name"] for x in sets] == ["untrained", "true stems", "sum of the stems"] and sets[0][
            "stems"
        ][0]["note"].startswith("SDR ")


def test_what_was_separated_lies_beside_its_song(tmp_path):
    "By the name of its model, at the level at which it was written; it isn't separated again."
    write(tmp_path / "song.wav", tone(440, .8), RATE)
    write(tmp_path / "vocals.wav", tone(440, .4), RATE)
    with serving({}) as server:
        server.queue.add(
            SeparatedSong({"vocals": tmp_path / "vocals.wav"}, tmp_path / "song.wav", "default", 0.5), "",
            "song.wav",
        )
        assert finished(server)[0]["about"] == "separated with default"
        data = data_of(ask(server, "GET", "/song/1")[1])
        assert [x["name"] for x in data["sets"]] == ["default", "original"]
        peaks = [abs(fetched(server, f"song/{x['stems'][0]['url']}")[0]).max() for x in data["sets"]]
        assert peaks == pytest.approx([.4, .4], abs=1e-3)


def test_removing_a_song_ends_its_separation(tmp_path, monkeypatch):
    """The one under way stops at the next few seconds of sound, one that waits never begins, and nothing is
    left of either."""
    import tempfile
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    begun, go_on = threading.Event(), threading.Event()
    class Slow:
        name = "slow"
        def separate(self, mixture, rate, progress):
            for seconds in range(100):
                if progress(seconds, 100) is False: raise Cancelled("slow")
                begun.set()
                go_on.wait(10)
                steps.append(seconds)
    steps = []
    monkeypatch.setattr("deepdemix.serving.desk_queue.as_separators", lambda models: models)
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/song.wav", tone(440, .5), RATE)
    with serving({"slow": Slow()}) as server:
        for _ in range(2): send(server, "song.wav", (tmp_path / "in/song.wav").read_bytes(), "slow")
        assert begun.wait(10)
        first, second = json.loads(ask(server, "GET", "/songs")[1])["songs"]
        assert (first["state"], first["stage"], first["total"], second["state"]) == (
            "working", "separating with slow", 3, "waiting",
        )
        for number in (2, 1): assert ask(server, "POST", f"/remove?id={number}", X_Desk="1")[0] == 200
        go_on.set()
        deadline = time.monotonic() + 10
        while (server.queue.worker or len(list(tmp_path.iterdir())) > 1) and time.monotonic() < deadline:
            time.sleep(.02)
        assert len(steps) == 1 and finished(server) == [] and [x.name for x in tmp_path.iterdir()] == ["in"]


def test_server_says_what_is_wrong_with_a_song():
    with serving({"untrained": untrained()}) as server:
        send(server, "notes.txt", b"no sound")
        song, = finished(server)
        assert song["state"] == "failed" and "notes.txt" in song["error"]
        assert send(server, "a.wav", b"x", "other")[0] == 404


def test_server_refuses_strangers():
    """A page of another site can't send the header, and a name bent to this address isn't this host's; nor
    do paths lead to files."""
    with serving({"untrained": untrained()}) as server:
        for path in ("/songs?name=a.wav&model=untrained", "/remove?id=1"):
            assert ask(server, "POST", path, b"x")[0] == 403
        assert ask(server, "GET", "/", Host="evil.example")[0] == 403
        for path in (
            "/../../etc/passwd", "/song/1/../../etc/passwd", "/song/-1", "/song/1/0.flac", "/song/%31",
        ):
            assert ask(server, "GET", path)[0] == 404
        assert not list(server.queue)
        assert ask(server, "GET", "/")[0] == 200


def test_serve_ends_with_ctrl_c(tmp_path, monkeypatch, capsys):
    def interrupted(self): raise KeyboardInterrupt
    monkeypatch.setattr(DeskServer, "serve_forever", interrupted)
    monkeypatch.setattr(
        SongQueue, "add", lambda self, song, label, name, **opening: begun.append((label, name, opening))
    )
    begun = []
    write(tmp_path / "song.wav", tone(440, .5), RATE)
    serve(tmp_path / "song.wav", untrained(), open_browser=False)
    assert "http://127.0.0.1:" in capsys.readouterr().out and begun == [
        ("untrained", "song.wav", dict(track=1, references=False))
    ]


def test_serve_on_a_port_that_is_taken():
    with serving({"untrained": untrained()}) as server:
        with pytest.raises(UserError, match="port"):
            serve(None, untrained(), server.server_port, open_browser=False)


@pytest.mark.parametrize(
    "host,status",
    [("localhost", 200), ("127.0.0.1", 200), ("LocalHost:9000", 200), ("127.0.0.1:1", 200), ("[::1]:80", 200),
     ("localhost.:80", 200), ("localhost.evil.example", 403), ("evil.example:80", 403), ("evil.example", 403),
     ("127.0.0.1.evil.example", 403), ("evil.example#localhost", 403), ("localhost:80@evil.example", 403),
     ("", 403)],
)
def test_the_name_of_the_host_counts_and_not_its_port(host, status):
    "Browsers leave port 80 out; a forwarded port has another number."
    with serving({"untrained": untrained()}) as server:
        assert ask(server, "GET", "/", Host=host)[0] == status
        answer = send(server, "a.wav", b"x", Host=host)[0]
        assert answer == (202 if status == 200 else 403)
        finished(server)


def test_an_upload_that_cannot_be_written_is_over(tmp_path, monkeypatch):
    import tempfile
    with serving({"untrained": untrained()}) as server:
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
            status, text = send(server, "a.wav", b"x" * 1000)
        assert status == 507 and text.startswith("a.wav can't be kept here: ") and "gone" not in text
        assert finished(server) == []
        assert send(server, "a.wav", b"x")[0] == 202


@pytest.mark.parametrize(
    "name",
    [
        "..", ".", "", "x" * 5000 + ".wav", "a%00b.wav", "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "C%3A%5Csongs%5Ca.wav", "%F0%9F%98%80.wav",
    ],
)
def test_an_upload_of_any_name(name):
    with serving({"untrained": untrained()}) as server:
        for _ in range(2):
            assert send(server, name, b"no sound")[0] == 202
            song = finished(server)[-1]
            assert song["state"] == "failed" and "is not an audio file" in song["error"]


def test_a_stalled_upload_blocks_nobody(tmp_path):
    "One that never goes on, one that breaks off, and a third that is whole."
    write(tmp_path / "song.wav", tone(440, .5), RATE)
    with serving({"untrained": untrained()}) as server:
        server.patience = 1.
        head = ("POST /songs?name=slow.wav&model=untrained HTTP/1.1\r\nHost:"
                f" localhost:{server.server_port}\r\nX-Desk: 1\r\nContent-Length: 100000\r\n\r\nten bytes "
                .encode())
        stalled, broken = (socket.create_connection(("127.0.0.1", server.server_port), 20) for _ in range(2))
        for connection in (stalled, broken): connection.sendall(head)
        broken.shutdown(socket.SHUT_WR)
        assert send(server, "song.wav", (tmp_path / "song.wav").read_bytes())[0] == 202
        assert [x["state"] for x in finished(server)] == ["ready"]
        for connection in (stalled, broken):
            answer = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
            assert " 408 " in answer.splitlines()[0] and answer.endswith(
                "slow.wav has not come in whole: send it again"
            )
            connection.close()
        assert [x["name"] for x in finished(server)] == ["song"], "what has not come in whole is no song"


def test_nothing_is_left_of_uploads(tmp_path, monkeypatch):
    import tempfile
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serving({"untrained": untrained()}) as server:
        server.patience = .2
        for body in (b"no sound", None):
            if body: send(server, "a.wav", body)
            else: send(server, "a.wav", b"", Content_Length="50")
            finished(server)
        deadline = time.monotonic() + 10
        while list(tmp_path.iterdir()) and time.monotonic() < deadline: time.sleep(.05)
        assert list(tmp_path.iterdir()) == []


def test_errors_speak_of_the_song_and_not_of_a_temporary_file():
    import tempfile

    import deepdemix.serving.songs as songs
    with serving({"untrained": untrained()}) as server:
        for patch, kind in ((None, "is not an audio file"), (lambda path, **_: 1 / 0, "ZeroDivisionError"),
                            (lambda path, **_: open(f"{path}x"), "No such file")):
            with pytest.MonkeyPatch.context() as m:
                if patch: m.setattr(songs, "read", patch)
                send(server, "my%20notes.txt", b"no sound")
                error = finished(server)[-1]["error"]
            assert error.startswith("my notes") and kind in error and tempfile.gettempdir() not in error


def test_a_thread_that_cannot_start_leaves_the_desk_free(monkeypatch):
    server = DeskServer({"untrained": untrained()})
    with monkeypatch.context() as patch:
        def start(self): raise RuntimeError("can't start new thread")
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError): server.queue.add("song.wav", "untrained", "song")
    assert not list(server.queue) and server.queue.worker is None
    server.server_close()


def test_a_browser_that_goes_away_is_no_error(capfd):
    with serving({"untrained": untrained()}) as server:
        server.queue.sound = lambda *_: b"x" * 20_000_000
        with socket.create_connection(("127.0.0.1", server.server_port), 20) as connection:
            connection.sendall(
                f"GET /song/1/0.flac HTTP/1.1\r\nHost: localhost:{server.server_port}\r\n\r\n".encode()
            )
            connection.recv(10)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        assert ask(server, "GET", "/")[0] == 200
        time.sleep(.3)
    assert capfd.readouterr().err == ""


def test_a_port_that_is_none():
    with pytest.raises(UserError, match="port 70000"): serve(None, untrained(), 70000, open_browser=False)


def test_the_desk_opens_without_standard_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(DeskServer, "serve_forever", lambda self: None)
    for name in ("stdout", "stderr"): monkeypatch.setattr(sys, name, None)
    serve(None, untrained(), open_browser=False)


def test_names_that_are_no_text(tmp_path):
    "A file whose name is no UTF-8: the page shows what can be shown of it."
    path = tmp_path / os.fsdecode(b"latin \xe9.wav")
    write(path, tone(440, .5, 1.), RATE)
    with serving({"untrained": untrained()}) as server:
        server.queue.add(path, "untrained", path.name)
        assert (finished(server)[0]["error"] is None
                and "<h1>latin ?.wav</h1>" in ask(server, "GET", "/song/1")[1])


def test_the_second_track_of_a_film(tmp_path):
    import av
    with av.open(str(tmp_path / "film.mkv"), "w") as container:
        for stream in [
            container.add_stream("pcm_s16le", rate=RATE, layout=layout) for layout in ("stereo", "mono")
        ]:
            frame = av.AudioFrame.from_ndarray(
                torch.zeros(1, 8000 * stream.layout.nb_channels).short().numpy(), format="s16",
                layout=stream.layout.name,
            )
            frame.sample_rate = RATE
            for packet in [*stream.encode(frame), *stream.encode(None)]: container.mux(packet)
    assert [len(open_song(tmp_path / "film.mkv", track=n).mixture) for n in (1, 2)] == [2, 1]
    with pytest.raises(UserError, match="has 2 sound track"):
        serve(tmp_path / "film.mkv", untrained(), open_browser=False, track=3)


@pytest.mark.parametrize("rate", [0, -1, "44100", None])
def test_rates_of_songs_in_memory(rate):
    for call in (lambda: open_song(tone(440, .5), rate), lambda: desk_html({"a": tone(440, .5)}, rate)):
        with pytest.raises(UserError): call()


def test_arrays_of_songs_in_memory():
    x = tone(440, .5)[0].numpy()
    assert torch.equal(open_song(x[::-1], RATE).mixture[0], torch.from_numpy(x[::-1].copy()))
    with pytest.raises(UserError, match="floats"): open_song((x * 32767).astype("int16"), RATE)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium: pytest.skip("no Chromium")
    with playwright.sync_playwright() as p:
        context = p.chromium.launch_persistent_context(tmp_path_factory.mktemp("profile"),
                                                       executable_path=chromium, headless=True, args=FLAGS,
                                                       viewport=dict(width=1100, height=700))
        yield context
        context.close()


@contextlib.contextmanager
def opened(browser, address, widgets=False, but="$^"):
    """A tab that fails on errors of the script, on warnings unless it is another program's page, and on
    requests to anywhere else; those to `but` get nothing and don't count."""
    tab, wrong = browser.new_page(), []
    own = address.split("/")[2] if address.startswith("http") else None
    if but != "$^":
        tab.route(
            re.compile(but),
            lambda route: (route.continue_() if route.request.url.startswith(f"http://{own}/")
                           else route.fulfill(body="", content_type="text/css")),
        )
    tab.on(
        "console",
        lambda m: (wrong.append(m.text) if (m.type == "error" or m.type == "warning" and not widgets)
                   and not re.search(but, m.text + m.location["url"]) else None),
    )
    tab.on("pageerror", lambda e: wrong.append(str(e)))
    tab.on(
        "request",
        lambda r: (
            wrong.append(r.url)
            if not (re.search(but, r.url) or r.url.startswith(("file:", "data:", "blob:")) or own
                    and r.url.startswith(f"http://{own}/"))
            else None
        ),
    )
    tab.goto(address, timeout=120000)
    try:
        yield tab
        assert not wrong, wrong
    finally: tab.close()


@pytest.fixture
def desk(browser, page, tmp_path):
    (tmp_path / "desk.html").write_text(page, encoding="utf-8")
    with opened(browser, (tmp_path / "desk.html").as_uri()) as tab:
        tab.wait_for_selector("#play:enabled")
        yield tab


def level(tab):
    "What leaves the graph, in dB, once gains have settled and the meter's window has passed."
    tab.wait_for_timeout(350)
    return tab.evaluate("desk.level()")


@pytest.mark.browser
def test_what_is_heard_follows_the_buttons(desk):
    """Levels read from the running Web Audio graph: drums -20 dB, bass -40 dB, vocals -60 dB; B is 20 dB
    below A."""
    desk.evaluate("desk.region(0, 3)")
    desk.click("#play")
    assert level(desk) == pytest.approx(-20, abs=.3)
    desk.click("[aria-label='Mute drums']")
    assert level(desk) == pytest.approx(-40, abs=.3)
    desk.keyboard.press("Shift+Digit4")
    assert level(desk) == pytest.approx(-60, abs=.5)
    before = desk.evaluate("desk.position()")
    desk.keyboard.press("s")
    assert 0 <= (desk.evaluate("desk.position()") - before) % 3 < .5
    assert level(desk) == pytest.approx(-80, abs=1.5)
    assert "vocals of B" in desk.inner_text("#status")
    desk.keyboard.press("s")
    assert level(desk) == pytest.approx(-20, abs=.3)
    desk.keyboard.press("Space")
    assert desk.inner_text("#play") == "Play" and not desk.evaluate("desk.state.playing")


@pytest.mark.browser
def test_volume_of_a_track(desk):
    desk.evaluate("desk.region(0, 3)")
    desk.locator("[aria-label='Volume of drums, in decibels']").fill("-12")
    desk.click("[aria-label='Solo drums']")
    desk.click("#play")
    assert level(desk) == pytest.approx(-32, abs=.3)
    assert "-12.0 dB" in desk.inner_text("[data-stem=drums]")


@pytest.mark.browser
def test_loop_by_dragging_and_seek_by_clicking(desk):
    box = desk.locator("[data-stem=bass] .lane").bounding_box()
    at = lambda part: (box["x"] + part * box["width"], box["y"] + box["height"] / 2)
    desk.mouse.click(*at(.5))
    assert desk.evaluate("desk.position()") == pytest.approx(1.5, abs=.02)
    desk.mouse.move(*at(.6))
    desk.mouse.down()
    desk.mouse.move(*at(.7))
    desk.mouse.up()
    assert desk.evaluate("[desk.state.loop, desk.state.from, desk.state.to]") == [
        True, pytest.approx(1.8, abs=0.02), pytest.approx(2.1, abs=0.02),
    ]
    desk.click("#play")
    desk.wait_for_timeout(900)
    assert 1.79 <= desk.evaluate("desk.position()") <= 2.12 and desk.evaluate("desk.state.playing")


@pytest.mark.browser
def test_without_a_loop_the_end_stops(desk):
    desk.click("#play")
    desk.wait_for_selector("#play:text-is('Pause')")
    desk.evaluate("desk.go(2.8)")
    desk.wait_for_selector("#play:text-is('Play')", timeout=5000)
    assert desk.evaluate("desk.position()") == 0


@pytest.mark.browser
def test_keyboard_alone(desk):
    "Tab reaches every control; space on a focused button is that button's."
    desk.focus("[aria-label='Mute bass']")
    desk.keyboard.press("Space")
    assert (desk.get_attribute("[aria-label='Mute bass']", "aria-pressed") == "true"
            and desk.inner_text("[aria-label='Mute bass']") == "Muted")
    assert not desk.evaluate("desk.state.playing")
    reached = set()
    desk.evaluate("document.activeElement.blur()")
    for _ in range(60):
        desk.keyboard.press("Tab")
        reached.add(
            desk.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label') ||"
                          " document.activeElement.tagName")
        )
    assert {
        "play", "start", "position", "loop", "from", "to", "tempo", "view", "volume", "zoom-in", "save-mix",
        "save-all",
    } | {f"{what} {stem}" for what in ("Mute", "Solo", "Download") for stem in SOURCES} <= reached
    assert {f"Volume of {stem}, in decibels" for stem in SOURCES} | {
        f"Pan of {stem}, left to right" for stem in SOURCES
    } <= reached


@pytest.mark.browser
def test_nothing_is_said_by_colour_alone(desk):
    """Without any colour, names, numbers and words still tell tracks apart, and muted from not muted, heard
    from silent."""
    for i, name in enumerate(SOURCES):
        row = desk.locator(f"[data-stem={name}]")
        assert row.locator("b").inner_text() == name and row.locator("kbd").inner_text() == str(i + 1)
    desk.click("[aria-label='Solo bass']")
    assert (desk.inner_text("[aria-label='Solo bass']") == "Soloed"
            and desk.inner_text("[aria-label='Solo drums']") == "Solo")
    said = desk.evaluate("[...document.querySelectorAll('.row:not([hidden])')].map(r =>"
                         " getComputedStyle(r.querySelector('.lane'), '::after').content)")
    assert (said == ['"silent"', "none", '"silent"', '"silent"']
            and "playing" not in desk.inner_text("#status") and "bass" in desk.inner_text("#status"))


@pytest.mark.browser
def test_dark_desk(browser, page, tmp_path):
    "Where the system is dark, the untouched song is drawn in a light gray."
    (tmp_path / "desk.html").write_text(page, encoding="utf-8")
    with opened(browser, (tmp_path / "desk.html").as_uri()) as tab:
        tab.wait_for_selector("#play:enabled")
        for scheme, expected in (("light", SOURCE_COLORS["mixture"]), ("dark", "#aaa49a")):
            tab.emulate_media(color_scheme=scheme)
            assert (tab.evaluate("color('mixture')") == expected
                    and tab.evaluate("color('bass')") == SOURCE_COLORS["bass"])


@pytest.mark.browser
def test_a_frame_is_as_tall_as_its_desk(browser, page, tmp_path):
    "Within another page nothing of the desk is hidden, on a phone as on a screen."
    (tmp_path / "outer.html").write_text(f"<!DOCTYPE html>{embed(page, 300)}", encoding="utf-8")
    with opened(browser, (tmp_path / "outer.html").as_uri()) as tab:
        inside = inner(tab)
        for width in (1100, 390):
            tab.set_viewport_size(dict(width=width, height=800))
            tab.wait_for_timeout(300)
            shown = tab.locator("iframe").bounding_box()["height"]
            needed = inside.evaluate("document.querySelector('main').getBoundingClientRect().height")
            assert (needed <= shown <= needed + 2
                    and inside.evaluate("document.documentElement.scrollWidth") <= width)


@pytest.mark.browser
def test_download_is_the_stem(desk):
    with desk.expect_download() as got: desk.click("[aria-label='Download bass']")
    assert got.value.suggested_filename == "Levels - A - bass.flac"
    import soundfile
    x, rate = soundfile.read(got.value.path(), dtype="float32")
    assert rate == RATE and abs(torch.from_numpy(x) - tone(100, .01 * 2 ** .5)[0]).max() < 1e-4


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 661, 748, 1100])
def test_fits_its_window(desk, width):
    desk.set_viewport_size(dict(width=width, height=800))
    desk.wait_for_timeout(100)
    assert desk.evaluate("document.documentElement.scrollWidth") <= width
    drawn = desk.evaluate(
        "[...document.querySelectorAll('.row:not([hidden]) canvas')].map(c => { const d ="
        " c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0; for (let i = 3; i <"
        " d.length; i += 4) n += d[i] > 0; return n; })"
    )
    assert len(drawn) == 4 and min(drawn) > 200


@pytest.mark.browser
def test_page_without_code(browser, tmp_path):
    "Choose a song, and its desk opens."
    write(tmp_path / "song.wav", toy_song(1, 1., RATE).sum(0), RATE)
    with serving({"untrained": untrained()}) as server, opened(browser, server.address) as tab:
        tab.set_input_files("#file", tmp_path / "song.wav")
        tab.wait_for_selector("#play:enabled", timeout=30000)
        assert tab.inner_text("h1") == "song" and tab.locator("#sets input").count() == 2


def until(tab, holds, seconds=30):
    "Wait for something that the page can be asked; its policy forbids Playwright's own way."
    end = time.monotonic() + seconds
    while not tab.evaluate(holds):
        assert time.monotonic() < end, holds
        tab.wait_for_timeout(50)


def saved(tab, action, tmp_path):
    "(name, path) of what is saved by an action."
    with tab.expect_download() as got: action()
    got.value.save_as(tmp_path / got.value.suggested_filename)
    return got.value.suggested_filename, tmp_path / got.value.suggested_filename


@pytest.mark.browser
def test_the_mix_is_saved_as_it_is_heard(desk, tmp_path):
    """Drums alone, 12 dB down, in a WAV file of 24 bits; panned hard right the right channel holds both, as
    Web Audio has it, and the left one nothing."""
    import soundfile
    desk.locator("[aria-label='Volume of drums, in decibels']").fill("-12")
    desk.locator("[aria-label='Pan of drums, left to right']").fill("1")
    desk.click("[aria-label='Solo drums']")
    name, path = saved(desk, lambda: desk.keyboard.press("e"), tmp_path)
    x, rate = soundfile.read(path, dtype="float32")
    assert (name == "Levels - A - mix.wav" and soundfile.info(path).subtype == "PCM_24"
            and (rate, len(x)) == (RATE, 3 * RATE))
    expected = 2 * 10 ** (-12 / 20) * tone(440, .1 * 2 ** .5)[0]
    assert abs(x[:, 0]).max() < 1e-6 and abs(torch.from_numpy(x[:, 1]) - expected).max() < 1e-4
    desk.wait_for_selector("#save-mix:enabled")
    assert desk.inner_text("#status") == "saved this mix"


@pytest.mark.browser
def test_all_tracks_are_saved_without_loss(desk, tmp_path):
    import io
    import zipfile

    import soundfile
    name, path = saved(desk, lambda: desk.keyboard.press("Shift+e"), tmp_path)
    assert name == "Levels - A.zip"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.namelist() == [f"{x}.flac" for x in SOURCES]
        x, rate = soundfile.read(io.BytesIO(archive.read("bass.flac")), dtype="float32")
    assert rate == RATE and abs(torch.from_numpy(x) - tone(100, .01 * 2 ** .5)[0]).max() <= 2 ** -15
    assert open_song(path).label == "stems", "what the desk saves it can open"


CROSSINGS = """() => { const x = new Float32Array(graph.meter.fftSize); graph.meter.getFloatTimeDomainData(x);
    let n = 0; for (let i = 1; i < x.length; i++) n += x[i - 1] < 0 && x[i] >= 0; return n * context.sampleRate / x.length; }"""


@pytest.mark.browser
def test_another_tempo_keeps_the_pitch(desk, tmp_path):
    """At half the tempo the position goes half as fast, 440 Hz stay 440 Hz, and the level stays; so does the
    saved mix, twice as long."""
    import soundfile
    desk.click("[aria-label='Solo drums']")
    for _ in range(10): desk.keyboard.press("Comma")
    assert desk.inner_text("#tempo-text") == "50 %" and "at 50 % tempo" in desk.inner_text("#status")
    desk.keyboard.press("Space")
    until(desk, "desk.position() > .2")
    went = desk.evaluate(
        "new Promise(done => { const t = context.currentTime, p = desk.position(); setTimeout(() =>"
        " done((desk.position() - p) / (context.currentTime - t)), 600); })"
    )
    assert went == pytest.approx(.5, abs=.03)
    assert desk.evaluate(CROSSINGS) == pytest.approx(440, rel=0.02) and level(desk) == pytest.approx(
        -20, abs=0.5
    )
    desk.keyboard.press("Space")
    _, path = saved(desk, lambda: desk.click("#save-mix"), tmp_path)
    x, rate = soundfile.read(path)
    assert len(x) / rate == pytest.approx(6, abs=.1)
    crossings = ((x[:-1, 0] < 0) & (x[1:, 0] >= 0)).sum() / (len(x) / rate)
    assert crossings == pytest.approx(440, rel=.02)
    desk.keyboard.press("Slash")
    assert desk.inner_text("#tempo-text") == "100 %"


def view(tab): return tab.evaluate("[desk.state.left, desk.state.right]")


@pytest.mark.browser
def test_zoom_and_scroll(desk):
    """By key, button, wheel and slider; a click means the place that is seen, and the view goes along with
    what plays."""
    assert view(desk) == [0, 3] and not desk.locator("#scrolling").is_visible()
    desk.evaluate("desk.go(1.5)")
    desk.keyboard.press("+")
    assert view(desk) == pytest.approx([.75, 2.25])
    desk.click("#zoom-in")
    assert view(desk) == pytest.approx([1.125, 1.875])
    box = desk.locator("[data-stem=bass] .lane").bounding_box()
    desk.mouse.click(box["x"] + .5 * box["width"], box["y"] + 20)
    assert desk.evaluate("desk.position()") == pytest.approx(1.5, abs=.01)
    desk.focus("#scroll")
    desk.keyboard.press("Home")
    assert view(desk) == pytest.approx([0, .75])
    desk.evaluate("document.activeElement.blur(); desk.go(0); desk.zoom(1)")
    desk.keyboard.press("Space")
    until(desk, "desk.state.left > .5")
    desk.keyboard.press("Space")
    left, right = view(desk)
    assert left <= desk.evaluate("desk.position()") <= right
    desk.mouse.move(box["x"] + .5 * box["width"], box["y"] + 20)
    desk.keyboard.down("Control")
    desk.mouse.wheel(0, 200)
    desk.keyboard.up("Control")
    assert view(desk)[1] - view(desk)[0] == pytest.approx(1.5, abs=.01)
    desk.keyboard.press("0")
    assert view(desk) == [0, 3] and desk.locator("#zoom-out").is_disabled()


def drop(tab, *paths):
    "Let files fall on the page."
    import base64
    files = [[path.name, base64.b64encode(path.read_bytes()).decode()] for path in paths]
    tab.evaluate("""files => { const dropped = new DataTransfer();
        for (const [name, text] of files) dropped.items.add(new File([Uint8Array.from(atob(text), x => x.charCodeAt(0))], name));
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true, cancelable: true })); }""", files)


def queue_of(tab):
    return [" ".join(x.split()) for x in tab.locator("#queue li > div:first-child").all_text_contents()]


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1100])
def test_many_songs_on_one_desk(browser, tmp_path, width):
    """Chosen, dropped, and a folder of stems: each has its desk, without a restart; one is removed, and all
    of it works by keys."""
    for name in ("one", "two", "three"): write(tmp_path / f"{name}.wav", toy_song(1, 1., RATE).sum(0), RATE)
    stem_folder(tmp_path / "tones")
    (tmp_path / "tones/notes.txt").write_text("about the tones")
    with serving({"untrained": untrained(), "default": "default"}) as server, opened(
        browser, server.address
    ) as tab:
        chosen = []
        tab.on("filechooser", lambda chooser: chosen.append(chooser))
        tab.set_viewport_size(dict(width=width, height=844))
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.locator("#models b").all_inner_texts() == ["untrained", "default"]
        assert "a network of your own" in tab.inner_text("#models") and "band-split" in tab.inner_text(
            "#models"
        )
        tab.keyboard.press("o")
        for _ in range(100):
            if not chosen: tab.wait_for_timeout(50)
        chosen[0].set_files([tmp_path / "one.wav"])
        tab.wait_for_selector("#play:enabled", timeout=30000)
        assert tab.inner_text("h1") == "one"
        tab.set_input_files("#folder", tmp_path / "tones")
        drop(tab, tmp_path / "two.wav", tmp_path / "three.wav")
        until(tab, "document.querySelectorAll('#queue a:not([hidden])').length === 3")
        assert sorted(queue_of(tab)) == sorted([
            "one on this page; separated with untrained", "tones stems, played as they are",
            "two separated with untrained", "three separated with untrained",
        ])
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        titles = {tab.inner_text("h1")}
        for _ in range(3):
            before = tab.url
            tab.keyboard.press("n")
            tab.wait_for_url(lambda url: url != before)
            tab.wait_for_selector("#play:enabled", timeout=30000)
            until(tab, "document.querySelectorAll('#queue li').length === 4")
            titles.add(tab.inner_text("h1"))
        assert titles == {"one", "two", "three", "tones"}
        tab.click("#songs-title")
        tab.focus("[aria-label='Remove one']")
        tab.keyboard.press("Enter")
        until(tab, "document.querySelectorAll('#queue li').length === 3")
        assert tab.inner_text("#news") == "removed one" and len(list(server.queue)) == 3


CONTROLS = "button|slider|radio|spinbutton|link|progressbar|meter|img|textbox|checkbox|list|heading"


def unnamed(tab):
    "Controls that a screen reader can't name, and how many regions it reads out when they change."
    seen = tab.locator("body").aria_snapshot()
    return re.findall(rf'^ *- (?:{CONTROLS})(?: \[[^"]*)?:?$', seen, re.M), len(
        re.findall("^ *- status", seen, re.M)
    )


@pytest.mark.browser
def test_a_screen_reader_names_every_control(desk, browser, tmp_path):
    "On a page by itself and on one with songs; values of sliders are not read out over and over."
    assert unnamed(desk) == ([], 1)
    desk.keyboard.press("Comma")
    assert desk.get_attribute("#tempo", "aria-valuetext") == "95 %"
    stem_folder(tmp_path / "tones")
    with serving({"untrained": untrained()}) as server:
        server.queue.add(tmp_path / "tones", "untrained", "tones")
        finished(server)
        with opened(browser, f"{server.address}song/1") as tab:
            tab.wait_for_selector("#play:enabled")
            until(tab, "document.querySelectorAll('#queue li').length === 1")
            tab.click("#songs-title")
            assert unnamed(tab) == ([], 2)
            assert (tab.get_by_role("radio", name="untrained").count() == 1
                    and tab.get_by_role("button", name="Remove tones").count() == 1)
            tab.evaluate("document.querySelector('.solo').removeAttribute('aria-label');"
                         " document.querySelector('.solo').textContent = ''")
            assert [x.strip() for x in unnamed(tab)[0]] == ["- button"]


@pytest.mark.browser
def test_a_separation_is_cancelled(browser, tmp_path, monkeypatch):
    "How far it is can be seen and heard by a screen reader; Cancel ends it, and the next song goes on."
    go_on = threading.Event()
    class Slow:
        name = "slow"
        def separate(self, mixture, rate, progress):
            for part in range(4):
                if progress(part * .25, 1) is False: raise Cancelled("slow")
                if part == 2: go_on.wait(20)
            return dict(vocals=mixture)
    monkeypatch.setattr("deepdemix.serving.desk_queue.as_separators", lambda models: models)
    for name in ("one", "two"): write(tmp_path / f"{name}.wav", tone(440, .5, 1.), RATE)
    with serving({"slow": Slow()}) as server, opened(browser, server.address) as tab:
        drop(tab, tmp_path / "one.wav", tmp_path / "two.wav")
        until(tab, "document.querySelector('#queue').innerText.includes('50 %')")
        assert (queue_of(tab) == ["one separating with slow: 50 %", "two waiting"]
                and tab.inner_text("#count") == "(2, 2 under way)")
        assert tab.get_by_label("Progress of one").get_attribute("value") == "0.5"
        tab.focus("[aria-label='Cancel one']")
        tab.keyboard.press("Enter")
        until(tab, "document.querySelector('#news').innerText === 'cancelled one'")
        go_on.set()
        tab.wait_for_selector("#play:enabled", timeout=20000)
        assert tab.inner_text("h1") == "two" and [x.name for x in server.queue] == ["two"]


NOTEBOOK = """import torch
from deepdemix.serving.exploring import explore_mix
from deepdemix.listening import listen
def tone(frequency, level): return level * 2 ** .5 * torch.sin(2 * torch.pi * frequency * torch.arange(3 * 16000) / 16000)[None]
stems = {"drums": tone(440, .1), "bass": tone(100, .01), "other": tone(1000, 0.), "vocals": tone(700, .001)}"""


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    "A notebook with a desk and an explorer of tones of known levels."
    import nbformat
    path = tmp_path_factory.mktemp("notebook") / "desk.ipynb"
    cells = [
        nbformat.v4.new_code_cell(x)
        for x in (NOTEBOOK, "listen(stems, None, sample_rate=16000)",
                  "explore_mix(stems, 16000, seconds=3.0)")
    ]
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=cells,
            metadata={"kernelspec": dict(name="python3", display_name="Python 3", language="python")},
        ),
        path,
    )
    return path


@contextlib.contextmanager
def program(arguments, folder, ready, **settings):
    "A program on this machine, once it answers; its address ends up in the second value that `ready` finds."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log.txt"
    env = (
        os.environ
        | dict(HOME=str(folder), JUPYTER_CONFIG_DIR=str(folder / "config"), BROWSER="true",
               OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
        | settings
    )
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, *(x.replace("PORT", str(port)) for x in arguments)],
                                   cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT,
                                   start_new_session=True)
    try:
        end = time.monotonic() + 120
        while not (found := re.search(ready, log.read_text())):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(.1)
        yield found[1] if found.groups() else f"http://127.0.0.1:{port}/"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try: process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def inner(place, k=0):
    "The page inside the `k`-th frame with a desk, once its sound is open."
    frame = (
        place.locator("iframe[title='Listening desk']").nth(k).element_handle(timeout=120000).content_frame()
    )
    frame.wait_for_selector("#play:enabled", timeout=60000)
    return frame


def plays_mutes_and_switches(frame):
    "Drums are at -20 dB, bass at -40, vocals at -60, read from the running graph of the frame's page."
    frame.evaluate("desk.region(0, 3)")
    frame.click("#play")
    assert level(frame) == pytest.approx(-20, abs=.3)
    frame.click("[aria-label='Mute drums']")
    assert level(frame) == pytest.approx(-40, abs=.3)
    frame.click("[aria-label='Solo vocals']")
    assert level(frame) == pytest.approx(-60, abs=.5)
    frame.click("#play")


def explores_with_keys(tab):
    """The field of the drums, found by its name and turned by keys alone, turns the drums down; the song as
    it was lies beside."""
    field = tab.get_by_label("Drums, in dB")
    field.focus()
    assert field.input_value() == "0"
    before = inner(tab, -1).evaluate("desk.sets[0].stems[0].note")
    for _ in range(20): tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    tab.wait_for_function(
        "old => { const f = [...document.querySelectorAll('iframe')].at(-1).contentWindow; return f.desk &&"
        " f.desk.state.ready && f.desk.sets[0].stems[0].note !== old &&"
        " f.desk.sets[0].stems[0].note.startsWith('-4'); }", arg=before, timeout=60000,
    )
    frame = inner(tab, -1)
    frame.evaluate("desk.region(0, 3)")
    frame.click("[aria-label='Solo drums']")
    frame.click("#play")
    assert level(frame) == pytest.approx(-40, abs=.3)
    frame.get_by_label("as in the song").check()
    assert level(frame) == pytest.approx(-20, abs=.3)
    for words in (
        "Song", "From, in seconds", "Pitch, in semitones", "Length, times", "Levels around", "Vocals, in dB",
    ):
        assert tab.get_by_label(words, exact=True).count() == 1


@pytest.mark.browser
def test_under_voila(browser, notebook, tmp_path):
    """A notebook with a desk and an explorer as a page without code; what Voila's own template asks for
    elsewhere (icons) stays empty, and nothing else is asked for."""
    pytest.importorskip("voila", reason="voila is not installed")
    with program(
        ["-m", "voila", str(notebook), "--no-browser", "--port=PORT", "--Voila.ip=127.0.0.1"], tmp_path,
        "Voil.*running at|http://127",
    ) as address, opened(
        browser, address, True, "cdn.jsdelivr.net/npm/@fortawesome|labextensions/jupyterlab-jupytext"
    ) as tab:
        plays_mutes_and_switches(inner(tab))
        explores_with_keys(tab)
        assert tab.locator(".jp-InputArea, .jp-CodeCell .cm-content").count() == 0


def run_all(tab, tries=3):
    """Choose Run All Cells in JupyterLab, again if no cell begins: its menu can be clicked before the
    notebook listens, on a busy machine."""
    for left in reversed(range(tries)):
        tab.locator(".jp-Notebook .jp-CodeCell").first.click()
        tab.get_by_role("menuitem", name="Run", exact=True).click()
        tab.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try:
            return tab.wait_for_function(
                "/[*0-9]/.test(document.querySelector('.jp-Notebook .jp-InputPrompt')?.textContent)",
                timeout=20000,
            )
        except Exception:
            if not left: raise


@pytest.mark.browser
def test_in_jupyterlab(browser, notebook, tmp_path):
    "The same cells, run in JupyterLab."
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")
    options = [
        "--no-browser", "--port=PORT", "--ip=127.0.0.1", "--allow-root", "--IdentityProvider.token=",
        "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly", f"--ServerApp.root_dir={notebook.parent}",
    ]
    with program(["-m", "jupyterlab", *options], tmp_path, r"is running at") as address, opened(
        browser, address + "lab/tree/desk.ipynb?reset", True
    ) as tab:
        tab.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=120000)
        run_all(tab)
        plays_mutes_and_switches(inner(tab))
        inner(tab, -1)
        explores_with_keys(tab)


@pytest.mark.browser
def test_the_command_opens_a_desk(browser, tmp_path):
    """`deepdemix listen FOLDER --references` as a program of its own: the true stems and what the default
    model makes of them, at one instant."""
    stem_folder(tmp_path / "tones")
    with program(
        ["-c", "from deepdemix.cli import main; main()", "listen", str(tmp_path / "tones"), "--references"],
        tmp_path, r"(http://127\.0\.0\.1:\d+/)",
    ) as address, opened(browser, address) as tab:
        tab.wait_for_selector("#play:enabled", timeout=120000)
        tab.get_by_label("true stems").check()
        plays_mutes_and_switches(tab)
        assert [x.inner_text() for x in tab.locator("#sets label").all()] == [
            "default", "true stems", "sum of the stems",
        ]
        before = tab.evaluate("desk.position()")
        tab.keyboard.press("s")
        assert tab.evaluate("desk.state.set") == 2 and tab.evaluate("desk.position()") - before < .5


@pytest.mark.browser
def test_separate_opens_a_desk(browser, tmp_path):
    """`deepdemix separate SONG --listen`: the files that were written, and the song beside them; nothing is
    separated again."""
    write(tmp_path / "song.wav", toy_song(1, 2., RATE).sum(0), RATE)
    line = [
        "-c", "import sys; from deepdemix.cli import main; sys.exit(main())", "separate", "song.wav",
        "--listen", "--no-browser", "--port", "PORT",
    ]
    with program(line, tmp_path, r"(http://127\.0\.0\.1:\d+/)") as address, opened(browser, address) as tab:
        tab.wait_for_selector("#play:enabled", timeout=60000)
        until(tab, "document.querySelectorAll('#queue li').length === 1")
        assert tab.inner_text("h1") == "song.wav" and queue_of(tab) == [
            "song.wav on this page; separated with default"
        ]
        assert [x.inner_text() for x in tab.locator("#sets label").all()] == ["default", "original"]
        written = {x.name: x.read_bytes() for x in (tmp_path / "separated/song").iterdir()}
        (tmp_path / "out").mkdir()
        saved(tab, lambda: tab.click("[aria-label='Download vocals']"), tmp_path / "out")
        import soundfile
        ours, made = (
            soundfile.read(path, dtype="int16")[0]
            for path in (next((tmp_path / "out").iterdir()), tmp_path / "separated/song/vocals.wav")
        )
        assert len(written) == 4 and (ours == made).all()


@pytest.mark.browser
def test_the_command_through_voila(browser, tmp_path):
    "`deepdemix listen FOLDER --voila --references`: the widgets as a page without code."
    pytest.importorskip("voila", reason="voila is not installed")
    stem_folder(tmp_path / "tones")
    line = ["-c", "import sys; from deepdemix.cli import main; sys.exit(main())", "listen",
            str(tmp_path / "tones"), "--voila", "--references", "--no-browser", "--port=PORT"]
    with program(line, tmp_path, "Voil.*running at|http://127") as address, opened(
        browser, address, True, "cdn.jsdelivr.net/npm/@fortawesome|labextensions/jupyterlab-jupytext"
    ) as tab:
        frame = inner(tab)
        frame.get_by_label("true stems").check()
        plays_mutes_and_switches(frame)
        assert tab.locator(".jp-InputArea, .jp-CodeCell .cm-content").count() == 0
