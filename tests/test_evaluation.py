"""Evaluation: faults, files that museval reads, statistics that cover what they promise, and the reference
rows on real songs."""
import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepdemix import evaluation as E
from deepdemix.audio import SOURCES, STFT
from deepdemix.data import prepare_toy
from deepdemix.foundations.codecs import read_streams
from deepdemix.foundations.decoding import probe
from deepdemix.foundations.files import UserError
from deepdemix.foundations.store import Store
from deepdemix.scoring.oracles import (
    REFERENCES,
    TRIVIAL_ROWS,
    _masked,
    binary_mask,
    complex_mask,
    grid_mask,
    ratio_mask,
    real_mask,
)
from deepdemix.scoring.pictures import show_songs
from deepdemix.scoring.scores import Scores
from deepdemix.scoring.verdicts import compare

RATE = 4000


class Songs:
    "A store of made-up songs: noise in four bands of time."
    sources, sample_rate, digest = SOURCES, RATE, "made up"

    def __init__(self, n=5, seconds=2.5, split="test", channels=2):
        self.stem = [
            torch.randn(4, channels, int(seconds * RATE), generator=torch.Generator().manual_seed(k)) * 0.1
            for k in range(n)
        ]
        self.songs = [SimpleNamespace(title=f"Song {k}", split=split) for k in range(n)]

    def __len__(self): return len(self.stem)
    def stems(self, i): return self.stem[i].clone()
    def mixture(self, i, kind="sum"): return self.stem[i].sum(0) * (.9 if kind == "stream" else 1)


def quarter(x): return torch.stack([x / 4] * 4)


def oracle(store, noise=.3, seed=0, channels="mono"):
    "A separator that knows the answer up to noise; it must be called song by song, in order."
    g, state = torch.Generator().manual_seed(seed), {"i": 0}
    def separate(x):
        stems = store.stems(state["i"])
        state["i"] += 1
        stems = stems.mean(1, keepdim=True) if channels == "mono" else stems
        return stems + noise * stems.std() * torch.randn(stems.shape, generator=g)
    return separate


# Protocols

def test_mono_is_the_sum_of_stems_and_stereo_the_stream():
    store, seen = Songs(1), []
    E.evaluate(lambda x: seen.append(x) or quarter(x), store, references=False)
    E.evaluate(lambda x: seen.append(x) or quarter(x), store, channels="stereo", references=False)
    E.evaluate(
        lambda x: seen.append(x) or quarter(x), store, channels="stereo", mixture="sum", references=False
    )
    assert torch.allclose(seen[0], store.stem[0].mean(1, keepdim=True).sum(0))
    assert torch.allclose(seen[1], store.stem[0].sum(0) * .9)
    assert torch.allclose(seen[2], store.stem[0].sum(0))


