"""Foreign bytes: whatever comes, it is either exactly what was sent or poison. Never a crash, never accepted."""

import os
import random
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from python_tests.delivery.workers import SPEC, messages_of, rows_of, summaries_of
from vista_ext.delivery import Message, decode, encode
from vista_ext.store import StoreSpec, Summaries

FUZZ_SECONDS = float(os.environ.get("VISTA_FUZZ_SECONDS", "5"))
LAST = 2**63 - 1


def test_round_trip():
    users, times, versions = (torch.tensor(x) for x in ([5, -1, LAST], [9, -3, 0], [0, 7, LAST]))
    sent = Summaries(users, rows_of(users, times), times, versions)
    decoded = decode(SPEC, encode(SPEC, sent))
    for name in ("user_ids", "rows", "event_times", "versions"):
        assert torch.equal(getattr(decoded.summaries, name), getattr(sent, name))
    assert not decoded.poison and [m.key for m in decoded.messages] == [b"5", b"-1", b"%d" % LAST]


def test_nothing():
    decoded = decode(SPEC, encode(SPEC, summaries_of([], 1)))
    assert len(decoded.summaries) == 0 and decoded.summaries.rows.shape == (0, SPEC.row_bytes)
    assert decoded.messages == decoded.poison == []


def test_the_others_stay_in_order():
    good = messages_of([1, 2, 3, 4], 1)
    mixed = [good[0], Message(b"9", b"x", "here"), good[1], Message(b"7", good[2].value), good[2], good[3]]
    decoded = decode(SPEC, mixed)
    assert decoded.messages == good and decoded.summaries.user_ids.tolist() == [1, 2, 3, 4]
    assert [str(p) for p in decoded.poison] == [
        "here: key b'9': size expected 704 bytes, found 1",
        ": key b'7': record of user 3, model version 3: key expected 3",
    ]


@pytest.mark.parametrize("key", [b"", b"+5", b"05", b"5 ", b"5.0", b"\xff", b"five", b"5" * 9999])
def test_only_one_spelling_of_a_key(key):
    (message,) = messages_of([5], 1)
    (poison,) = decode(SPEC, [Message(key, message.value)]).poison
    assert "key expected 5" in str(poison) and len(str(poison)) < 200


def test_a_version_that_is_no_version():
    import zlib

    value = bytearray(messages_of([5], 1)[0].value)
    value[32:40] = b"\xff" * 8
    value[48:52] = bytes(4)
    value[48:52] = zlib.crc32(value).to_bytes(4, "little")
    (poison,) = decode(SPEC, [Message(b"5", bytes(value))]).poison
    assert "model_version expected below 2^63, found 18446744073709551615" in str(poison)


@given(st.binary(max_size=2000), st.binary(max_size=30))
def test_random_bytes_are_poison(value, key):
    decoded = decode(SPEC, [Message(key, value)])
    assert len(decoded.poison) == 1 and len(decoded.summaries) == 0


def spoil(random, value):
    """Random, truncated, extended, spliced or bit-flipped bytes."""
    kind = random.randrange(5)
    if kind == 0:
        return random.randbytes(random.choice([0, 1, 63, 64, 65, len(value), random.randrange(2 * len(value))]))
    if kind == 1:
        return value[: random.randrange(len(value))]
    if kind == 2:
        return value + random.randbytes(random.randrange(1, 100))
    data = bytearray(value)
    if kind == 3:
        begin = random.randrange(len(value))
        data[begin : begin + 16] = random.randbytes(len(data[begin : begin + 16]))
    else:
        for _ in range(random.randrange(1, 9)):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def test_fuzz():
    """VISTA_FUZZ_SECONDS says how long; CI takes seconds."""
    seed = int(os.environ.get("VISTA_FUZZ_SEED", "0"))
    chance, rounds, spoiled = random.Random(seed), 0, 0
    specs = [SPEC, StoreSpec("int4", 2, 128, 32), StoreSpec("fp8_e4m3", 1, 128)]
    end = time.monotonic() + FUZZ_SECONDS
    while time.monotonic() < end:
        spec = chance.choice(specs)
        users = [chance.randrange(-(2**63), 2**63) for _ in range(chance.randrange(1, 20))]
        sent = messages_of(users, chance.randrange(2**40), version=chance.randrange(2**63), spec=spec)
        mixed = [Message(m.key, spoil(chance, m.value)) if chance.random() < 0.5 else m for m in sent]
        decoded = decode(spec, mixed)
        assert decoded.messages == [m for m, s in zip(mixed, sent, strict=True) if m.value == s.value]
        assert len(decoded.messages) + len(decoded.poison) == len(mixed)
        assert encode(spec, decoded.summaries) == [Message(m.key, m.value) for m in decoded.messages]
        rounds, spoiled = rounds + 1, spoiled + len(decoded.poison)
    print(f"{rounds} batches, {spoiled} spoiled messages found, seed {seed}")
    assert spoiled > 10
