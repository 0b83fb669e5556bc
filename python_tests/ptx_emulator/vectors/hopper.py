"""Instructions of sm_90a: what each lane must get, by loops over elements as the manual draws their places.

Factors are small integers, whose sums are exact: what is fixed is which element lies where.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import chain

from .exact import BF16, F16, F32
from .vector import Rows, WarpSpec
from .warps import random_words, word_of

ROWS, COLUMNS, DEPTH = 64, 16, 16
B_TILE = 8192  # bytes behind A
Place = Callable[[int, int], int]  # byte of the element of (row of A or column of B, k)


def matrices() -> Iterator[WarpSpec]:
    """Lane i names the address of row i of the matrices, and reads row i."""
    rows = random_words(11, 4)
    for count in (1, 2, 4):
        for transposed in (False, True):
            halves = [[[0] * 8 for _ in range(8)] for _ in range(count)]
            for matrix in range(count):
                for lane in range(32):
                    for i in (0, 1):
                        row, column = lane // 4, lane % 4 * 2 + i
                        value = rows[lane][matrix] >> 16 * i & 0xFFFF
                        halves[matrix][column if transposed else row][row if transposed else column] = value
            results: Rows = []
            for lane in range(32):
                line = halves[lane // 8][lane % 8] if lane < 8 * count else [0] * 8
                results.append([line[2 * i] | line[2 * i + 1] << 16 for i in range(4)])
            opcode = f"stmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
            sources = ", ".join(f"%i{n}" for n in range(count))
            body = (
                ".shared .align 16 .b8 tile[512]; mov.u32 %r0, tile; shl.b32 %r1, %thread, 4; add.u32 %r0, %r0, %r1;\n"
                "mov.u32 %r2, 0; st.shared.v4.b32 [%r0], {%r2, %r2, %r2, %r2}; bar.sync 0;\n"
                f"{opcode} [%r0], {{{sources}}};\n"
                "bar.sync 0; ld.shared.v4.b32 {%o0, %o1, %o2, %o3}, [%r0];"
            )
            yield WarpSpec(opcode, body, ["b32"] * 4, ["b32"] * 4, rows, results, "90a")


def barriers() -> Iterator[WarpSpec]:
    body = (
        "elect.sync _|%p0, -1; vote.sync.ballot.b32 %r0, %p0, -1; popc.b32 %o0, %r0;\n"
        "mov.u32 %o1, 0; setp.lt.u32 %p1, %i0, 5; @%p1 elect.sync _|%p0, 31; and.pred %p0, %p0, %p1;\n"
        "vote.sync.ballot.b32 %r0, %p0, -1; popc.b32 %o1, %r0;"
    )
    lanes = [[lane] for lane in range(32)]
    yield WarpSpec("elect.sync", body, ["u32"], ["u32"] * 2, lanes, [[1, 1]] * 32, "90a")

    flag = "mbarrier.test_wait.parity.shared.b64 %p0, [%r0], {parity}; selp.u32 %o{n}, 1, 0, %p0; bar.sync 0;\n"
    phases = ".shared .align 8 .b8 barrier[8]; mov.u32 %r0, barrier; setp.eq.u32 %p1, %thread, 0;\n"
    phases += "@%p1 mbarrier.init.shared.b64 [%r0], 33; bar.sync 0;\n"
    phases += flag.format(parity=0, n=0) + flag.format(parity=1, n=1)
    phases += ".reg .b64 %state; mbarrier.arrive.shared.b64 %state, [%r0]; bar.sync 0;\n" + flag.format(parity=0, n=2)
    phases += "@%p1 mbarrier.arrive.shared.b64 %state, [%r0]; bar.sync 0;\n"
    phases += flag.format(parity=0, n=3) + flag.format(parity=1, n=4)
    yield WarpSpec("mbarrier phases", phases, ["u32"], ["u32"] * 5, lanes, [[0, 1, 0, 1, 0]] * 32, "90a")

    rows = random_words(13, 2)  # as 64-bit words in memory, of which 512 bytes come by one copy
    copy = (
        ".shared .align 8 .b8 barrier[8]; .shared .align 128 .b8 tile[512]; mov.u32 %r0, barrier; mov.u32 %r1, tile;\n"
        "setp.eq.u32 %p1, %thread, 0; @!%p1 bra MADE;\n"
        "mbarrier.init.shared.b64 [%r0], 1; fence.mbarrier_init.release.cluster;\n"
        "mbarrier.arrive.expect_tx.shared.b64 _, [%r0], 512;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%from], 512, [%r0];\n"
        "MADE: bar.sync 0;\n"
        "WAIT: mbarrier.try_wait.parity.shared.b64 %p0, [%r0], 0; @!%p0 bra WAIT;\n"
        "xor.b32 %r2, %thread, 31; shl.b32 %r2, %r2, 4; add.u32 %r1, %r1, %r2;\n"
        "ld.shared.u32 %o0, [%r1]; ld.shared.u32 %o1, [%r1+8];"
    )
    yield WarpSpec("cp.async.bulk", copy, ["b32"] * 2, ["b32"] * 2, rows, rows[::-1], "90a")


def _place(mn_major: bool, swizzle: int, leading: int, stride: int) -> Place:
    """Lines of `swizzle` bytes in groups of eight, or 8 x 16-byte core matrices without one."""

    def place(row: int, k: int) -> int:
        along, across = (row, k) if mn_major else (k, row)  # along a line; from line to line
        if swizzle == 0:
            chunk, byte = divmod(along * 2, 16)
            if mn_major:
                return across // 8 * leading + chunk * stride + across % 8 * 16 + byte
            return across // 8 * stride + chunk * leading + across % 8 * 16 + byte
        line, byte = divmod(along * 2, swizzle)
        linear = line * leading + across // 8 * stride + across % 8 * swizzle + byte
        # Of a line's 16-byte pieces, number p of line l lies where p xor l would: lines of 32 bytes share four by four
        # a 128-byte row of banks, those of 64 two by two.
        group = linear // 128 % (swizzle // 16)
        return linear ^ group * 16

    return place


def _descriptor(start: str, swizzle: int, leading: int, stride: int) -> str:
    """PTX that makes %d<start> from the address in %<start>."""
    code = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    constant = code << 62 | stride >> 4 << 32 | leading >> 4 << 16
    return (
        f".reg .b64 %d{start}; .reg .b32 %low{start}; and.b32 %low{start}, %{start}, 0x3ffff;\n"
        f"shr.u32 %low{start}, %low{start}, 4; cvt.u64.u32 %d{start}, %low{start};\n"
        f"or.b64 %d{start}, %d{start}, {constant:#x};\n"
    )


def _matrix(source: random.Random, rows: int) -> Rows:
    return [[source.randrange(-8, 9) for _ in range(DEPTH)] for _ in range(rows)]


def _pairs(matrix: Rows, place: Place, mn_major: bool, format_) -> list[list[int]]:
    """Address and word of every two elements that lie side by side."""
    found = []
    for row in range(0, len(matrix), 2 if mn_major else 1):
        for k in range(0, DEPTH, 1 if mn_major else 2):
            other = matrix[row + 1][k] if mn_major else matrix[row][k + 1]
            found.append([place(row, k), word_of([matrix[row][k], other], format_)])
    return found


def products() -> Iterator[WarpSpec]:
    for kind, format_ in (("bf16", BF16), ("f16", F16)):
        for swizzle in (0, 32, 64, 128) if kind == "bf16" else (128,):
            for mn_major in (False, True):
                yield _product(kind, format_, swizzle, mn_major, a_in_registers=False)
        yield _product(kind, format_, 128, False, a_in_registers=True)


def _product(kind: str, format_, swizzle: int, mn_major: bool, a_in_registers: bool) -> WarpSpec:
    source = random.Random(swizzle + mn_major)
    a, b = _matrix(source, ROWS), _matrix(source, COLUMNS)
    # Distances in bytes. Swizzled along k, the leading one is not used.
    if swizzle == 0:
        leading, stride = (1024, 128) if mn_major else (128, 256)
    else:
        leading, stride = (2 * 8 * swizzle, 8 * swizzle) if mn_major else (16, 8 * swizzle)
    place = _place(mn_major, swizzle, leading, stride)
    pairs_a = [] if a_in_registers else _pairs(a, place, mn_major, format_)
    pairs_b = [[B_TILE + address, word] for address, word in _pairs(b, place, mn_major, format_)]
    rows, results = [], []
    for thread in range(128):
        warp, group, lane = thread // 32, thread % 32 // 4, thread % 4
        row = [*chain.from_iterable(pairs_a[4 * thread : 4 * thread + 4]), *pairs_b[thread]]
        if a_in_registers:
            for part in range(4):
                m, k = 16 * warp + group + 8 * (part % 2), 2 * lane + 8 * (part // 2)
                row.append(word_of([a[m][k], a[m][k + 1]], format_))
        rows.append(row)
        result = []
        for i in range(COLUMNS // 2):
            m, n = 16 * warp + group + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * lane + i % 2
            result.append(word_of([sum(a[m][k] * b[n][k] for k in range(DEPTH))], F32))
        results.append(result)
    words = len(rows[0])
    stores = "".join(
        f"add.u32 %r1, %a, %i{n}; st.shared.b32 [%r1], %i{n + 1};\n" for n in range(0, words - 4 * a_in_registers, 2)
    )
    first = words - 4
    left = f"{{{', '.join(f'%i{n}' for n in range(first, words))}}}" if a_in_registers else "%da"
    majors = int(mn_major) if a_in_registers else f"{int(mn_major)}, {int(mn_major)}"
    opcode = f"wgmma.mma_async.sync.aligned.m64n{COLUMNS}k16.f32.{kind}.{kind}"
    body = (
        f".shared .align 1024 .b8 tile[{2 * B_TILE}]; .reg .b32 %a, %b; mov.u32 %a, tile; add.u32 %b, %a, {B_TILE};\n"
        f"{stores}fence.proxy.async; bar.sync 0;\n"
        f"{_descriptor('a', swizzle, leading, stride)}{_descriptor('b', swizzle, leading, stride)}"
        "setp.ne.u32 %p0, %thread, %thread; wgmma.fence.sync.aligned;\n"
        f"{opcode} {{{', '.join(f'%o{n}' for n in range(COLUMNS // 2))}}}, {left}, %db, %p0, 1, 1, {majors};\n"
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    )
    where = "A in registers" if a_in_registers else f"{'MN' if mn_major else 'K'}-major, {swizzle}B swizzle"
    name = f"wgmma.m64n{COLUMNS}k16.{kind} {where}"
    return WarpSpec(name, body, ["b32"] * words, ["f32"] * (COLUMNS // 2), rows, results, "90a")
