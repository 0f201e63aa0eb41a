"The command, run as a user runs it: every step from a toy store to a verdict."
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepdemix.cli import main
from deepdemix.foundations.recipe import Recipe

SLOW = pytest.mark.slow
TINY = [word for setting in ("epochs=1", "examples_per_epoch=4", "batch_size=2", "valid_examples=2")
        for word in ("--set", setting)]


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
        assert (
            main(["evaluate", "--model", str(folder / name), "--data", str(folder / "toy"), "--out",
                  str(folder / f"{name}.json")])
            == 0
        )
        printed = capsys.readouterr().out
        assert name in printed and "oracle 12x12" in printed and "ideal ratio mask" in printed
    assert main(["compare", str(folder / "baseline.json"), str(folder / "ddm.json")]) == 0
    assert "songs improve" in capsys.readouterr().out


def test_two_models_of_one_file_are_compared(tmp_path, capsys):
    rows = {m: [0.0 + k, 1.0 + k] for k, m in enumerate(("early", "late"))}
    import pandas as pd

    from deepdemix.scoring.scores import Scores
    frame = pd.DataFrame([
        dict(model=m, seed=0, split="test", song=f"song {i}", source=s, metric="SDR", value=v)
        for m, values in rows.items()
        for i in range(8)
        for s, v in zip(("drums", "bass"), values)
    ])
    Scores(frame, dict(channels="mono", mixture="sum")).save(tmp_path / "scores.json")
    assert main(["compare", str(tmp_path / "scores.json"), "--model-a", "early", "--model-b", "late"]) == 0
    assert "late changes SDR by +1.00 dB" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "scores.json")]) == 2
    assert "early, late" in capsys.readouterr().err


def test_separate_with_a_run_folder(folder, capsys):
    song = next((folder / "toy").rglob("*.npy"))
    assert (main(["separate", str(song), "--out", str(folder / "stems"), "--model", str(folder / "baseline")])
            == 2)
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


def test_a_recipe_is_printed_changed_and_trained(folder, tmp_path, capsys):
    assert main(["recipe", "baseline", "--profile", "demo", "--device", "cpu", *TINY]) == 0
    text = capsys.readouterr().out
    about = {f.name for f in dataclasses.fields(Recipe)}
    commented = {line.split(":")[0] for line in text.splitlines()
                 if not line.startswith(" ") and line.partition("  # ")[2]}
    assert commented == about
    (tmp_path / "mine.yaml").write_text(text.replace("lr: 0.001", "lr: 2e-3"))
    assert (
        main(["train", "--recipe", str(tmp_path / "mine.yaml"), "--data", str(folder / "toy"), "--out",
              str(tmp_path / "run")])
        == 0
    )
    expected = json.loads((folder / "baseline" / "recipe.json").read_text())["recipe"] | {"lr": 2e-3}
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"] == expected
    assert main(["recipe", "--recipe", str(tmp_path / "run"), "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{"):]) == expected
    assert main(["recipe"]) == 2 and main(["recipe", "nobody"]) == 2


def test_a_run_goes_on_with_what_its_folder_holds(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MUSDB_PATH", raising=False)
    run = str(tmp_path / "run")
    shutil.copytree(folder / "baseline", run)
    before = json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]
    assert main(["train", "--resume", run, "--set", "epochs=3"]) == 0
    record = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert record["recipe"] == before | {"epochs": 3} and record["epoch"] == 3
    assert main(["train", "--resume", run]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", run, "--set", "epochs=2"]) == 2
    error = capsys.readouterr().err
    assert "has done 3 epochs" in error and error.count("\n") == 1
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]["epochs"] == 3
    assert main(["train", "--resume", run, "--out", str(tmp_path / "other")]) == 2
    assert main(["train", "--resume", str(tmp_path / "none")]) == 2
    shutil.copytree(folder / "encoder", tmp_path / "encoder")
    assert main(["pretrain", "--resume", str(tmp_path / "encoder"), "--set", "epochs=2"]) == 0
    assert json.loads((tmp_path / "encoder" / "recipe.json").read_text())["epoch"] == 2


