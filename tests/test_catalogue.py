"""The catalogue where a notebook cell is the wrong place: workers that die, clusters that are none, stores
in parts, and a store of 30 GB."""
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from deepdemix.audio import SOURCES
from deepdemix.augmentation import Mixer
from deepdemix.cli import main
from deepdemix.data import prepare_stems, prepare_toy
from deepdemix.foundations.encoding import write
from deepdemix.foundations.files import UserError
from deepdemix.foundations.recipe import Recipe
from deepdemix.foundations.runs import save_network
from deepdemix.foundations.store import STORE_FORMAT
from deepdemix.networks.recurrent import Recurrent
from deepdemix.serving.catalogue import SongWorker, read_manifest, separate_catalogue, serial_executor
from deepdemix.serving.cluster import OnRay, cluster

RATE = 8000


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "A separator with a few random weights."
    torch.manual_seed(0)
    network = Recurrent(single=8, hidden=8, layers=1, window_length=512, hop_length=128, sample_rate=RATE)
    save_network(network, Recipe(network="recurrent", network_args=network.args),
                 folder := tmp_path_factory.mktemp("tiny"))
    return folder


@pytest.fixture(scope="module")
def on_ray():
    "A function that makes an `OnRay`, on one cluster of two cores for all tests."
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'deepdemix[ray]'")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'deepdemix[ray]'")
    with cluster(cores=2): yield lambda workers=2: OnRay(workers=workers)


def make_songs(folder, n, seconds=2.0):
    "Songs of noise, and one that is none."
    folder.mkdir(parents=True)
    for k in range(n - 1):
        write(folder / f"song {k:02d}.wav",
              0.1 * torch.randn(2, int(seconds * RATE), generator=torch.Generator().manual_seed(k)), RATE)
    (folder / "torn.wav").write_bytes(b"RIFF, and then nothing")
    return folder


def counts(summary): return [summary[k] for k in ("songs", "done", "skipped", "failed")]


# ---- without Ray

def test_a_restart_does_what_is_left_and_another_model_everything(tmp_path, tiny):
    songs, out = make_songs(tmp_path / "in", 5, 0.3), tmp_path / "out"
    assert counts(separate_catalogue([songs], out, tiny, progress=False)) == [5, 4, 0, 1]
    (out / "song 01" / "bass.wav").unlink()
    write(songs / "song 02.wav", torch.zeros(1, 2400), RATE)
    assert counts(separate_catalogue([songs], out, tiny, progress=False)) == [5, 2, 2, 1]
    assert counts(separate_catalogue([songs], out, tiny, progress=False, format="flac")) == [5, 4, 0, 1]
    assert counts(separate_catalogue([songs], out, tiny, progress=False, format="flac", overwrite=True)) == [
        5, 4, 0, 1,
    ]
    table = read_manifest(out)
    assert (sorted(table.status) == ["done"] * 4 + ["failed"] and table.input.is_unique
            and not table.skipped.any())
    assert {p.name for p in out.iterdir() if p.is_dir()} == {
        ".catalogue", *(f"song {k:02d}" for k in range(4)),
    }


def test_options_that_mean_the_same_find_their_songs_finished(tmp_path, tiny):
    """From Python and from the command line: tuples and lists, one stem and a list of one, what is as it is
    by default."""
    songs, out = make_songs(tmp_path / "in", 3, 0.3), tmp_path / "out"
    ways = [dict(stems=("vocals",)), dict(stems=["vocals"]), dict(stems="vocals"),
            dict(stems=iter(["vocals"])),
            dict(stems={"vocals"}, format="wav", clip=None, two_stems=None, track=1)]
    for k, options in enumerate(ways):
        assert counts(
            separate_catalogue([songs], out, tiny, progress=False, loading=dict(overlap=None), **options)
        ) == [3, *((0, 2) if k else (2, 0)), 1]
    assert {p.name for p in (out / "song 00").iterdir()} == {"vocals.wav"}
    assert counts(separate_catalogue([songs], out, tiny, progress=False, stems=("vocals", "bass"))) == [
        3, 2, 0, 1,
    ]


