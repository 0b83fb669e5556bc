"""What nvcc made of the kernels is what the record says (tools/kernel_manifest.py), and nothing spills."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import kernel_manifest
import occupancy


@pytest.fixture(scope="module")
def record():
    return kernel_manifest.load_record()


@pytest.fixture(scope="module")
def manifest():
    try:
        return kernel_manifest.read(kernel_manifest.library())
    except kernel_manifest.Unavailable as reason:
        pytest.skip(str(reason))


def test_no_spills_no_doubles_nothing_lost(manifest, record):
    problems = kernel_manifest.broken_rules(manifest, record)
    assert not problems, "\n".join(problems)


def test_every_figure(manifest, record):
    if manifest["nvcc"] != record["nvcc"]:
        pytest.skip(f"the record is nvcc {record['nvcc']}'s, here is {manifest['nvcc']}: only the rules were checked")
    changed = kernel_manifest.differences(manifest, record)
    assert not changed, "\n".join([*changed, "if that was meant: make manifest"])


GOOD = {
    "registers": 64, "shared": 512, "stack": 0, "local": 0, "bounds": 128, "dynamic": 0, "threads": 128,
    "blocks": {"8.0": 8}, "code": {"HMMA": 8, "LDGSTS": 4},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stack": 16}, "stack is 16 bytes"),
        ({"code": {"HMMA": 8, "LDGSTS": 4, "LDL": 2}}, "2 LDL instructions"),
        ({"code": {"HMMA": 8, "LDGSTS": 4, "DFMA": 1}}, "1 DFMA instructions"),
        ({"code": {"LDGSTS": 4}}, "lost its HMMA"),
        ({"code": {"HMMA": 8, "LDGSTS": 4, "HGMMA": 4}}, "tiles begin 512 bytes into shared memory"),
        ({"bounds": None}, "no launch bounds"),
        ({"threads": None}, "no launch of it"),
        ({"threads": 256}, "launched with 256 threads, built for 128"),
        ({"blocks": {"8.0": 8, "8.9": 0}}, "does not fit on 8.9"),
    ],
)
def test_the_rules_can_fail(change, message):
    kernel = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    record = {"sm_80": {"k": GOOD}}
    assert not kernel_manifest.broken_rules(record, record)
    assert message in "\n".join(kernel_manifest.broken_rules({"sm_80": {"k": kernel}}, record))
    assert kernel_manifest.differences({"sm_80": {"k": kernel}}, record)


def test_a_kernel_that_came_or_went_is_named():
    old, new = {"sm_80": {"old": GOOD}}, {"sm_80": {"new": GOOD}}
    assert kernel_manifest.broken_rules(new, old) == [
        "sm_80 new: is not in the record",
        "sm_80 old: is in the record only",
    ]


# From cuda_occupancy.h (13.0), which agrees with tools/occupancy.py on a grid of 18,392 such cases.
@pytest.mark.parametrize(
    ("capability", "threads", "registers", "shared", "blocks"),
    [
        ("8.0", 32, 16, 0, 32),
        ("8.0", 128, 107, 42000, 3),
        ("8.0", 992, 68, 0, 0),
        ("8.6", 32, 16, 0, 16),
        ("8.9", 128, 55, 0, 9),
        ("8.9", 416, 42, 14000, 3),
        ("9.0", 128, 211, 0, 2),
        ("9.0", 320, 94, 63000, 2),
        ("9.0", 608, 55, 98000, 1),
        ("9.0", 992, 68, 0, 0),
    ],
)
def test_occupancy(capability, threads, registers, shared, blocks):
    assert occupancy.blocks_per_sm(capability, threads, registers, shared) == blocks
