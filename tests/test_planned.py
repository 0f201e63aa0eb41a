"""Planned studies: what a plan must be, pieces that are stopped and go on, scores that stay sealed, and a
rehearsal."""
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepdemix.data import prepare_toy
from deepdemix.foundations.files import UserError
from deepdemix.foundations.recipe import read_record
from deepdemix.foundations.runs import load_network
from deepdemix.foundations.weights import read_weights
from deepdemix.studies import planned
from deepdemix.studies.plan import Plan, Run
from deepdemix.studies.planned import (
    SEALED,
    check_committed,
    main,
    read_test,
    run_study,
    study_table,
    train_run,
    unseal,
)

TINY = dict(
    window_length=1024, hop_length=512, octave=16, band=8, bandwidth=16000.0, width=8, hidden=8, layers=1
)
SHARED = dict(network="compact", network_args=TINY, batch_size=2, valid_examples=2,
              mixer=dict(duration=0.5, pitch=None, stretch=None))
RECIPES = dict(separator=dict(SHARED, loss="l1_cells", epochs=2, validation="songs", ema=0.9),
               encoder=dict(SHARED, kind="dense", loss="supcon", epochs=1))
RUNS = (Run("scratch", "separator", "scratch", examples=8), Run("encoder", "encoder", examples=4),
        Run("pretrained", "separator", "pretrained", examples=8, encoder="encoder", songs=2))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return prepare_toy(
        8, tmp_path_factory.mktemp("toy") / "store", duration=1.5, valid=0.25, test=0.25, progress=False
    )


def plan(**changes):
    base = Plan("Does it help?", (("scratch", "pretrained"),), (0, 1), RECIPES, RUNS,
                scoring=dict(channels="stereo", window=1.0))
    return replace(base, **changes)


@pytest.fixture
def study(tmp_path):
    (tmp_path / "results").mkdir()
    plan().save(tmp_path / "results/plan.json")
    return tmp_path / "results", tmp_path / "runs"


@pytest.mark.parametrize(
    "changes, words",
    [(dict(seeds=(0, 0)), "each once"), (dict(margin=0.0), "above 0"),
     (dict(runs=RUNS[1:] + RUNS[1:]), "twice"), (dict(comparisons=(("scratch", "x"),)), "compares 'x'"),
     (dict(runs=(replace(RUNS[0], examples=6),)), "whole batches"),
     (dict(runs=(RUNS[2],)), "no run 'encoder' before"),
     (dict(runs=(replace(RUNS[0], recipe="x"),)), "no recipe 'x'"),
     (dict(runs=(replace(RUNS[0], settings=dict(learning=1)),)), "learning")],
)
def test_a_plan_with_a_mistake_is_refused(changes, words):
    with pytest.raises(UserError, match=words): plan(**changes).check()