def test_a_stop_in_the_middle_keeps_what_is_finished(tmp_path, tiny):
    def stops(call, jobs, state, inputs):
        for k, result in serial_executor(call, jobs, state, inputs):
            if k == 2: raise KeyboardInterrupt
            yield k, result
    songs, out = make_songs(tmp_path / "in", 5, 0.3), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt): separate_catalogue([songs], out, tiny, stops, progress=False)
    assert (not list(out.glob("manifest*")) and not list(out.glob(".manifest*"))
            and not list(out.rglob("tries/*")))
    assert counts(separate_catalogue([songs], out, tiny, progress=False)) == [5, 1, 3, 1]


def test_a_song_that_is_missing_from_the_list_is_listed(tmp_path, tiny):
    make_songs(tmp_path / "in", 2, 0.3)
    (tmp_path / "in" / "all.txt").write_text("song 00.wav\ngone.wav\n")
    summary = separate_catalogue([tmp_path / "in" / "all.txt"], tmp_path / "out", tiny, progress=False)
    assert counts(summary) == [2, 1, 0, 1] and "gone.wav: no such file" in summary["reasons"][0]


def test_bad_use_is_one_line_and_status_2(tmp_path, tiny, capsys):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'deepdemix[ray]'")
    (tmp_path / "bare").mkdir()
    songs = make_songs(tmp_path / "in", 2, 0.3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{free.getsockname()[1]}"
    web = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    for words, line in (
        (["separate", "--ray", str(tmp_path / "bare")], "no audio files"),
        (["separate", "--ray", str(tmp_path / "none")], "no such folder"),
        (["separate", "--ray", str(songs), "--address", closed], "nothing answers there"),
        (["separate", "--ray", str(songs), "--address", "127.0.0.1:%d" % web.server_port], "it is not Ray"),
        (["separate", str(songs), "--address", closed], "--ray"),
        (["separate", "--ray", str(songs), "--model", "nobody"], "there is no model"),
        (["separate", "--ray", str(songs), "--workers", "0"], "0"),
    ):
        try:
            status = main([*words, "--out", str(tmp_path / "out"),
                           *([] if "--model" in words else ["--model", str(tiny)])])
        except SystemExit as e: status = e.code
        error = capsys.readouterr().err
        assert status == 2 and line in error and "Traceback" not in error, (words, error)
    web.shutdown()
    web.server_close()


def test_the_mixes_of_a_store_in_parts_are_those_of_the_whole(tmp_path):
    whole, parted = (
        prepare_toy(8, tmp_path / name, duration=6.0, sample_rate=RATE, progress=False, parts=parts)
        for name, parts in (("whole", None), ("parted", 3))
    )
    assert (len(list(parted.path.glob("part-*"))) == 3 and not (parted.path / "songs").exists()
            or not list((parted.path / "songs").iterdir()))
    assert parted.digest == whole.digest and parted.verify() == []
    for split in ("train", "valid", "test"):
        a, b = (Mixer(s.split(split), duration=2., coherent=.5, seed=3) for s in (whole, parted))
        for i in (0, 7): assert torch.equal(a[i].sources, b[i].sources)
    again = prepare_toy(8, tmp_path / "parted", duration=6., sample_rate=RATE, progress=False)
    assert (again.digest == whole.digest and not list(again.path.glob("part-*/songs/*"))
            and not list(again.path.glob("part-*/store.json")))


# ---- with Ray

def test_a_cluster_of_our_own_is_for_this_machine_and_this_process(on_ray, tmp_path):
    "Nothing listens on other addresses, and nobody comes in without the token."
    import ipaddress

    import psutil
    import ray
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [
        c.laddr.ip for p in ours for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN
    ]
    plain = [ipaddress.ip_address(ip.removeprefix("::ffff:")) for ip in listening]
    assert len(plain) > 3 and all(ip.is_loopback for ip in plain), listening
    assert ray.get(ray.remote(lambda: os.environ["RAY_AUTH_MODE"]).remote()) == "token"
    script = (f"import ray; ray.init(address={ray.get_runtime_context().gcs_address!r}, log_to_driver=False);"
              " print('inside')")
    def come_in(**env):
        return subprocess.run(
            [sys.executable, "-c", script], env=os.environ | env, capture_output=True, text=True
        ).stdout
    assert "inside" not in come_in(RAY_AUTH_TOKEN="0" * 64) and "inside" in come_in()


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_and_does_nothing_twice(tmp_path, tiny, on_ray):
    songs, out, journal, killed = make_songs(tmp_path / "in", 30), tmp_path / "out", tmp_path / "journal", []

    def executor(call, jobs, state, inputs):
        class Written:
            "Notes which worker wrote a song's stems, and when."
            def __call__(self, job):
                import os
                import time
                row = call(job)
                if row.get("outputs"):
                    with open(journal, "a") as f:
                        f.write(f"{job.path}\t{os.stat(row['outputs'][0]).st_mtime_ns}\t{os.getpid()}\n")
                time.sleep(.05)
                return row
        return on_ray(2)(Written(), jobs, state, inputs)

    def kill():
        while len(list((out / ".catalogue").glob("*/*.json"))) < 10: time.sleep(.01)
        while not killed:
            for note in (out / ".catalogue" / "tries").glob("*/*"):
                try: killed.append(int(note.read_text().split()[1]))
                except (OSError, IndexError): continue
                os.kill(killed[0], signal.SIGKILL)
                break

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    summary = separate_catalogue([songs], out, tiny, executor, progress=False)
    killer.join(5)
    assert len(killed) == 1 and counts(summary) == [30, 29, 0, 1] and "torn.wav" in summary["reasons"][0]
    table = read_manifest(out)
    assert table.input.is_unique and sorted(table.status) == ["done"] * 29 + ["failed"]
    assert {p.name for p in out.iterdir() if p.is_dir() and not p.name.startswith(".")} == {
        f"song {k:02d}" for k in range(29)
    }
    assert all(
        sorted(x.name for x in (out / f"song {k:02d}").iterdir()) == sorted(f"{s}.wav" for s in SOURCES)
        for k in range(29)
    )
    lines = [line.split("\t") for line in journal.read_text().splitlines()]
    assert max(Counter(path for path, _ in {(p, t) for p, t, _ in lines}).values()) == 1
    assert len({pid for _, _, pid in lines}) >= 3
    assert not list((out / ".catalogue" / "tries").glob("*/*"))
    assert counts(separate_catalogue([songs], out, tiny, progress=False)) == [30, 0, 29, 1]


@pytest.mark.slow
def test_a_job_that_kills_its_worker_is_listed(tmp_path, on_ray):
    def job(n):
        import os
        if n == 2: os.kill(os.getpid(), 9)
        return 10 * n
    results = dict(on_ray(1)(job, [1, 2, 3], tmp_path))
    assert (results[0], results[2]) == (10, 30) and "ended its worker 3 times" in str(results[1])


@pytest.mark.slow
def test_a_cluster_prepares_the_same_store(tmp_path, on_ray):
    for k in range(6):
        for j, name in enumerate(SOURCES):
            (tmp_path / "in" / f"song {k}").mkdir(parents=True, exist_ok=True)
            write(tmp_path / "in" / f"song {k}" / f"{name}.wav",
                  0.1 * torch.randn(1, RATE, generator=torch.Generator().manual_seed(4 * k + j)), RATE)
    (tmp_path / "in" / "song 6").mkdir()
    (tmp_path / "in" / "song 6" / "bass.wav").write_bytes(b"RIFF, and then nothing")
    here, there = (
        prepare_stems(tmp_path / "in", tmp_path / name, sample_rate=RATE, progress=False, skip_bad=True, **kw)
        for name, kw in (("here", {}), ("there", dict(parts=3, executor=on_ray(2))))
    )
    assert (here.digest == there.digest and len(there) == 6 and there.verify() == []
            and there.index["skipped"] == here.index["skipped"])


@pytest.mark.slow
def test_a_cluster_that_somebody_started_is_joined(tmp_path, tiny, on_ray):
    import ray
    songs, address = make_songs(tmp_path / "in", 3, 0.3), ray.get_runtime_context().gcs_address
    words = ["separate", "--ray", str(songs), "--address", address, "--model", str(tiny), "--out",
             str(tmp_path / "out"), "--device", "cpu"]
    joined = lambda *more: subprocess.run([str(Path(sys.executable).parent / "deepdemix"), *words, *more],
                                          capture_output=True, text=True, timeout=300)
    done = joined("--workers", "3")
    assert (done.returncode == 2 and "3 workers with 1 cores each don't fit: there are 2 cores" in done.stderr
            and "Traceback" not in done.stderr), done.stderr
    done = joined("--workers", "1")
    assert "Traceback" not in done.stderr and sorted(read_manifest(tmp_path / "out").status) == [
        "done", "done", "failed",
    ], done.stderr


@pytest.mark.slow
def test_a_server_that_speaks_as_ray_does_and_is_not(tmp_path, tiny):
    "It greets as any gRPC server and then says nothing."
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'deepdemix[ray]'")
    songs, held = make_songs(tmp_path / "in", 2, 0.3), []
    with socket.create_server(("127.0.0.1", 0)) as s:
        def serve():
            try:
                while True:
                    held.append(s.accept()[0])
                    held[-1].sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            except OSError: pass
        threading.Thread(target=serve, daemon=True).start()
        words = ["separate", "--ray", str(songs), "--address", f"127.0.0.1:{s.getsockname()[1]}", "--model",
                 str(tiny), "--out", str(tmp_path / "out")]
        done = subprocess.run([str(Path(sys.executable).parent / "deepdemix"), *words], capture_output=True,
                              text=True, timeout=500)
    lines = [x for x in done.stderr.splitlines() if x.startswith("deepdemix:")]
    assert (done.returncode == 2 and len(lines) == 1 and "can't join this cluster" in lines[0]
            and "Traceback" not in done.stderr), done.stderr


@pytest.mark.slow
def test_every_machine_is_asked(tmp_path, tiny, on_ray):
    import ray

    from deepdemix.serving.cluster import check_machines
    songs, call = make_songs(tmp_path / "in", 2, 0.3), SongWorker(tmp_path / "out", tiny)
    check_machines(ray, call, tmp_path / "out" / ".catalogue", [str(songs / "song 00.wav")])
    assert not list((tmp_path / "out" / ".catalogue").iterdir())
    here = os.getpid()
    def call(job): pass
    call.identity = lambda: {"torch": "1.0" if __import__("os").getpid() == here else "2.0"}
    with pytest.raises(UserError, match="has torch 2.0 and this machine 1.0"):
        check_machines(ray, call, tmp_path / "out" / ".catalogue", [])


# ---- a store that is larger than memory

GIANT = """
import re, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from deepdemix.data import open_data
def anonymous(): return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
class Excerpts(torch.utils.data.Dataset):
    def __init__(self, store): self.store = store
    def __len__(self): return int(sys.argv[2])
    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        k = int(rng.integers(len(self.store)))
        self.store.stems(k, int(rng.integers(self.store.songs[k].frames - 220500)), 220500)
        return torch.utils.data.get_worker_info().id, anonymous()
for n, (worker, mib) in enumerate(torch.utils.data.DataLoader(Excerpts(open_data(sys.argv[1])), batch_size=None, num_workers=2)):
    if n % 20 < 2: print(n, int(worker), float(mib), flush=True)
"""


def giant_store(out, gigabytes=30, minutes=3):
    "A store of silence in ten parts, in files with holes: it takes hardly any disk."
    frames = minutes * 60 * 44100
    n, songs = round(gigabytes * 1e9 / (frames * 32)), []
    for k in range(n):
        part, file = f"part-{k % 10:04d}", f"song-{k:08x}"
        (out / part / "songs").mkdir(parents=True, exist_ok=True)
        with (out / part / "songs" / f"{file}.npy").open("wb") as f:
            np.lib.format.write_array_header_1_0(
                f, dict(descr="<f4", fortran_order=False, shape=(4, 2, frames))
            )
            f.truncate(f.tell() + frames * 32)
        songs.append(
            dict(title=f"song {k}", split="train", frames=frames, channels=2, sample_rate=44100,
                 present=SOURCES, flags=[], mixture="sum", mixture_snr=None, rms=[-200.0] * 4, peak=0.0,
                 digest=f"{k}", mixture_digest=None, dtype="float32", scales=[1.0] * 5, file=file, part=part)
        )
    (out / "store.json").write_text(
        json.dumps(
            dict(format=STORE_FORMAT, sample_rate=44100, sources=SOURCES, digest="", skipped=[], songs=songs)
        )
    )
    return sum(p.stat().st_size for p in out.rglob("*.npy"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_on_a_store_of_30_gb(tmp_path):
    assert giant_store(tmp_path / "giant") > 29e9
    done = subprocess.run([sys.executable, "-c", GIANT, str(tmp_path / "giant"), "1000"], capture_output=True,
                          text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    for worker in {w for _, w, _ in rows}:
        mine = [mib for _, w, mib in rows if w == worker]
        assert max(mine[len(mine) // 2:]) - mine[len(mine) // 2] < 32, mine
