"What every test may ask for: the real data, nussl, and one thread."
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"): settings.load_profile("ci")
REAL = "musdb"
ROOT = Path(__file__).parent.parent


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs in `make test-all`")
    config.addinivalue_line("markers", "musdb: reads the real MUSDB18 songs under MUSDB_PATH")
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    config.addinivalue_line("markers", "browser: drives a real browser")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem != "test_nbdev") # first, or both processes build its site
    for item in items:
        if "slow" in item.keywords and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="slow: runs in `make test-all`"))
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter):
    ran = [r for r in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
           if REAL in r.keywords]
    terminalreporter.write_line(f"real-data tests that ran: {len(ran)}")


@pytest.fixture(scope="session")
def musdb_path() -> Path:
    "The folder of MUSDB18 (7-second previews or full), or a skip that says why."
    root = os.environ.get("MUSDB_PATH")
    if not root: pytest.skip("MUSDB_PATH is not set")
    if not (Path(root) / "train").is_dir(): pytest.skip("MUSDB_PATH has no train folder")
    return Path(root)


@pytest.fixture(scope="session")
def nussl():
    "nussl with the shim that it needs on today's SciPy, or a skip that says why."
    from deepdemix.networks.nussl_bridge import import_nussl
    try: return import_nussl()
    except ImportError as e: pytest.skip(f"nussl is not installed: {e}")


@pytest.fixture(scope="session")
def out_of_reach():
    """Names the parameters of a network that its last `backward` did not reach. Biases need only lie in its
    graph: behind a normalisation or a softmax over keys their gradient is zero but for rounding."""
    def names(network):
        return [name for name, p in network.named_parameters()
                if p.grad is None or not (name.endswith(".bias") or p.grad.any())]
    return names


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """The Python of a new environment that holds the package, from a wheel that was built of the source
    archive, and a kernel; DEEPDEMIX_FRESH names one that is there already."""
    if os.environ.get("DEEPDEMIX_FRESH"): return Path(os.environ["DEEPDEMIX_FRESH"])
    folder = tmp_path_factory.mktemp("fresh")
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    python = folder / "env/bin/python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", next(folder.glob("*.whl")),
         "ipykernel", "nbclient"],
        env=alone, check=True,
    )
    return python
