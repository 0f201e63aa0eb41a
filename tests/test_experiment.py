"The experiment: its controls, its checks, and the bundled weights as files."
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deepdemix.audio import UserError, read_streams, to_mono
from deepdemix.contest import Contest
from deepdemix.data import prepare_toy
from deepdemix.ensemble import join_runs
from deepdemix.evaluation import Scores
from deepdemix.experiment import CONTROL_STEPS, PAPER_STEPS, WEIGHTS, bundle, excerpt_path, find_step, run_experiment, song_subset, step_recipe
from deepdemix.metrics import sdr
from deepdemix.pretraining import PretrainingTask
from deepdemix.separation import Separator, pretrained_names
from deepdemix.training import Recipe, build_network, fit, load_network, read_record, recipe_for, recipe_from

TINY = ["epochs=1", "examples_per_epoch=4", "batch_size=2", "valid_examples=2", "device=cpu"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return prepare_toy(16, tmp_path_factory.mktemp("toy") / "store", duration=2., progress=False)


def test_every_step_of_the_plan_has_a_recipe(tmp_path):
    for profile in ("demo", "laptop", "author", "paper"):
        for step in PAPER_STEPS + CONTROL_STEPS:
            recipe = step_recipe(step, profile, 3, tmp_path)
            assert recipe.seed == 3 and (recipe.encoder is None) == (step.encoder is None)


def test_the_paper_profile_is_the_paper():
    for name, epochs in {"baseline": 30, "pretraining": 40, "ddm": 45}.items():
        recipe = recipe_for(name, "paper")
        assert (recipe.epochs, recipe.examples_per_epoch, recipe.batch_size, recipe.lr, recipe.betas) == (epochs, 6000, 16, 1e-3, (0.9, 0.999))
        assert recipe.network_args == {} and recipe.mixer["duration"] == 5.0


def test_shuffled_labels_keep_the_excerpts_and_lose_the_roles(store):
    recipe = step_recipe(find_step("encoder"), "demo", 0, store.path, TINY)
    shuffled = step_recipe(find_step("encoder_shuffled"), "demo", 0, store.path, TINY)
    network = build_network("encoder", **recipe.network_args)
    plain, mixed = (PretrainingTask(network, r, store) for r in (recipe, shuffled))
    moved = 0
    for number in range(8):
        a, b = (task.train_batch(number)[0].unflatten(0, (-1, 3)) for task in (plain, mixed))
        for x, y in zip(a, b):
            key = lambda t: sorted(t.square().sum((1, 2)).tolist())
            np.testing.assert_allclose(key(x), key(y), rtol=1e-5)
            moved += not torch.equal(x, y)
    assert moved >= 8


def test_controls_run(store, tmp_path):
    result = run_experiment(store, tmp_path / "out", profile="demo", controls=True, settings=TINY, splits=("test",), progress=False)
    assert set(result.scores.models) == {step.label for step in PAPER_STEPS + CONTROL_STEPS if step.label}
    seen = result.costs().epochs
    assert seen[0, "ddm_long"] == 1
    assert (result.out / "table.png").stat().st_size > 5000


def test_an_experiment_without_test_songs_is_refused(store, tmp_path):
    songs = store.select([i for i, s in enumerate(store.songs) if s.split != "test"])
    with pytest.raises(UserError, match="'test'"): run_experiment(songs, tmp_path / "out", profile="demo")


def test_more_songs_than_there_are(store):
    with pytest.raises(UserError, match="training songs"): song_subset(store, 1000, 0)


def test_a_card_says_how_many_processes_trained(store, tmp_path):
    run = fit(recipe_for("ddm", "demo", epochs=1, examples_per_epoch=4, batch_size=2, valid_examples=2, device="cpu", validation="songs"), store, tmp_path / "run", progress=False)
    for processes, words in ((1, '--data "$MUSDB_PATH" --out RUN`'), (2, '--data "$MUSDB_PATH" --devices 2 --out RUN`')):
        record = json.loads((run / "recipe.json").read_text())
        (run / "recipe.json").write_text(json.dumps(record | dict(processes=processes)))
        folder = bundle(run, "twin", "a twin", store, root=tmp_path / "weights", results=tmp_path / "results")
        assert words in (folder / "README.md").read_text()


def test_bundled_weights_tell_what_they_began_with(store, tmp_path):
    "An encoder, a separator from it, and this trained further: commands and recipes for all, and no folder of this machine."
    few = dict(epochs=1, examples_per_epoch=4, batch_size=2, valid_examples=2, device="cpu", validation="songs")
    encoder = fit(recipe_for("pretraining", "demo", **few | dict(validation="mixes")), store, tmp_path / "runs" / "taught", progress=False)
    first = fit(recipe_for("ddm", "demo", encoder=str(encoder), **few), store, tmp_path / "runs" / "first", progress=False)
    second = fit(recipe_from(first, lr=1e-6), store, tmp_path / "runs" / "second", progress=False)
    for run, field, origin in ((first, "encoder", "taught"), (second, "start", "first")):
        folder = bundle(run, run.name, "a twin", store, root=tmp_path / "weights", results=tmp_path / "results")
        card, recipe = (folder / "README.md").read_text(), read_record(folder)["recipe"]
        assert recipe[field] == origin and str(tmp_path / "runs") not in card + (folder / "recipe.json").read_text()
        assert f"--{field} {field.upper()}_RUN" in card and f"--out {field.upper()}_RUN`" in card
        assert Recipe.load(tmp_path / "results" / run.name / f"{field}.json").epochs == 1
        assert (tmp_path / "results" / run.name / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()
        assert load_network(folder).args == load_network(run).args
    assert "its start's encoder: `deepdemix pretrain" in card and "--encoder START_ENCODER_RUN" in card
    told = "".join(path.read_text() for path in (tmp_path / "results").rglob("*.json"))
    assert str(tmp_path / "runs") not in told and Recipe.load(tmp_path / "results/second/start_encoder.json").kind == "pretraining"


def test_an_ensemble_of_runs_that_began_with_others_tells_no_folder_of_this_machine(store, tmp_path):
    few = dict(epochs=1, examples_per_epoch=4, batch_size=2, valid_examples=2, device="cpu", validation="songs")
    first = fit(recipe_for("ddm", "demo", **few), store, tmp_path / "runs" / "first", progress=False)
    second = fit(recipe_from(first, lr=1e-6), store, tmp_path / "runs" / "second", progress=False)
    folder = bundle(join_runs([first, second], tmp_path / "runs" / "both"), "both", "two", store, root=tmp_path / "weights", results=tmp_path / "results")
    assert read_record(folder)["members"][1]["recipe"]["start"] == "first" == Recipe.load(tmp_path / "results/both/member2.json").start
    for path in (*folder.glob("*.*"), *(tmp_path / "results").rglob("*.json")): assert str(tmp_path / "runs").encode() not in path.read_bytes(), path


@pytest.mark.parametrize("name", pretrained_names())
def test_bundled_weights_have_a_card_and_a_recipe(name):
    card, record = (WEIGHTS / name / "README.md").read_text(), read_record(WEIGHTS / name)
    assert "non-commercial research" in card and "deepdemix train" in card and "valid songs" in card
    assert record["recipe"]["kind"] == "separation" and record["parameters"] <= 6e6
    assert (WEIGHTS / name / "model.safetensors").stat().st_size < 13e6


def changed_by_noise_above(separator):
    "How far noise above 18.5 kHz, which no training song had, moves what is below 17 kHz, as a share of the loudest sample; and how far all of it."
    torch.manual_seed(0)
    noise = 0.1 * torch.randn(2, 44100)
    frequencies = torch.fft.rfftfreq(44100, 1 / 44100)
    band = lambda x, low, high: torch.fft.irfft(torch.fft.rfft(x) * ((frequencies >= low) & (frequencies <= high)), n=44100)
    low, high = (x * torch.hann_window(44100) for x in (band(noise, 0, 16000), 10 * band(noise, 18500, 22050)))
    with torch.no_grad(): before, after = separator(low), separator(low + high)
    loudest = before.abs().max()
    return float((band(after, 0, 17000) - band(before, 0, 17000)).abs().max() / loudest), float((after - before).abs().max() / loudest)


def test_default_is_bundled_and_hears_full_band_songs():
    "It leaves what is below as it was, but for what leaks through the window; a network that listens to all frequencies does not."
    below, everywhere = changed_by_noise_above(Separator.from_pretrained("default", device="cpu"))
    assert below < 1e-2 and everywhere > 1
    torch.manual_seed(0)
    assert changed_by_noise_above(Separator(build_network("compact", bandwidth=22050.).eval(), device="cpu"))[0] > 0.1


def test_the_real_excerpt_is_where_the_demo_looks():
    assert excerpt_path().stat().st_size > 100_000


@pytest.mark.musdb
@pytest.mark.parametrize("name", pretrained_names())
def test_bundled_scores_are_those_of_the_card(name, musdb_path):
    "Every validation song, separated anew with the bundled files, has the score that is kept for it; their median is the number in the card."
    kept = json.loads((Path(__file__).parents[1] / "results" / name / "valid.json").read_text())
    songs, separator, found = {r["song"]: r["scores"] for r in kept["songs"] if r["model"] == name}, Separator.from_pretrained(name), []
    assert len(songs) == 14
    for song, scores in songs.items():
        streams, rate = read_streams(musdb_path / "train" / f"{song}.stem.mp4")
        stems = torch.stack(streams[1:])
        mixture = stems.sum(0) if kept["info"]["mixture"] == "sum" else streams[0]
        if kept["info"]["channels"] == "mono": mixture, stems = to_mono(mixture), to_mono(stems)
        with torch.no_grad(): found.append(sdr(stems, separator(mixture)).tolist())
        np.testing.assert_allclose(found[-1], [scores[s]["SDR"] for s in separator.sources], atol=0.01)
    card = next(line for line in (WEIGHTS / name / "README.md").read_text().splitlines() if line.startswith(name + " "))
    assert abs(float(card.split()[1]) - np.median(found, 0).mean()) < 0.01


def test_the_change_log_says_what_the_results_say():
    root = Path(__file__).parents[1]
    log = (root / "CHANGELOG.md").read_text()
    for name, change in Contest(root / "results/contest").summary()["change"].items():
        size, interval = change.split(" ", 1)
        assert f"{name} {size} dB {interval}" in log
    assert f"{Scores.load(root / 'results/default/test.json').overall():.2f} dB on the test songs" in log
