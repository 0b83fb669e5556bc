"""Faults planted into the toys' PTX: each is found and named. A checker that never fires proves nothing."""

import numpy as np
import pytest

from python_tests.ptx_emulator import Device, EmulationError

from .toys import bf16, run_gemm

SEEDS = range(3)
BARRIER = r"bar\.sync\s+0;"


def kinds(action) -> set[str]:
    with pytest.raises(EmulationError) as caught:
        action()
    return {problem.kind for problem in caught.value.problems}


@pytest.mark.parametrize("seed", SEEDS)
class TestGemm:
    def test_wait_that_allows_a_group_too_many(self, gemm, seed):
        assert kinds(lambda: run_gemm(gemm.mutate(r"wait_group 1", "wait_group 2"), seed)) >= {"in flight"}

    def test_no_wait(self, gemm, seed):
        assert kinds(lambda: run_gemm(gemm.mutate(r"cp\.async\.wait_group 1;", ""), seed)) >= {"in flight"}

    def test_no_commit(self, gemm, seed):
        library = gemm.mutate(r"cp\.async\.commit_group;", "", occurrence=0)
        assert kinds(lambda: run_gemm(library, seed)) >= {"in flight"}

    @pytest.mark.parametrize("which", [0, 1])
    def test_missing_barrier(self, gemm, seed, which):
        library = gemm.mutate(BARRIER, "", occurrence=which)
        assert kinds(lambda: run_gemm(library, seed)) & {"race", "in flight"}

    def test_barrier_before_the_wait(self, gemm, seed):
        library = gemm.mutate(r"(?s)(cp\.async\.wait_group 1;)(.*?)(bar\.sync\s+0;)", r"\3\2\1", occurrence=0)
        assert kinds(lambda: run_gemm(library, seed)) >= {"race"}

    def test_pointer_past_the_end(self, gemm, seed):
        assert kinds(lambda: run_gemm(gemm, seed, m=64, shift=8)) == {"out of bounds"}

    def test_misaligned_pointer(self, gemm, seed):
        assert "misaligned" in kinds(lambda: run_gemm(gemm, seed, m=64, shift=1))

    def test_shared_memory_too_small_for_the_tiles(self, gemm, seed):
        library = gemm.mutate(r"(cp\.async\.cg\.shared\.global \[)(%r\d+)\]", r"\1\2 + 16384]")
        assert kinds(lambda: run_gemm(library, seed)) >= {"out of bounds"}

    def test_wrong_fragment(self, gemm, seed):
        # Not a finding: the values are wrong, which is what references are for.
        library = gemm.mutate(
            r"ldmatrix\.sync\.aligned\.m8n8\.x4", r"ldmatrix.sync.aligned.m8n8.x4.trans", occurrence=0
        )
        right, wrong = run_gemm(gemm, seed)[3], run_gemm(library, seed)[3]
        assert np.abs(right - wrong).max() > 1


