"Bundled weights: their cards, their commands, and the files themselves."
import ast
import inspect
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from deepdemix.cli import make_parser
from deepdemix.data import open_data, prepare_toy
from deepdemix.foundations.codecs import read_streams
from deepdemix.foundations.model_names import pretrained_names
from deepdemix.foundations.profiles import recipe_for
from deepdemix.foundations.recipe import Recipe, read_record
from deepdemix.foundations.registry import build_network
from deepdemix.foundations.runs import WEIGHTS, load_network, recipe_from
from deepdemix.foundations.store import stem_minutes
from deepdemix.foundations.waveforms import to_mono
from deepdemix.metrics import sdr
from deepdemix.networks.ensemble import join_runs
from deepdemix.separation import Separator
from deepdemix.studies.bundling import bundle, made_by
from deepdemix.training import fit

FEW = dict(epochs=1, examples_per_epoch=4, batch_size=2, valid_examples=2, device="cpu", validation="songs")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return prepare_toy(16, tmp_path_factory.mktemp("toy") / "store", duration=2., progress=False)


def test_a_card_says_how_many_processes_trained(store, tmp_path):
    run = fit(recipe_for("ddm", "demo", **FEW), store, tmp_path / "run", progress=False)
    for processes, words in ((1, '--data "$MUSDB_PATH" --out RUN`'),
                             (2, '--data "$MUSDB_PATH" --devices 2 --out RUN`')):
        record = json.loads((run / "recipe.json").read_text())
        (run / "recipe.json").write_text(json.dumps(record | dict(processes=processes)))
        folder = bundle(run, "twin", "a twin", store, root=tmp_path / "weights", results=tmp_path / "results")
        assert words in (folder / "README.md").read_text()


def test_bundled_weights_tell_what_they_began_with(store, tmp_path):
    """An encoder, a separator from it, and this trained further: commands and recipes for all, and no folder
    of this machine."""
    encoder = fit(recipe_for("pretraining", "demo", **FEW | dict(validation="mixes")), store,
                  tmp_path / "runs" / "taught", progress=False)
    first = fit(recipe_for("ddm", "demo", encoder=str(encoder), **FEW), store, tmp_path / "runs" / "first",
                progress=False)
    second = fit(recipe_from(first, lr=1e-6), store, tmp_path / "runs" / "second", progress=False)
    for run, field, origin in ((first, "encoder", "taught"), (second, "start", "first")):
        folder = bundle(
            run, run.name, "a twin", store, root=tmp_path / "weights", results=tmp_path / "results"
        )
        card, recipe = (folder / "README.md").read_text(), read_record(folder)["recipe"]
        assert (recipe[field] == origin
                and str(tmp_path / "runs") not in card + (folder / "recipe.json").read_text())
        assert f"--{field} {field.upper()}_RUN" in card and f"--out {field.upper()}_RUN`" in card
        assert Recipe.load(tmp_path / "results" / run.name / f"{field}.json").epochs == 1
        assert (tmp_path / "results" / run.name / "metrics.csv").read_bytes() == (
            run / "metrics.csv"
        ).read_bytes()
        assert load_network(folder).args == load_network(run).args
    assert "its start's encoder: `deepdemix pretrain" in card and "--encoder START_ENCODER_RUN" in card
    told = "".join(path.read_text() for path in (tmp_path / "results").rglob("*.json"))
    assert (str(tmp_path / "runs") not in told
            and Recipe.load(tmp_path / "results/second/start_encoder.json").kind == "pretraining")


def test_an_ensemble_of_runs_that_began_with_others_tells_no_folder_of_this_machine(store, tmp_path):
    first = fit(recipe_for("ddm", "demo", **FEW), store, tmp_path / "runs" / "first", progress=False)
    second = fit(recipe_from(first, lr=1e-6), store, tmp_path / "runs" / "second", progress=False)
    folder = bundle(join_runs([first, second], tmp_path / "runs" / "both"), "both", "two", store,
                    root=tmp_path / "weights", results=tmp_path / "results")
    assert (read_record(folder)["members"][1]["recipe"]["start"] == "first"
            == Recipe.load(tmp_path / "results/both/member2.json").start)
    for path in (*folder.glob("*.*"), *(tmp_path / "results").rglob("*.json")):
        assert str(tmp_path / "runs").encode() not in path.read_bytes(), path
    card = (folder / "README.md").read_text()
    assert ("member2.json --start MEMBER2_START_RUN" in card
            and "- its member 2's start: `deepdemix train" in card and "--out MEMBER2_START_RUN`" in card)
    assert Recipe.load(tmp_path / "results/both/member2_start.json").start is None


