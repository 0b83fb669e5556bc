"""Bytes from elsewhere, broken on purpose: no crash, no hang, nothing accepted that was not written.

Short here; `VISTA_FUZZ_SECONDS=600 pytest python_tests/store/test_fuzz.py` goes on for ten minutes with each decoder.
"""

import os
import random
import time

import numpy as np
import pytest
from workers import SPEC, rows_of

from vista_ext.store import StoreError, StoreSpec, record

SECONDS = float(os.environ.get("VISTA_FUZZ_SECONDS", "0.5"))
USERS = np.arange(8)


def broken(data, chance):
    """Another byte string: bits flipped, cut, lengthened, spliced, or made up."""
    data = bytearray(data)
    kind = chance.randrange(6)
    if kind == 0:
        for _ in range(chance.choice([1, 1, 2, 8])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[chance.randrange(len(data)) :]
    elif kind == 2:
        data += chance.randbytes(chance.randrange(1, 100))
    elif kind == 3:
        at = chance.randrange(len(data))
        data[at : at + chance.randrange(1, 64)] = chance.randbytes(chance.randrange(64))
    elif kind == 4:
        data = bytearray(chance.randbytes(len(data)))
    else:
        at = chance.randrange(0, len(data), 4)  # fields at their extremes
        data[at : at + 4] = chance.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\x01\0\0\0"])
    return bytes(data)


def rounds():
    seed = random.randrange(2**32) if SECONDS > 10 else 0
    chance, end = random.Random(seed), time.monotonic() + SECONDS
    count = 0
    while time.monotonic() < end:
        yield chance
        count += 1
    print(f"seed {seed}: {count} rounds")
    assert count > 10


@pytest.mark.timeout(SECONDS + 600)
def test_records():
    times = USERS * 10
    rows = rows_of(USERS, times).numpy()
    whole = [r.tobytes() for r in record.pack(SPEC, USERS, np.full(8, 3), times, rows)]
    for chance in rounds():
        # Some are broken, one is another user's whole record, one is missing.
        values = [broken(value, chance) if chance.random() < 0.5 else value for value in whole]
        if chance.random() < 0.5:
            values[chance.randrange(8)] = whole[chance.randrange(8)]
        if chance.random() < 0.2:
            values[chance.randrange(8)] = None
        landing = record.Landing(SPEC, 8)
        landing.take(values)
        landing.versions[:] = 3
        damage = landing.damage(USERS)
        for i, value in enumerate(values):
            sound = value == whole[i]
            assert (i in damage) == (value is not None and not sound)
            assert not sound or np.array_equal(landing.rows[i].numpy(), rows[i])
            assert value is None or len(value) == len(whole[i]) or not landing.rows[i].any()


@pytest.mark.timeout(SECONDS + 600)
def test_published_specs():
    texts = [StoreSpec("int4", 2, 128, 32, 7, {"a": [1, None, "x"]}).to_json(), SPEC.to_json()]
    for chance in rounds():
        text = broken(chance.choice(texts), chance)
        try:
            spec = StoreSpec.from_json(text, "here")
        except StoreError as error:
            assert str(error).startswith("here: its spec cannot be read: ")
        else:
            assert spec == StoreSpec.from_json(spec.to_json(), "there") and spec.row_bytes > 0


@pytest.mark.timeout(SECONDS + 600)
def test_keys():
    for chance in rounds():
        data = chance.randbytes(16 * chance.randrange(20))
        keys = [data[i : i + 16] for i in range(0, len(data), 16)]
        assert record.keys(*record.parse_keys(keys)) == keys
