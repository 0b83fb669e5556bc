"""What vectors of one instruction do not show: control flow, asynchronous copies, divergence, what is not known."""

import numpy as np
import pytest

from python_tests.ptx_emulator import EmulationError, UnsupportedPtx
from python_tests.ptx_emulator.vectors.micro import emulate, kernel

LANES = np.arange(32, dtype=np.uint64)[:, None]


def run(body: str, rows: np.ndarray = LANES, seed: int = 0, inputs=("u32",), outputs=("u32",)) -> np.ndarray:
    return emulate(kernel("k", body, list(inputs), list(outputs)), "k", rows, len(outputs), seed)


def kinds(body: str, rows: np.ndarray = LANES) -> set[str]:
    with pytest.raises(EmulationError) as caught:
        run(body, rows)
    return {problem.kind for problem in caught.value.problems}


@pytest.mark.parametrize("collective", ["bar.sync 0;", "bar.warp.sync -1;", "shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;"])
def test_lanes_meet_again_behind_a_branch_that_lies_further_down(collective):
    body = f"""
        mov.u32 %r0, %i0; mov.u32 %r1, 5; setp.lt.u32 %p0, %i0, 7;
        @%p0 bra FAR;
        JOIN: {collective}
        add.u32 %o0, %r0, 1; bra END;
        FAR: add.u32 %r0, %r0, 100; bra JOIN;
        END: mov.u32 %r2, 0;"""
    np.testing.assert_array_equal(run(body)[:, 0], np.where(LANES < 7, LANES + 101, LANES + 1)[:, 0])


