"Rooms that have become small stay small."
import json

import pytest
import sizes

KEPT = json.loads(sizes.KEPT.read_text())


@pytest.fixture(scope="module")
def now():
    return sizes.measure()


@pytest.mark.parametrize("name", KEPT)
def test_nothing_grows(name, now):
    assert now[name] <= KEPT[name], f"{name}: {now[name]}, kept is {KEPT[name]}; see tests/sizes.py"


def test_a_longer_cell_is_seen(tmp_path):
    source = ["#| export\n", "def f():\n", *["    x = 1\n"] * 50]
    cell = dict(cell_type="code", source=source)
    path = tmp_path / "room.ipynb"
    path.write_text(json.dumps(dict(cells=[cell, dict(cell, source=["f()"])])))
    assert list(sizes.exported_cells(path)) == [51]
