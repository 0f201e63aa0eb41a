"""Music source separation with contrastive pretraining.

`Separator`, `separate`, `read`, `Store`, `Mixer`, `Recipe`, `fit`, `evaluate` and `listen` are here as well as in their rooms; each is imported
when it is first used, so that `import deepdemix` costs next to nothing.
"""
from os import PathLike

__version__ = "0.1.0"
__all__ = ["Mixer", "Recipe", "Separator", "Store", "evaluate", "fit", "listen", "read", "separate"]

_ROOMS = {
    "Mixer": "augmentation",
    "Recipe": "foundations.recipe",
    "Separator": "separation",
    "Store": "foundations.store",
    "evaluate": "evaluation",
    "fit": "training",
    "listen": "listening",
    "read": "foundations.codecs",
}


def separate(
    path:str|PathLike, out:str|PathLike="separated", model:str|PathLike="default", **options:object
) -> dict:
    """Separate one song into files.

    Parameters:
        path: a song: any audio or video file
        out: the folder in which the song gets a folder of its own
        model: a bundled model, a run folder, or "hf:owner/name"
        options: of `Separator.separate_file`

    Returns: what was written: "folder", "outputs" by stem, and more
    """
    from deepdemix.separation import Separator
    return Separator.from_pretrained(model).separate_file(path, out, **options)


def __getattr__(name:str) -> object:
    if name not in _ROOMS: raise AttributeError(f"module 'deepdemix' has no attribute '{name}'")
    from importlib import import_module
    globals()[name] = getattr(import_module(f"deepdemix.{_ROOMS[name]}"), name)
    _explain(globals()[name], _ROOMS[name])
    return globals()[name]


def _explain(thing:object, room:str) -> None:
    "Let `help` say what each parameter means, as the stub of its room does."
    import ast
    from pathlib import Path
    stub = Path(__file__).parent / f"{room.replace('.', '/')}.pyi"
    tree = ast.parse(stub.read_text(encoding="utf-8")) if stub.exists() else ast.Module([])
    own = next((node for node in tree.body if getattr(node, "name", "") == thing.__name__), tree)
    pairs = [(thing, own)] if not isinstance(own, ast.ClassDef) else [
        (vars(thing).get(node.name), node) for node in own.body if isinstance(node, ast.FunctionDef)
    ]
    for function, node in pairs:
        function = getattr(function, "__func__", function)
        if hasattr(function, "__code__") and (text := ast.get_docstring(node)): function.__doc__ = text


def __dir__() -> list: return sorted({*globals(), *__all__})
