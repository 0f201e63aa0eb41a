"One ONNX file, waveform in and stems out: what it holds, what runs it, and what it says of itself."
import subprocess
import sys
from pathlib import Path

import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from deepdemix.cli import main
from deepdemix.data import prepare_toy
from deepdemix.foundations.codecs import read
from deepdemix.foundations.encoding import write
from deepdemix.foundations.files import UserError
from deepdemix.foundations.registry import build_network
from deepdemix.foundations.runs import file_digest
from deepdemix.foundations.toy_band import toy_song
from deepdemix.networks.onnx_file import OnnxNetwork
from deepdemix.separation import Separator
from deepdemix.serving import export as room
from deepdemix.serving.export import export, load_separator

EXAMPLE = Path(__file__).parent.parent / "examples/separate.py"
SMALL = dict(width=8, layers=1, hidden=8, octave=8, band=4, window_length=256, hop_length=64, refine=0.75)


def small(**settings):
    "A small Compact network that turns phases."
    torch.manual_seed(0)
    network = build_network("compact", **SMALL | settings).eval()
    torch.nn.init.normal_(network.maskers.turn.weight)
    return network


def apart(a, b): return float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max())


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    "The bundled default as files: in single and in half precision."
    folder = tmp_path_factory.mktemp("onnx")
    for name, more in ("single", []), ("half", ["--half"]):
        assert main(["export", "--out", str(folder / f"{name}.onnx"), *more]) == 0
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A network whose chunks are short, and its file."
    network = small()
    return network, export(network, tmp_path_factory.mktemp("tiny") / "tiny.onnx", "for tests", "tiny")


# The file

def test_the_default_agrees_on_real_music_at_three_lengths(default, musdb_path):
    "Three songs, three lengths, a batch of two: 1e-4 of full scale."
    network = Separator.from_pretrained("default", device="cpu").network
    songs = [read(path)[0][:2] for path in sorted((musdb_path / "test").glob("*.mp4"))[:3]]
    for file in "single", "half":
        run = OnnxNetwork(default / f"{file}.onnx")
        for song, samples in zip(songs, (300_032, 100_001, 12_345)):
            x = torch.stack([song[:, :samples], song[:, -samples:]])
            with torch.inference_mode(): assert apart(run(x), network(x)) < 1e-4


def test_the_default_agrees_on_the_toy_band(default):
    network = Separator.from_pretrained("default", device="cpu").network
    run = OnnxNetwork(default / "single.onnx")
    x = toy_song(4, duration=5.).sum(0)[None]
    for samples in 1, 1023, 1024, 1025, 4096, 44_100, x.shape[-1]:
        with torch.inference_mode(): assert apart(run(x[..., :samples]), network(x[..., :samples])) < 1e-4


def test_sizes(default):
    parameters = sum(
        p.numel() for p in Separator.from_pretrained("default", device="cpu").network.parameters()
    )
    single, half = ((default / f"{name}.onnx").stat().st_size for name in ("single", "half"))
    assert single <= 4 * parameters + 2e6 and half <= 2 * parameters + 1e6


def test_half_of_bundled_weights_loses_nothing(default):
    "The bundled weights are in half precision already."
    x = toy_song(5, duration=1.).sum(0)[None]
    assert torch.equal(OnnxNetwork(default / "half.onnx")(x), OnnxNetwork(default / "single.onnx")(x))


def test_half_rounds_fresh_weights(tmp_path):
    network = small()
    files = [export(network, tmp_path / f"{half}.onnx", half=half) for half in (False, True)]
    x = torch.randn(1, 2, 5000) / 8
    a, b = (OnnxNetwork(file)(x) for file in files)
    assert 0 < apart(a, b) < 0.01 * float(a.abs().max())
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), small().parameters()))


def test_a_file_says_what_it_is(default):
    about = {p.key: p.value for p in onnx.load(default / "half.onnx").metadata_props}
    assert (about["sources"] == "drums,bass,other,vocals" and about["sample_rate"] == "44100"
            and about["name"] == "default")
    assert "non-commercial research" in about["licence"] and about["precision"] == "half"
    assert int(about["parameters"]) == sum(
        p.numel() for p in Separator.from_pretrained("default", device="cpu").network.parameters()
    )


def test_a_file_has_no_more_nodes_than_a_browser_likes(default):
    "A run time's work when it loads a file grows with the square of their number."
    nodes = [n.op_type for n in onnx.load(default / "single.onnx").graph.node if n.op_type != "Constant"]
    assert len(nodes) < 900 and nodes.count("LSTM") == 8
    assert not any(domain.domain for domain in onnx.load(default / "single.onnx").opset_import)


@pytest.mark.parametrize(
    "settings", [dict(), dict(refine=0.0), dict(channels=1), dict(stack=3, attention=2)], ids=str
)
def test_every_compact_network(settings, tmp_path):
    network = small(**settings)
    run = OnnxNetwork(export(network, tmp_path / "x.onnx"))
    for batch, samples in (1, 1), (2, 63), (3, 9999):
        x = torch.randn(batch, network.channels, samples) / 8
        with torch.inference_mode(): assert apart(run(x), network(x)) < 1e-4


def test_a_network_that_can_only_be_written_without_its_stft(tmp_path):
    "Its window is not a whole even number of hops."
    network = build_network("baseline", hidden_size=4, window_length=48, hop_length=20).eval()
    session = onnxruntime.InferenceSession(str(export(network, tmp_path / "x.onnx")))
    x = torch.rand(2, 31, network.n_f, 1)
    with torch.inference_mode():
        assert apart(session.run(None, {"magnitude": x.numpy()})[0], network.mask(x)) < 1e-4


# What runs it

