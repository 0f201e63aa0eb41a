"The metrics against their originals, museval and nussl, and against what must hold for any signal."
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from deepdemix import metrics as M
from deepdemix.foundations.codecs import read_streams
from deepdemix.foundations.files import UserError

RATE = 4000


def signals(seed, sources=3, channels=2, seconds=4.3, rate=RATE, error=.3):
    "References and noisy estimates (sources, channels, time)."
    g = torch.Generator().manual_seed(seed)
    r = torch.randn(sources, channels, int(seconds * rate), generator=g)
    return r, r * .8 + error * torch.randn(r.shape, generator=g) + .1 * r.flip(0)


@pytest.fixture(scope="module")
def museval():
    "museval's evaluate on (sources, channels, time), or a skip: its import needs an ffmpeg program."
    try:
        import museval
    except (ImportError, RuntimeError) as e: pytest.skip(f"museval cannot be imported: {e}")
    def evaluate(r, e, win, hop):
        return museval.evaluate(r.numpy().transpose(0, 2, 1), e.numpy().transpose(0, 2, 1), win=win, hop=hop)
    return evaluate


def test_a_metric_uses_one_core_and_gives_the_same_bits_for_any_number_of_threads(monkeypatch):
    seen, double, before = [], M._double, torch.get_num_threads()
    monkeypatch.setattr(M, "_double", lambda x: (seen.append(torch.get_num_threads()), double(x))[1])
    r, e = signals(0, seconds=30.)
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append((M.framewise_sdr(r, e, RATE), M.scores(r, e, RATE)["SI-SDR"]))
            assert torch.get_num_threads() == threads
    finally: torch.set_num_threads(before)
    assert set(seen) == {1} and all(torch.equal(a, b) for a, b in zip(*found))


def agree(ours, theirs, tolerance):
    "The same numbers, and no number in the same frames."
    ours = ours.numpy()
    assert (np.isnan(ours) == np.isnan(theirs)).all()
    assert np.nanmax(np.abs(ours - theirs)) < tolerance


@pytest.mark.parametrize(
    "seconds, window, hop",
    [(4.3, 1, 1), (4.0, 1, 1), (0.7, 1, 1), (4.3, 1, 0.5), (4.3, 0.3, 0.7), (3.01, 2, 1.5)],
)
def test_framewise_sdr_is_musevals(museval, seconds, window, hop):
    r, e = signals(1, sources=2, channels=1, seconds=seconds)
    agree(
        M.framewise_sdr(r, e, RATE, window, hop), museval(r, e, int(window * RATE), int(hop * RATE))[0], 1e-6
    )


def test_silent_frames_have_no_score_in_any_source(museval):
    r, e = signals(2, sources=2, seconds=6.2)
    r[0, :, RATE:2 * RATE] = 0
    e[1, :, 2 * RATE:3 * RATE] = 0
    r[1, 0, 4 * RATE:5 * RATE] = -r[1, 1, 4 * RATE:5 * RATE]
    ours = M.framewise_sdr(r, e, RATE)
    agree(ours, museval(r, e, RATE, RATE)[0], 1e-6)
    assert ours.isnan().any(0).tolist() == [False, True, True, False, True, False]


@pytest.mark.parametrize("channels", [1, 2])
def test_isr_sir_sar_are_musevals(museval, channels):
    r, e = signals(3, sources=2, channels=channels, seconds=2.6)
    r[0, :, RATE:2 * RATE] = 0
    for ours, theirs in zip(M.isr_sir_sar(r, e, RATE), museval(r, e, RATE, RATE)[1:]):
        agree(ours, theirs, 1e-3)


def test_empty_bands_do_not_part_us_from_museval(museval):
    r, e = (torch.fft.rfft(x.double()) for x in signals(12, sources=2, seconds=2.6))
    cut = 2 * r.shape[-1] // 3
    for x in (r, e): x[..., cut:] *= 1e-7
    r, e = (torch.fft.irfft(x).float() for x in (r, e))
    for ours, theirs in zip(M.isr_sir_sar(r, e, RATE), museval(r, e, RATE, RATE)[1:]):
        agree(ours, theirs, 1e-3)


