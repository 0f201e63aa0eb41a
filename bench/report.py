"""What all benchmarks share: rows with a figure, a peer and their ratio, printed as a table and saved as
JSON."""
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent


def seconds(call, times=1):
    "Median wall time of some calls, in seconds."
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def row(what, figure, unit, peer="", peer_figure=None, more_is_better=None, note=""):
    "One line of a report; the ratio says how many times better than the peer."
    ratio = None
    if peer_figure: ratio = figure / peer_figure if more_is_better else peer_figure / figure
    return dict(
        what=what, figure=figure, unit=unit, peer=peer, peer_figure=peer_figure, ratio=ratio, note=note
    )


def absent(what, peer, error):
    "The row of a peer that is not there."
    return row(what, None, "", peer, note=f"{peer} is not installed here ({str(error).splitlines()[0][:80]})")


def machine():
    "What the figures were measured on."
    import deepdemix
    return dict(cores=os.cpu_count(), threads=torch.get_num_threads(), processor=platform.machine(),
                python=platform.python_version(), torch=torch.__version__, deepdemix=deepdemix.__version__,
                cuda=torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def short(x): return "" if x is None else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def report(name, rows):
    "Print rows as they come and write `NAME.json` beside this file."
    print(f"\n{name} ({machine()['cores']} cores)", flush=True)
    kept = []
    for r in rows:
        kept.append(r)
        ratio = (
            f"{short(r['ratio'])}x of {r['peer']} ({short(r['peer_figure'])})" if r["ratio"] else r["note"]
        )
        print(f"  {r['what']:<58}{short(r['figure']):>9} {r['unit']:<13}{ratio}".rstrip(), flush=True)
    (HERE / f"{name}.json").write_text(json.dumps(dict(machine=machine(), rows=kept), indent=1) + "\n")
