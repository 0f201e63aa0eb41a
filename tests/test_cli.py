"The command, run as a user runs it: every step from a toy store to a verdict."
import json

import pytest

from deepdemix.cli import main

TINY = [word for setting in ("epochs=1", "examples_per_epoch=4", "batch_size=2", "valid_examples=2") for word in ("--set", setting)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A toy store, a pretrained encoder, and two separators."
    root = tmp_path_factory.mktemp("cli")
    run = lambda *words: main([str(w) for w in words])
    assert run("prepare", "--toy", 16, "--out", root / "toy") == 0
    common = ["--data", root / "toy", "--profile", "demo", "--device", "cpu", *TINY]
    assert run("pretrain", "--out", root / "encoder", *common) == 0
    assert run("train", "--model", "ddm", "--encoder", root / "encoder", "--out", root / "ddm", *common) == 0
    assert run("train", "--model", "baseline", "--out", root / "baseline", *common) == 0
    return root


def test_evaluate_and_compare(folder, capsys):
    for name in ("baseline", "ddm"):
        assert main(["evaluate", "--model", str(folder / name), "--data", str(folder / "toy"), "--out", str(folder / f"{name}.json")]) == 0
        printed = capsys.readouterr().out
        assert name in printed and "oracle 12x12" in printed and "ideal ratio mask" in printed
    assert main(["compare", str(folder / "baseline.json"), str(folder / "ddm.json")]) == 0
    assert "songs improve" in capsys.readouterr().out


def test_separate_with_a_run_folder(folder, capsys):
    song = next((folder / "toy").rglob("*.npy"))
    assert main(["separate", str(song), "--out", str(folder / "stems"), "--model", str(folder / "baseline")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_models_and_export(folder, capsys):
    assert main(["models"]) == 0
    assert {"default", "ddm_skip", "recurrent"} <= set(capsys.readouterr().out.split())
    assert main(["export", "--model", str(folder / "baseline"), "--out", str(folder / "net.pt")]) == 0
    assert (folder / "net.pt").stat().st_size > 100_000


def test_a_recipe_can_be_run_again(folder):
    words = ["train", "--recipe", folder / "baseline", "--data", folder / "toy", "--out", folder / "again"]
    assert main([str(w) for w in words]) == 0
    old, new = (json.loads((folder / n / "recipe.json").read_text())["recipe"] for n in ("baseline", "again"))
    assert old == new


def test_pretraining_takes_several_stores(folder, tmp_path, capsys):
    assert main(["prepare", "--toy", "4", "--seed", "1", "--out", str(tmp_path / "more")]) == 0
    words = ["pretrain", "--data", folder / "toy", "--data", f"{tmp_path / 'more'}=2", "--out", tmp_path / "run", "--profile", "demo", "--device", "cpu", *TINY]
    assert main([str(w) for w in words]) == 0
    stores = json.loads((tmp_path / "run" / "recipe.json").read_text())["data"]["stores"]
    assert [(s["name"], s["songs"], s["weight"]) for s in stores] == [("toy", 16, 1), ("more", 2, 2)]
    capsys.readouterr()
    assert main([str(w) for w in [*words[:1], "--data", folder / "toy", *words[5:], "--resume", "--set", "epochs=2"]]) == 2
    assert "other data" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["train", "--out", "x"], ["train", "--model", "nobody", "--out", "x"], ["evaluate", "--model", "default", "--data", "nowhere", "--out", "x"]])
def test_one_line_and_status_2(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("deepdemix: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
