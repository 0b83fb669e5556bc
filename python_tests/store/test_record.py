import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from workers import SPEC, rows_of

from vista_ext import _C
from vista_ext.store import StoreSpec, record

USERS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([-(2**63), -1, 0, 1, 2**63 - 1]))
VERSIONS = st.integers(0, 2**63 - 1)


def test_header_is_the_documented_one():
    """Packed by hand from docs/row_layout.md."""
    user, version, time = -5, 7, 1_700_000_000
    row = rows_of([9], [4]).numpy()
    (made,) = record.pack(SPEC, *(np.array([x]) for x in (user, version, time)), row)
    parts = b"VSTA", 1, 0, 0, 16, 256, 256, SPEC.row_bytes, user, version, time
    blank = struct.pack("<4sHBBIIIIqQqI12x", *parts, 0)
    crc = zlib.crc32(blank + row.tobytes())
    assert made.tobytes() == struct.pack("<4sHBBIIIIqQqI12x", *parts, crc) + row.tobytes()


def test_scheme_and_group_travel():
    spec = StoreSpec("int4", 2, 128, 32)
    rows = np.zeros((1, spec.row_bytes), dtype=np.uint8)
    header = record.pack(spec, *(np.array([x]) for x in (1, 2, 3)), rows)[0, :64].view(record.HEADER)[0]
    assert (header["scheme"], header["group"], header["row_bytes"]) == (1, 32, spec.row_bytes)


@given(st.lists(st.tuples(USERS, VERSIONS), min_size=1))
def test_keys_order_as_numbers_and_read_back(pairs):
    users, versions = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    packed = record.keys(users, versions)
    assert [pairs[i] for i in sorted(range(len(pairs)), key=packed.__getitem__)] == sorted(pairs)
    back = record.parse_keys(packed)
    assert np.array_equal(back[0], users) and np.array_equal(back[1], versions)


def test_no_keys():
    none = np.empty(0, dtype=np.int64)
    assert record.keys(none, none) == [] and [len(x) for x in record.parse_keys([])] == [0, 0]


def landed(value, spec=SPEC, version=3):
    landing = record.Landing(spec, 1)
    landing.take([value])
    landing.versions[:] = version
    return landing


def whole(user=12, version=3, time=99):
    return record.pack(SPEC, *(np.array([x]) for x in (user, version, time)), rows_of([user], [time]).numpy())[0]


def test_a_whole_record_lands():
    landing = landed(whole())
    assert not landing.damage(np.array([12]))
    assert landing.headers["event_time"] == 99 and torch.equal(landing.rows, rows_of([12], [99]))
    assert landing.sizes.tolist() == [64 + SPEC.row_bytes]
    nothing = landed(None)
    assert nothing.sizes.tolist() == [-1] and not nothing.damage(np.array([12])) and not nothing.rows.any()


@pytest.mark.parametrize("bit", [0, 7])
@given(at=st.integers(0, 64 + SPEC.row_bytes - 1))
def test_no_flipped_bit_passes(at, bit):
    made = whole()
    made[at] ^= 1 << bit
    # All but a flipped time, which only the checksum knows, or a flipped checksum are named by their field.
    assert "record of user 12" in str(landed(made).damage(np.array([12]))[0])


@given(size=st.integers(0, 64 + SPEC.row_bytes - 1))
def test_no_truncated_record_passes(size):
    landing = landed(whole().tobytes()[:size])
    assert f"size expected 4288 bytes, found {size}" in str(landing.damage(np.array([12]))[0])
    assert not landing.rows.any() and not landing.header_bytes.any()


@given(data=st.binary(max_size=200) | st.binary(min_size=64 + SPEC.row_bytes, max_size=64 + SPEC.row_bytes))
def test_no_random_bytes_pass(data):
    assert landed(data).damage(np.array([12]))


@given(user=USERS, version=VERSIONS)
def test_a_record_under_another_key_is_damage(user, version):
    found = landed(whole(), version=version).damage(np.array([user]))
    assert bool(found) == ((user, version) != (12, 3))


def test_records_that_cannot_be_taken():
    landing = record.Landing(SPEC, 2)
    with pytest.raises(ValueError, match="values must be as many as the rows, 1, found 2"):
        landing.take([b"", b""], first=1)
    with pytest.raises(ValueError, match="a record must be contiguous bytes"):
        landing.take([memoryview(bytes(100))[::2], None])
    frozen = np.zeros((1, SPEC.row_bytes), dtype=np.uint8)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="rows must be a writable array"):
        _C.unpack_records([None], landing.header_bytes[:1], frozen, landing.sizes[:1], landing.checksums[:1])


@given(data=st.binary(max_size=700), start=st.integers(0, 2**32 - 1), base=st.booleans())
def test_crc32_is_that_of_zlib(data, start, base):
    assert _C.crc32(data, start, base) == zlib.crc32(data, start)


@pytest.mark.parametrize("base", [False, True])
def test_crc32_of_every_length(base):
    data = np.random.default_rng(0).bytes(300)
    assert all(_C.crc32(data[:n], 0, base) == zlib.crc32(data[:n]) for n in range(300))
