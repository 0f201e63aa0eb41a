"""The table of single steps towards the default model, from run folders: `python bench/steps.py RUNS/*`;
with `--csv`, the curves."""
import sys
from pathlib import Path

import pandas as pd

from deepdemix.audio import SOURCES
from deepdemix.foundations.recipe import read_record
from deepdemix.foundations.run_metrics import read_metrics

BEST, LAST = "valid_sdr", 3


def step(run):
    """One row: what a run cost, and its validation SDR in dB at its best epoch and as the mean of its last
    ones."""
    record, curve = read_record(run), read_metrics(run)
    if not len(curve): return None
    best = curve.loc[curve[BEST].idxmax()]
    clock = record["recipe"]["clock"]
    row = dict(step=Path(run).name, seed=record["recipe"]["seed"], status=record["status"],
               hours=curve.seconds.sum() / 3600, clock=clock, examples=int(curve.examples.iloc[-1]),
               pace=curve.seconds.sum() / curve.examples.iloc[-1], parameters=record["parameters"],
               at=int(best.examples), mean=best[BEST])
    return row | {s: best[f"{BEST}_{s}"] for s in SOURCES} | {f"last {LAST}": curve[BEST].tail(LAST).mean()}


def curves(runs):
    "All epochs of all runs, long form."
    return pd.concat([pd.DataFrame(read_metrics(run)).assign(step=Path(run).name) for run in runs])


if __name__ == "__main__":
    runs = [r for r in sys.argv[1:] if (Path(r)/"metrics.csv").exists()]
    if "--csv" in sys.argv: print(curves(runs).to_csv(index=False), end="")
    else:
        print(
            pd.DataFrame(filter(None, map(step, runs))).to_string(index=False, float_format="{:.2f}".format)
        )
