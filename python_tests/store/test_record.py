import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from workers import SPEC, rows_of

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


@pytest.mark.parametrize("bit", [0, 7])
@given(at=st.integers(0, 64 + SPEC.row_bytes - 1))
def test_no_flipped_bit_passes(at, bit):
    users, versions, times = (np.array([x]) for x in (12, 3, 99))
    (made,) = record.pack(SPEC, users, versions, times, rows_of([12], [99]).numpy())
    made[at] ^= 1 << bit
    with pytest.raises(record.RecordError, match="record of user 12"):
        record.check(SPEC, users, versions, made[:64].view(record.HEADER), made[None, 64:], np.arange(1))
