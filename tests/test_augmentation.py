"Properties of mixes, triplets and balanced batches that no single example can show."
import math
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from deepdemix.augmentation import BalancedBatches, Mixer, Triplets
from deepdemix.foundations.augmentation_cache import AugmentationCache
from deepdemix.foundations.blocks import Blocks
from deepdemix.foundations.effects import shift
from deepdemix.foundations.files import UserError
from deepdemix.foundations.loudness import Loudness

RATE = 8000
NAMES = ("drums", "bass", "other", "vocals")


class Band:
    """Songs in memory with a store's face: low-rate noise bursts and tones, each song without one instrument
    or none."""
    sources, sample_rate = NAMES, RATE

    def __init__(self, songs=6, seconds=6.8, channels=2, loud=0.1, rate=RATE):
        self.waves, self.songs, frames = [], [], round(seconds * rate)
        for k in range(songs):
            rng = np.random.default_rng(k)
            time = np.arange(frames) / rate
            tones = [
                np.sin(2 * np.pi * (60 * (s + 1) + 11 * k) * time) * (1 + np.sin(2 * np.pi * (s + 1) * time))
                for s in range(4)
            ]
            waves = loud * (np.stack(tones)[:, None] + 0.3 * rng.standard_normal((4, channels, frames)))
            missing = k if k < 4 else None
            if missing is not None: waves[missing] = 0
            present = tuple(name for s, name in enumerate(NAMES) if s != missing)
            self.waves.append(torch.tensor(waves, dtype=torch.float32))
            self.songs.append(
                SimpleNamespace(title=f"song {k}", frames=frames, channels=channels, present=present,
                                duration=seconds, digest=str(k))
            )

    def __len__(self): return len(self.songs)

    def stems(self, i, start=0, frames=None):
        return self.waves[i][..., start:None if frames is None else start + frames].clone()


BAND = Band()
few = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
numbers = st.integers(0, 10**6)
options = st.fixed_dictionaries(
    dict(coherent=st.sampled_from([0.0, 0.5, 1.0]), channels=st.sampled_from([None, 1]),
         shift=st.sampled_from(["bank", "tied", None]), fill=st.booleans(),
         level=st.sampled_from([("lufs", -20, (-5, 5)), ("lufs", 0, (0, 5)), ("gain", (-5, 20)), None]),
         eq=st.sampled_from([None, (-6, 6)]), swap=st.sampled_from([0.0, 0.5]),
         flip=st.sampled_from([0.0, 0.5]), mixup=st.sampled_from([0.0, 0.5]),
         gate=st.sampled_from([None, -30.0]), variants=st.sampled_from([1, 2]))
)


@few
@given(numbers, numbers, options)
def test_mixture_is_the_sum_of_its_sources_and_never_clips(seed, i, chosen):
    mix = Mixer(BAND, seed=seed, duration=3.0, **chosen)[i]
    peak = mix.mixture.abs().max()
    assert (mix.mixture - mix.sources.sum(0)).abs().max() <= 1e-6 * max(peak, 1e-3)
    assert peak <= 1.0
    assert torch.isfinite(mix.sources).all()
    assert mix.sources.shape == (4, chosen["channels"] or 2, 3 * RATE)


@few
@given(numbers, numbers, st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(["bank", "tied", "exact"]))
def test_what_is_drawn_stays_in_range(seed, i, coherent, shift):
    mix = Mixer(BAND, seed=seed, coherent=coherent, shift=shift, duration=2.0, channels=1)[i]
    assert (all(-2 <= p <= 2 for p in mix.pitch) and all(0.8 <= r <= 1.2 for r in mix.stretch)
            and all(-5 <= d <= 5 for d in mix.snr))
    assert all(
        0 <= t and t + n / r / RATE <= 6.8 + 0.01 for t, n, r in zip(mix.starts, mix.frames, mix.stretch)
    )
    if mix.coherent:
        assert all(len(set(drawn)) == 1 for drawn in (mix.songs, mix.starts, mix.pitch, mix.stretch))
    else:
        assert len(set(mix.songs)) == 4 and all(
            name in BAND.songs[int(title[-1])].present for name, title in zip(NAMES, mix.songs)
        )
    if shift == "tied": assert np.allclose(mix.pitch, -12 * np.log2(mix.stretch))


