"The command, run as a user runs it: every step from a toy store to a verdict."
import json

import pytest

from deepdemix.cli import main

TINY = [word for setting in ("epochs=1", "examples_per_epoch=4", "batch_size=2", "valid_examples=2") for word in ("--set", setting)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A toy store, a pretrained encoder, and two separators."
    root = tmp_path_factory.mktemp("cli")
    run = lambda *words: main([str(w) for w in words])
    assert run("prepare", "--toy", 16, "--out", root / "toy") == 0
    common = ["--data", root / "toy", "--profile", "demo", "--device", "cpu", *TINY]
    assert run("pretrain", "--out", root / "encoder", *common) == 0
    assert run("train", "--model", "ddm", "--encoder", root / "encoder", "--out", root / "ddm", *common) == 0
    assert run("train", "--model", "baseline", "--out", root / "baseline", *common) == 0
    return root


def test_evaluate_and_compare(folder, capsys):
    for name in ("baseline", "ddm"):
        assert main(["evaluate", "--model", str(folder / name), "--data", str(folder / "toy"), "--out", str(folder / f"{name}.json")]) == 0
        printed = capsys.readouterr().out
        assert name in printed and "oracle 12x12" in printed and "ideal ratio mask" in printed
    assert main(["compare", str(folder / "baseline.json"), str(folder / "ddm.json")]) == 0
    assert "songs improve" in capsys.readouterr().out


def test_two_models_of_one_file_are_compared(tmp_path, capsys):
    rows = {m: [0.0 + k, 1.0 + k] for k, m in enumerate(("early", "late"))}
    import pandas as pd
    from deepdemix.evaluation import Scores
    frame = pd.DataFrame([dict(model=m, seed=0, split="test", song=f"song {i}", source=s, metric="SDR", value=v) for m, values in rows.items() for i in range(8) for s, v in zip(("drums", "bass"), values)])
    Scores(frame, dict(channels="mono", mixture="sum")).save(tmp_path / "scores.json")
    assert main(["compare", str(tmp_path / "scores.json"), "--model-a", "early", "--model-b", "late"]) == 0
    assert "late changes SDR by +1.00 dB" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "scores.json")]) == 2
    assert "early, late" in capsys.readouterr().err


def test_separate_with_a_run_folder(folder, capsys):
    song = next((folder / "toy").rglob("*.npy"))
    assert main(["separate", str(song), "--out", str(folder / "stems"), "--model", str(folder / "baseline")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_models_and_export(folder, capsys):
    assert main(["models"]) == 0
    assert {"default", "ddm_skip", "recurrent"} <= set(capsys.readouterr().out.split())
    assert main(["export", "--model", str(folder / "baseline"), "--out", str(folder / "net.pt")]) == 0
    assert (folder / "net.pt").stat().st_size > 100_000


def test_a_recipe_can_be_run_again(folder):
    words = ["train", "--recipe", folder / "baseline", "--data", folder / "toy", "--out", folder / "again"]
    assert main([str(w) for w in words]) == 0
    old, new = (json.loads((folder / n / "recipe.json").read_text())["recipe"] for n in ("baseline", "again"))
    assert old == new


def test_a_model_is_trained_further(folder, tmp_path, capsys):
    words = lambda start, out: ["train", "--start", str(start), "--data", str(folder / "toy"), "--out", str(tmp_path / out), "--set", "epochs=2"]
    assert main(words(folder / "ddm", "run")) == 0
    record = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (record["network"][0], record["recipe"]["start"], record["recipe"]["encoder"], record["epoch"]) == ("ddm", str(folder / "ddm"), None, 2)
    capsys.readouterr()
    assert main(words("nobody", "none")) == 2
    assert "default" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_pretraining_takes_several_stores(folder, tmp_path, capsys):
    assert main(["prepare", "--toy", "4", "--seed", "1", "--out", str(tmp_path / "more")]) == 0
    words = ["pretrain", "--data", folder / "toy", "--data", f"{tmp_path / 'more'}=2", "--out", tmp_path / "run", "--profile", "demo", "--device", "cpu", *TINY]
    assert main([str(w) for w in words]) == 0
    stores = json.loads((tmp_path / "run" / "recipe.json").read_text())["data"]["stores"]
    assert [(s["name"], s["songs"], s["weight"]) for s in stores] == [("toy", 16, 1), ("more", 2, 2)]
    capsys.readouterr()
    assert main([str(w) for w in [*words[:1], "--data", folder / "toy", *words[5:], "--resume", "--set", "epochs=2"]]) == 2
    assert "other data" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["train", "--out", "x"], ["train", "--model", "nobody", "--out", "x"], ["evaluate", "--model", "default", "--data", "nowhere", "--out", "x"]])