def test_sources_are_matched_by_name():
    store = Songs(2)
    scores = E.evaluate(oracle(store, .1), store, references=False)
    mixed = oracle(store, .1)
    named = E.evaluate(lambda x: dict(reversed(list(zip(SOURCES, mixed(x))))), store, references=False)
    assert named.rows.value.equals(scores.rows.value)
    class Network(torch.nn.Module):
        sources, sample_rate = SOURCES[::-1], RATE
        def forward(self, x): return torch.stack([x * k for k in (.4, .3, .2, .1)], 1)
    found = E.evaluate(Network(), store, references=False).by_song("SD-SDR")
    plain = E.evaluate(
        lambda x: torch.stack([x * k for k in (0.1, 0.2, 0.3, 0.4)]), store, references=False
    ).by_song("SD-SDR")
    assert np.allclose(found, plain, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_evaluated_and_left_as_it_was(training):
    class Network(torch.nn.Module):
        sample_rate = RATE
        def forward(self, x):
            assert not self.training and not torch.is_grad_enabled()
            return torch.stack([x] * 4, 1)
    network = Network().train(training)
    assert not E.evaluate(network, Songs(2), references=False).failed
    assert network.training == training


# Bad input: one clear line, and the other songs keep their scores

FAULTS = {
    "one source only": (lambda y: y[:1], "the separator gave"),
    "mono for stereo": (lambda y: y[:, :1], "the separator gave"),
    "too short": (lambda y: y[..., :-1], "the separator gave"),
    "NaN": (lambda y: y * math.nan, "NaN"),
    "infinite": (lambda y: y / 0, "NaN or infinite"),
    "no output": (lambda y: None, ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_song_costs_no_other(fault):
    spoil, reason = FAULTS[fault]
    store, calls = Songs(4), []
    def separate(x):
        calls.append(x)
        return spoil(quarter(x)) if len(calls) == 3 else quarter(x)
    scores = E.evaluate(separate, store, channels="stereo")
    assert scores.rows[scores.rows.model == "model"].song.unique().tolist() == ["Song 0", "Song 1", "Song 3"]
    assert [f["song"] for f in scores.failed] == ["Song 2"] and reason in scores.failed[0]["reason"]
    assert "no score: Song 2 (model)" in str(scores.table())


def test_a_missing_stem_costs_itself_alone():
    store, calls = Songs(3), []
    def separate(x):
        calls.append(x)
        return dict(zip(SOURCES[:3] if len(calls) == 2 else SOURCES, quarter(x)))
    scores = E.evaluate(separate, store, references=False)
    assert scores.failed == [{"model": "model", "song": "Song 1", "reason": "no vocals", "seed": 0}]
    assert scores.by_song("SNR").isna().to_numpy().tolist() == [
        [False] * 4, [False] * 3 + [True], [False] * 4,
    ]


def test_a_separator_of_one_source_has_no_overall_score():
    store, voice = Songs(4), oracle(Songs(4), .1)
    def separate(x): return voice(x)[3:]
    separate.sources = ("vocals",)
    scores = E.evaluate(separate, store, name="voice", references=False) + E.evaluate(
        oracle(store, 0.1), store, name="all", references=False
    )
    assert not scores.failed
    table = scores.summary(["SNR"])["SNR"]
    assert table.loc[("test", "voice")].isna().to_dict() == {
        "overall": True, "vocals": False, "drums": True, "bass": True, "other": True,
    }
    assert abs(table.loc[("test", "voice"), "vocals"] - table.loc[("test", "all"), "vocals"]) < .5
    verdict = compare(scores, scores, "SNR", "all", "voice")
    assert list(verdict.per_source) == ["vocals"] and "voice is scored on vocals only" in str(
        scores.table(["SNR"])
    )


def test_six_stems_are_scored_on_four():
    store = Songs(2)
    def six(x):
        i = six.calls
        six.calls += 1
        stems = dict(zip(SOURCES, store.stems(i).mean(1, keepdim=True)))
        return stems | {"other": stems["other"] * 0.5,
                        "guitar": stems["other"] * 0.2,
                        "piano": stems["other"] * 0.3 + 0.001}
    six.calls = 0
    found = E.evaluate(six, store, references=False).by_song("SNR")
    assert (found["other"] > 25).all()


def test_a_separator_may_ask_for_the_title():
    store, seen = Songs(3), []
    def separate(mixture, title="?"):
        seen.append(title)
        return quarter(mixture)
    E.evaluate(separate, store, references=False)
    assert seen == ["Song 0", "Song 1", "Song 2"]


def test_a_network_is_scored_with_its_own_channels():
    class Network(torch.nn.Module):
        sources, sample_rate, channels = SOURCES, RATE, 2
        def forward(self, x): return torch.stack([x / 4] * 4, 1)
    assert E.evaluate(Network(), Songs(1), references=False).info["channels"] == "stereo"
    assert E.evaluate(Network(), Songs(1), "mono", references=False).info["channels"] == "mono"
    assert E.evaluate(quarter, Songs(1), references=False).info["channels"] == "mono"


def test_results_in_museval_files_become_a_row(tmp_path):
    scores = E.evaluate(oracle(Songs(3)), Songs(3), name="mine", references=False, bss=True)
    scores.save_songs(tmp_path)
    (tmp_path / "test" / "Song 0.json").write_text(
        (tmp_path / "test" / "Song 0.json").read_text().replace('"name": "bass"', '"name": "accompaniment"')
    )
    read = Scores.from_museval(tmp_path, "theirs")
    assert (read.models == ["theirs"] and set(read.rows.metric) == {"SDR", "ISR", "SIR", "SAR"}
            and set(read.rows.split) == {"test"})
    a, b = scores.by_song("SDR"), read.by_song("SDR")
    assert math.isnan(b.loc["Song 0", "bass"]) and np.allclose(
        a.drop("Song 0"), b.drop("Song 0")[a.columns], atol=1e-4
    )
    (tmp_path / "test" / "Song 0.json").write_text("{}")
    with pytest.raises(UserError, match="not one of museval's files"): Scores.from_museval(tmp_path)


def test_bad_data_are_named():
    store = Songs(4)
    store.stem[0] *= 0
    store.stem[1][2, 0, 7] = math.nan
    store.mixture = lambda i, kind: store.stem[i].sum(0)[..., :-5] if i == 2 else store.stem[i].sum(0)
    scores = E.evaluate(quarter, store, channels="stereo", references=False)
    reasons = {f["song"]: f["reason"] for f in scores.failed}
    assert list(reasons) == ["Song 0", "Song 1", "Song 2"]
    assert "silent" in reasons["Song 0"] and "NaN" in reasons["Song 1"] and "samples" in reasons["Song 2"]


@pytest.mark.parametrize(
    "change, message",
    [(dict(store=Songs(0)), "no songs"), (dict(channels="quad"), "mono or stereo"),
     (dict(mixture="loud"), "sum or stream"), (dict(name="silence"), "reference row"),
     (dict(metrics=("PESQ",)), "unknown metric"), (dict(separate=lambda x: x * math.nan), "Song 0"),
     (dict(references=("perfect",)), "unknown reference")],
)
def test_what_fails_for_all_songs_is_one_error(change, message):
    arguments = dict(separate=quarter, store=Songs(2)) | change
    with pytest.raises(UserError, match=message): E.evaluate(**arguments)


def test_rates_and_single_sources_are_refused():
    store, separate = Songs(1), E.Windowed(torch.nn.Identity())
    with pytest.raises(UserError, match="44100 Hz"): E.evaluate(separate, store)
    store.sources = ("vocals",)
    with pytest.raises(UserError, match="one source only"): E.evaluate(quarter, store)


def test_a_song_without_vocals_scores_the_others():
    store = Songs(3)
    store.stem[1][3] = 0
    table = E.evaluate(oracle(store), store, references=False).by_song("SDR")
    assert table.isna().sum().to_dict() == {"drums": 0, "bass": 0, "other": 0, "vocals": 1}


def test_an_interrupt_is_not_a_bad_song():
    def separate(x): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): E.evaluate(separate, Songs(2))


# Files

def test_scores_survive_the_disk(tmp_path):
    store = Songs(3)
    store.stem[1][3] = 0
    scores = E.evaluate(oracle(store), store, name="a", info={"weights": "abc"}) + E.evaluate(
        oracle(store, seed=1), store, name="a", seed=1
    )
    again = Scores.load(scores.save(tmp_path / "scores.json"))
    assert again.rows.equals(scores.rows) and again.frames == scores.frames and again.info["weights"] == "abc"
    assert str(again.table()) == str(scores.table()) and "a (2 seeds)" in str(again.table())
    assert json.loads(
        (tmp_path / "scores.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON")
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}', '{"songs": []}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(UserError, match="scores.json"): Scores.load(tmp_path / "scores.json")


def test_museval_reads_and_aggregates_the_songs(tmp_path, monkeypatch):
    from deepdemix import metrics
    monkeypatch.setattr(metrics, "isr_sir_sar", functools.partial(metrics.isr_sir_sar, taps=16))
    museval = pytest.importorskip("museval", exc_type=RuntimeError)
    store = Songs(3, seconds=2.5)
    store.songs[1].title = "A/C: what?"
    scores = E.evaluate(oracle(store), store, metrics=("SDR",), bss=True)
    scores.save_songs(tmp_path)
    theirs = museval.EvalStore()
    theirs.add_eval_dir(tmp_path)
    found = theirs.agg_frames_tracks_scores()
    for source in SOURCES:
        ours = scores.by_song("SDR", "model")[source]
        assert abs(found[source, "SDR"] - ours.median()) < 2e-5
        assert abs(found[source, "SIR"] - scores.by_song("SIR", "model")[source].median()) < 2e-5
    track = museval.TrackStore("x")
    track.scores = json.loads(next((tmp_path / "test").glob("*.json")).read_text())
    track.validate()
    assert set(track.df.target) == set(SOURCES)


# Verdicts

def test_verdict_of_a_model_with_itself_and_with_a_better_one(tmp_path):
    store = Songs(12)
    a = E.evaluate(oracle(store, .5), store, name="A", references=False)
    b = E.evaluate(oracle(store, .3, 1), store, name="B", references=False)
    same = compare(a, a)
    assert ((same.difference, same.low, same.high, same.improved, same.p) == (0, 0, 0, 0, 1)
            and not same.significant and same.negligible)
    better = compare(Scores.load(a.save(tmp_path / "a.json")), b, name="less noise")
    assert (better.significant and better.sentence.startswith("less noise changes SDR by +4.")
            and "12 of 12 songs improve" in better.sentence)
    assert abs(better.difference - 20 * math.log10(.5 / .3)) < .2 and list(better.per_source) == list(SOURCES)
    json.dumps(better.to_dict(), allow_nan=False)


def test_songs_of_one_only_are_left_out_and_said():
    store = Songs(4)
    a, b = (E.evaluate(oracle(store, .5, k), store, name=n, references=False) for k, n in enumerate("AB"))
    verdict = compare(a, b.filter(song=["Song 0", "Song 2"]))
    assert verdict.songs == 2 and any("2 songs" in n for n in verdict.notes)
    with pytest.raises(UserError, match="in common"):
        compare(a.filter(song=["Song 1"]), b.filter(song=["Song 0"]))
    with pytest.raises(UserError, match="name one of the models: A, B"): compare(a + b, b)


# The best and the worst

@pytest.mark.parametrize("songs, n, rows", [(1, 5, 1), (3, 5, 3), (12, 5, 10), (5, 1, 2)])
def test_best_and_worst_songs_are_drawn_once_each(songs, n, rows):
    import matplotlib.pyplot as plt
    store = Songs(songs)
    scores = E.evaluate(oracle(store), store, metrics=("SDR",), references=False)
    figure = show_songs(quarter, store, scores, n=n)
    drawn = [ax.get_ylabel().splitlines()[0] for ax in figure.axes[::3]]
    order = scores.ranked(source="vocals")
    plt.close(figure)
    assert len(set(drawn)) == len(drawn) == rows
    assert (drawn[0], drawn[-1]) == (order[0], order[-1]) and drawn == [s for s in order if s in drawn]


# The table

def test_table_is_the_mean_of_the_medians():
    store = Songs(5)
    scores = E.evaluate(oracle(store), store, name="x")
    row = [
        line for line in str(scores.table(["SNR"], intervals=False)).splitlines() if line.startswith("x ")
    ][0].split()
    medians = scores.by_song("SNR").median()
    assert row == ["x", f"{medians.mean():.2f}", *(f"{medians[s]:.2f}" for s in SOURCES)]


def test_names_cannot_break_the_page():
    store = Songs(2)
    page = E.evaluate(quarter, store, name="<script>")._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_paper_rows_stand_beside_ours():
    text = str(E.evaluate(quarter, Songs(2)).table(paper=True))
    assert "paper: DDM (pt)" in text and "1.42" in text and "-2.01" in text and "1.52" not in text


# Reference rows

def test_masks_are_optimal_among_their_kind():
    g = torch.Generator().manual_seed(0)
    stems = torch.randn(1, 24, 36, 1, 2, dtype=torch.cfloat, generator=g)
    mixture = stems.sum(-1, keepdim=True)
    def error(mask): return (mask * mixture - stems).abs().square().sum()
    best = real_mask(stems, mixture)
    for mask in (binary_mask(stems, mixture), ratio_mask(stems, mixture), best * 0.9,
                 torch.rand(best.shape, generator=g)):
        assert error(best) <= error(mask)
    grid = grid_mask(stems, mixture)
    for mask in (grid * .9, (grid + .02).clamp(max=1), torch.full_like(grid, .5)):
        assert error(grid) < error(mask)
    assert (error(complex_mask(stems, mixture)) <= error(best))


def test_grids_are_what_upsampling_makes_of_them():
    values = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    mixture = torch.randn(1, 100, 65, 1, 1, dtype=torch.cfloat, generator=torch.Generator().manual_seed(1))
    for mode, up in (("nearest", "nearest"), ("linear", "bilinear")):
        true = torch.nn.functional.interpolate(values, size=(100, 65), mode=up)[0, 0]
        found = grid_mask(true[None, :, :, None, None] * mixture, mixture, mode=mode)
        assert (found[0, ..., 0, 0] - true).abs().max() < 1e-2


def test_long_songs_are_masked_in_pieces_without_a_seam():
    store = Songs(1, seconds=9)
    stems = store.stem[0]
    whole = _masked(stems, stems.sum(0), STFT(), [ratio_mask], 10 ** 6)
    pieces = _masked(stems, stems.sum(0), STFT(), [ratio_mask], 8192, context=512)
    assert (whole - pieces).abs().max() < 1e-5


def test_reference_rows_come_with_every_evaluation(tmp_path):
    store = prepare_toy(4, tmp_path / "toy", duration=3., progress=False).split("test")
    assert isinstance(store, Store)
    scores = E.evaluate(quarter, store)
    assert scores.references == ["silence", "mixture", "mixture / 4"]
    own, same = scores.by_song("SNR", "model"), scores.by_song("SNR", "mixture / 4")
    assert np.allclose(own, same, atol=1e-5)
    full = E.evaluate(quarter, store, references=True)
    assert full.references == [r for r in REFERENCES if r != "ideal complex mask"]


PAPER_MD = {
    "silence": dict(overall=0, drums=0, bass=0, other=0, vocals=0), "mixture": dict(overall=-5.3),
    "mixture / 4": dict(overall=1.08, drums=1.40, bass=0.69, other=0.92, vocals=1.31),
    "oracle 12x12": dict(overall=1.65), "oracle 12x12, bilinear": dict(overall=1.75),
    "ideal ratio mask": dict(overall=6.0), "ideal binary mask": dict(overall=6.8),
    "best real mask": dict(overall=8.2),
}
PAPER_MD_SI = {
    "mixture": -5.3, "mixture / 4": -5.3, "oracle 12x12": -3.4, "oracle 12x12, bilinear": -3.2,
    "ideal ratio mask": 5.1, "ideal binary mask": 5.8, "best real mask": 7.6,
}


@pytest.fixture(scope="module")
def previews(musdb_path):
    "The 50 test previews, decoded when asked for."
    paths = sorted((musdb_path / "test").glob("*.stem.mp4"))
    if len(paths) != 50: pytest.skip("MUSDB_PATH has not the 50 test files")
    if probe(paths[0]).duration > 10: pytest.skip("the numbers are those of the 7-second previews")
    class Real(Songs):
        sample_rate, digest = 44100, "previews"
        def __init__(self):
            self.stem, self.songs = paths, [SimpleNamespace(title=p.name[:-9], split="test") for p in paths]
        def stems(self, i): return torch.stack(read_streams(paths[i])[0][1:5])
    return Real()


@pytest.mark.musdb
def test_plain_rows_on_the_real_previews(previews):
    table = E.reference_rows(previews, rows=TRIVIAL_ROWS, metrics=("SNR", "SI-SDR")).summary()
    for name in TRIVIAL_ROWS:
        row = table.loc["test", name]
        for column, value in PAPER_MD[name].items():
            assert abs(row["SNR", column] - value) < .06, (name, column)
        assert (math.isnan(row["SI-SDR", "overall"]) if name == "silence"
                else abs(row["SI-SDR", "overall"] - PAPER_MD_SI[name]) < 0.1)


@pytest.mark.musdb
@pytest.mark.slow
def test_all_rows_on_the_real_previews(previews):
    table = E.reference_rows(previews, metrics=("SNR", "SI-SDR")).summary()
    for name, numbers in PAPER_MD.items():
        row = table.loc["test", name]
        for column, value in numbers.items(): assert abs(row["SNR", column] - value) < .1, (name, column)
        if name in PAPER_MD_SI: assert abs(row["SI-SDR", "overall"] - PAPER_MD_SI[name]) < .1, name


@pytest.mark.parametrize("kind", ["mean", "median"])
def test_averages_do_not_touch_the_filters_of_warnings(kind, monkeypatch):
    "They belong to the whole process, and another thread may be using them."
    import warnings

    from deepdemix.foundations.statistics import nan_average
    monkeypatch.setattr(
        warnings, "catch_warnings", lambda *args, **kwargs: pytest.fail("the filters were changed")
    )
    warnings.simplefilter("error")
    values = np.array([[3., np.nan, 1.], [np.nan] * 3, [1., 2., 6.]])
    assert np.array_equal(
        nan_average(values, kind), [2.0, np.nan, 3.0 if kind == "mean" else 2.0], equal_nan=True
    )


@pytest.mark.parametrize(
    "network, sizes",
    [
        (
            "compact",
            dict(window_length=1024, hop_length=512, octave=16, band=8, bandwidth=3500.0, width=8, hidden=8,
                 layers=1, refine=0.5, channels=2),
        ),
        ("baseline", dict(hidden_size=4, num_layers=1, window_length=256, hop_length=64)),
    ],
)
def test_the_sdr_that_training_shows_is_that_of_evaluation(tmp_path, network, sizes):
    """One path through a song: a trained network has one SDR, whoever asks; songs longer than a chunk,
    averaged weights, half precision."""
    from deepdemix.foundations.inference import stems_of_song
    from deepdemix.foundations.profiles import recipe_for
    from deepdemix.foundations.run_metrics import read_metrics
    from deepdemix.foundations.runs import load_network
    from deepdemix.separation import Separator
    from deepdemix.training import fit
    store = prepare_toy(4, tmp_path / "toy", duration=25., sample_rate=8000, valid=0.5, progress=False)
    recipe = recipe_for(network, "demo", network_args=dict(sizes, sample_rate=8000), epochs=2,
                        examples_per_epoch=4, batch_size=2, valid_examples=2, validation="songs",
                        device="cpu", precision="bf16-mixed", ema=0.5, mixer=dict(duration=1.0))
    run = fit(recipe, store, tmp_path / "run", progress=False)
    shown, songs = read_metrics(run).sort_values("valid_sdr").iloc[-1], store.split("valid")
    separator = Separator(load_network(run), device="cpu", threads=2)
    for separate in load_network(run), separator:
        found = E.evaluate(separate, songs, references=False, metrics=("SDR",)).by_song("SDR").median()
        assert abs(found.mean() - shown.valid_sdr) < 1e-6
        assert all(abs(found[s] - shown[f"valid_sdr_{s}"]) < 1e-6 for s in SOURCES)
    mixture = songs.mixture(0, kind="stream")
    assert torch.equal(separator(mixture), stems_of_song(load_network(run), mixture))
