"""Who uses what, and which clean-ups are due."""

from __future__ import annotations

from firetitan_daemon.core.leases import LeaseTable, client_of
from firetitan_daemon.core.records import Cleanup, DeferredCleanup, Lease

T, D = "trainers/t", "deployments/d"


def lease(client: str, *names: str, ttl_s: float = 10.0) -> Lease:
    return Lease(client, f"{client}.py", ttl_s, dict.fromkeys(names, Cleanup.KEEP))


def test_who_uses_a_session_uses_its_trainer() -> None:
    table = LeaseTable()
    table.hold(lease("a", f"{T}/sessions/s"), 0.0)
    table.hold(lease("b", "trainers/t2"), 0.0)
    assert [one.client_id for one in table.users(T)] == ["a"]
    assert table.users("trainers/t3") == []


def test_a_clean_up_is_due_when_the_last_has_left() -> None:
    table = LeaseTable()
    table.hold(lease("a", T), 0.0)
    table.hold(lease("b", T), 0.0)
    table.defer(table.wanted({T: Cleanup.DELETE, D: Cleanup.KEEP}, "a.py", 1.0))
    assert table.due() == []
    table.end("a")
    assert table.due() == []
    table.end("b")
    assert table.due() == [DeferredCleanup(T, Cleanup.DELETE, "a.py", 1.0)]
    table.finish(table.due()[0])
    assert list(table.cleanups) == []


def test_of_two_clean_ups_deleting_wins() -> None:
    for first, second in ((Cleanup.DELETE, Cleanup.STOP), (Cleanup.STOP, Cleanup.DELETE)):
        table = LeaseTable()
        table.defer(table.wanted({D: first}, "a.py", 1.0))
        table.defer(table.wanted({D: second}, "b.py", 2.0))
        assert [one.cleanup for one in table.cleanups] == [Cleanup.DELETE]


def test_a_lease_ends_unless_it_is_renewed() -> None:
    table = LeaseTable()
    table.hold(lease("a", T), 0.0)
    assert table.expired(9.9) == []
    table.hold(lease("a", T), 9.0)
    assert table.expired(18.9) == []
    assert [one.client_id for one in table.expired(19.0)] == ["a"]


def test_a_restart_gives_every_lease_its_full_time_again() -> None:
    table = LeaseTable()
    table.restore([lease("a", T)], [DeferredCleanup(T, Cleanup.STOP, "b.py", 1.0)], 100.0)
    assert table.expired(109.9) == []
    assert table.due() == []
    assert [one.client_id for one in table.expired(110.0)] == ["a"]


def test_lanes_and_pins_belong_to_the_client_before_the_dot() -> None:
    assert client_of("abc.pin-1") == "abc"
    assert client_of("abc") == ""
