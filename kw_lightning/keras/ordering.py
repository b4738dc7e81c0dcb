"""Names in an order in which each comes after those that it waits for: Kahn's algorithm, and a cycle where it fails."""

from __future__ import annotations

from collections.abc import Collection, Mapping


def in_order(waits: Mapping[str, Collection[str]]) -> tuple[list[str], list[str]]:
    """Return names in order, as near to their own as may be, and one cycle where some wait for each other.

    Args:
        waits: name → the names that it waits for, which are among the keys.

    Returns:
        The names that wait for no cycle, and a cycle in the direction of the data, its first name again at the end;
        empty where there is none.
    """
    waiting = {name: set(sources) for name, sources in waits.items()}
    readers: dict[str, list[str]] = {name: [] for name in waits}
    for name, sources in waiting.items():
        for source in sources:
            readers[source].append(name)
    free = [name for name in reversed(list(waits)) if not waiting[name]]
    order: list[str] = []
    while free:
        order.append(free.pop())
        for reader in reversed(readers[order[-1]]):
            waiting[reader].discard(order[-1])
            if not waiting[reader]:
                free.append(reader)
    return order, _cycle({name: sources for name, sources in waiting.items() if sources})


def _cycle(waiting: Mapping[str, set[str]]) -> list[str]:
    name, way = next(iter(waiting), ""), list[str]()
    while waiting and name not in way:
        way.append(name)
        name = min(source for source in waiting[name] if source in waiting)
    return list(reversed([*way[way.index(name) :], name])) if way else []
