"""How many blocks of a kernel an SM holds at once, from the limits that NVIDIA documents per compute capability."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536  # per SM, in four partitions
REGISTERS_PER_WARP_UNIT = 256
SHARED_UNIT = 128
SHARED_RESERVED = 1024  # per block, the system's


@dataclass(frozen=True)
class Limits:
    warps: int
    blocks: int
    shared: int  # bytes per SM; a block gets at most SHARED_RESERVED less


LIMITS = {
    "8.0": Limits(warps=64, blocks=32, shared=164 * 1024),
    "8.6": Limits(warps=48, blocks=16, shared=100 * 1024),
    "8.9": Limits(warps=48, blocks=24, shared=100 * 1024),
    "9.0": Limits(warps=64, blocks=32, shared=228 * 1024),
}


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def blocks_per_sm(capability: str, threads: int, registers: int, shared: int) -> int:
    """`shared`: the block's own bytes, static and dynamic. 0: it does not fit at all."""
    limits = LIMITS[capability]
    warps = _round_up(threads, WARP) // WARP
    # Registers are given to whole warps of one partition.
    warps_by_registers = 4 * (REGISTERS // 4 // _round_up(max(registers, 1) * WARP, REGISTERS_PER_WARP_UNIT))
    by_shared = limits.shared // _round_up(shared + SHARED_RESERVED, SHARED_UNIT)
    return min(limits.blocks, limits.warps // warps, warps_by_registers // warps, by_shared)
