from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firetitan_daemon.core import chain
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import LoraSettings, Session, SessionState, Snapshot


def session(rank: int = 0, head: str | None = None) -> Session:
    return Session("trainers/t/sessions/s", "t", "base", LoraSettings(rank), 0, "0badcafe",
                   SessionState.ACTIVE, 0.0, chain_head=head)  # fmt: skip


def snapshot(name: str, parent: str | None = None, kind: str | None = None) -> Snapshot:
    kind = kind or ("delta" if parent else "base")
    return Snapshot(name, "trainers/t/sessions/s", "base", 0, kind, "f", parent, 1, 1, "f", "d",
                    "r", 1, 0.0)  # fmt: skip


def line(length: int) -> dict[str, Snapshot]:
    """s0 <- s1 <- ... as ids and rows, `length` deltas after the base."""
    return {f"s{i}": snapshot(f"s{i}", f"s{i - 1}" if i else None) for i in range(length + 1)}


def reason(call: object, *args: object) -> Reason:
    with pytest.raises(FiretitanError) as caught:
        call(*args)  # type: ignore[operator]
    return caught.value.reason


def test_full_parameter_saves_a_base_then_deltas() -> None:
    rows: dict[str, Snapshot] = {}
    state = session()
    kinds = []
    for number in range(24):
        following = chain.next_kind(state, None, rows.get)
        kinds.append(following.kind)
        rows[f"n{number}"] = snapshot(f"n{number}", following.parent, following.kind)
        state = chain.commit(state, rows[f"n{number}"])
    assert kinds == ["base", *["delta"] * 20, "base", "delta", "delta"]
    assert len(chain.plan("n20", [], rows.get)) == 21


def test_a_rebase_says_why() -> None:
    rows = line(chain.MAX_DELTAS)
    following = chain.next_kind(session(head=f"s{chain.MAX_DELTAS}"), "delta", rows.get)
    assert following.kind == "base"
    assert following.note is not None
    assert "20 deltas in a row" in following.note


def test_lora_is_always_a_base() -> None:
    assert chain.next_kind(session(8), None, {}.get) == chain.NextSnapshot("base")
    assert chain.next_kind(session(8), "base", {}.get) == chain.NextSnapshot("base")
    asked = chain.next_kind(session(8), "Delta", {}.get)
    assert asked.kind == "base"
    assert asked.note is not None
    assert "LoRA" in asked.note
    assert chain.commit(session(8), snapshot("a")).chain_head is None


def test_a_delta_needs_something_to_build_on() -> None:
    rows = line(1)
    assert reason(chain.next_kind, session(), "delta", rows.get) == Reason.INVALID_ARGUMENT
    lost = session(head="gone")
    assert reason(chain.next_kind, lost, "delta", rows.get) == Reason.INVALID_ARGUMENT
    assert chain.next_kind(lost, None, rows.get).kind == "base"
    built = chain.next_kind(session(head="s1"), "DELTA ", rows.get)
    assert built == chain.NextSnapshot("delta", parent="s1")
    assert chain.next_kind(session(head="s1"), "base", rows.get).parent is None


def test_unknown_kinds_are_refused() -> None:
    assert reason(chain.next_kind, session(), "merged", {}.get) == Reason.INVALID_ARGUMENT
    assert reason(chain.next_kind, session(8), "merged", {}.get) == Reason.INVALID_ARGUMENT


def test_after_a_reset_comes_a_base() -> None:
    rows = line(2)
    state = chain.reset(session(head="s2"))
    assert chain.next_kind(state, None, rows.get) == chain.NextSnapshot("base")
    late = snapshot("x", parent="s2")
    assert reason(chain.commit, state, late) == Reason.CHAIN_BROKEN


def test_plans() -> None:
    rows = line(3) | {"other": snapshot("other")}

    def plan(target: str, *loaded: str) -> list[str]:
        return [one.id for one in chain.plan(target, loaded, rows.get)]

    assert plan("s3") == ["s0", "s1", "s2", "s3"]
    assert plan("s3", "s1") == ["s2", "s3"]
    assert plan("s3", "s2", "s0") == ["s3"]
    assert plan("s3", "s3") == []
    assert plan("s1", "s3") == ["s0", "s1"]
    assert plan("s3", "other") == ["s0", "s1", "s2", "s3"]
    assert plan("other", "s3") == ["other"]


def test_broken_chains_are_told() -> None:
    rows = {
        "a": snapshot("a", "b"),
        "b": snapshot("b", "a"),
        "c": snapshot("c", "gone"),
        "d": snapshot("d", None, "delta"),
        "e": snapshot("e", "e"),
    }
    assert reason(chain.plan, "x", [], rows.get) == Reason.SNAPSHOT_NOT_FOUND
    assert reason(chain.plan, "gone", ["gone"], rows.get) == Reason.SNAPSHOT_NOT_FOUND
    for target in "abcde":
        assert reason(chain.plan, target, [], rows.get) == Reason.CHAIN_BROKEN
    assert [one.id for one in chain.plan("c", ["gone"], rows.get)] == ["c"]


@st.composite
def forests(draw: st.DrawFn) -> dict[str, Snapshot]:
    rows: dict[str, Snapshot] = {}
    for number in range(draw(st.integers(1, 12))):
        parent = draw(st.none() | st.sampled_from(sorted(rows))) if rows else None
        rows[f"n{number}"] = snapshot(f"n{number}", parent)
    return rows


@given(forests(), st.data())
def test_a_plan_is_a_shortest_valid_way(rows: dict[str, Snapshot], data: st.DataObject) -> None:
    target = data.draw(st.sampled_from(sorted(rows)))
    loaded = data.draw(st.sets(st.sampled_from(sorted(rows))))
    layers = chain.plan(target, loaded, rows.get)
    held = set(loaded)
    for layer in layers:
        assert layer.kind == "base" or layer.parent in held
        held.add(layer.id)
    assert target in held
    assert not layers or layers[-1].id == target
    assert len(layers) == fewest(rows, target, loaded)


def fewest(rows: dict[str, Snapshot], target: str, loaded: set[str]) -> int:
    """Applications to the target, by trying everything breadth first."""
    queue = deque([(name, 0) for name in loaded])
    queue.extend((name, 1) for name, one in rows.items() if one.kind == "base")
    best: dict[str, int] = {}
    while queue:
        name, cost = queue.popleft()
        if best.get(name, 99) <= cost:
            continue
        best[name] = cost
        queue.extend((child, cost + 1) for child, one in rows.items() if one.parent == name)
    return best[target]
