"""Memory itself is bounded in models/test_stage1.py."""

from vista_ext import _heap


def test_every_turn_is_taken_and_memory_released_now_and_then(monkeypatch):
    calls = []
    monkeypatch.setattr(_heap.ctypes, "CDLL", lambda _: type("C", (), {"malloc_trim": staticmethod(calls.append)}))
    assert list(_heap.released(range(40))) == list(range(40)) and calls == [0, 0]
    monkeypatch.setattr(_heap.ctypes, "CDLL", lambda _: object())  # another C library
    assert list(_heap.released("ab")) == ["a", "b"] and not list(_heap.released([]))