def test_a_model_is_trained_further(folder, tmp_path, capsys):
    words = lambda start, out: ["train", "--start", str(start), "--data", str(folder / "toy"), "--out",
                                str(tmp_path / out), "--set", "epochs=2"]
    assert main(words(folder / "ddm", "run")) == 0
    record = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (record["network"][0], record["recipe"]["start"], record["recipe"]["encoder"],
            record["epoch"]) == ("ddm", str(folder / "ddm"), None, 2)
    capsys.readouterr()
    assert main(words("nobody", "none")) == 2
    assert "default" in capsys.readouterr().err and not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["null", *(pytest.param(x, marks=SLOW) for x in ("2024", "1e5"))])
def test_a_run_may_be_called_anything(folder, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "encoder", name)
    common = ["--data", str(folder / "toy"), "--profile", "demo", "--device", "cpu", *TINY]
    assert main(["train", "--model", "ddm", "--encoder", name, "--out", "ddm", *common]) == 0
    shutil.copytree("ddm", f"whole/{name}")
    monkeypatch.chdir("whole")
    assert main(["train", "--start", name, "--out", "further", *common]) == 0
    kept = [json.loads(Path(run, "recipe.json").read_text())["recipe"] for run in ("../ddm", "further")]
    assert (kept[0]["encoder"], kept[1]["start"]) == (name, name)


def test_pretraining_takes_several_stores(folder, tmp_path, capsys):
    assert main(["prepare", "--toy", "4", "--seed", "1", "--out", str(tmp_path / "more")]) == 0
    words = ["pretrain", "--data", folder / "toy", "--data", f"{tmp_path / 'more'}=2", "--out",
             tmp_path / "run", "--profile", "demo", "--device", "cpu", *TINY]
    assert main([str(w) for w in words]) == 0
    stores = json.loads((tmp_path / "run" / "recipe.json").read_text())["data"]["stores"]
    assert [(s["name"], s["songs"], s["weight"]) for s in stores] == [("toy", 16, 1), ("more", 2, 2)]
    capsys.readouterr()
    assert (
        main([str(w)
              for w in [*words[:1], "--data", folder / "toy", *words[5:], "--resume", "--set", "epochs=2"]])
        == 2
    )
    assert "other data" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["train", "--out", "x"], ["train", "--model", "nobody", "--out", "x"],
     ["evaluate", "--model", "default", "--data", "nowhere", "--out", "x"]],
)
def test_one_line_and_status_2(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("deepdemix: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [["train", "--model", "baseline", "--seed", "99999999999999999999"],
     ["prepare", "--toy", "2", "--seed", "-1"], ["demo", "--seed", "-1"]],
)
def test_a_seed_is_checked_before_anything_is_made(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop: main([*words, "--out", "x"])
    assert stop.value.code == 2 and "seed" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [["label-efficiency", "--songs", "-2"], ["label-efficiency", "--seeds", "0"],
     ["experiment", "--seeds", "0"], ["contest", "--seeds", "0"], ["contest", "--minutes", "0"],
     ["contest", "--cores", "0"]],
)
def test_counts_are_checked(folder, words, tmp_path, capsys):
    assert main([*words, "--data", str(folder / "toy"), "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "1" in error and not (tmp_path / "x").exists()


@SLOW
def test_fields_for_all_models_may_stand_in_a_file(folder, tmp_path):
    (tmp_path / "few.json").write_text(
        json.dumps({"epochs": 1, "examples_per_epoch": 4, "batch_size": 2, "valid_examples": 2, "lr": 0.5})
    )
    words = ["label-efficiency", "--songs", "4", "--seeds", "1", "--recipe", tmp_path / "few.json", "--set",
             "lr=0.25", "--set", "device=cpu", "--logger", "tensorboard", "--data", folder / "toy", "--out",
             tmp_path / "curve"]
    assert main([str(w) for w in words]) == 0
    runs = [json.loads(p.read_text())["recipe"] for p in (tmp_path / "curve").rglob("recipe.json")]
    assert len(runs) == 5 and {(r["epochs"], r["lr"]) for r in runs} == {(1, 0.25)}
    assert len(list((tmp_path / "curve").rglob("events.out.tfevents.*"))) == 5
    (tmp_path / "few.json").write_text('{"epoch": 1}')
    assert main([str(w) for w in words]) == 2


def test_the_system_s_errors_are_said_plainly(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert (
        main(["export", "--model", str(folder / "baseline"), "--out", str(tmp_path / "file" / "net.pt")]) == 2
    )
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and "Errno" not in error and error.count("\n") == 1


def test_an_encoder_is_no_separator(folder, capsys, tmp_path):
    words = [["separate", str(folder / "none.wav"), "--out", str(tmp_path / "s")],
             ["evaluate", "--data", str(folder / "toy"), "--out", str(tmp_path / "s.json")]]
    for command in words:
        assert main([*command, "--model", str(folder / "encoder")]) == 2
        assert "train --encoder" in capsys.readouterr().err


def test_a_toy_store_in_16_bits(tmp_path):
    from deepdemix.foundations.store import Store
    assert main(["prepare", "--toy", "1", "--out", str(tmp_path / "toy"), "--dtype", "int16"]) == 0
    assert Store.open(tmp_path / "toy").songs[0].dtype == "int16"


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143),
                                            pytest.param(signal.SIGINT, 130, marks=SLOW)])
