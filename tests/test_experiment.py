"The experiment: its controls and its checks, and what the change log says of it."
from pathlib import Path

import numpy as np
import pytest
import torch

from deepdemix.data import prepare_toy
from deepdemix.experiment import CONTROL_STEPS, PAPER_STEPS, find_step, run_experiment, step_recipe
from deepdemix.foundations.files import UserError
from deepdemix.foundations.profiles import recipe_for
from deepdemix.foundations.registry import build_network
from deepdemix.pretraining import PretrainingTask
from deepdemix.scoring.scores import Scores
from deepdemix.studies.contest import Contest
from deepdemix.studies.demo import excerpt_path
from deepdemix.studies.label_efficiency import song_subset

TINY = dict(epochs=1, examples_per_epoch=4, batch_size=2, valid_examples=2, device="cpu")


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
        assert (recipe.epochs, recipe.examples_per_epoch, recipe.batch_size, recipe.lr, recipe.betas) == (
            epochs, 6000, 16, 1e-3, (0.9, 0.999),
        )
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


@pytest.mark.slow
def test_controls_run(store, tmp_path):
    result = run_experiment(store, tmp_path / "out", profile="demo", controls=True, settings=TINY,
                            splits=("test",), progress=False)
    assert set(result.scores.models) == {step.label for step in PAPER_STEPS + CONTROL_STEPS if step.label}
    seen = result.costs().epochs
    assert seen[0, "ddm_long"] == 1
    assert (result.out / "table.png").stat().st_size > 5000


def test_an_experiment_without_test_songs_is_refused(store, tmp_path):
    songs = store.select([i for i, s in enumerate(store.songs) if s.split != "test"])
    with pytest.raises(UserError, match="'test'"): run_experiment(songs, tmp_path / "out", profile="demo")


def test_more_songs_than_there_are(store):
    with pytest.raises(UserError, match="training songs"): song_subset(store, 1000, 0)


def test_the_real_excerpt_is_where_the_demo_looks():
    assert excerpt_path().stat().st_size > 100_000


def test_the_change_log_says_what_the_results_say():
    root = Path(__file__).parents[1]
    log = (root / "CHANGELOG.md").read_text()
    for name, change in Contest(root / "results/contest").summary()["change"].items():
        size, interval = change.split(" ", 1)
        assert f"{name} {size} dB {interval}" in log
    assert f"{Scores.load(root / 'results/default/test.json').overall():.2f} dB on the test songs" in log