def test_isr_sir_sar_of_long_songs_come_from_blocks(monkeypatch):
    r, e = signals(4, sources=2, channels=1, seconds=5)
    once = M.isr_sir_sar(r, e, RATE, taps=64)
    blocks, calls = M._correlations, []
    monkeypatch.setattr(M, "_correlations", lambda a, b, taps: calls.append(taps) or blocks(a, b, taps, 512))
    monkeypatch.setattr(M, "_song_filters", functools.partial(M._song_filters, most=2 ** 14))
    for a, b in zip(once, M.isr_sir_sar(r, e, RATE, taps=64)): assert torch.allclose(a, b, atol=1e-8)
    assert calls == [64, 64]


def test_isr_sir_sar_refuse_what_is_no_number():
    r, e = signals(4, seconds=.5)
    e[0, 0, 3] = np.nan
    with pytest.raises(UserError, match="NaN"): M.isr_sir_sar(r, e, RATE, taps=16)


def scale_scores(nussl, r, e):
    "nussl's BSSEvalScale as metric -> (sources, channels)."
    def wrap(x):
        return [nussl.AudioSignal(audio_data_array=s.numpy().astype(float), sample_rate=RATE) for s in x]
    found = nussl.evaluation.BSSEvalScale(wrap(r), wrap(e), compute_sir_sar=False).evaluate()
    return {k: np.array([found[f"source_{i}"][k] for i in range(len(r))])
            for k in ("SNR", "SD-SDR", "SI-SDR", "SNRi", "SD-SDRi", "SI-SDRi")}


@pytest.mark.parametrize(
    "channels, offset, gain", [(1, 0, 1), (2, 0, 1), (2, 0.5, 1), (1, 0, 0.01), (1, 0, -2)]
)
def test_snr_and_friends_are_nussls(nussl, channels, offset, gain):
    r, e = signals(5, channels=channels)
    r, e = (r + offset).double(), (gain * e - offset).double()
    theirs = scale_scores(nussl, r, e)
    for name, fn in (("SNR", M.snr), ("SD-SDR", M.sd_sdr), ("SI-SDR", M.si_sdr)):
        assert np.abs(fn(r, e, per_channel=True).numpy() - theirs[name]).max() < 1e-4
        assert np.abs(fn(r, e).numpy() - theirs[name].mean(1)).max() < 1e-4
        assert np.abs(M.improvement(fn, r, e, per_channel=True).numpy() - theirs[name + "i"]).max() < 1e-4


@pytest.fixture(scope="module")
def real(musdb_path):
    "A real test song: its stems and the estimates of a plausible separator, 6.8 s stereo."
    path = sorted((musdb_path / "test").glob("*.stem.mp4"))[7]
    streams, rate = read_streams(path)
    r = torch.stack(streams[1:5])[..., :7 * rate]
    power = torch.fft.rfft(r).abs().square()
    masks = power.sqrt() / power.sqrt().sum(0).clamp_min(1e-9)
    return r, torch.fft.irfft(masks * torch.fft.rfft(r.sum(0)), r.shape[-1]), rate


@pytest.mark.musdb
def test_sdr_of_a_real_song_is_musevals(museval, real):
    r, e, rate = (x.mean(1, keepdim=True) if torch.is_tensor(x) else x for x in real)
    agree(M.framewise_sdr(r[2:], e[2:], rate), museval(r[2:], e[2:], rate, rate)[0], 1e-6)


@pytest.mark.musdb
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked", "leaking"])
def test_all_of_a_real_stereo_song_is_musevals(museval, real, kind):
    r, e, rate = real
    if kind == "leaking": e = .8 * r + .1 * r.sum(0)
    theirs = museval(r, e, rate, rate)
    agree(M.framewise_sdr(r, e, rate), theirs[0], 1e-6)
    for ours, once in zip(M.isr_sir_sar(r, e, rate), theirs[1:]): agree(ours, once, 1e-3)


@pytest.mark.musdb
def test_snr_and_friends_of_a_real_song_are_nussls(nussl, real):
    r, e, _ = real
    theirs = scale_scores(nussl, r, e)
    for name, fn in (("SNR", M.snr), ("SD-SDR", M.sd_sdr), ("SI-SDR", M.si_sdr)):
        assert np.abs(fn(r, e, per_channel=True).numpy() - theirs[name]).max() < 1e-4


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10 ** 6), gain=st.floats(.01, 100), channels=st.integers(1, 3))
def test_what_scaling_changes(seed, gain, channels):
    r, e = signals(seed, channels=channels, seconds=.5)
    for fn in (M.snr, M.sd_sdr, M.si_sdr): assert torch.allclose(fn(gain * r, gain * e), fn(r, e), atol=1e-3)
    assert torch.allclose(M.si_sdr(r, gain * e), M.si_sdr(r, e), atol=1e-3)
    assert (M.si_sdr(r, e) >= M.sd_sdr(r, e) - 1e-9).all()
    best = M.moments(r, e).centred()
    scale = (best.ss + best.sd) / (best.ss + 2 * best.sd + best.dd)
    assert (M.snr(r, e * scale[..., None].float()) >= M.snr(r, e) - 1e-3).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10 ** 6), order=st.permutations(range(3)))
def test_order_of_sources_and_batch_axes(seed, order):
    r, e = signals(seed, seconds=2.1)
    both = torch.stack([r, r[order]]), torch.stack([e, e[order]])
    for fn in (lambda a, b: M.framewise_sdr(a, b, RATE), M.usdr, M.snr, M.si_sdr):
        found = fn(*both)
        assert torch.allclose(found[0], fn(r, e), atol=1e-9)
        assert torch.allclose(found[1], fn(r, e)[order], atol=1e-9)


def test_arrays_and_memory_maps_and_halves(tmp_path):
    r, e = signals(6)
    np.save(tmp_path / "r.npy", r.numpy())
    mapped = np.load(tmp_path / "r.npy", mmap_mode="r")
    assert torch.equal(M.framewise_sdr(mapped, e.numpy(), RATE), M.framewise_sdr(r, e, RATE))
    assert torch.isfinite(M.snr(r.half(), e.half())).all()


def test_blocks_do_not_matter():
    r, e = signals(7)
    for a, b in zip(M.moments(r, e)[1:], M.moments(r, e, block=1000)[1:]): assert torch.allclose(a, b)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("fn", [M.sdr, M.usdr, M.snr, M.si_sdr])
def test_no_number_is_refused(fn, bad):
    r, e = signals(8)
    e[1, 0, 50] = bad
    with pytest.raises(UserError, match="NaN"): fn(r, e)


def test_shapes_are_refused_never_broadcast():
    r, e = signals(9)
    for wrong in (e[:1], e[:, :1], e[..., :-1], e[0]):
        with pytest.raises(UserError, match="must be equal"): M.snr(r, wrong)
    with pytest.raises(UserError, match="nothing to score"): M.sdr(r[..., :0], e[..., :0])


def test_memory_does_not_grow_with_the_song():
    import resource
    base = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0))
    length = base.numel() - 100
    r, e = (base.as_strided((4, 2, length), (11, 5, 1), k) for k in (0, 40))
    M.scores(r[..., :400_000], e[..., :400_000], 44100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    M.scores(r, e, 44100)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 25, f"{grown:.0f} MiB more for a song of 45 s: as much as a copy of it (61 MiB)"


MEASURES = [M.framewise_sdr, M.sdr, M.usdr, M.snr, M.sd_sdr, M.si_sdr, M.isr_sir_sar, M.scores,
            M.sdr_and_moments, M.moments]

@pytest.mark.parametrize("fn", MEASURES)
def test_musevals_axes_are_refused(fn):
    "(sources, time, channels): plausible wrong numbers, and as much as 2 PiB for the filters of SIR."
    r, e = (x.transpose(1, 2) for x in signals(10))
    with pytest.raises(UserError, match=r"looks like museval's \(sources, time, channels\)"): fn(r, e)


def test_many_channels_and_few_samples_are_no_error():
    for shape in ((2, 2, 1), (2, 64, 5), (3, 1, 1)):
        r = torch.ones(shape, dtype=torch.float64)
        assert torch.allclose(
            M.usdr(r, r / 2, delta=0.0), torch.full(shape[:1], 6.0206, dtype=torch.float64), atol=1e-3
        )


@pytest.mark.parametrize("fn", MEASURES)
def test_integers_are_refused(fn):
    r, e = signals(11)
    for wrong in ((r * 30000).short(), (r * 30000).short().numpy(), torch.complex(r, e), r > 0):
        with pytest.raises(UserError, match=r"references hold floats in \[-1, 1\]"): fn(wrong, e)
    with pytest.raises(UserError, match="estimates hold floats"): fn(r, (e * 30000).int())


@pytest.mark.parametrize(
    "change",
    [lambda x: x[..., ::-1], lambda x: x[::-1, ::-1], lambda x: x.astype(">f4"),
     lambda x: np.asfortranarray(x), lambda x: x.astype(np.longdouble), lambda x: x.tolist()],
)
def test_arrays_as_numpy_makes_them(change):
    r, e = (x.numpy() for x in signals(12, seconds=1.2))
    plain = [torch.from_numpy(np.array(change(x), dtype=np.float64)) for x in (r, e)]
    assert torch.allclose(
        M.framewise_sdr(change(r), change(e), RATE), M.framewise_sdr(*plain, RATE), atol=1e-4
    )


@pytest.mark.parametrize("fn", [M.framewise_sdr, M.sdr, M.isr_sir_sar, M.scores, M.sdr_and_moments])
@pytest.mark.parametrize("rate", [0, -1, "44100", float("nan"), float("inf"), None])
def test_rates_that_are_none(fn, rate):
    r, e = signals(13, seconds=1.2)
    with pytest.raises(UserError, match="a rate above 0") as error: fn(r, e, rate)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spans", [dict(window=0), dict(hop=0), dict(window=-1), dict(hop=-1.0), dict(window=1e-9)]
)
def test_windows_of_nothing(spans):
    r, e = signals(14, seconds=1.2)
    with pytest.raises(UserError, match="give a sample or more"): M.framewise_sdr(r, e, RATE, **spans)


@pytest.mark.parametrize("perfect", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 4))])
def test_a_perfect_second_counts_as_very_high_as_in_museval(museval, perfect):
    "Of five seconds; the median never forgets one."
    r, e = signals(15, seconds=5)
    e[..., :perfect * RATE] = r[..., :perfect * RATE]
    theirs = np.nanmedian(museval(r, e, RATE, RATE)[0], 1)
    ours = M.sdr(r, e, RATE).numpy()
    if perfect < 3: assert np.allclose(ours, theirs, atol=1e-3)
    else: assert (ours == M.PERFECT).all() and (theirs >= M.PERFECT - 15).all()
    assert M.framewise_sdr(r, e, RATE).isfinite().all()


def test_read_only_arrays_are_shared_without_a_warning(monkeypatch):
    """The filters of warnings belong to the whole process: metrics in two threads would leave them changed
    for good."""
    import warnings

    from deepdemix.metrics import _tensor
    frozen = np.arange(6.).reshape(1, 2, 3)
    frozen.flags.writeable = False
    monkeypatch.setattr(
        warnings, "catch_warnings", lambda *args, **kwargs: pytest.fail("the filters were changed")
    )
    warnings.simplefilter("error")
    assert _tensor(frozen).data_ptr() == frozen.ctypes.data