def test_a_stopped_training_has_the_status_of_its_signal(folder, tmp_path, number, status):
    words = ["train", "--model", "baseline", "--data", str(folder / "toy"), "--profile", "demo", "--out",
             str(tmp_path / "run"), "--device", "cpu", "--set", "examples_per_epoch=8", "--set",
             "valid_examples=4", "--set", "epochs=10000"]
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from deepdemix.cli import main; sys.exit(main())", *words,
         "--resume"],
        stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    lines = iter(process.stderr.readline, "")
    assert any(line.startswith("epoch") for line in lines)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == status and "Traceback" not in error


def test_a_contest_prints_its_table_and_what_pretraining_changed(folder, tmp_path, monkeypatch, capsys):
    from deepdemix.studies import contest
    monkeypatch.setattr(
        contest, "ENTRIES",
        (
            contest.Entry(
                "Narrow", "recurrent", dict(window_length=2048, hop_length=1024, hidden=8, layers=1), {}
            ),
        ),
    )
    words = [
        w
        for s in ("mixer.duration=1", "mixer.pitch=null", "mixer.stretch=null", "device=cpu", "precision=32")
        for w in ("--set", s)
    ]
    assert (
        main(["contest", "--data", str(folder / "toy"), "--out", str(tmp_path / "run"), "--minutes", "1",
              "--cores", "1", "--seeds", "1", *TINY, *words])
        == 0
    )
    printed = capsys.readouterr().out
    assert ("mixture / 4" in printed and "Narrow (pt) changes SDR by" in printed
            and (tmp_path / "run" / "scores.json").exists())


@SLOW
def test_two_processes_share_a_contest(folder, tmp_path):
    "Each run is trained by one of the two, scored once, and both see all of it in the end."
    import csv
    import subprocess
    import sys
    code = """
import sys
from deepdemix.studies import contest
size = dict(window_length=2048, hop_length=1024, layers=1)
contest.ENTRIES = tuple(contest.Entry(name, "recurrent", dict(size, hidden=hidden), {})
                        for name, hidden in (("Narrow", 8), ("Wide", 16)))
from deepdemix.cli import main
sys.exit(main())
"""
    words = [
        w
        for s in ("mixer.duration=1", "mixer.pitch=null", "mixer.stretch=null", "device=cpu", "precision=32")
        for w in ("--set", s)
    ]
    command = [sys.executable, "-c", code, "contest", "--data", str(folder / "toy"), "--out",
               str(tmp_path / "run"), "--minutes", "1", "--cores", "1", "--seeds", "1", *TINY, *words]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    printed = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert printed[0][0] == printed[1][0] and "Wide (pt) changes SDR by" in printed[0][0]
    from deepdemix.studies.contest import Contest
    rows = (Contest(tmp_path / "run") .scores.rows.query("metric == 'SDR' and source == 'drums'")
            .groupby("model") .song.agg(["count", "nunique"]))
    assert (set(rows.index) >= {"Narrow", "Narrow (pt)", "Wide", "Wide (pt)"}
            and (rows["count"] == rows["nunique"]).all())
    curves = [list(csv.DictReader(path.open())) for path in (tmp_path / "run").rglob("separator/metrics.csv")]
    assert [[row["epoch"] for row in curve] for curve in curves] == [["1"]] * 4


