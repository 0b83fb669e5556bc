"""sm_90's instructions beyond their vectors: who waits for whom, clusters of one block, what is not known."""

import numpy as np
import pytest

from python_tests.ptx_emulator import EmulationError, UnsupportedPtx
from python_tests.ptx_emulator.vectors.micro import emulate, kernel

THREADS = np.arange(256, dtype=np.uint64)[:, None]
WARP = "shr.u32 %r7, %i0, 5;\n"
# Warp 0 writes a word for each lane, and what stands for `wait` comes before warp 1 reads it.
HANDOVER = """
    .shared .align 8 .b8 barrier[8]; .shared .align 4 .b8 box[128]; .reg .b64 %state;
    mov.u32 %r0, barrier; mov.u32 %r1, box; and.b32 %r2, %i0, 31; shl.b32 %r3, %r2, 2; add.u32 %r1, %r1, %r3;
    mov.u32 %o0, 0; setp.eq.u32 %p1, %i0, 0; @%p1 mbarrier.init.shared.b64 [%r0], 32; bar.sync 0;
    setp.eq.u32 %p2, %r7, 0; @%p2 st.shared.u32 [%r1], %i0; @%p2 mbarrier.arrive.shared.b64 _, [%r0];
    setp.eq.u32 %p3, %r7, 1; @!%p3 bra END;
    WAIT: {wait}
    ld.shared.u32 %o0, [%r1];
    END: mov.u32 %r4, 0;"""
WAIT = "mbarrier.try_wait.parity.shared.b64 %p0, [%r0], 0; @!%p0 bra WAIT;"


def run(body: str, threads: int = 64, seed: int = 0) -> np.ndarray:
    return emulate(kernel("k", WARP + body, ["u32"], ["u32"]), "k", THREADS[:threads], 1, seed)[:, 0]


def kinds(body: str, threads: int = 64, seed: int = 0) -> set[str]:
    with pytest.raises(EmulationError) as caught:
        run(body, threads, seed)
    return {problem.kind for problem in caught.value.problems}


@pytest.mark.parametrize("seed", range(4))
class TestBarriers:
    def test_handover(self, seed):
        np.testing.assert_array_equal(run(HANDOVER.format(wait=WAIT), seed=seed), [0] * 32 + list(range(32)))

    def test_handover_without_a_wait(self, seed):
        assert kinds(HANDOVER.format(wait=""), seed=seed) & {"race", "uninitialised read"}

    def test_one_try_is_no_wait(self, seed):
        once = HANDOVER.format(wait="mbarrier.try_wait.parity.shared.b64 %p0, [%r0], 1;")  # the phase before the first
        assert kinds(once, seed=seed) & {"race", "uninitialised read"}

    def test_an_arrival_too_many(self, seed):
        body = HANDOVER.replace("@%p2 mbarrier.arrive.shared.b64 _, [%r0];", "mbarrier.arrive.shared.b64 _, [%r0], 33;")
        assert "mbarrier" in kinds(body.format(wait=""), seed=seed)

    def test_nobody_arrives(self, seed):
        body = HANDOVER.replace("@%p2 mbarrier.arrive.shared.b64 _, [%r0];", "")
        assert kinds(body.format(wait=WAIT), seed=seed) == {"deadlock"}

    def test_a_barrier_that_was_not_made(self, seed):
        body = HANDOVER.replace("@%p1 mbarrier.init.shared.b64 [%r0], 32;", "")
        assert kinds(body.format(wait=WAIT), seed=seed) & {"mbarrier", "uninitialised read"}

    def test_cluster_barrier(self, seed):
        body = HANDOVER.replace("@%p2 mbarrier.arrive.shared.b64 _, [%r0];", "barrier.cluster.arrive.aligned;")
        good = body.format(wait="").replace("setp.eq.u32 %p3", "barrier.cluster.wait.aligned; setp.eq.u32 %p3")
        np.testing.assert_array_equal(run(good, seed=seed), [0] * 32 + list(range(32)))
        assert kinds(body.format(wait=""), seed=seed) & {"race", "uninitialised read"}


def test_a_cluster_has_one_block():
    body = """
        .shared .align 8 .b8 box[8]; mov.u32 %r0, box; mov.u32 %r1, %cluster_ctarank; mov.u32 %r2, %cluster_nctarank;
        mapa.shared::cluster.u32 %r3, %r0, %r1; sub.u32 %r3, %r3, %r0; mov.u32 %r4, %clusterid.x;
        griddepcontrol.wait; griddepcontrol.launch_dependents;
        add.u32 %o0, %r1, %r3; add.u32 %o0, %o0, %r4; mad.lo.u32 %o0, %r2, 10, %o0;"""
    assert (run(body) == 10).all()
    assert kinds("mov.u32 %r0, 0; mapa.shared::cluster.u32 %o0, %r0, 1;") == {"out of bounds"}


@pytest.mark.parametrize("seed", range(3))
def test_warps_of_a_warpgroup_that_leave_a_product_out(seed):
    body = """
        .reg .b64 %d; .reg .b32 %a<4>; .shared .align 128 .b8 tile[4096];
        mov.u32 %r0, tile; shl.b32 %r1, %i0, 4; add.u32 %r0, %r0, %r1; mov.u32 %r2, 0;
        st.shared.v4.b32 [%r0], {%r2, %r2, %r2, %r2}; fence.proxy.async; bar.sync 0;
        setp.lt.u32 %p0, %r7, WARPS; @!%p0 bra END; mov.b64 %d, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%a0, %a1, %a2, %a3}, {%r0, %r1, %r2, %r3}, %d, %p0, 1, 1, 0;
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        END: mov.u32 %o0, 0;"""
    assert (run(body.replace("WARPS", "4"), 128, seed) == 0).all()
    assert kinds(body.replace("WARPS", "3"), 128, seed) == {"deadlock"}


@pytest.mark.parametrize("seed", range(3))
def test_registers_of_a_product_under_way(seed):
    body = """
        .reg .b64 %d; .reg .b32 %a<4>; .shared .align 128 .b8 tile[4096];
        mov.u32 %r0, tile; shl.b32 %r1, %i0, 4; add.u32 %r0, %r0, %r1; mov.u32 %r2, 0;
        st.shared.v4.b32 [%r0], {%r2, %r2, %r2, %r2}; fence.proxy.async; bar.sync 0;
        setp.eq.u32 %p0, 0, 0; mov.b64 %d, 0; mov.u32 %r3, 7; mov.u32 %r0, 0; mov.u32 %r1, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%a0, %a1, %a2, %a3}, {%r0, %r1, %r2, %r3}, %d, 0, 1, 1, 0;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%a0, %a1, %a2, %a3}, {%r0, %r1, %r2, %r3}, %d, %p0, 1, 1, 0;
        wgmma.commit_group.sync.aligned; EARLY
        wgmma.wait_group.sync.aligned 0; LATE"""
    after = "mov.u32 %o0, %r3; mov.u32 %r3, 8;"
    assert (run(body.replace("EARLY", "").replace("LATE", after), 128, seed) == 7).all()
    assert (run(body.replace("EARLY", "mov.u32 %o0, %r3;").replace("LATE", ""), 128, seed) != 7).all()
    assert kinds(body.replace("EARLY", "mov.u32 %r3, 8;").replace("LATE", after), 128, seed) == {"wgmma"}


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("cp.async.bulk.tensor.2d.shared::cluster.global.im2col.x [%r0], [%from, {%r1, %r2}], [%r3];", "im2col"),
        ("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%to], [%r0], 16;", "cp.reduce"),
        ("fence.proxy.tensormap::generic.release.gpu;", "tensormap"),
        ("wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r0, %r1, %r2, %r3}, %from, %to, 1, 1, 1;", "tf32"),
        ("setmaxnreg.inc.sync.aligned.u32 12;", "setmaxnreg"),
        ("mbarrier.arrive_drop.shared.b64 _, [%r0];", "arrive_drop"),
    ],
)
def test_what_is_not_known_is_named(body, name):
    with pytest.raises(UnsupportedPtx, match=name):
        run(body)