def test_a_plan_that_is_no_plan(tmp_path):
    for text in ("{", "[]", '{"question": "?"}', '{"runs": [{"nom": 1}]}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(UserError): Plan.load(tmp_path)


def test_a_plan_is_committed_before_it_is_run(study, store):
    results, root = study
    git = lambda *words: subprocess.run(
        ["git", "-C", results, "-c", "user.name=x", "-c", "user.email=x@example.org", *words], check=True,
        capture_output=True,
    )
    git("init")
    with pytest.raises(UserError, match="not committed"): run_study(results, store, root, progress=False)
    git("add", "plan.json"), git("commit", "-m", "plan")
    check_committed(results / "plan.json")
    (results / "plan.json").write_text((results / "plan.json").read_text() + " ")
    with pytest.raises(UserError, match="not committed"): check_committed(results / "plan.json")
    assert not root.exists()


def test_pieces_make_the_same_study(study, store, tmp_path):
    results, root = study
    assert run_study(results, store, root, part=(2, 2), progress=False)
    assert {p.parent.name + p.parent.parent.name for p in results.rglob(SEALED)} == {
        "seed0pretrained", "seed1pretrained",
    }
    with pytest.raises(UserError, match="not over"): read_test(results, store)
    shutil.rmtree(root)
    before = {p: p.read_bytes() for p in results.rglob(SEALED)}
    assert run_study(results, store, root, part=(1, 2), progress=False)
    assert all(p.read_bytes() == text for p, text in before.items()) and not (root / "pretrained").exists()
    found = read_test(results, store)
    assert set(found.models) == {"scratch", "pretrained"} and sorted(
        found.filter(model="scratch").rows.seed.unique()
    ) == [0, 1]
    whole = tmp_path / "whole"
    whole.mkdir()
    shutil.copy(results / "plan.json", whole / "plan.json")
    run_study(whole, store, tmp_path / "again", progress=False)
    key = ["model", "seed", "split", "song", "source", "metric"]
    a, b = (s.filter(model=["scratch", "pretrained"]).rows.sort_values(key).reset_index(drop=True)
            for s in (read_test(whole, store), found))
    assert a.equals(b)


def test_a_stopped_run_keeps_the_same_checkpoints(store, tmp_path, monkeypatch):
    steady = train_run(plan(), RUNS[0], 0, store, tmp_path / "steady", progress=False)
    calls, real = [], planned.TASKS["separation"].validate

    def stop_once(self):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(self)
    monkeypatch.setattr(planned.TASKS["separation"], "validate", stop_once)
    recipes = {**RECIPES, "separator": {**RECIPES["separator"], "save_minutes": 0.}}
    with pytest.raises(UserError, match="stopped"):
        train_run(plan(recipes=recipes), RUNS[0], 0, store, tmp_path / "stopped", progress=False)
    assert read_record(tmp_path / "stopped/scratch/seed0")["status"] == "running"
    stopped = train_run(plan(recipes=recipes), RUNS[0], 0, store, tmp_path / "stopped", progress=False)
    for name in ("epoch1.safetensors", "epoch2.safetensors", "model.safetensors"):
        a, b = (read_weights(folder / name) for folder in (steady, stopped))
        assert all(torch.equal(a[k], b[k]) for k in a), name


def test_records_say_what_made_a_run(study, store):
    results, root = study
    run_study(results, store, root, seeds=[1], progress=False)
    table = study_table(results)
    digests = json.loads((results / "digests.json").read_text())
    assert list(table.index) == [("scratch", 1), ("encoder", 1), ("pretrained", 1)]
    assert table.encoder["pretrained", 1] == digests["encoder/seed1"][:12] and (table.hours > 0).all()
    assert list(table.examples) == [8, 4, 8]
    assert read_record(results / "pretrained/seed1")["recipe"]["clock"] == "processor"


def test_a_study_may_end_as_it_stands(study, store):
    results, root = study
    run_study(results, store, root, seeds=[1], progress=False)
    with pytest.raises(UserError, match="2 runs are not over"): read_test(results, store)
    found = read_test(results, store, unfinished=True)
    assert set(found.filter(model=["scratch", "pretrained"]).rows.seed) == {1}
    about = json.loads((results / "test.json").read_text())
    assert about["seeds"] == [1] and about["missing"] == ["scratch/seed0", "pretrained/seed0"]
    with pytest.raises(UserError, match="were read"): read_test(results, store, unfinished=True)
    with pytest.raises(UserError, match="is over"): run_study(results, store, root, progress=False)


def test_the_last_checkpoint_is_the_last_validation(store, tmp_path):
    results, root = tmp_path / "results", tmp_path / "runs"
    folder = train_run(plan(), RUNS[0], 0, store, root, progress=False)
    planned.seal_run(plan(), RUNS[0], 0, store, root, results)
    best = read_record(folder)["best"]["epoch"]
    scores = unseal(results / "scratch/seed0" / SEALED)
    chosen, kept = (
        scores.filter(model=name).overall("SDR", name, "test") for name in ("scratch", f"scratch @ {best}")
    )
    assert chosen == pytest.approx(kept, abs=1e-4)
    assert load_network(folder).training is False and "SI-SDR" in set(scores.rows.metric)


def test_songs_are_the_few(store, tmp_path):
    folder = train_run(plan(), RUNS[2], 0, store, tmp_path, progress=False)
    assert read_record(folder)["data"]["songs"] == 2 + 2 + 2
    assert read_record(tmp_path / "encoder/seed0")["data"]["songs"] == len(store)


def test_the_command(study, store, capsys):
    results, root = map(str, study)
    threads = torch.get_num_threads()
    try:
        assert (
            main(["run", results, "--out", root, "--data", str(store.path), "--part", "1/2", "--seed", "0"])
            == 0
        )
        assert "8 examples, 4 steps" in capsys.readouterr().err
        assert main(["status", results]) == 0 and "scratch" in capsys.readouterr().out
        assert main(["test", results, "--data", str(store.path)]) == 2
        assert capsys.readouterr().err.startswith("deepdemix: 3 runs are not over")
        assert main(["run", results, "--data", str(store.path)]) == 2
        with pytest.raises(SystemExit): main(["run", results, "--part", "3/2"])
    finally: torch.set_num_threads(threads)


def test_a_run_that_fails_does_not_stop_the_others(study, store, monkeypatch, capsys):
    results, root = study
    real = planned.train_run

    def fails(plan, run, seed, *args, **kwargs):
        if run.name == "scratch" and seed == 0: raise UserError("the loss is no longer finite")
        return real(plan, run, seed, *args, **kwargs)
    monkeypatch.setattr(planned, "train_run", fails)
    assert not run_study(results, store, root, progress=False)
    assert "seed 0: scratch: the loss is no longer finite" in capsys.readouterr().err
    assert len(list(results.rglob(SEALED))) == 3
    monkeypatch.setattr(planned, "train_run", real)
    assert run_study(results, store, root, progress=False)


def test_time_that_is_over_begins_nothing(study, store):
    results, root = study
    assert not run_study(results, store, root, hours=1e-9, progress=False)
    assert not list(results.rglob(SEALED))


def test_the_workstation_has_the_steps_of_the_author():
    from deepdemix.foundations.profiles import PROFILES, recipe_for
    from deepdemix.serving.training_commands import PROFILE_NAMES
    for name in ("ddm", "pretraining"):
        here, small, author = (recipe_for(name, profile) for profile in ("workstation", "laptop", "author"))
        assert (here.steps == author.steps and here.network_args == small.network_args
                and here.valid_examples == 64)
    assert set(PROFILE_NAMES) == set(PROFILES)


@pytest.mark.parametrize("name", ["dense", "budget", "steps"])
def test_the_plans_that_are_kept_hold_together(name):
    kept = Plan.load(Path(__file__).parent.parent / "results" / name)
    longest = max(run.examples for run in kept.runs if run.label)
    assert kept.question and kept.budget["processor_hours"] > 0 and kept.data
    assert all(0.75 * longest <= run.examples or "as long as both" in str(kept.comparisons)
               for run in kept.runs if run.label)
    assert {label for pair in kept.comparisons for label in pair} == {
        run.label for run in kept.runs if run.label
    }
