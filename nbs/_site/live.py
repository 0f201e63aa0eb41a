"""What the page "Try it" needs beside its own script, into a folder of the site: `python nbs/_site/live.py
FOLDER`

onnxruntime-web comes from npm, at one version; the model, two short songs and the listening desk come from
the package.
Where npm or the packages for ONNX are missing the page says how it would be built, and the rest of the site
stands.
"""
import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

root = Path(__file__).resolve().parents[2]
VERSION = "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
FILES = ("dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm")
SECONDS, SEED = 10.0, 3


class Missing(Exception):
    "The page can't be built here; the text says what is missing."


def digest(content: bytes) -> str:
    "As npm writes it."
    return "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()


def package(cache: Path) -> Path:
    "The archive of onnxruntime-web, fetched once."
    path = cache / f"onnxruntime-web-{VERSION}.tgz"
    cache.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or digest(path.read_bytes()) != INTEGRITY:
        npm = shutil.which("npm")
        if not npm: raise Missing("npm is missing")
        done = subprocess.run(
            [npm, "pack", f"onnxruntime-web@{VERSION}", "--silent"], cwd=cache, capture_output=True, text=True
        )
        if done.returncode or not path.is_file():
            raise Missing(f"npm could not fetch onnxruntime-web {VERSION}")
    if digest(path.read_bytes()) != INTEGRITY:
        raise Missing(f"onnxruntime-web {VERSION} is not the archive that was tested")
    return path


def runtime(out: Path, cache: Path) -> None:
    "Runtime and licence."
    archive, licence = package(cache), Path(sys.modules["onnxruntime"].__file__).parent / "LICENSE"
    with tarfile.open(archive) as files:
        for name in FILES: (out / Path(name).name).write_bytes(files.extractfile(f"package/{name}").read())
    text = licence.read_text(encoding="utf-8") if licence.is_file() else "MIT\n"
    (out / "LICENSE-onnxruntime.txt").write_text(f"onnxruntime-web {VERSION}\n\n{text}", encoding="utf-8")


def model(out: Path) -> dict:
    "The bundled default in half precision; what its metadata say."
    import onnx

    from deepdemix.separation import Separator
    from deepdemix.serving.export import export, licence_of
    path = export(Separator.from_pretrained("default", device="cpu").network, out / "default.onnx",
                  licence_of("default"), "default", half=True)
    return {p.key: p.value for p in onnx.load(path).metadata_props}


def excerpts(out: Path) -> None:
    "A song for each button: the funk band that comes with the package, and the toy band."
    from deepdemix.foundations.encoding import write
    from deepdemix.foundations.sample_song import sample_song
    from deepdemix.foundations.toy_band import toy_song
    for name, stems in {"funk": sample_song(), "toy": toy_song(SEED, duration=SECONDS)}.items():
        song = stems.sum(0)
        write(out / f"{name}.flac", song * min(1.0, 0.99 / float(song.abs().max())), 44100)


def desk(out: Path) -> dict:
    "The listening desk without its sound; the colours of the stems."
    from deepdemix.audio import SOURCE_COLORS
    from deepdemix.serving.desk import POLICY, SCRIPTS, desk_text, fill
    parts = dict(
        policy=POLICY, style=desk_text("desk.css"), script=desk_text(*(f"{name}.js" for name in SCRIPTS))
    )
    page = fill(desk_text("desk.html"), **parts, songs="", keys="", song="", more="")
    page = page.replace(
        "<script type", "<script>window.given = window.parent.given</script>\n<script type", 1
    )
    (out / "desk.html.txt").write_text(page, encoding="utf-8")
    return SOURCE_COLORS


def make(out: Path, cache: Path = root / "nbs/_site/build/npm") -> str:
    "Fill the folder; returns what is missing, which is nothing as a rule."
    out.mkdir(parents=True, exist_ok=True)
    about = dict(ready=False, missing="")
    try:
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
        except ImportError as error: raise Missing(f"the package {error.name} is missing") from error
        runtime(out, cache)
        about |= dict(model=model(out), colors=desk(out), version=VERSION, ready=True)
        excerpts(out)
    except Missing as error: about["missing"] = str(error)
    (out / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    return about["missing"]


if __name__ == "__main__":
    if missing := make(Path(sys.argv[1])): sys.exit(missing)
