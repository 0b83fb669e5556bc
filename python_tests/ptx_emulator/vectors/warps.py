"""Instructions of a whole warp: what lane i of 32 must get, by loops over lanes as the manual draws them.

The factors of mma are small integers, whose sums are exact in every format: what is fixed here is which element lies
where, not how the tensor core rounds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from .exact import BF16, F16, F32
from .vector import Rows, WarpSpec

ALL = 0xFFFFFFFF


def random_words(seed: int, columns: int) -> Rows:
    source = random.Random(seed)
    return [[source.randrange(1 << 32) for _ in range(columns)] for _ in range(32)]


def shuffles() -> Iterator[WarpSpec]:
    def partner(mode: str, lane: int, amount: int, clamp: int) -> int:
        segment, bound = clamp >> 8 & 31, clamp & 31
        lowest = lane & segment
        highest = lowest | bound & ~segment & 31
        other = {
            "up": lane - amount,
            "down": lane + amount,
            "bfly": lane ^ amount,
            "idx": lowest | amount & ~segment & 31,
        }[mode]
        inside = other >= highest if mode == "up" else other <= highest
        return other if inside else -1

    for mode, clamp in (
        ("up", 0),
        ("down", 31),
        ("bfly", 31),
        ("idx", 31),
        ("up", 0x1800),
        ("down", 0x181F),
        ("idx", 0x181F),
        ("bfly", 0x100F),
    ):
        for amount in (1, 5, 16):
            rows = random_words(amount, 1)
            results = []
            for lane in range(32):
                other = partner(mode, lane, amount, clamp)
                results.append([rows[other if other >= 0 else lane][0], int(other >= 0)])
            body = f"shfl.sync.{mode}.b32 %o0|%p0, %i0, {amount}, {clamp:#x}, -1; selp.u32 %o1, 1, 0, %p0;"
            yield WarpSpec(f"shfl.sync.{mode} by {amount} in {clamp:#x}", body, ["b32"], ["b32", "u32"], rows, results)


def votes() -> Iterator[WarpSpec]:
    for name, flags in (("mixed", [i % 3 == 0 for i in range(32)]), ("all", [True] * 32), ("none", [False] * 32)):
        rows = [[int(flag)] for flag in flags]
        ballot = sum(int(flag) << i for i, flag in enumerate(flags))
        outcome = [int(all(flags)), int(any(flags)), int(len(set(flags)) == 1), ballot]
        body = "setp.ne.u32 %p0, %i0, 0;\n"
        for n, mode in enumerate(("all", "any", "uni")):
            body += f"vote.sync.{mode}.pred %p1, %p0, -1; selp.u32 %o{n}, 1, 0, %p1;\n"
        body += "vote.sync.ballot.b32 %o3, %p0, -1;"
        yield WarpSpec(f"vote.sync {name}", body, ["u32"], ["u32"] * 3 + ["b32"], rows, [outcome] * 32)
    rows = [[i % 5] for i in range(32)]
    results = [[sum(1 << j for j in range(32) if j % 5 == i % 5)] for i in range(32)]
    yield WarpSpec("match.any.sync.b32", "match.any.sync.b32 %o0, %i0, -1;", ["b32"], ["b32"], rows, results)
    body = "mov.u32 %o0, 0; setp.lt.u32 %p0, %i0, 3; @%p0 activemask.b32 %o0;"
    results = [[sum(1 << j for j in range(32) if j % 5 < 3) if i % 5 < 3 else 0] for i in range(32)]
    yield WarpSpec("activemask", body, ["u32"], ["b32"], rows, results)


def reductions() -> Iterator[WarpSpec]:
    def signed(value: int) -> int:
        return value - (1 << 32) if value >> 31 else value

    functions: dict[str, Callable[[list[int]], int]] = {
        "add.s32": sum,
        "add.u32": sum,
        "min.u32": min,
        "max.u32": max,
        "min.s32": lambda v: min(map(signed, v)),
        "max.s32": lambda v: max(map(signed, v)),
    }
    rows = random_words(3, 1)
    values = [row[0] for row in rows]
    for name, function in functions.items():
        opcode = f"redux.sync.{name}"
        results = [[function(values) & ALL]] * 32
        yield WarpSpec(opcode, f"{opcode} %o0, %i0, -1;", ["b32"], ["b32"], rows, results)
    both, either, odd = ALL, 0, 0
    for value in values:
        both, either, odd = both & value, either | value, odd ^ value
    for name, result in (("and", both), ("or", either), ("xor", odd)):
        opcode = f"redux.sync.{name}.b32"
        yield WarpSpec(opcode, f"{opcode} %o0, %i0, -1;", ["b32"], ["b32"], rows, [[result]] * 32)


def matrices() -> Iterator[WarpSpec]:
    """Lane i stores row i of the matrices, 16 bytes, and names its address."""
    rows = random_words(7, 4)
    halves = [[word >> shift & 0xFFFF for word in row for shift in (0, 16)] for row in rows]  # [32][8]
    for count in (1, 2, 4):
        for transposed in (False, True):
            results = []
            for lane in range(32):
                words = []
                for matrix in range(count):
                    row, column = lane // 4, lane % 4 * 2
                    pair = [
                        halves[8 * matrix + (column + i if transposed else row)][row if transposed else column + i]
                        for i in (0, 1)
                    ]
                    words.append(pair[0] | pair[1] << 16)
                results.append(words)
            trans = ".trans" if transposed else ""
            opcode = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16"
            targets = ", ".join(f"%o{n}" for n in range(count))
            body = (
                ".shared .align 16 .b8 tile[512]; mov.u32 %r0, tile; shl.b32 %r1, %thread, 4; add.u32 %r0, %r0, %r1;\n"
                "st.shared.v4.b32 [%r0], {%i0, %i1, %i2, %i3}; bar.sync 0;\n"
                f"{opcode} {{{targets}}}, [%r0];"
            )
            yield WarpSpec(opcode, body, ["b32"] * 4, ["b32"] * count, rows, results)


def products() -> Iterator[WarpSpec]:
    for kind, k, format_ in (
        ("bf16", 16, BF16),
        ("f16", 16, F16),
        ("bf16", 8, BF16),
        ("f16", 8, F16),
        ("tf32", 8, F32),
        ("tf32", 4, F32),
    ):
        source = random.Random(k)
        a = [[source.randrange(-8, 9) for _ in range(k)] for _ in range(16)]
        b = [[source.randrange(-8, 9) for _ in range(8)] for _ in range(k)]
        c = [[source.randrange(-100, 101) for _ in range(8)] for _ in range(16)]
        d = [[c[i][j] + sum(a[i][x] * b[x][j] for x in range(k)) for j in range(8)] for i in range(16)]
        per_word = 1 if kind == "tf32" else 2
        rows, results = [], []
        for lane in range(32):
            group, thread = lane // 4, lane % 4
            left, right = [], []
            for step in range(k // (4 * per_word)):
                columns = [4 * per_word * step + thread * per_word + i for i in range(per_word)]
                for row in (group, group + 8):
                    left.append(word_of([a[row][x] for x in columns], format_))
                right.append(word_of([b[x][group] for x in columns], format_))
            places = [(group + 8 * (i // 2), 2 * thread + i % 2) for i in range(4)]
            rows.append(left + right + [word_of([c[i][j]], F32) for i, j in places])
            results.append([word_of([d[i][j]], F32) for i, j in places])
        opcode = f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32"
        split = len(left), len(left) + len(right)
        names = [f"%i{n}" for n in range(split[1] + 4)]
        operands = [", ".join(part) for part in (names[: split[0]], names[split[0] : split[1]], names[split[1] :])]
        body = f"{opcode} {{%o0, %o1, %o2, %o3}}, " + ", ".join(f"{{{part}}}" for part in operands) + ";"
        yield WarpSpec(opcode, body, ["b32"] * len(names), ["b32"] * 4, rows, results)


def word_of(values: list[int], format_) -> int:
    from fractions import Fraction

    word = 0
    for i, value in enumerate(values):
        word |= format_.round(Fraction(value)) << i * format_.bits
    return word