def test_the_examples_at_the_top_of_the_page():
    "Each command has an example there, which the parser takes."
    import re
    import shlex
    from pathlib import Path

    from deepdemix.cli import make_parser
    page = json.loads(
        next((Path(__file__).parent.parent / "nbs").rglob("*_cli.ipynb")).read_text(encoding="utf-8")
    )
    examples = re.findall(
        r"^\| `deepdemix ([^`]+)` \|", "\n".join("".join(c["source"]) for c in page["cells"]), re.M
    )
    for example in examples: make_parser().parse_args(shlex.split(example))
    commands = next(action.choices for action in make_parser()._actions if action.metavar == "COMMAND")
    assert {example.split()[0] for example in examples} == set(commands)


# Habits: names, streams, words

COMMAND = [
    sys.executable, "-c",
    "import torch; torch.set_num_threads(1); import sys; from deepdemix.cli import main; sys.exit(main())",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A run folder with a small separator at 8 kHz."
    from deepdemix.baseline import Baseline
    from deepdemix.foundations.recipe import Recipe
    from deepdemix.foundations.runs import save_network
    network = Baseline(hidden_size=3, window_length=256, hop_length=64, sample_rate=8000)
    folder = tmp_path_factory.mktemp("tiny") / "run"
    save_network(network, Recipe(network="baseline", network_args=network.args), folder)
    return folder


@pytest.fixture
def desk(tiny, tmp_path, monkeypatch):
    "A working folder with a song in it, and `separate` with the small model there."
    from deepdemix.foundations.encoding import write
    monkeypatch.chdir(tmp_path)
    write("song.wav", torch.rand(2, 8000, generator=torch.Generator().manual_seed(0)) / 2, 8000)
    return lambda *words: main(["separate", *map(str, words), "--model", str(tiny)])


def stems_in(folder):
    return sorted(x.relative_to(folder).as_posix() for x in Path(folder).rglob("*.*") if x.is_file())


FOUR = ["song/bass.wav", "song/drums.wav", "song/other.wav", "song/vocals.wav"]


def test_a_default_folder_and_a_short_option(desk):
    assert desk("song.wav") == 0 and stems_in("separated") == FOUR
    assert desk("song.wav", "-o", "short") == 0 and stems_in("short") == FOUR


def test_every_out_has_its_short_option():
    from deepdemix.cli import make_parser
    commands = next(action.choices for action in make_parser()._actions if action.metavar == "COMMAND")
    outs = [a.option_strings for p in commands.values() for a in p._actions if a.dest == "out"]
    assert len(outs) > 10 and all(x == ["-o", "--out"] for x in outs)


def test_the_shell_s_home_folder(desk, tiny, tmp_path, monkeypatch):
    "`--out=~/x` and quoted names come with their `~`."
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    os.rename("song.wav", "home/song.wav")
    os.symlink(tiny, "home/run")
    assert main(["separate", "~/song.wav", "--out=~/x", "--model=~/run"]) == 0
    assert stems_in("home/x") == FOUR and sorted(os.listdir()) == ["home"]


@pytest.mark.parametrize("name", ["-dash.wav", "--dash.wav", "-o.wav", "-", "~song.wav"])
def test_names_that_look_like_something_else(desk, name, capsys, monkeypatch):
    if name == "-": monkeypatch.setattr(sys, "stdin", open("song.wav"))
    os.rename("song.wav", f"./{name}") if name != "-" else None
    assert desk(name, "-o", "out") == 0, capsys.readouterr().err
    folder = {
        "-": "stdin", "--dash.wav": "--dash", "-dash.wav": "-dash", "-o.wav": "-o", "~song.wav": "~song",
    }[name]
    assert stems_in("out") == [x.replace("song", folder) for x in FOUR]


def test_a_name_with_a_dash_that_is_not_there(desk, capsys):
    with pytest.raises(SystemExit) as stop: desk("-dsh.wav", "-o", "out")
    assert stop.value.code == 2 and "-dsh.wav: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "--stems vocals song.mp3", "--stems vocals drums song.mp3", "--stems vocals,drums song.mp3",
        "song.mp3 --stems vocals,drums", "--stems drums vocals ./vocals --two",
    ],
)
def test_songs_behind_the_names_of_stems(desk, words, capsys):
    "A folder may have a stem's name too: the stem is meant."
    from deepdemix.foundations.codecs import read
    from deepdemix.foundations.encoding import write
    write("song.mp3", *read("song.wav"))
    if "--two" in words:
        Path("vocals").mkdir()
        os.rename("song.wav", "vocals/song.wav")
    words = words.removesuffix(" --two").split()
    assert desk(*words, "-o", "out") == 0, capsys.readouterr().err
    expected = {"vocals"} | ({"drums"} if any("drums" in w for w in words) else set())
    assert {Path(x).stem for x in stems_in("out")} == expected and {
        Path(x).parent.name for x in stems_in("out")
    } == {"song"}


