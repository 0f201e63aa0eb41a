"""A demo pretraining on the toy band: seconds, and what its encoder knows on songs that nothing was chosen
by; `make bench BENCH=pretraining` runs it."""
import tempfile
from pathlib import Path

from report import report, row, seconds

from deepdemix.contrast.probing import probe_embedding
from deepdemix.data import prepare_toy
from deepdemix.foundations.runs import load_network
from deepdemix.pretraining import pretrain
from deepdemix.studies.demo import DEMO_SONGS


def everything(folder):
    "Rows for the paper's triplets and for supervised contrast."
    store = prepare_toy(DEMO_SONGS, folder / "store", progress=False)
    for loss in ("triplet", "supcon"):
        taken = seconds(lambda: pretrain(store, folder / loss, loss=loss, profile="demo", progress=False))
        yield row(f"{loss}, demo pretraining", taken, "s")
        table = probe_embedding(load_network(folder / loss), store.split("train"), store.split("test"))
        yield row(f"{loss}, nearest neighbours on test songs", float(table.knn["encoder"]), "",
                  "random encoder", float(table.knn["random encoder"]), True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder: report("pretraining", everything(Path(folder)))