def test_loops_of_different_length():
    body = """
        mov.u32 %o0, 0; mov.u32 %r0, %i0;
        LOOP: setp.eq.u32 %p0, %r0, 0; @%p0 bra END;
        add.u32 %o0, %o0, %r0; sub.u32 %r0, %r0, 1; bra LOOP;
        END: mov.u32 %r1, 0;"""
    np.testing.assert_array_equal(run(body)[:, 0], [n * (n + 1) // 2 for n in range(32)])


def test_branch_table():
    body = """
        rem.u32 %r0, %i0, 3;
        TABLE: .branchtargets A, B, C;
        brx.idx %r0, TABLE;
        A: mov.u32 %o0, 10; bra END;
        B: mov.u32 %o0, 20; bra END;
        C: mov.u32 %o0, 30;
        END: mov.u32 %r1, 0;"""
    np.testing.assert_array_equal(run(body)[:, 0], 10 * (np.arange(32) % 3 + 1))


def test_scoped_labels_and_registers_of_inline_assembly():
    block = """{ .reg .u32 t; .reg .pred q; add.u32 t, %r0, 1; setp.gt.u32 q, t, 9; @q bra DONE;
        add.u32 t, t, 50; DONE: mov.u32 %r0, t; }"""
    found = run(f"mov.u32 %r0, %i0; {block} {block} mov.u32 %o0, %r0;")
    once = lambda x: x + 1 if x + 1 > 9 else x + 51  # noqa: E731
    np.testing.assert_array_equal(found[:, 0], [once(once(x)) for x in range(32)])


@pytest.mark.parametrize("count", [0, 3, 16])
def test_asynchronous_copy_fills_with_zeros(count):
    body = f"""
        .shared .align 16 .b8 tile[512];
        mov.u32 %r0, tile; shl.b32 %r1, %thread, 4; add.u32 %r0, %r0, %r1; mov.u32 %r2, {count};
        ld.param.u64 %from, [from]; mul.wide.u32 %row, %thread, 16; add.u64 %from, %from, %row;
        cp.async.cg.shared.global [%r0], [%from], 16, %r2; cp.async.wait_all;
        ld.shared.v2.u64 {{%o0, %o1}}, [%r0];"""
    rows = np.random.default_rng(0).integers(0, 1 << 63, (32, 2)).astype(np.uint64)
    expected = rows.copy()
    expected.view(np.uint8).reshape(32, 16)[:, count:] = 0
    found = run(body, rows, inputs=("u64", "u64"), outputs=("u64", "u64"))
    np.testing.assert_array_equal(found, expected)


def test_copy_of_nothing_may_point_anywhere():
    body = """
        .shared .align 16 .b8 tile[512];
        mov.u32 %r0, tile; shl.b32 %r1, %thread, 4; add.u32 %r0, %r0, %r1; mov.u32 %r2, 0; mov.u64 %word, 0;
        cp.async.cg.shared.global [%r0], [%word], 16, %r2; cp.async.wait_all; ld.shared.u32 %o0, [%r0];"""
    assert (run(body) == 0).all()


def test_atomics_give_every_thread_another_old_value():
    body = """
        .shared .align 4 .b8 counter[4];
        mov.u32 %r0, counter; setp.eq.u32 %p0, %i0, 0; mov.u32 %r1, 0; @%p0 st.shared.u32 [%r0], %r1; bar.sync 0;
        atom.shared.add.u32 %o0, [%r0], 1;"""
    assert (run(body)[:, 0] == np.arange(32)).all()
    shuffled = run(body, seed=3)[:, 0]
    assert (np.sort(shuffled) == np.arange(32)).all() and (shuffled != np.arange(32)).any()


def test_local_memory_and_generic_addresses():
    body = """
        .local .align 8 .b8 frame[16]; .shared .align 4 .b8 box[128];
        .reg .b64 %g<4>;
        mov.u64 %g0, frame; cvta.local.u64 %g1, %g0; st.local.u32 [%g0+4], %i0; ld.u32 %r0, [%g1+4];
        mov.u64 %g2, box; cvta.shared.u64 %g3, %g2; mul.wide.u32 %word, %thread, 4; add.u64 %g3, %g3, %word;
        st.u32 [%g3], %r0; ld.u32 %o0, [%g3];"""
    np.testing.assert_array_equal(run(body), LANES)


def test_shuffle_among_some_threads():
    body = "mov.u32 %o0, 77; setp.lt.u32 %p0, %i0, 4; @%p0 shfl.sync.bfly.b32 %o0, %i0, 1, 31, 15;"
    np.testing.assert_array_equal(run(body)[:, 0], [1, 0, 3, 2] + [77] * 28)


def test_shuffle_that_waits_for_threads_elsewhere():
    body = "mov.u32 %o0, 0; setp.lt.u32 %p0, %i0, 4; @%p0 shfl.sync.bfly.b32 %o0, %i0, 1, 31, -1; bar.sync 0;"
    assert kinds(body) == {"divergence"}


def test_shuffle_of_a_thread_that_the_mask_does_not_name():
    assert "divergence" in kinds("shfl.sync.bfly.b32 %o0, %i0, 1, 31, 15;")


def test_barrier_while_other_threads_of_the_warp_exit():
    assert kinds(
        "mov.u32 %o0, 0; setp.lt.u32 %p0, %i0, 4; @%p0 bra OUT; bar.sync 0; bra END; OUT: ret; END: mov.u32 %o0, 1;"
    ) == {"divergence"}


def test_reading_beyond_a_shared_variable():
    body = """
        .shared .align 4 .b8 box[128];
        mov.u32 %r0, box; shl.b32 %r1, %i0, 2; add.u32 %r0, %r0, %r1;
        st.shared.u32 [%r0], %r1; ld.shared.u32 %o0, [%r0+4];"""
    assert kinds(body) == {"out of bounds"}


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("tex.1d.v4.f32.s32 {%r0, %r1, %r2, %r3}, [t, {%i0}];", "tex.1d"),
        ("mbarrier.pending_count.b64 %r0, %rd0;", "mbarrier.pending_count"),
        ("red.global.add.f32 [%to], %r0;", "float atomics"),
        ("mov.u32 %o0, %clock;", "%clock"),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%r0}, {%r1}, {%r2}, {%r3};", "m8n8k4"),
    ],
)
def test_what_is_not_known_is_named(body, name):
    with pytest.raises(UnsupportedPtx, match=name):
        run(body)


def test_an_endless_loop_is_given_up(monkeypatch):
    monkeypatch.setattr("python_tests.ptx_emulator.launch.MOST_WARP_INSTRUCTIONS", 100_000)
    assert kinds("LOOP: add.u32 %r0, %r0, 1; bra LOOP; mov.u32 %o0, 0;") == {"deadlock"}