def test_a_stem_that_is_misspelt_is_no_song(desk, capsys):
    assert desk("--stems", "voclas", "song.wav") == 2
    assert "no stem 'voclas'; it has drums" in capsys.readouterr().err and not Path("separated").exists()


def test_nothing_to_separate(desk, capsys):
    for words in ([], ["--stems", "vocals"]):
        assert desk(*words) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_an_address_is_no_file(desk, capsys):
    assert desk("https://example.org/song.mp3") == 2
    error = capsys.readouterr().err
    assert ("https://example.org/song.mp3 is an address" in error and error.count("\n") == 1
            and not Path("separated").exists())


def test_standard_input(desk, tiny):
    import tempfile
    run = lambda *words, **kwargs: subprocess.run(
        [*COMMAND, "separate", *words, "--model", str(tiny)], capture_output=True, **kwargs
    )
    done = run("-", "-o", "shown", input=Path("song.wav").read_bytes())
    assert (done.stdout == b"standard input: 4 stems in shown/stdin\n"
            and done.stderr.startswith(b"stdin: 100%") and tempfile.gettempdir().encode() not in done.stderr)
    done = run("-", "-o", "out", "--json", input=Path("song.wav").read_bytes())
    summary = json.loads(done.stdout)
    assert (done.returncode == 0 and stems_in("out") == [x.replace("song", "stdin") for x in FOUR]
            and summary["songs"][0]["input"] == "standard input")
    done = run("-", "-o", "no", input=b"not a song at all")
    assert (done.returncode == 2 and done.stderr.startswith(b"deepdemix: standard input is not an audio file")
            and not Path("no").exists())
    done = run("-", "-o", "no", stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and done.stderr == b"deepdemix: standard input is empty (0 bytes)\n"


def test_separate_hands_its_stems_to_the_desk(desk, capsys, monkeypatch):
    """With the model that is loaded already; a song that failed is not among them, and nothing opens where
    nothing was made."""
    from deepdemix.audio import SOURCES
    served = []
    monkeypatch.setattr("deepdemix.listening.serve", lambda *given: served.append(given))
    assert desk("song.wav", "missing.wav", "--listen", "--no-browser", "--port", "8123") == 1
    (songs, separator, port, browser), = served
    assert [(x.song, sorted(x.outputs)) for x in songs] == [("song.wav", sorted(SOURCES))]
    assert (songs[0].model, port, browser) == (separator.name, 8123, False)
    assert desk("missing.wav", "--listen") == 2 and len(served) == 1
    assert desk("song.wav", "--listen", "--json") == 2 and "--listen goes without" in capsys.readouterr().err


def test_skip_existing_needs_no_cluster(desk, capsys):
    Path("copy.wav").write_bytes(Path("song.wav").read_bytes())
    assert desk("song.wav") == 0
    before = os.stat("separated/song/bass.wav").st_mtime_ns
    capsys.readouterr()
    assert desk("song.wav", "copy.wav", "--skip-existing") == 0
    out = capsys.readouterr().out
    assert "song.wav: finished before, in separated/song\n" in out and "copy.wav: 4 stems" in out
    assert os.stat("separated/song/bass.wav").st_mtime_ns == before and sorted(os.listdir("separated")) == [
        "copy", "song",
    ]
    assert desk("song.wav", "--skip-existing", "--overwrite") == 2


def test_an_album_that_is_its_own_output(desk, capsys):
    Path("album").mkdir()
    os.rename("song.wav", "album/song.wav")
    for _ in range(2):
        assert desk("album", "-o", "album", "--overwrite") == 0
        assert stems_in("album") == sorted([*FOUR, "song.wav"])
    assert "stems of an earlier run" in capsys.readouterr().err


def test_what_a_folder_holds_beside_songs_is_said(desk, capsys):
    Path("album").mkdir()
    os.rename("song.wav", "album/song.m4b"), Path("album/cover.jpg").write_text("")
    assert desk("album") == 0
    assert "album: not taken: 1 .jpg\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "recipe.json"])
def test_a_model_may_be_named_by_its_file(desk, tiny, name):
    assert main(["separate", "song.wav", "--model", str(tiny / name)]) == 0 and stems_in("separated") == FOUR


def test_a_track_that_is_not_there(desk, capsys):
    assert desk("song.wav", "--track", "2") == 2
    assert "has 1 sound track" in capsys.readouterr().err


def test_a_depth_by_a_wrong_name(desk, capsys):
    assert desk("song.wav", "--subtype", "25bit") == 2
    error = capsys.readouterr().err
    assert "PCM_24" in error and "ADPCM" not in error and os.listdir() == ["song.wav"]
    assert desk("song.wav", "--subtype", "24bit") == 0


# Streams

def test_without_standard_error(desk, tiny):
    "Closed by the shell: the work is done, and no file of ours gets the number that libraries complain to."
    out = subprocess.run(
        ["sh", "-c", '"$@" 2>&-', "sh", *COMMAND, "separate", "song.wav", "song.wav", "missing.wav",
         "--model", str(tiny)],
        stdout=subprocess.PIPE,
    )
    assert out.returncode == 1 and stems_in("separated") == FOUR
    assert out.stdout.decode() == "song.wav: 4 stems in separated/song\n"


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_the_numbers_of_closed_streams_stay_free(tmp_path, closed):
    code = """
import os, sys
import deepdemix.cli as cli
def work(args):
    with open(sys.argv[1], "w") as file: print(file.fileno(), file=file); os.write(2, b"a library complains")
cli.models_command = work
os.environ["TORCH_CPP_LOG_LEVEL"] = "x"
sys.exit(cli.main(["models"]))
"""
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-c", code, str(tmp_path / "file")]
    )
    assert done.returncode == 0 and int((tmp_path / "file").read_text()) > 2