@pytest.mark.parametrize("seed", SEEDS)
class TestSimple:
    def row_sums(self, library, seed, columns=100):
        device = Device(library, seed)
        x = np.ones((5, columns), np.float32)
        device.call("run_row_sums", device.array(x), device.empty(5, np.float32), 5, columns)

    def histogram(self, library, seed):
        device = Device(library, seed)
        values = np.arange(1000, dtype=np.int32) % 60
        device.call("run_histogram", device.array(values), device.empty(60, np.int32), 1000, 60, 3)

    def test_row_sums_without_barrier(self, simple, seed):
        library = simple.mutate(BARRIER, "", kernel="row_sums")
        assert kinds(lambda: self.row_sums(library, seed)) & {"race", "uninitialised read"}

    def test_row_sums_bound_off_by_one(self, simple, seed):
        library = simple.mutate(r"setp\.lt\.s32", "setp.le.s32", kernel="row_sums")
        library = library.mutate(r"setp\.ge\.s32", "setp.gt.s32", kernel="row_sums")
        assert kinds(lambda: self.row_sums(library, seed)) >= {"out of bounds"}

    def test_shuffle_in_a_branch(self, simple, seed):
        library = simple.mutate(r"(?<!@%p1 )shfl\.sync", "@%p1 shfl.sync", kernel="row_sums", occurrence=0)
        assert kinds(lambda: self.row_sums(library, seed)) >= {"divergence"}

    @pytest.mark.parametrize("which", [0, 1])
    def test_histogram_without_barrier(self, simple, seed, which):
        library = simple.mutate(BARRIER, "", kernel="histogram", occurrence=which)
        assert kinds(lambda: self.histogram(library, seed)) & {"race", "uninitialised read"}

    def test_histogram_without_shared_atomics(self, simple, seed):
        library = simple.mutate(
            r"atom\.shared\.add\.u32\s+(%r\d+), (\[%r\d+\]), 1;", r"st.shared.u32 \2, 1;", kernel="histogram"
        )
        assert kinds(lambda: self.histogram(library, seed)) >= {"race"}

    def test_histogram_without_global_atomics(self, simple, seed):
        library = simple.mutate(
            r"(?:atom|red)\.global\.add\.u32\s+(?:%r\d+, )?(\[%rd\d+\]), (%r\d+);",
            r"st.global.u32 \1, \2;",
            kernel="histogram",
        )
        assert kinds(lambda: self.histogram(library, seed)) >= {"race"}

    def test_quantize_without_bound(self, simple, seed):
        library = simple.mutate(r"@%p1 bra.*", "", kernel="quantize")
        device = Device(library, seed)
        x = device.array(bf16(np.ones((5, 64))))
        codes, scales = device.empty((5, 64), np.int8), device.empty(5, np.float32)
        assert kinds(lambda: device.call("run_quantize", x, codes, scales, 5, 64)) == {"out of bounds"}

    def test_uninitialised_input(self, simple, seed):
        device = Device(simple, seed)
        x, sums = device.empty((5, 64), np.float32), device.empty(5, np.float32)
        assert kinds(lambda: device.call("run_row_sums", x, sums, 5, 64)) == {"uninitialised read"}

    def test_scatter_to_one_target(self, simple, seed):
        device = Device(simple, seed)
        target, x = np.zeros(256, np.int32), np.arange(256, dtype=np.int32)
        y = device.array(np.zeros(1, np.int32))
        assert kinds(lambda: device.call("run_scatter", device.array(target), device.array(x), y, 256)) == {"race"}

    @pytest.mark.parametrize("apart", [1, 32, 128])
    def test_scatter_of_two_threads_to_one_target(self, simple, seed, apart):
        # In one warp, in two warps, in two blocks.
        device = Device(simple, seed)
        target, x = np.arange(256, dtype=np.int32), np.arange(256, dtype=np.int32)
        target[apart] = 0
        y = device.array(np.zeros(256, np.int32))
        assert kinds(lambda: device.call("run_scatter", device.array(target), device.array(x), y, 256)) == {"race"}

    @pytest.mark.parametrize("target", [-1, 256, -(1 << 31)])
    def test_scatter_out_of_bounds(self, simple, seed, target):
        device = Device(simple, seed)
        y = device.array(np.zeros(256, np.int32))
        targets, x = device.array(np.array([0, target], np.int32)), device.array(np.ones(2, np.int32))
        assert kinds(lambda: device.call("run_scatter", targets, x, y, 2)) == {"out of bounds"}

    def test_torn_barrier(self, simple, seed):
        device = Device(simple, seed)
        x = device.array(np.zeros(128, np.float32))
        assert kinds(lambda: device.call("run_torn_barrier", x, 16)) == {"divergence"}

    def test_crossed_barriers(self, simple, seed):
        device = Device(simple, seed)
        x = device.empty(2, np.int32)
        assert kinds(lambda: device.call("run_crossed_barriers", x)) == {"deadlock"}

    @pytest.mark.parametrize("which", range(4))
    def test_handover_without_one_of_its_barriers(self, simple, seed, which):
        library = simple.mutate(r"bar\.(sync|arrive) [12], 64;", "", kernel="handover", occurrence=which)
        device = Device(library, seed)
        x, y = device.array(np.arange(160, dtype=np.int32)), device.empty((2, 5, 32), np.int32)
        found = kinds(lambda: device.call("run_handover", x, y, 5))
        assert found & {"race", "deadlock", "divergence", "uninitialised read"}

    def test_copy_out_of_bounds_by_the_host(self, simple, seed):
        device = Device(simple, seed)
        values, counts = device.array(np.zeros(4, np.int32)), device.empty(4, np.int32)
        assert "out of bounds" in kinds(lambda: device.call("run_histogram", values, counts, 4, 5, 1))
