"A notebook that was opened and saved in Jupyter, and then cleaned, is the notebook it was."
import json
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_listening import browser, program  # noqa: F401 (the browser is a fixture)

ROOT = Path(__file__).parent.parent
NOTEBOOKS = runpy.run_path(str(ROOT / "nbs/_site/listing.py"))["notebooks"]()
LAB = [
    "--no-browser", "--port=PORT", "--ip=127.0.0.1", "--allow-root", "--IdentityProvider.token=",
    "--LabApp.news_url=", "--LabApp.extension_manager=readonly",
    "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
]
KERNEL = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3}, "file_extension": ".py",
        "mimetype": "text/x-python", "name": "python", "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3", "version": "3.11.7",
    },
}


@pytest.fixture
def folder(tmp_path):
    "The settings, and room for notebooks beside them."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "nbs").mkdir()
    return tmp_path


def clean(path, folder):
    "nbdev_clean, on a notebook or a folder of them."
    subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", path], cwd=folder, check=True,
                   capture_output=True)


def test_saved_with_a_kernel_and_cleaned(folder):
    """All notebooks, through the part of Jupyter that reads and writes them, with what JupyterLab adds: the
    kernel's full name, its language, numbers of runs and marks on cells."""
    from jupyter_server.services.contents.largefilemanager import LargeFileManager
    manager = LargeFileManager(root_dir=str(folder))
    for notebook in NOTEBOOKS:
        path = folder / "nbs" / notebook.name
        shutil.copy(notebook, path)
        model = manager.get(f"nbs/{notebook.name}")
        model["content"]["metadata"].update(KERNEL)
        for number, cell in enumerate(c for c in model["content"]["cells"] if c["cell_type"] == "code"):
            # a solution's own mark, which hides its code, is the one that stays
            cell["execution_count"], cell["metadata"] = number + 1, {
                "execution": {"iopub.status.busy": "2026-01-01"}, "collapsed": False, "tags": [],
                "trusted": True, **cell["metadata"],
            }
        manager.save(model, f"nbs/{notebook.name}")
        assert path.read_bytes() != notebook.read_bytes()
    clean(folder / "nbs", folder)
    changed = [notebook.name for notebook in NOTEBOOKS
               if (folder / "nbs" / notebook.name).read_bytes() != notebook.read_bytes()]
    assert not changed, changed


@pytest.mark.browser
def test_saved_in_jupyterlab_and_cleaned(browser, folder): # noqa: F811
    "JupyterLab itself asks for no kernel, and what it saves is cleaned to what there was."
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")
    kept = {p.name: p for p in NOTEBOOKS if p.stem in ("index", "quickstart") or p.stem.endswith("_audio")}
    assert len(kept) == 3
    for path in kept.values(): shutil.copy(path, folder / "nbs")
    with program(
        ["-m", "jupyterlab", *LAB, f"--ServerApp.root_dir={folder}"], folder, "is running at"
    ) as address:
        for name, original in kept.items():
            path = folder / "nbs" / name
            tab = browser.new_page()
            tab.goto(f"{address}lab/tree/nbs/{name}?reset", timeout=120000)
            tab.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=120000)
            assert tab.locator(".jp-Dialog").count() == 0
            tab.locator(".jp-Notebook .jp-Cell").first.click()
            assert "language_info" in saved(path, tab)["metadata"]
            tab.close()
            clean(path, folder)
            assert path.read_bytes() == original.read_bytes(), name


def saved(path, tab):
    """A notebook, saved until JupyterLab has written what its kernel is, which it knows a moment after it
    shows the notebook."""
    end = time.monotonic() + 60
    while True:
        tab.keyboard.press("Control+s")
        tab.wait_for_timeout(1000)
        try: notebook = json.loads(path.read_text(encoding="utf-8"))
        except ValueError: continue
        if "language_info" in notebook["metadata"] or time.monotonic() > end: return notebook