@pytest.mark.parametrize(
    "start, words", [("default", "--start default --data"), ("runs/gone", "--start START_RUN --data")]
)
def test_a_start_that_is_bundled_or_gone(start, words, store, tmp_path):
    """Weights of the package are told by name; a run that is gone is said to be gone, and its folder is not
    told."""
    run = fit(recipe_for("ddm", "demo", **FEW), store, tmp_path / "run", progress=False)
    record = json.loads((run / "recipe.json").read_text())
    record["recipe"]["start"] = start if start == "default" else str(tmp_path / start)
    (run / "recipe.json").write_text(json.dumps(record))
    card = made_by(run, "twin", tmp_path)
    assert words in card and str(tmp_path / "runs") not in card
    assert ("- its start: gone" in card) == (start != "default") and not (tmp_path / "start.json").exists()


@pytest.mark.parametrize("name", pretrained_names())
def test_the_commands_of_a_card_can_be_given(name):
    "Every option is known, every recipe is there, and the last command imports what is there."
    commands = re.findall(r"`((?:deepdemix|python) [^`]+)`", (WEIGHTS / name / "README.md").read_text())
    assert len(commands) >= 2
    for words in map(shlex.split, commands):
        if words[0] == "python":
            statement, call = words[2].split("; ")
            exec(statement, found := {})
            called = ast.parse(call, mode="eval").body
            inspect.signature(found[called.func.id]).bind(
                *called.args, **{k.arg: k.value for k in called.keywords}
            )
        else:
            args = make_parser().parse_args(words[1:])
            assert Recipe.load(Path(__file__).parents[1] / args.recipe).kind == (
                "pretraining" if words[1] == "pretrain" else "separation"
            )


@pytest.mark.parametrize("name", pretrained_names())
def test_bundled_weights_have_a_card_and_a_recipe(name):
    card, record = (WEIGHTS / name / "README.md").read_text(), read_record(WEIGHTS / name)
    assert "non-commercial research" in card and "deepdemix train" in card and "valid songs" in card
    assert record["recipe"]["kind"] == "separation" and record["parameters"] <= 6e6
    assert (WEIGHTS / name / "model.safetensors").stat().st_size < 13e6


def changed_by_noise_above(separator):
    """How far noise above 18.5 kHz, which no training song had, moves what is below 17 kHz, as a share of
    the loudest sample; and how far all of it."""
    torch.manual_seed(0)
    noise = 0.1 * torch.randn(2, 44100)
    frequencies = torch.fft.rfftfreq(44100, 1 / 44100)
    band = lambda x, low, high: torch.fft.irfft(
        torch.fft.rfft(x) * ((frequencies >= low) & (frequencies <= high)), n=44100
    )
    low, high = (
        x * torch.hann_window(44100) for x in (band(noise, 0, 16000), 10 * band(noise, 18500, 22050))
    )
    with torch.no_grad(): before, after = separator(low), separator(low + high)
    loudest = before.abs().max()
    return float((band(after, 0, 17000) - band(before, 0, 17000)).abs().max() / loudest), float(
        (after - before).abs().max() / loudest
    )


def test_default_is_bundled_and_hears_full_band_songs():
    """It leaves what is below as it was, but for what leaks through the window; a network that listens to
    all frequencies does not."""
    below, everywhere = changed_by_noise_above(Separator.from_pretrained("default", device="cpu"))
    assert below < 1e-2 and everywhere > 1
    torch.manual_seed(0)
    assert (
        changed_by_noise_above(Separator(build_network("compact", bandwidth=22050.0).eval(), device="cpu"))[0]
        > 0.1
    )


@pytest.mark.musdb
def test_bundled_models_say_how_much_music_they_learned_from(musdb_path):
    store = open_data(musdb_path, progress=False)
    minutes = stem_minutes([s for s in store.songs if s.split == "train"])
    for name in pretrained_names():
        data = read_record(WEIGHTS / name)["data"]
        assert (data["digest"], data["minutes"]) == (store.digest, minutes)


@pytest.mark.musdb
@pytest.mark.parametrize("name", [n if n == "default" else pytest.param(n, marks=pytest.mark.slow)
                                  for n in pretrained_names()])
def test_bundled_scores_are_those_of_the_card(name, musdb_path):
    """Every validation song, separated anew with the bundled files, has the score that is kept for it; their
    median is the number in the card."""
    kept = json.loads((Path(__file__).parents[1] / "results" / name / "valid.json").read_text())
    songs = {r["song"]: r["scores"] for r in kept["songs"] if r["model"] == name}
    separator = Separator.from_pretrained(name)
    found = []
    assert len(songs) == 14
    for song, scores in songs.items():
        streams, rate = read_streams(musdb_path / "train" / f"{song}.stem.mp4")
        stems = torch.stack(streams[1:])
        mixture = stems.sum(0) if kept["info"]["mixture"] == "sum" else streams[0]
        if kept["info"]["channels"] == "mono": mixture, stems = to_mono(mixture), to_mono(stems)
        with torch.no_grad(): found.append(sdr(stems, separator(mixture)).tolist())
        np.testing.assert_allclose(found[-1], [scores[s]["SDR"] for s in separator.sources], atol=0.01)
    card = next(line for line in (WEIGHTS / name / "README.md").read_text().splitlines()
                if line.startswith(name + " "))
    assert abs(float(card.split()[1]) - np.median(found, 0).mean()) < 0.01
