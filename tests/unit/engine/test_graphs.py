"""The table of kept graphs: count, bytes, age."""

from __future__ import annotations

import pytest

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.graphs import GraphLimits, GraphTable


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def gone(table: GraphTable[str], handle: str) -> bool:
    try:
        table.get(handle)
    except FiretitanError as error:
        assert error.reason is Reason.GRAPH_EXPIRED
        return True
    return False


def test_the_oldest_makes_room_by_count_and_by_bytes() -> None:
    table: GraphTable[str] = GraphTable(GraphLimits(max_count=3, max_bytes=100))
    handles = []
    for size in (40, 40, 10, 10):
        assert table.make_room(size)
        handles.append(table.put("graph", size))
    assert [gone(table, handle) for handle in handles] == [True, False, False, False]
    assert table.make_room(70)
    assert [gone(table, handle) for handle in handles] == [True, True, False, False]
    assert table.num_bytes == 20


def test_a_graph_over_the_budget_is_refused_and_evicts_nothing() -> None:
    table: GraphTable[str] = GraphTable(GraphLimits(max_bytes=100))
    handle = table.put("graph", 90)
    assert not table.make_room(101)
    assert table.get(handle) == "graph"
    assert not GraphTable[str](GraphLimits(max_count=0)).make_room(1)


def test_what_is_needed_stays_whatever_it_takes() -> None:
    clock = Clock()
    table: GraphTable[str] = GraphTable(GraphLimits(2, 100, 10), clock)
    assert table.make_room(30)
    other = table.put("other", 30)
    assert table.make_room(80, needed=True)
    first = table.put("a", 80, needed=True)
    assert gone(table, other)
    assert not table.make_room(30)
    assert table.make_room(200, needed=True)
    second = table.put("b", 200, needed=True)
    clock.now_s = 1000.0
    assert not table.make_room(1) and not table.beside().make_room(1)
    assert (table.get(first), table.get(second)) == ("a", "b")
    table.release(second)
    assert table.make_room(20)
    table.clear()
    assert gone(table, first)


def test_age_expires() -> None:
    clock = Clock()
    table: GraphTable[str] = GraphTable(GraphLimits(max_age_s=10), clock)
    handle = table.put("graph", 1)
    clock.now_s = 9.0
    assert table.get(handle) == "graph" and len(table) == 1
    clock.now_s = 11.0
    assert len(table) == 0 and gone(table, handle)


def test_the_oldest_go_without_another_call_for_them() -> None:
    clock = Clock()
    table: GraphTable[str] = GraphTable(GraphLimits(max_age_s=10), clock)
    table.beside().put("graph", 1)
    clock.now_s = 9.0
    table.expire()
    assert table.num_bytes == 1
    clock.now_s = 11.0
    table.expire()
    assert table.num_bytes == 0


def test_get_keeps_release_and_clear_drop() -> None:
    table: GraphTable[str] = GraphTable()
    first, second = table.put("a", 1), table.put("b", 1)
    assert table.get(first) == table.get(first) == "a"
    table.release(first)
    table.release("unknown")
    assert gone(table, first) and table.get(second) == "b"
    table.clear()
    assert len(table) == 0 and table.num_bytes == 0


def test_the_message_says_what_to_do() -> None:
    with pytest.raises(FiretitanError, match="cross_entropy weights"):
        GraphTable[str]().get("nothing")