def test_separator_takes_a_file(default, tmp_path):
    write(tmp_path / "song.wav", toy_song(6, duration=12.).sum(0), 44100)
    here, there = (Separator.from_pretrained(x, device="cpu", chunk=5.0, threads=1)
                   for x in ("default", default / "half.onnx"))
    assert here.plan == there.plan and here.sources == there.sources and there.name == "half"
    for a, b in zip(
        here.separate(tmp_path / "song.wav").values(), there.separate(tmp_path / "song.wav").values()
    ):
        assert apart(a, b) < 1e-4


def test_command_line(default, tmp_path, capsys):
    write(tmp_path / "song.wav", toy_song(7, duration=2.).sum(0), 44100)
    stems = {}
    for name, options in dict(
        torch=[], file=["--model", str(default / "half.onnx")], onnx=["--backend", "onnx"]
    ).items():
        assert (
            main(["separate", str(tmp_path / "song.wav"), "--out", str(tmp_path / name), "--subtype", "FLOAT",
                  "--clip", "none", *options])
            == 0
        )
        stems[name] = [
            read(tmp_path / name / "song" / f"{stem}.wav")[0] for stem in ("drums", "bass", "other", "vocals")
        ]
    for name in "file", "onnx": assert max(map(apart, stems[name], stems["torch"])) < 1e-4
    for bad, words in ((["--backend", "torch"], "ONNX file"), (["--device", "cuda"], "processor"),
                       (["--ray", "--backend", "onnx"], "without --ray")):
        assert (
            main(["separate", str(tmp_path / "song.wav"), "--out", str(tmp_path / "no"), "--model",
                  str(default / "half.onnx"), *bad])
            == 2
        )
        assert words in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "content,words", [(b"", "no ONNX file"), (b"text", "no ONNX file"), (None, "no model")]
)
def test_files_that_are_no_models(content, words, tmp_path):
    if content is not None: (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(UserError, match=words): Separator.from_pretrained(tmp_path / "x.onnx")


def test_a_foreign_file(tiny, tmp_path):
    model = onnx.load(tiny[1])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(UserError, match="not a separator"): Separator.from_pretrained(tmp_path / "x.onnx")


def test_without_onnxruntime(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'deepdemix\[onnx\]'"):
        Separator.from_pretrained(tiny[1])
    with pytest.raises(UserError, match=r"pip install 'deepdemix\[export\]'"):
        export(small(), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_refusals(tiny, tmp_path):
    with pytest.raises(UserError, match="already"): export(OnnxNetwork(tiny[1]), tmp_path / "x.onnx")
    with pytest.raises(UserError, match="half"): export(small(), tmp_path / "x.pt", half=True)
    with pytest.raises(UserError, match="auto, torch or onnx"): load_separator("default", "tensorflow")
    with pytest.raises(UserError, match="processor"): load_separator("default", "onnx", device="cuda")
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    "An exporter that changes one weight is found out."
    honest = room.halve
    def dishonest(model):
        honest(model)
        table = next(t for t in model.graph.initializer if len(t.dims) == 3)
        values = onnx.numpy_helper.to_array(table)
        table.CopyFrom(onnx.numpy_helper.from_array((values * 1.5).astype(values.dtype), table.name))
    monkeypatch.setattr(room, "halve", dishonest)
    with pytest.raises(UserError, match="differs by"): export(small(), tmp_path / "x.onnx", half=True)
    assert not list(tmp_path.iterdir())


# The example

def example(*arguments, **more):
    "The example in a process in which PyTorch and the package can't be imported."
    blocked = ("import sys, runpy; sys.modules.update(torch=None, deepdemix=None); sys.argv = sys.argv[1:];"
               " runpy.run_path(sys.argv[0], run_name='__main__')")
    return subprocess.run(
        [sys.executable, "-c", blocked, EXAMPLE, *map(str, arguments)], capture_output=True, text=True, **more
    )


def test_the_example_separates_without_pytorch(tiny, tmp_path):
    "Chunks, context and cross-fades are the Separator's: three chunks and a bit."
    network, file = tiny
    song = toy_song(8, duration=50.).sum(0)
    write(tmp_path / "song.wav", song, 44100)
    done = example(file, tmp_path / "song.wav", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    expected = Separator(network, device="cpu").separate(tmp_path / "song.wav")
    for name, stem in expected.items():
        assert apart(read(tmp_path / "out" / f"{name}.wav")[0], stem.clamp(-1, 1 - 2**-15)) < 1e-4


def test_the_example_takes_mono_and_names_what_it_does_not_take(tiny, tmp_path):
    write(tmp_path / "mono.wav", toy_song(9, duration=1.).sum(0).mean(0, keepdim=True), 44100, "PCM_24")
    assert example(tiny[1], tmp_path / "mono.wav", tmp_path / "out").returncode == 0
    assert read(tmp_path / "out/bass.wav")[0].shape == (1, 44100)
    write(tmp_path / "slow.wav", torch.zeros(2, 1000), 8000)
    done = example(tiny[1], tmp_path / "slow.wav", tmp_path / "no")
    assert (done.returncode == 1 and "resample" in done.stderr and len(done.stderr.splitlines()) == 1
            and not (tmp_path / "no").exists())


def test_the_example_is_short(): assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 100


def test_a_file_is_scored_like_its_network(tmp_path):
    "evaluate takes a file, and names its digest."
    prepare_toy(1, tmp_path / "toy", duration=2., progress=False)
    file = export(small(), tmp_path / "tiny.onnx")
    assert (
        main(["evaluate", "--model", str(file), "--data", str(tmp_path / "toy"), "--split", "train", "--out",
              str(tmp_path / "scores.json")])
        == 0
    )
    assert file_digest(file) in (tmp_path / "scores.json").read_text()
