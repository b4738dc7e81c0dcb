"""The sweep itself: `python -m pytest -m zoo` goes over every network, which takes an hour; and one network of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import zoo


@pytest.mark.zoo
@pytest.mark.timeout(0)
def test_every_network_is_planned_converted_trained_and_reloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = zoo.table()
    monkeypatch.setattr(zoo, "TABLE", Path("zoo-sweep.json"))  # goes on where it was stopped
    zoo.sweep(modules={row["module"]: row["name"] for row in kept.values() if "module" in row})
    rows = zoo.table()
    assert [name for name, row in rows.items() if "traceback" in row] == []
    assert [name for name, row in rows.items() if row.get("step", "ok") != kept.get(name, row).get("step", "ok")] == []
    zoo.TABLE.unlink()


def test_one_network_of_the_sweep() -> None:
    row = zoo.measure("torchvision/shufflenet_v2_x0_5")
    assert (row["step"], row["reload"], row["warm_start_error"]) == ("ok", "ok", 0)
    assert row["kw"] == zoo.table()[row["name"]]["kw"]


def test_what_goes_wrong_is_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("lost")

    assert "refused" in zoo.measure("torchvision/no_such_network")
    monkeypatch.setattr(zoo, "plan", broken)
    assert zoo.measure("torchvision/resnet18")["traceback"].startswith("KeyError: 'lost'")