def test_standard_error_is_none(desk, monkeypatch, capsys):
    "As under pythonw. What belongs there does not go to standard output instead."
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert desk("song.wav", "missing.wav") == 1
        assert sys.stderr is None
    assert capsys.readouterr().out == "song.wav: 4 stems in separated/song\n"


@pytest.mark.parametrize("encoding", ["ascii", *(pytest.param(x, marks=SLOW) for x in ("cp437", "utf-8"))])
def test_characters_that_the_output_does_not_know(desk, tiny, encoding):
    "An emoji, and a name that is no text at all."
    names = ["song \U0001f600.wav", os.fsdecode(b"latin \xe9.wav")]
    for name in names: Path(name).write_bytes(Path("song.wav").read_bytes())
    run = lambda *words: subprocess.run([*COMMAND, "separate", *names, "--model", str(tiny), *words],
                                        capture_output=True,
                                        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    done = run("-o", "out")
    assert (
        done.returncode == 0 and b"Traceback" not in done.stderr and done.stdout.count(b"4 stems in out") == 2
    )
    assert sorted(os.listdir("out")) == sorted(x.removesuffix(".wav") for x in names)
    summary = json.loads(run("-o", "json", "--json").stdout)
    assert [x["input"] for x in summary["songs"]] == names
    assert run("-o", "song.wav").stderr.count(b"\n") == 1


def test_main_leaves_streams_and_signals_as_they_were(capsys):
    before = sys.stdout, sys.stdout.errors, sys.stderr, sys.stderr.errors, signal.getsignal(signal.SIGTERM)
    assert main(["models"]) == 0 and main(["compare", "nothing.json"]) == 2
    assert (sys.stdout, sys.stdout.errors, sys.stderr, sys.stderr.errors,
            signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_had_enough(unbuffered):
    done = subprocess.run(["bash", "-c", 'set -o pipefail; "$@" | true', "bash", *COMMAND, "models"],
                          capture_output=True, text=True, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_output_that_cannot_be_written():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "models"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "deepdemix: [Errno 28] No space left on device\n"


# Before the work

def write_scores(path, **models):
    import pandas as pd

    from deepdemix.scoring.scores import Scores
    rows = [dict(model=m, seed=0, split="test", song=f"song {i}", source=s, metric="SDR", value=value + i)
            for m, value in models.items() for i in range(8) for s in ("drums", "bass")]
    Scores(pd.DataFrame(rows), dict(channels="mono", mixture="sum")).save(path)
    return str(path)


def test_a_model_is_not_compared_with_itself(tmp_path, capsys):
    one = write_scores(tmp_path / "one.json", **{"ddm": 1., "mixture / 4": 0.})
    two = write_scores(tmp_path / "two.json", early=1., late=2.)
    for words in ([one], [one, one], [one, str(tmp_path / "." / "one.json"), "--model-a", "ddm"],
                  [two, "--model-a", "late", "--model-b", "late"]):
        assert main(["compare", *words]) == 2
        captured = capsys.readouterr()
        assert "with itself" in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert (main(["compare", one, "--model-b", "mixture / 4"]) == 0
            and "mixture / 4 changes SDR by -1.00 dB" in capsys.readouterr().out)
    again = write_scores(tmp_path / "again.json", ddm=1.5)
    assert main(["compare", one, again]) == 0, "two runs of one name are two"


def test_scores_have_a_place_before_songs_are_scored(folder, tmp_path, monkeypatch, capsys):
    from deepdemix.studies import score_model as room
    monkeypatch.setattr(
        room, "score_model", lambda *args, **kwargs: pytest.fail("the songs were scored first")
    )
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "scores.json"):
        assert (
            main(["evaluate", "--model", str(folder / "baseline"), "--data", str(folder / "toy"), "--out",
                  str(out)])
            == 2
        )
        error = capsys.readouterr().err
        assert str(out) in error and error.count("\n") == 1
    assert sorted(x.name for x in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    "command",
    [
        "download --musdb7", "prepare --toy 2", "train --model baseline", "pretrain", "experiment",
        "label-efficiency", "contest", "demo", "join default default", "separate song.wav",
    ],
)
def test_a_file_where_a_folder_shall_be(command, tmp_path, monkeypatch, capsys):
    from deepdemix import cli
    from deepdemix.serving import training_commands
    name = command.split()[0].replace("-", "_")
    room = training_commands if name in ("train", "pretrain") else cli
    monkeypatch.setattr(room, f"{name}_command", lambda args: pytest.fail("the work was begun"))
    (tmp_path / "file").write_text("mine")
    assert main([*command.split(), "--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err and (tmp_path / "file").read_text() == "mine"


def test_a_port_out_of_range(capsys):
    with pytest.raises(SystemExit): main(["listen", "--port", "70000"])
    assert "no port" in capsys.readouterr().err
