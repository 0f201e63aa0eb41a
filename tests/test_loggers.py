"Loggers of the field: the rows of metrics.csv, offline, in a log that goes on when the run does."
import csv
import importlib.util
import json
import sys

import pytest

from deepdemix.cli import main
from deepdemix.data import prepare_toy
from deepdemix.foundations.reporting import LOGGERS

SMALL = [
    "examples_per_epoch=4", "batch_size=2", "valid_examples=2", "mixer.duration=1.0", "network_args.hidden=8",
    "network_args.layers=1",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "store"
    prepare_toy(6, folder, duration=2., progress=False)
    return folder


@pytest.fixture
def train(store, tmp_path, monkeypatch):
    "A function that trains for some epochs into one run folder: the exit status."
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)
    def run(logger, epochs, *words):
        settings = [x for s in (*SMALL, f"epochs={epochs}") for x in ("--set", s)]
        return main(["train", "--model", "recurrent", "--profile", "demo", "--device", "cpu", "--data",
                     str(store), "--out", str(tmp_path / "run"), "--logger", logger, *settings, *words])
    return run


def rows(run):
    return [{k: float(v) for k, v in x.items() if v} for x in csv.DictReader((run / "metrics.csv").open())]
def record(run): return json.loads((run / "recipe.json").read_text())
def need(name):
    if importlib.util.find_spec(name) is None: pytest.skip(f"the package {name} is not installed")


def test_csv_needs_nothing(train, tmp_path):
    assert train("csv", 1) == 0
    assert len(rows(tmp_path / "run")) == 1 and "loggers" not in record(tmp_path / "run")


def test_tensorboard_has_the_rows_of_both_starts(train, tmp_path):
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert train("tensorboard", 1) == 0 and train("tensorboard", 3, "--resume") == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert "hp_metric" not in events.Tags()["scalars"]
    for name in ("train_loss", "valid_loss"):
        found = [(x.step, x.value) for x in events.Scalars(name)]
        assert [s for s, _ in found] == [2, 4, 6] and [v for _, v in found] == pytest.approx(
            [x[name] for x in rows(tmp_path / "run")]
        )
    assert record(tmp_path / "run")["loggers"] == dict(tensorboard="tensorboard")


def test_mlflow_writes_to_files_and_goes_on(train, tmp_path):
    need("mlflow")
    from mlflow.tracking import MlflowClient
    assert train("mlflow", 1) == 0 and train("mlflow", 3, "--resume") == 0
    client = MlflowClient((tmp_path / "run/mlruns").as_uri())
    name = record(tmp_path / "run")["loggers"]["mlflow"]
    found = client.search_runs([x.experiment_id for x in client.search_experiments()])
    assert ([x.info.run_id for x in found] == [name] and found[0].info.status == "FINISHED"
            and found[0].info.run_name == "run")
    assert [(x.step, x.value) for x in client.get_metric_history(name, "valid_loss")] == [
        (int(x["step"]), pytest.approx(x["valid_loss"])) for x in rows(tmp_path / "run")
    ]
    assert (
        found[0].data.params["network"] == "recurrent" and float(found[0].data.params["minutes_pseudo"]) == 0
    )


def test_wandb_offline_goes_on_under_one_name(train, tmp_path):
    need("wandb")
    assert train("wandb", 1) == 0 and train("wandb", 3, "--resume") == 0
    name = record(tmp_path / "run")["loggers"]["wandb"]
    logs = sorted((tmp_path / "run/wandb").glob(f"offline-run-*-{name}"))
    assert len(logs) == 2 == len(list((tmp_path / "run/wandb").glob("offline-run-*")))
    first, second = (next(x.glob("*.wandb")).read_bytes() for x in logs)
    values = [str(x["valid_loss"]).encode() for x in rows(tmp_path / "run")]
    assert [x in first for x in values] == [True, False, False] and [x in second for x in values] == [
        False, True, True,
    ]


@pytest.mark.parametrize("name", [x for x in LOGGERS if x != "csv"])
def test_a_package_that_is_missing_is_one_line(train, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert train(name, 1) == 2
    said = capsys.readouterr().err
    assert (
        said == f"deepdemix: the logger '{name}' needs the package {name}: pip install 'deepdemix[loggers]'\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_log_that_cannot_be_written_is_one_line(train, tmp_path, monkeypatch, capsys):
    need("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    assert train("mlflow", 1) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the logger 'mlflow' can't be used" in said
