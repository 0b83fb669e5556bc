"""wgmma: descriptors of operands in shared memory, and the instructions of a warpgroup."""

from __future__ import annotations

import re

import numpy as np

from .accesses import Accesses
from .control import RESELECT, together
from .decode import Decoder, Run, handles, unsupported
from .formats import bf16_to_f64
from .parser import Immediate, Instruction, Operand, Vector
from .products import WARPGROUP, Product
from .tensor_map import swizzled

LANE = np.arange(32)
ROWS, DEPTH = 16, 16  # of a warp's part of A
_SWIZZLE = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes, by bits 62 and 63


def executing_warps(m) -> np.ndarray:
    """Their numbers in the wave. The caller has seen to it that warps execute as one."""
    return np.unique(m.executing() // 32)


@handles("wgmma")
def _wgmma(d: Decoder, ins: Instruction) -> Run:
    kind = ins.modifiers[0]
    if kind == "mma_async":
        return _multiply(d, ins)
    if kind == "fence":
        action = lambda m, warps: m.products.fence(warps)  # noqa: E731
    elif kind == "commit_group":
        action = lambda m, warps: m.products.commit(warps)  # noqa: E731
    elif kind == "wait_group":
        return _wait(d, ins)
    else:
        raise unsupported(ins)

    def run(m) -> int | None:
        if not together(m, ins):
            return RESELECT
        action(m, executing_warps(m))
        return None

    return run


def _wait(d: Decoder, ins: Instruction) -> Run:
    allowed = ins.operands[0]
    if not isinstance(allowed, Immediate):
        raise unsupported(ins)
    count = allowed.value

    def run(m) -> int | None:
        if not together(m, ins):
            return RESELECT
        late = m.products.wait(executing_warps(m), count)
        if len(late) == 0:
            return None
        result = m.leave(ins.index + 1)
        lanes = (late[:, None] * 32 + LANE).reshape(-1)
        m.pcs[lanes] = ins.index
        m.ready[lanes] = False
        return result

    return run


class _Layout:
    """Where the 16-byte pieces of 16 of k of an operand lie, by its descriptor and the manual's canonical layouts.

    K-major: a piece is 8 of k of one row; MN-major: 8 rows at one k.
    """

    def __init__(self, mn_major: bool, first: int, rows: int):
        """Rows `first` to `first + rows` of what the descriptor describes."""
        self.mn_major = mn_major
        if mn_major:
            pieces, k = np.meshgrid(np.arange(first // 8, (first + rows) // 8), np.arange(DEPTH), indexing="ij")
            self.outer, self.k = pieces.reshape(-1), k.reshape(-1)  # a piece's rows, in eights
        else:
            row, piece = np.meshgrid(np.arange(first, first + rows), np.arange(DEPTH // 8), indexing="ij")
            self.outer, self.k = row.reshape(-1), piece.reshape(-1)  # k in eights
        self.shape = (rows // 8, DEPTH, 8) if mn_major else (rows, DEPTH)

    def addresses(self, ins, descriptor: int) -> np.ndarray:
        start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        if descriptor & (0x3FFF_C000_C000_C000 & ~(0x3FFF << 32)):
            raise unsupported(ins, f"descriptor {descriptor:#x} with a base offset or reserved bits")
        width = _SWIZZLE[descriptor >> 62]
        eight, within = self.outer // 8, self.outer % 8
        if self.mn_major:
            if width:
                per_line = width // 16
                offset = self.outer % per_line * 16 + self.outer // per_line * leading
                offset += self.k % 8 * width + self.k // 8 * stride
            else:
                offset = self.outer * stride + self.k % 8 * 16 + self.k // 8 * leading
        elif width:
            offset = within * width + eight * stride + self.k * 16
        else:
            offset = within * 16 + eight * stride + self.k * leading
        return swizzled(start + offset, width)

    def matrix(self, pieces: np.ndarray) -> np.ndarray:
        """[..., rows, 16 of k] from the pieces' elements."""
        values = pieces.reshape(*pieces.shape[:-2], *self.shape)
        if not self.mn_major:
            return values
        return np.moveaxis(values, -1, -2).reshape(*pieces.shape[:-2], -1, DEPTH)


def _fragment_of(values: np.ndarray) -> np.ndarray:
    """A [warps, 16, 16] from four registers [warps, 4, 32] of pairs."""
    pairs = values.view(np.uint16).reshape(-1, 4, 32, 2)
    register, lane, half = np.meshgrid(np.arange(4), LANE, np.arange(2), indexing="ij")
    a = np.empty((len(pairs), ROWS, DEPTH), np.uint16)
    a[:, lane // 4 + 8 * (register % 2), lane % 4 * 2 + half + 8 * (register // 2)] = pairs
    return a


def _scale(operand: Operand) -> int:
    assert isinstance(operand, Immediate) and abs(operand.value) == 1
    return operand.value


def _multiply(d: Decoder, ins: Instruction) -> Run:
    shape = re.search(r"\.m64n(\d+)k16\.(\w+)\.(\w+)\.(\w+)", "." + ".".join(ins.modifiers))
    if shape is None or shape[2] != "f32" or shape[3] != shape[4] or shape[3] not in ("bf16", "f16"):
        raise unsupported(ins)
    columns = int(shape[1])
    numbers = bf16_to_f64 if shape[3] == "bf16" else lambda bits: bits.view(np.float16).astype(np.float64)
    sums = tuple(d.write(item, "b32") for item in d.items(ins.operands[0]))
    left, right, scale_d, *immediate = ins.operands[1:]
    in_registers = isinstance(left, Vector)
    fragment = tuple(d.read(item, "b32") for item in left.items) if isinstance(left, Vector) else ()
    descriptor_a = None if in_registers else d.read(left, "b64")
    descriptor_b = d.read(right, "b64")
    accumulate, negated = d.predicate(scale_d)
    sign = _scale(immediate[0]) * _scale(immediate[1])
    majors = [isinstance(operand, Immediate) and operand.value == 1 for operand in immediate[2:]]
    if len(sums) != columns // 2 or len(majors) != (1 if in_registers else 2) or (fragment and len(fragment) != 4):
        raise unsupported(ins, "operand count")
    layouts_a = [_Layout(majors[0], ROWS * quarter, ROWS) for quarter in range(WARPGROUP)]
    layout_b = _Layout(majors[-1], 0, columns)
    register = np.arange(columns // 2)[:, None]
    place = (LANE // 4 + register // 2 % 2 * 8) * columns + register // 4 * 8 + LANE % 4 * 2 + register % 2

    def uniform(m, slot: int) -> np.ndarray:
        """One value for each executing warp."""
        rows = m.pick(np.broadcast_to(m.r[slot], (m.slice.size,))).reshape(-1, 32)
        if (rows != rows[:, :1]).any():
            m.report("divergence", ins, "operands that differ between threads of a warp", 0)
        return rows[:, 0]

    def load(m, warps: np.ndarray, layouts: list[_Layout], slot: int) -> tuple[np.ndarray, np.ndarray]:
        """Matrices, and the places that they came from, by warp."""
        known: dict[tuple[int, int], np.ndarray] = {}
        addresses = []
        for warp, descriptor in zip(warps.tolist(), uniform(m, slot).tolist(), strict=True):
            quarter = warp % m.warps_per_block % WARPGROUP % len(layouts)
            key = quarter, descriptor
            if key not in known:
                known[key] = layouts[quarter].addresses(ins, descriptor)
            addresses.append(known[key])
        flat = np.concatenate(addresses)
        accesses = Accesses(m, np.repeat(warps * 32, len(addresses[0])))
        offsets, sound = accesses.unit.shared_offsets(ins, flat, 16, "read")
        if not sound:
            raise m.launch.findings.fatal("out of bounds", ins.text, "operand in shared memory")
        values = accesses.unit.read_shared(ins, flat, 16, generic=False)
        pieces = np.ascontiguousarray(values).view(np.uint16).reshape(len(warps), -1, 8)
        return layouts[0].matrix(pieces), (offsets >> 4).reshape(len(warps), -1)

    def run(m) -> int | None:
        if not together(m, ins):
            return RESELECT
        warps = executing_warps(m)
        b, places = load(m, warps, [layout_b], descriptor_b)
        held = np.empty((len(warps), 0, 32), np.uint32)
        if descriptor_a is None:
            held = m.products.fragments(warps, fragment)
            a = _fragment_of(held)
        else:
            a, places_a = load(m, warps, layouts_a, descriptor_a)
            places = np.concatenate([places, places_a], axis=1)
        used = uniform(m, accumulate) != negated
        before = m.products.accumulators(ins, warps, sums, used, fragment)
        product = sign * np.matmul(numbers(a), np.swapaxes(numbers(b), 1, 2))
        total = product.reshape(len(warps), -1)[:, place] + np.where(used[:, None, None], before, 0)
        values = total.astype(np.float32).view(np.uint32)
        m.products.issue(
            [
                Product(ins, warp, sums, values[i], np.unique(places[i]), fragment, held[i])
                for i, warp in enumerate(warps.tolist())
            ]
        )
        return None

    return run
