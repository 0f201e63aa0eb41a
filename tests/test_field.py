"Stems that other tools wrote, models and published results in one table."
import json

import pytest
import torch

from deepdemix.audio import SOURCES
from deepdemix.cli import main
from deepdemix.data import prepare_toy
from deepdemix.evaluation import evaluate
from deepdemix.foundations.encoding import write
from deepdemix.foundations.song_files import plain_title
from deepdemix.foundations.waveforms import resample
from deepdemix.scoring.estimates import Estimates


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return prepare_toy(
        6, tmp_path_factory.mktemp("field") / "toy", duration=2.0, valid=0.2, test=0.5, progress=False
    ).split("test")


def spread(store, root, name=str, ending=".wav", gain=.5, rate=44100, **kwargs):
    "Stems of all songs at half their level, as some tool would have left them."
    for i, song in enumerate(store.songs):
        for stem, x in zip(SOURCES, store.stems(i)):
            write(
                root / name(song.title) / f"{stem}{ending}", resample(x * gain, 44100, rate), rate, **kwargs
            )
    return root


LAYOUTS = {
    "plain": str, "upper case": str.upper, "underscores": lambda t: t.replace(" ", "_"),
    "Demucs": lambda t: f"htdemucs/{t}.stem", "museval": lambda t: f"test/{t}",
    "a file's name": lambda t: f"{t}.wav",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_songs_are_found_in_every_layout(store, tmp_path, layout):
    spread(store, tmp_path, LAYOUTS[layout], subtype="FLOAT")
    scores = evaluate(Estimates(tmp_path), store, "stereo", name="half", references=False, metrics=("SNR",))
    assert not scores.failed and abs(scores.rows.value - 6.0206).max() < 1e-3


@pytest.mark.parametrize(
    "kind",
    [dict(ending=".flac"), dict(ending=".mp3"), dict(ending=".ogg"), dict(rate=22050, subtype="FLOAT"),
     dict(rate=48000, subtype="FLOAT")],
    ids=str,
)
def test_formats_and_rates_are_brought_to_the_data(store, tmp_path, kind):
    tool = Estimates(spread(store, tmp_path, gain=1., **kind))
    scores = evaluate(tool, store, "stereo", references=False, metrics=("SNR",))
    assert not scores.failed and scores.overall("SNR") > 7
    assert any("resampled from" in line for line in tool.notes) == ("rate" in kind)
    assert all(line in str(scores.table(["SNR"])) for line in tool.notes)


def test_lengths_are_put_right_within_a_tenth_of_a_second(store, tmp_path):
    spread(store, tmp_path, subtype="FLOAT")
    def lengthen(song, stem, samples):
        x = store.stems(song)[SOURCES.index(stem)] * .5
        x = torch.nn.functional.pad(x, (0, samples))
        write(tmp_path / store.songs[song].title / f"{stem}.wav", x, 44100, subtype="FLOAT")
    lengthen(0, "bass", 4000)
    lengthen(1, "bass", -4000)
    lengthen(2, "bass", 5000)
    scores = evaluate(Estimates(tmp_path), store, "stereo", references=False, metrics=("SNR",))
    assert [x["song"] for x in scores.failed] == [store.songs[2].title]
    assert "5000 samples longer than the song; up to 4410" in scores.failed[0]["reason"]
    assert any("2 stems cut or filled with silence at the end" in x for x in scores.info["notes"])


def test_a_mono_stem_goes_to_both_channels(store, tmp_path):
    spread(store, tmp_path, subtype="FLOAT")
    for i, song in enumerate(store.songs):
        write(tmp_path / song.title / "bass.wav", store.stems(i)[1].mean(0, keepdim=True), 44100,
              subtype="FLOAT")
    tool = Estimates(tmp_path)
    assert not evaluate(tool, store, "stereo", references=False, metrics=("SNR",)).failed
    assert any("mono, given to both channels" in x for x in tool.notes)


def test_missing_songs_and_stems_are_listed_and_cost_themselves_alone(store, tmp_path, capsys):
    spread(store, tmp_path / "tool")
    first, second, third = (s.title for s in store.songs)
    (tmp_path / "tool" / first / "vocals.wav").unlink()
    for path in (tmp_path / "tool" / second).iterdir(): path.unlink()
    (tmp_path / "tool" / third / "drums.wav").write_bytes(b"RIFF, but no sound")
    out = tmp_path / "scores.json"
    assert (
        main(
            ["evaluate", "--estimates", str(tmp_path / "tool"), "--data", str(store.path), "--out", str(out)]
        )
        == 1
    )
    printed = capsys.readouterr().out
    assert (f"no score: {first} (tool): no vocals" in printed
            and f"no score: {second} (tool): no folder of this name" in printed)
    assert f"no score: {third} (tool): " in printed and "drums.wav" in printed
    assert len({s["song"] for s in json.loads(out.read_text())["songs"] if s["model"] == "tool"}) == 1


def test_several_rows_make_one_table_with_verdicts(store, tmp_path, capsys):
    spread(store, tmp_path / "a" / "stems", gain=.5)
    spread(store, tmp_path / "b" / "stems", gain=.9)
    words = ["evaluate", "--data", store.path, "--out", tmp_path / "scores.json"]
    run = lambda *more: main([str(x) for x in (*words, *more)])
    assert run("--estimates", tmp_path / "a" / "stems", "--estimates", tmp_path / "b" / "stems") == 2
    assert "two rows would be called 'stems'" in capsys.readouterr().err
    assert (
        run(
            "--estimates", f"soft={tmp_path / 'a' / 'stems'}", "--estimates",
            f"loud={tmp_path / 'b' / 'stems'}",
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "loud changes SDR by +13.98 dB" in printed and "ideal ratio mask" in printed
    assert "window and hop of 512/128 samples" in printed


def test_what_cannot_be_scored_is_one_line(store, tmp_path, capsys):
    run = lambda *words: main(
        [str(x) for x in ("evaluate", "--data", store.path, "--out", tmp_path / "scores.json", *words)]
    )
    assert run() == 2 and "nothing to score" in capsys.readouterr().err
    assert (
        run("--estimates", tmp_path / "nowhere") == 2 and "no such folder of stems" in capsys.readouterr().err
    )
    assert run("--estimates", tmp_path) == 2 and "no stems here" in capsys.readouterr().err
    assert not (tmp_path / "scores.json").exists()


def test_mono_and_stereo_scores_say_what_makes_them_comparable(store, tmp_path, capsys):
    spread(store, tmp_path / "tool")
    for kind in ("mono", "stereo"):
        main(["evaluate", "--estimates", str(tmp_path / "tool"), "--data", str(store.path), "--channels",
              kind, "--out", str(tmp_path / f"{kind}.json")])
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "mono.json"), str(tmp_path / "stereo.json")]) == 2
    assert "score both with --channels mono, or both with --channels stereo" in capsys.readouterr().err


def test_titles_that_only_look_alike_stay_apart():
    assert plain_title("Song 1") != plain_title("Song 11") and plain_title("!!!") == "!!!"