@few
@given(numbers, numbers, st.floats(0.5, 0.99))
def test_a_stem_that_is_too_short_ends_in_silence(seed, i, stretch):
    mix = Mixer(
        BAND, seed=seed, duration=5.0, stretch=(stretch, stretch), pitch=None, shift="tied", channels=1
    )[i]
    end = round(5.0 * RATE * stretch)
    assert all(abs(n - end) <= 1 for n in mix.frames)
    assert mix.sources[..., end + 1:].abs().max() == 0
    heard = [s for s, name in enumerate(NAMES) if name in BAND.songs[int(mix.songs[0][-1])].present]
    assert mix.sources[heard][..., end - RATE // 2:end].abs().amax((1, 2)).min() > 0


@few
@given(numbers, st.lists(st.integers(0, 500), min_size=2, max_size=4))
def test_order_does_not_matter(seed, order):
    one, other = (Mixer(BAND, seed=seed, duration=1.0, coherent=0.5, refresh=50, shift="tied", channels=1)
                  for _ in range(2))
    forwards = {i: one[i].mixture for i in order}
    for i in reversed(order): assert torch.equal(other[i].mixture, forwards[i])


@few
@given(numbers, st.integers(0, 300), st.integers(1, 5))
def test_a_batch_is_its_examples(seed, start, n):
    mixer = Mixer(BAND, seed=seed, duration=1.0, coherent=0.5, shift="tied", mixup=0.3, flip=0.5)
    mixture, sources = mixer.batch(n, start)
    for k in range(n):
        example = mixer[start + k]
        assert torch.equal(mixture[k], example.mixture) and torch.equal(sources[k], example.sources)


@few
@given(numbers, numbers, st.sampled_from(["bank", "tied", "exact"]))
def test_detuned_sources_share_the_place_and_not_the_pitch(seed, i, shift):
    settings = dict(seed=seed, duration=2.0, channels=1, shift=shift, variants=4)
    plain, mix = Mixer(BAND, **settings)[i], Mixer(BAND, **settings, detune=1.0)[i]
    assert len(set(plain.pitch)) == 1 and len(set(mix.pitch)) == 4
    assert mix.coherent and mix.songs == plain.songs and mix.snr == plain.snr
    assert max(mix.starts) - min(mix.starts) < 0.2 * 6.8


@few
@given(numbers, st.integers(0, 300))
def test_what_is_not_detuned_stays_as_it_was(seed, i):
    settings = dict(seed=seed, duration=1.0, coherent=0.5, shift="tied", channels=1, variants=4, mixup=0.3,
                    flip=0.5, gate=-30.0)
    plain, some, all_ = (Mixer(BAND, **settings, detune=share)[i] for share in (0.0, 0.5, 1.0))
    assert torch.equal(some.sources, plain.sources) or torch.equal(some.sources, all_.sources)
    if not plain.coherent: assert torch.equal(all_.sources, plain.sources)


@pytest.mark.parametrize(
    "settings", [dict(), dict(variants=2, pitch=None, stretch=None), dict(variants=2, shift=None)]
)
def test_one_copy_of_a_song_is_never_out_of_tune_with_itself(settings):
    with pytest.raises(UserError, match="detune"): Mixer(BAND, detune=0.5, **settings)


class Loud(Band):
    "The same at the paper's rate, without holes."
    sample_rate = 44100

    def __init__(self): super().__init__(songs=3, channels=1, rate=44100)


def _scaper(folder, band, mix, reference):
    "The same draws through Scaper."
    import numpy
    numpy.Inf = numpy.inf
    scaper = pytest.importorskip("scaper", reason="Scaper is not installed (it comes with the bench extra)")
    soundfile = pytest.importorskip("soundfile")
    for name in ("background", *(f"stems/{name}" for name in NAMES)): (folder / name).mkdir(parents=True)
    scene = scaper.Scaper(
        duration=5.0, fg_path=str(folder / "stems"), bg_path=str(folder / "background"), random_state=0
    )
    scene.sr, scene.ref_db, scene.n_channels = 44100, reference, 1
    for s, name in enumerate(NAMES):
        file = folder / "stems" / name / f"{mix.songs[s]}.wav"
        soundfile.write(file, band.waves[int(mix.songs[s][-1])][s].T.numpy(), 44100, subtype="FLOAT")
        scene.add_event(label=("const", name), source_file=("const", str(file)),
                        source_time=("const", mix.starts[s] + 0.5 / 44100), event_time=("const", 0),
                        event_duration=("const", 5.0), snr=("const", mix.snr[s]), pitch_shift=None,
                        time_stretch=None if mix.stretch[s] == 1 else ("const", mix.stretch[s]))
    audio, _, _, events = scene.generate(fix_clipping=True)
    return audio[:, 0], np.stack([e[:, 0] for e in events])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reference", [-26, 0])
@pytest.mark.parametrize("coherent", [0.0, 1.0])
def test_same_draws_give_what_scaper_makes(tmp_path, reference, coherent):
    band = Loud()
    mix = Mixer(
        band, seed=1, pitch=None, stretch=None, level=("lufs", reference, (-5, 5)), coherent=coherent
    )[1]
    mixture, sources = _scaper(tmp_path, band, mix, reference)
    assert (mix.scale < 1) == (reference == 0)
    assert np.abs(mix.sources[:, 0].numpy() - sources).max() < 0.003 * np.abs(mixture).max()
    assert np.abs(mix.mixture[0].numpy() - mixture).max() < 0.003 * np.abs(mixture).max()


@pytest.mark.filterwarnings("ignore")
def test_a_shortened_stem_ends_where_scapers_does(tmp_path):
    band = Loud()
    mix = Mixer(band, pitch=None, stretch=(0.85, 0.85), shift="tied")[0]
    _, theirs = _scaper(tmp_path, band, mix, -20)
    last = lambda waves: max(int(np.nonzero(np.abs(w) > 1e-6)[0].max(initial=0)) for w in waves)
    assert abs(last(theirs) - last(mix.sources[:, 0].numpy())) <= 100


def _make(seed, numbers):
    mixer = Mixer(Band(), seed=seed, duration=1.0, coherent=0.5, refresh=20)
    return [mixer[i].sources.numpy() for i in numbers]


def test_other_processes_make_the_same_examples(tmp_path):
    settings = dict(seed=3, duration=1.0, coherent=0.5, refresh=20)
    plain, ahead = Mixer(BAND, **settings), Mixer(BAND, **settings, workers=1, cache=str(tmp_path))
    asked = [33, 6017, 0]
    for i in asked: assert torch.equal(plain[i].sources, ahead[i].sources)
    for i, wave in zip(asked, ahead.bank.pool.submit(_make, 3, asked).result()):
        assert np.array_equal(plain[i].sources.numpy(), wave)
    ahead.bank.pool.shutdown()
    assert list(tmp_path.glob("*.npy")) and not list(tmp_path.glob("*.part*"))


def test_little_memory_forgets_and_makes_the_same_again():
    need = AugmentationCache(BAND, channels=1, shift="tied").need()
    small = Mixer(BAND, channels=1, duration=1.0, seed=2, refresh=10, shift="tied", memory=need)
    large = Mixer(BAND, channels=1, duration=1.0, seed=2, refresh=10, shift="tied")
    for i in (0, 9, 30, 200, 0): assert torch.equal(small[i].mixture, large[i].mixture)
    kept = lambda mixer: sum(v.stems.nbytes for v in mixer.bank.kept.values())
    for i in range(0, 300, 7):
        small[i]
        large[i]
    assert kept(small) <= need * 2**30 < kept(large)
    with pytest.raises(UserError, match="memory="): Mixer(BAND, channels=1, shift="tied", memory=need / 2)


def test_a_store_that_does_not_fit_is_read_piece_by_piece():
    whole, pieces = (Mixer(BAND, pitch=None, stretch=None, duration=1.0, coherent=0.5, memory=memory)
                     for memory in (4.0, 1e-6))
    for i in range(5): assert torch.allclose(whole[i].sources, pieces[i].sources, atol=1e-7)
    assert all(v.stems is None for v in pieces.bank.kept.values())


@few
@given(numbers, numbers, st.sampled_from([None, (-2, 2)]))
def test_a_triplet_never_breaks_its_definition(seed, i, pitch):
    triplets = Triplets(BAND, seed=seed, duration=1.0, pitch=pitch, shift="tied", gate=-40)
    pieces, (a, p, n) = triplets.draw(i)
    assert a == p != n
    assert pieces[0].song != pieces[1].song
    assert [piece.source for piece in pieces] == [a, p, n]
    assert all(NAMES[piece.source] in BAND.songs[piece.song].present for piece in pieces)
    waves = triplets[i]
    assert waves.shape == (3, 1, RATE) and waves.square().mean(-1).min() > 1e-6


@few
@given(numbers, st.integers(0, 1000), st.sampled_from([None, (-5, 5)]))
def test_balanced_batches_are_balanced(seed, start, background):
    waves, labels, songs = BalancedBatches(BAND, per_class=3, seed=seed, duration=1.0, background=background)[
        start
    ]
    assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for label, group in enumerate(songs.view(4, 3).tolist()):
        assert len(set(group)) == 3 and all(NAMES[label] in BAND.songs[k].present for k in group)
    assert torch.isfinite(waves).all() and waves.shape == (12, 1, RATE)


def test_silence_is_never_an_example():
    band = Band(songs=4)
    for k in range(4): band.waves[k][0, :, : 5 * RATE] = 0
    band.songs[0].present = NAMES
    triplets = Triplets(band, duration=1.0, gate=-40)
    found = [triplets.find(np.random.default_rng(k), 0, 0) for k in range(20)]
    assert all(piece.seconds > 3.9 and piece.song != 0 for piece in found)
    for k in range(4): band.waves[k][0] = 0
    with pytest.raises(UserError, match="drums"):
        Triplets(band, duration=1.0).find(np.random.default_rng(0), 0, 0)


cells = RATE // 200


@few
@given(st.integers(0, 2**31), st.integers(0, 1000), st.integers(100, 1000), st.floats(-60, 0))
def test_loudness_is_that_of_pyloudnorm(seed, start, length, decibel):
    import pyloudnorm
    rng, meter = np.random.default_rng(seed), pyloudnorm.Meter(RATE)
    envelope = np.repeat(rng.random(11) ** 3, RATE)
    wave = torch.tensor(
        10 ** (decibel / 20) * rng.standard_normal((1, 2, 11 * RATE)) * envelope, dtype=torch.float32
    )
    window = slice(start * cells, (start + length) * cells)
    afresh = max(-70.0, meter.integrated_loudness(wave[0, :, window].T.double().numpy()))
    assert abs(Loudness(wave[..., window], RATE)()[0] - afresh) < 1e-3
    weighted = wave[0].double().numpy()
    for name in ("high_shelf", "high_pass"): weighted = meter._filters.pop(name).apply_filter(weighted)
    theirs = max(-70.0, meter.integrated_loudness(weighted[:, window].T))
    assert abs(Loudness(wave, RATE, block=3)(window.start, length * cells)[0] - theirs) < 1e-5


@few
@given(st.integers(0, 2**31), st.integers(0, 40000), st.integers(4000, 40000))
def test_loudness_between_the_points_of_its_grid(seed, start, frames):
    import pyloudnorm
    noise = np.random.default_rng(seed).standard_normal((1, 2, 11 * RATE))
    wave = torch.tensor(0.1 * noise, dtype=torch.float32)
    window = wave[0, :, start:start + frames].T.double().numpy()
    theirs = pyloudnorm.Meter(RATE).integrated_loudness(window)
    assert abs(Loudness(wave, RATE, block=3)(start, frames)[0] - theirs) < 0.02


def test_stretching_keeps_stereo_and_length():
    left = torch.randn(1, 4 * RATE) * 0.1
    both = torch.cat([left, 0.5 * left])
    shifted = shift(both, RATE, 1.0, 1.1)
    assert shifted.shape == (2, round(4 * RATE * 1.1))
    assert torch.allclose(shifted[1], 0.5 * shifted[0], atol=1e-4)
    assert torch.equal(shift(both, RATE, 0.0, 1.0), both)


@pytest.mark.parametrize(
    "bad, says",
    [(dict(coherent=2), "coherent=2"), (dict(shift="fast"), "shift='fast'"),
     (dict(level=("lufs", 3)), "level="), (dict(duration=0), "duration=0"), (dict(pitch=(2, -2)), "pitch="),
     (dict(stretch=(0, 1)), "stretch="), (dict(seed=-1), "seed=-1"), (dict(variants=0), "variants=0"),
     (dict(channels=3), "channels=3"), (dict(detune=2, variants=2), "detune=2")],
)
def test_bad_settings_are_named(bad, says):
    with pytest.raises(UserError, match=says.replace("(", r"\(")): Mixer(BAND, **bad)


def test_an_instrument_that_nobody_plays_is_named():
    band = Band(songs=2)
    for song in band.songs: song.present = ("drums", "bass")
    with pytest.raises(UserError, match="other"): Mixer(band, coherent=0.5)
    with pytest.raises(UserError, match="other is in 0"): Triplets(band)
    assert len(Triplets(band, instruments=("drums", "bass")).pools) == 2
    with pytest.raises(UserError, match="two instruments"): Triplets(band, instruments=("drums",))
    with pytest.raises(UserError, match="empty"): Mixer(Band(songs=0))


@pytest.fixture(scope="session")
def real_store(musdb_path, tmp_path_factory):
    """Three training songs of the previews as a store; the whole set takes its time to decode and is tested
    where that is the matter."""

    from deepdemix.data import prepare_musdb
    from deepdemix.foundations.store import Store
    root = tmp_path_factory.mktemp("musdb")
    for split in ("train", "test"):
        (root / split).mkdir()
        for file in sorted((musdb_path / split).glob("*.stem.mp4"))[: 4 if split == "train" else 1]:
            (root / split / file.name).symlink_to(file)
    prepare_musdb(root, root / "store", progress=False)
    return Store.open(root / "store")


@pytest.mark.musdb
def test_batches_of_real_songs(real_store):
    import pyloudnorm
    mixer = Mixer(real_store, channels=1)
    mixture, sources = mixer.batch(4)
    assert mixture.shape == (4, 1, 220500) and sources.shape == (4, 4, 1, 220500)
    assert (mixture - sources.sum(1)).abs().max() <= 1e-6 and mixture.abs().max() <= 1
    meter = pyloudnorm.Meter(44100)
    for i in range(4):
        mix = mixer[i]
        for s in range(4):
            level = meter.integrated_loudness(
                mix.sources[s, :, : mix.frames[s]].T.double().numpy()
            ) - 20 * math.log10(mix.scale)
            if level > -60: assert abs(level - (-20 + mix.snr[s])) < 0.3


@pytest.mark.musdb
def test_triplets_of_real_songs(real_store):
    waves, labels, songs = Triplets(real_store, pitch=(-2, 2), level=("gain", (-5, 5))).batch(6)
    assert waves.shape == (6, 3, 1, 220500) and torch.isfinite(waves).all()
    assert (songs[:, 0] != songs[:, 1]).all() and waves.square().mean(-1).min() > 1e-7


def test_mono_and_stereo_songs_go_together():
    band = Band(songs=4)
    for k in (0, 2): band.waves[k], band.songs[k].channels = band.waves[k][:, :1], 1
    mixer = Mixer(band, coherent=0.0, pitch=None, stretch=None, duration=1.0)
    for i in range(6):
        mix = mixer[i]
        assert mix.sources.shape == (4, 2, RATE)
        for s, title in enumerate(mix.songs):
            assert torch.equal(mix.sources[s, 0], mix.sources[s, 1]) == (
                band.songs[int(title[-1])].channels == 1
            )
    assert Triplets(band, channels=None, duration=1.0)[0].shape == (3, 2, RATE)


EVERY_CHOICE = [dict(), dict(coherent=0.0, eq=(-6, 6), swap=0.5, flip=0.5, mixup=0.5), dict(shift="tied"),
                dict(pitch=None, stretch=None, level=("gain", (-5, 20)))]


@pytest.mark.parametrize("options", EVERY_CHOICE)
def test_every_step_of_a_mix_runs_on_the_device_asked_for(options):
    mixture, sources = Mixer(BAND, duration=2.0, **options).batch(4, 5, device="meta")
    assert (mixture.is_meta and sources.is_meta and mixture.shape == (4, 2, 2 * RATE)
            and sources.shape == (4, 4, 2, 2 * RATE))


@pytest.mark.parametrize(
    "batches",
    [lambda: Triplets(BAND, duration=2.0), lambda: BalancedBatches(BAND, duration=2.0),
     lambda: BalancedBatches(BAND, duration=2.0, background=(-5, 5))],
)
def test_every_step_of_a_contrastive_batch_runs_on_the_device_asked_for(batches):
    assert all(x.is_meta for x in batches().batch(2, device="meta"))


@pytest.mark.cuda
@pytest.mark.parametrize(
    "options",
    [dict(), dict(coherent=0.0, eq=(-6, 6), flip=0.5, mixup=0.5),
     dict(pitch=None, stretch=None, level=("gain", (-5, 20)))],
)
def test_a_gpu_makes_the_same_mixes(options):
    here, there = (
        Mixer(BAND, duration=2.0, **options).batch(8, 5, device=device) for device in (None, "cuda")
    )
    for ours, theirs in zip(here, there):
        assert theirs.is_cuda and torch.allclose(ours, theirs.cpu(), atol=1e-3)
    waves = [Triplets(BAND, duration=2.0).batch(4, device=device)[0].cpu() for device in (None, "cuda")]
    assert torch.allclose(*waves, atol=1e-3)


def test_a_store_that_is_read_each_time_leaves_one_excerpt_in_memory():
    mixer = Mixer(BAND, duration=1.0, pitch=None, stretch=None, memory=1e-6)
    for i in range(40): mixer[i]
    parts = {id(v.held["part"]): v.held["part"].nbytes for v in mixer.bank.kept.values()}
    assert len(mixer.bank.kept) > 3 and sum(parts.values()) == 4 * 2 * RATE * 4


def test_memory_stays_flat_while_copies_come_and_go():
    mixer = Mixer(BAND, duration=1.0, refresh=10, shift="tied", channels=1)
    sizes = []
    for i in range(0, 400, 4):
        mixer[i]
        sizes.append(sum(v.stems.nbytes for v in mixer.bank.kept.values()))
    assert max(sizes[50:]) <= 2.01 * mixer.bank.need() * 2**30 and len(mixer.bank.kept) <= 2 * len(BAND)


HOLDERS = {
    "a part": lambda x: x[1:], "an array": lambda x: x.numpy(),
    "a tensor on an array": lambda x: torch.from_numpy(x.numpy()),
    "the storage": lambda x: x.untyped_storage(), "a list": lambda x: [x],
    "a graph": lambda x: (x * torch.ones(1, requires_grad=True)).grad_fn,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_that_is_held_is_not_lent_out_again(holder, monkeypatch):
    "Whatever reference counts say: some versions of Python count fewer than there are."
    monkeypatch.setattr(sys, "getrefcount", lambda x: 1)
    blocks = Blocks()
    x = blocks.get((3, 5))
    place, held = x.data_ptr(), HOLDERS[holder](x)
    del x
    assert blocks.get((3, 5)).data_ptr() != place
    del held
    assert place in {block.data_ptr() for block in [blocks.get((3, 5)) for _ in range(2)]}


def test_memory_is_lent_to_one_of_many_threads():
    blocks, wrong = Blocks(), []
    def work(number):
        for _ in range(300):
            x = blocks.get((64,)).fill_(number)
            if not bool((x == number).all()): wrong.append(number)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong
