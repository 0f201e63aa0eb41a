"""The mask network and the baseline: nussl's numbers, nussl's separator, any length and any number of
channels."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from deepdemix.baseline import Baseline, count_parameters
from deepdemix.foundations.codecs import read_streams
from deepdemix.foundations.files import UserError
from deepdemix.foundations.recipe import Recipe
from deepdemix.foundations.registry import build_network
from deepdemix.foundations.runs import load_network, save_network
from deepdemix.foundations.toy_band import toy_song
from deepdemix.networks.drawing import trace_shapes
from deepdemix.networks.nussl_bridge import (
    from_nussl_weights,
    import_nussl,
    load_nussl_weights,
    nussl_separator,
    to_nussl,
    to_nussl_weights,
)
from deepdemix.networks.protocol import MaskNetwork

SMALL = dict(hidden_size=5, window_length=64, hop_length=16)


def theirs_and_ours(nussl, seed=0, hidden=50, layers=1, both=True, kind="lstm", n_f=257, n_ac=1):
    """nussl's recurrent mask inference model with random weights and batch-norm statistics, and our baseline
    with the same."""
    torch.manual_seed(seed)
    config = nussl.ml.networks.builders.build_recurrent_mask_inference(
        n_f, hidden, layers, both, 0.0, 4, ["sigmoid"], num_audio_channels=n_ac, rnn_type=kind,
        normalization_args={"num_features": n_f},
    )
    config["modules"]["recurrent_stack"]["args"]["num_features"] = n_f * n_ac
    theirs = nussl.ml.SeparationModel(config)
    for name, value in theirs.state_dict().items():
        if value.is_floating_point():
            value.copy_(
                torch.rand_like(value) + 0.5 if "running_var" in name else torch.randn_like(value) * 0.4
            )
    ours = Baseline(hidden_size=hidden, num_layers=layers, bidirectional=both, rnn_type=kind, channels=n_ac,
                    window_length=2 * (n_f - 1), hop_length=(n_f - 1) // 2)
    return theirs, load_nussl_weights(ours, theirs.state_dict())


@pytest.mark.parametrize(
    "sizes",
    [{}, dict(hidden=7, layers=2, n_f=33), dict(hidden=6, both=False, n_f=17),
     dict(hidden=6, kind="gru", n_f=17), dict(hidden=4, n_f=17, n_ac=2)],
)
def test_the_baseline_equals_nussls_modules(nussl, sizes):
    theirs, ours = theirs_and_ours(nussl, **sizes)
    magnitude = torch.rand(3, 40, ours.n_f, ours.channels) ** 4
    magnitude[0, :5] = 0
    for training in (False, True):
        with torch.no_grad():
            a = ours.train(training).mask(magnitude)
            b = theirs.train(training)(mix_magnitude=magnitude)["mask"]
        assert (a - b).abs().max() < 1e-5
        assert a.std() > 0.05
    assert count_parameters(theirs) == count_parameters(ours)


def test_one_step_of_training_keeps_them_equal(nussl):
    theirs, ours = theirs_and_ours(nussl, hidden=6, n_f=33)
    magnitude, target = torch.rand(2, 20, 33, 1), torch.rand(2, 20, 33, 1, 4)
    before = ours.state_dict()["embedding.linear.weight"].clone()
    for net, mask in ((theirs, lambda: theirs(mix_magnitude=magnitude)["mask"]),
                      (ours, lambda: ours.mask(magnitude))):
        optimizer = torch.optim.SGD(net.train().parameters(), lr=1.)
        (mask() * magnitude[..., None] - target).abs().mean().backward()
        optimizer.step()
    assert (ours.state_dict()["embedding.linear.weight"] - before).abs().max() > 1e-4
    back = from_nussl_weights(theirs.state_dict())
    assert all(torch.allclose(ours.state_dict()[k], v, atol=1e-6) for k, v in back.items())


def test_weights_go_there_and_back(nussl):
    theirs, ours = theirs_and_ours(nussl, hidden=6, n_f=33)
    theirs.load_state_dict(to_nussl_weights(ours.state_dict()))
    with pytest.raises(UserError, match="embedding.linear.weight"):
        load_nussl_weights(Baseline(**SMALL), theirs.state_dict())
    with pytest.raises(UserError, match="normalization"): load_nussl_weights(Baseline(**SMALL), {})


def test_it_starts_as_nussls_does(nussl):
    config = nussl.ml.networks.builders.build_recurrent_mask_inference(
        257, 50, 1, True, 0.0, 4, ["sigmoid"], normalization_args={"num_features": 257}
    )
    theirs, ours = from_nussl_weights(nussl.ml.SeparationModel(config).state_dict()), Baseline().state_dict()
    for name, value in theirs.items():
        if "bias" in name or "batch_norm" in name: assert torch.equal(value, ours[name]), name
        else: assert abs(ours[name].std() / value.std() - 1) < 0.05, name


class LouderHigh(MaskNetwork):
    "A network without parameters that nobody registered."
    def predict(self, magnitude):
        ramp = torch.linspace(0, 1, magnitude.shape[2])[:, None].expand_as(magnitude)
        return torch.stack([ramp, 1 - ramp], -1)


DDM = dict(duration=0.25, window_length=64, hop_length=32, sample_rate=8000, conv_channels=[2, 2, 3, 3],
           kernels=[[3, 3]] * 4, pools=[[4, 2], [2, 2]], linears=[12, 8], latent=6, grid=[2, 4, 4])


@pytest.mark.parametrize(
    "name,args,channels",
    [("baseline", {}, 2), ("baseline", dict(channels=2, hidden_size=8), 2),
     ("baseline", dict(SMALL, window_type="hann"), 1), ("ddm", DDM, 2), ("ddm_skip", DDM, 1),
     (LouderHigh, dict(sources=["high", "low"], window_length=256), 2)],
)
def test_nussls_deep_mask_estimation_runs_our_networks(nussl, name, args, channels):
    torch.manual_seed(0)
    network = (build_network(name, **args) if isinstance(name, str) else name(**args)).eval()
    mixture = toy_song(2, duration=1., sample_rate=network.sample_rate).sum(0)[:channels]
    signal = nussl.AudioSignal(audio_data_array=mixture.numpy().copy(), sample_rate=network.sample_rate)
    estimates = nussl_separator(network, signal)()
    with torch.no_grad(): ours = network(mixture[None])[0]
    assert len(estimates) == len(network.sources)
    assert ours.abs().max() > 0.01
    for a, b in zip(ours, estimates): assert np.abs(a.numpy() - b.audio_data).max() < 1e-4


@pytest.mark.musdb
def test_nussl_and_ours_agree_on_a_real_song(nussl, musdb_path):
    from pathlib import Path
    streams, rate = read_streams(sorted(Path(musdb_path, "train").glob("*.stem.mp4"))[0])
    mixture, network = streams[0][:, :2 * rate], Baseline().eval()
    estimates = nussl_separator(
        network, nussl.AudioSignal(audio_data_array=mixture.numpy().copy(), sample_rate=rate)
    )()
    with torch.no_grad(): ours = network(mixture[None])[0]
    assert mixture.abs().max() > 0.05
    for a, b in zip(ours, estimates): assert np.abs(a.numpy() - b.audio_data).max() < 1e-4


def test_a_separation_model_is_built_again_from_its_configuration(nussl):
    network = Baseline(**SMALL).eval()
    model = to_nussl(network)
    again = nussl.ml.SeparationModel(json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict())
    magnitude = torch.rand(2, 9, 33, 1)
    with torch.no_grad(): assert torch.equal(again(mix_magnitude=magnitude)["mask"], network.mask(magnitude))


@pytest.mark.slow
def test_importing_nussl_is_quiet(nussl):
    code = "from deepdemix.networks.nussl_bridge import import_nussl; import_nussl().ml.SeparationModel"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_without_nussl_there_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "nussl", None)
    with pytest.raises(ImportError, match=r"deepdemix\[nussl\]"): import_nussl()


def test_importing_the_room_is_light():
    code = ("import sys, deepdemix.baseline; print([m for m in ('nussl', 'matplotlib', 'lightning', 'musdb',"
            " 'scipy.signal') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 3), channels=st.integers(1, 3), time=st.integers(1, 900),
       hop=st.sampled_from([16, 20, 32]))
def test_masks_that_add_up_to_one_give_the_mixture_back(batch, channels, time, hop):
    network = LouderHigh(sources=["high", "low"], window_length=64, hop_length=hop)
    mixture = torch.randn(batch, channels, time, generator=torch.Generator().manual_seed(time))
    stems = network(mixture)
    assert stems.shape == (batch, 2, channels, time)
    assert torch.allclose(stems.sum(1), mixture, atol=1e-5)


def test_channels_do_not_hear_each_other():
    network, song = Baseline(**SMALL).eval(), torch.randn(2, 3, 700)
    with torch.no_grad():
        together, apart = network(song), torch.cat([network(song[:, [c]]) for c in range(3)], 2)
    assert torch.allclose(together, apart, atol=1e-6)


def test_a_stereo_network_takes_mono_as_a_pair_and_refuses_six_channels():
    network, mono = Baseline(channels=2, **SMALL).eval(), torch.randn(1, 1, 700)
    with torch.no_grad():
        assert torch.allclose(network(mono), network(mono.expand(1, 2, 700)).mean(2, keepdim=True), atol=1e-6)
    with pytest.raises(UserError, match="6"): network(torch.zeros(1, 6, 700))


def test_a_saved_baseline_separates_as_before(tmp_path):
    network = Baseline(**SMALL).eval()
    network.normalization.batch_norm.running_mean.uniform_(-50, 0)
    save_network(network, Recipe(network="baseline", network_args=network.args), tmp_path / "run")
    song = torch.randn(1, 2, 800)
    with torch.no_grad(): assert torch.equal(load_network(tmp_path / "run")(song), network(song))


def test_unknown_settings_are_named():
    with pytest.raises(UserError, match="hidden_size"): build_network("baseline", hidden_sise=3)
    with pytest.raises(UserError, match="lstm or gru"): build_network("baseline", rnn_type="elman")


def test_a_drawing_counts_every_parameter_and_leaves_the_network_alone():
    network = Baseline(num_layers=2, **SMALL).train()
    boxes = trace_shapes(network, torch.rand(2, 9, 33, 1), method="mask")
    assert sum(box.parameters for box in boxes) == count_parameters(network)
    assert [box.shape for box in boxes] == [(9, 33, 1), (9, 33, 1), (9, 10), (9, 33, 1, 4)]
    assert network.training and not any(m._forward_hooks for m in network.modules())
    assert network.normalization.batch_norm.num_batches_tracked == 0
