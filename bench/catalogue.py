"""A catalogue on Ray: what the workers' time goes into, and what a song that is finished costs; the default
model, toy songs; `make bench BENCH=catalogue` runs it."""
import tempfile
import time
from pathlib import Path

from report import report, row

from deepdemix.foundations.encoding import write
from deepdemix.foundations.toy_band import toy_song
from deepdemix.serving.catalogue import read_manifest, separate_catalogue, serial_executor
from deepdemix.serving.cluster import OnRay, cluster


def timed(*args, **kw):
    "A summary, and the seconds it took."
    began = time.perf_counter()
    return (separate_catalogue(*args, progress=False, loading=dict(device="cpu", threads=1), **kw),
            time.perf_counter() - began)


def measure(folder, songs=30, duration=30.0, workers=2):
    "Rows of one process alone, of a cluster, and of a restart."
    for k in range(songs): write(folder / "in" / f"toy {k:02d}.wav", toy_song(k, duration).sum(0), 44100)
    yield row("length of a song", duration, "s")
    _, one = timed([folder / "in"], folder / "alone", executor=serial_executor)
    busy_alone = read_manifest(folder / "alone").seconds.sum()
    yield row("separating, one process of one thread", busy_alone / songs / duration, "of real time",
              note=f"{songs} songs of {duration:g} s")
    yield row("records, levels and the manifest", (one - busy_alone) / busy_alone, "of separating")
    began = time.perf_counter()
    with cluster(cores=workers):
        yield row("start a cluster", time.perf_counter() - began, "s")
        _, two = timed([folder / "in"], folder / "ray", executor=OnRay(workers=workers))
        busy = read_manifest(folder / "ray").seconds.sum()
        yield row(f"the catalogue on {workers} workers, start of the workers included", songs / two * 3600,
                  "songs/h", "one process", songs / one * 3600, True)
        yield row("share of the workers' time that is separation", busy / workers / two, "",
                  note="the rest: starting, levels, records, waiting")
        _, again = timed([folder / "in"], folder / "ray", executor=OnRay(workers=workers))
        yield row("a restart with nothing to do", again, "s")
    stems = [x for x in (folder / "ray").rglob("*.wav")]
    yield row("stems as 16 bit wav", sum(x.stat().st_size for x in stems) / songs / duration, "B/s of music")
    yield row(
        "records and manifest",
        sum(x.stat().st_size
            for x in [*(folder / "ray" / ".catalogue").rglob("*.json"), folder / "ray" / "manifest.parquet"])
        / songs, "B/song",
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder: report("catalogue", measure(Path(folder)))