def test_one_line_and_status_2(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("deepdemix: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["train", "--model", "baseline", "--seed", "99999999999999999999"], ["prepare", "--toy", "2", "--seed", "-1"], ["demo", "--seed", "-1"]])
def test_a_seed_is_checked_before_anything_is_made(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop: main([*words, "--out", "x"])
    assert stop.value.code == 2 and "seed" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["label-efficiency", "--songs", "-2"], ["label-efficiency", "--seeds", "0"], ["experiment", "--seeds", "0"], ["contest", "--seeds", "0"], ["contest", "--minutes", "0"], ["contest", "--cores", "0"]])
def test_counts_are_checked(folder, words, tmp_path, capsys):
    assert main([*words, "--data", str(folder / "toy"), "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "1" in error and not (tmp_path / "x").exists()


def test_fields_for_all_models_may_stand_in_a_file(folder, tmp_path):
    (tmp_path / "few.json").write_text(json.dumps({"epochs": 1, "examples_per_epoch": 4, "batch_size": 2, "valid_examples": 2, "lr": 0.5}))
    words = ["label-efficiency", "--songs", "4", "--seeds", "1", "--recipe", tmp_path / "few.json", "--set", "lr=0.25", "--set", "device=cpu", "--logger", "tensorboard", "--data", folder / "toy", "--out", tmp_path / "curve"]
    assert main([str(w) for w in words]) == 0
    runs = [json.loads(p.read_text())["recipe"] for p in (tmp_path / "curve").rglob("recipe.json")]
    assert len(runs) == 5 and {(r["epochs"], r["lr"]) for r in runs} == {(1, 0.25)}
    assert len(list((tmp_path / "curve").rglob("events.out.tfevents.*"))) == 5
    (tmp_path / "few.json").write_text('{"epoch": 1}')
    assert main([str(w) for w in words]) == 2


def test_the_system_s_errors_are_said_plainly(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["export", "--model", str(folder / "baseline"), "--out", str(tmp_path / "file" / "net.pt")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and "Errno" not in error and error.count("\n") == 1


def test_an_encoder_is_no_separator(folder, capsys, tmp_path):
    words = [["separate", str(folder / "none.wav"), "--out", str(tmp_path / "s")], ["evaluate", "--data", str(folder / "toy"), "--out", str(tmp_path / "s.json")]]
    for command in words:
        assert main([*command, "--model", str(folder / "encoder")]) == 2
        assert "train --encoder" in capsys.readouterr().err


def test_a_toy_store_in_16_bits(tmp_path):
    from deepdemix.data import Store
    assert main(["prepare", "--toy", "1", "--out", str(tmp_path / "toy"), "--dtype", "int16"]) == 0
    assert Store.open(tmp_path / "toy").songs[0].dtype == "int16"


def test_a_stopped_training_has_the_status_of_its_signal(folder, tmp_path):
    import signal, subprocess, sys, time
    words = ["train", "--model", "baseline", "--data", str(folder / "toy"), "--profile", "demo", "--out", str(tmp_path / "run"), "--device", "cpu",
             "--set", "examples_per_epoch=8", "--set", "valid_examples=4", "--set", "epochs=10000"]
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen([sys.executable, "-c", "import sys; from deepdemix.cli import main; sys.exit(main())", *words, "--resume"], stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        line = process.stderr.readline()
        assert line.startswith("epoch"), line
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == status and "Traceback" not in error


def test_a_contest_prints_its_table_and_what_pretraining_changed(folder, tmp_path, monkeypatch, capsys):
    from deepdemix import contest
    monkeypatch.setattr(contest, "ENTRIES", (contest.Entry("Narrow", "recurrent", dict(window_length=2048, hop_length=1024, hidden=8, layers=1), {}),))
    words = [w for s in ("mixer.duration=1", "mixer.pitch=null", "mixer.stretch=null", "device=cpu", "precision=32") for w in ("--set", s)]
    assert main(["contest", "--data", str(folder / "toy"), "--out", str(tmp_path / "run"), "--minutes", "1", "--cores", "1", "--seeds", "1", *TINY, *words]) == 0
    printed = capsys.readouterr().out
    assert "mixture / 4" in printed and "Narrow (pt) changes SDR by" in printed and (tmp_path / "run" / "scores.json").exists()


def test_two_processes_share_a_contest(folder, tmp_path):
    "Each run is trained by one of the two, scored once, and both see all of it in the end."
    import csv, subprocess, sys
    code = """
import sys
from deepdemix import contest
size = dict(window_length=2048, hop_length=1024, layers=1)
contest.ENTRIES = tuple(contest.Entry(name, "recurrent", dict(size, hidden=hidden), {}) for name, hidden in (("Narrow", 8), ("Wide", 16)))
from deepdemix.cli import main
sys.exit(main())
"""
    words = [w for s in ("mixer.duration=1", "mixer.pitch=null", "mixer.stretch=null", "device=cpu", "precision=32") for w in ("--set", s)]
    command = [sys.executable, "-c", code, "contest", "--data", str(folder / "toy"), "--out", str(tmp_path / "run"), "--minutes", "1", "--cores", "1", "--seeds", "1", *TINY, *words]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert printed[0][0] == printed[1][0] and "Wide (pt) changes SDR by" in printed[0][0]
    from deepdemix.contest import Contest
    rows = Contest(tmp_path / "run").scores.rows.query("metric == 'SDR' and source == 'drums'").groupby("model").song.agg(["count", "nunique"])
    assert set(rows.index) >= {"Narrow", "Narrow (pt)", "Wide", "Wide (pt)"} and (rows["count"] == rows["nunique"]).all()
    curves = [list(csv.DictReader(path.open())) for path in (tmp_path / "run").rglob("separator/metrics.csv")]
    assert [[row["epoch"] for row in curve] for curve in curves] == [["1"]] * 4


def test_the_examples_at_the_top_of_the_page():
    "Each command has an example there, which the parser takes."
    import re, shlex
    from pathlib import Path
    from deepdemix.cli import make_parser
    page = json.loads(next((Path(__file__).parent.parent / "nbs").rglob("*_cli.ipynb")).read_text(encoding="utf-8"))
    examples = re.findall(r"^\| `deepdemix ([^`]+)` \|", "\n".join("".join(c["source"]) for c in page["cells"]), re.M)
    for example in examples: make_parser().parse_args(shlex.split(example))
    commands = next(action.choices for action in make_parser()._actions if action.metavar == "COMMAND")
    assert sorted(example.split()[0] for example in examples) == sorted(commands)
