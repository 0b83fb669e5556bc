"""TMA, mbarriers and wgmma: correct kernels made of common/sm90's primitives, and faults planted into their PTX."""

import numpy as np
import pytest

from python_tests.ptx_emulator import Device, EmulatedLibrary, EmulationError
from python_tests.ptx_emulator.formats import bf16_to_f64

from .toys import bf16

SEEDS = range(3)
H100 = (9, 0)


def narrow(x: np.ndarray, half: bool) -> np.ndarray:
    return x.astype(np.float16) if half else bf16(x)


def wide(x: np.ndarray) -> np.ndarray:
    return bf16_to_f64(x) if x.dtype == np.uint16 else x.astype(np.float64)


def run_gemm(library: EmulatedLibrary, seed: int, m=200, n=136, k=264, half=False, majors=0):
    """The largest error in units of what float32 sums may be off by, and the device."""
    random = np.random.default_rng(0)
    a, b = (narrow(random.standard_normal((rows, k)), half) for rows in (m, n))
    device = Device(library, seed, capability=H100)
    c = device.empty((m, n), np.float32)
    operands = [device.array(np.ascontiguousarray(x.T) if majors >> i & 1 else x) for i, x in enumerate((a, b))]
    assert device.call("run_wgmma_gemm", *operands, c, m, n, k, int(half), majors) == 0
    bound = np.abs(wide(a)) @ np.abs(wide(b)).T * k * 2.0**-24
    return np.nan_to_num(np.abs(c.numpy() - wide(a) @ wide(b).T) / bound, nan=np.inf).max(), device


def run_chain(library: EmulatedLibrary, seed: int, half: bool):
    m, n, k = (50, 96, 40) if half else (64, 64, 64)
    random = np.random.default_rng(1)
    a, b, d = (narrow(random.standard_normal(shape), half) for shape in ((m, k), (64, k), (64, n)))
    device = Device(library, seed, capability=H100)
    c = device.empty((m, n), np.float32)
    assert device.call("run_wgmma_chain", device.array(a), device.array(b), device.array(d), c, m, n, k, int(half)) == 0
    first = wide(narrow((wide(a) @ wide(b).T).astype(np.float32), half))
    # A sum of the first product that lies near the middle of two 16-bit numbers may have been rounded to the other.
    step = 2.0 ** (-10 if half else -7) * np.abs(first).max() * np.abs(wide(d)).max()
    return np.abs(c.numpy() - first @ wide(d)).max() / step


def run_copy(library: EmulatedLibrary, seed: int):
    x = np.random.default_rng(0).standard_normal((100, 104)).astype(np.float16)
    device = Device(library, seed, capability=H100)
    y = device.empty(x.shape, np.float16)
    assert device.call("run_tma_copy", device.array(x), y, *x.shape) == 0
    return x, y.numpy()


@pytest.mark.parametrize("seed", SEEDS)
class TestCorrect:
    @pytest.mark.parametrize("majors", range(4))
    def test_gemm_bf16(self, hopper, seed, majors):
        error, device = run_gemm(hopper, seed, majors=majors)
        assert error <= 1
        (metrics,) = device.metrics.values()
        columns = {0: 128, 1: 64, 2: 128, 3: 192}[majors]
        assert metrics.blocks == 2 * -(-136 // columns)
        assert metrics.count("wgmma.mma_async") == metrics.blocks * 8 * 5 * 4  # warps, steps of 64, products in each
        assert metrics.bank_conflict_ratio == 1

    def test_gemm_fp16(self, hopper, seed):
        assert run_gemm(hopper, seed, half=True, n=264)[0] <= 1

    @pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 8), (128, 128, 64), (129, 8, 72)])
    def test_gemm_at_other_sizes(self, hopper, seed, m, n, k):
        assert run_gemm(hopper, seed, m, n, k)[0] <= 1

    @pytest.mark.parametrize("half", [False, True])
    def test_chain(self, hopper, seed, half):
        assert run_chain(hopper, seed, half) <= 1

    def test_copy(self, hopper, seed):
        x, y = run_copy(hopper, seed)
        np.testing.assert_array_equal(x, y)


def found(action) -> set[str]:
    """Kinds of findings; "values" where there are none but the result is wrong."""
    try:
        return {"values"} if action() > 1 else set()
    except EmulationError as error:
        return {problem.kind for problem in error.problems}


TRY_WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 ended, \[(%r\d+)\], (%r\d+);"
OTHER_PARITY = r".reg .b32 other; xor.b32 other, \2, 1; mbarrier.try_wait.parity.shared::cta.b64 ended, [\1], other;"
NO_WAIT = "setp.eq.u32 ended, 0, 0;"
ANNOUNCE = r"(mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[%r\d+\]), (%r\d+);"
PRODUCER, CONSUMER = 0, 1  # in the order of the text
KERNEL = "4gemmIN5vista4cuda8BFloat16ELi128ELNS2_4sm905MajorE0ELS5_0"

GEMM_FAULTS = {
    "no wait for the empty stage": (TRY_WAIT, NO_WAIT, PRODUCER, {"race", "in flight", "mbarrier"}),
    "no wait for the full stage": (TRY_WAIT, NO_WAIT, CONSUMER, {"race", "in flight"}),
    "parity of the empty stage": (TRY_WAIT, OTHER_PARITY, PRODUCER, {"deadlock"}),
    "parity of the full stage": (TRY_WAIT, OTHER_PARITY, CONSUMER, {"race", "in flight", "deadlock"}),
    "half of the bytes announced": (ANNOUNCE, r"\1, 16384;", None, {"race", "in flight", "deadlock"}),
    "twice the bytes announced": (ANNOUNCE, r"\1, 65536;", None, {"deadlock"}),
    "a stage less far than its tile": (
        r"add\.s32\s+(%r\d+), (%r\d+), 16384;",
        r"add.s32 \1, \2, 8192;",
        0,
        {"race", "in flight"},
    ),
    "barriers not shown to the copies": (r"fence\.mbarrier_init\.release\.cluster;", "", None, {"proxy"}),
    "no block barrier after making them": (r"bar\.sync\s+0;", "", None, {"race", "mbarrier"}),
    "too few arrivals for a stage": (
        r"mov\.u32\s+(%r\d+), 2;",
        r"mov.u32 \1, 1;",
        None,
        {"race", "in flight", "mbarrier", "deadlock"},
    ),
    "too many arrivals for a stage": (r"mov\.u32\s+(%r\d+), 2;", r"mov.u32 \1, 3;", None, {"deadlock"}),
    "stage released too early": (
        r"wait_group\.sync\.aligned 1;",
        "wait_group.sync.aligned 2;",
        None,
        {"race", "in flight"},
    ),
    "no wait for the products": (r"wgmma\.wait_group\.sync\.aligned 0;", "", None, {"values"}),
    "no fence before the products": (r"wgmma\.fence\.sync\.aligned;", "", None, {"wgmma"}),
    "products not committed": (r"wgmma\.commit_group\.sync\.aligned;", "", None, {"race", "in flight", "values"}),
    "descriptor's distance of rows": (
        r"or\.b64\s+(%rd\d+), (%rd\d+), 4611686293305360384;",
        r"or.b64 \1, \2, 4611686155866406912;",
        0,
        {"values"},
    ),
    "descriptor's swizzle": (
        r"or\.b64\s+(%rd\d+), (%rd\d+), 4611686293305360384;",
        r"or.b64 \1, \2, -9223371761976868864;",
        0,
        {"values"},
    ),
    "descriptor's offset": (
        r"(wgmma\.mma_async[^;]*\}, %rd\d+), (%rd\d+), accumulate",
        r"add.s64 \2, \2, 4; \1, \2, accumulate",
        None,
        {"values", "out of bounds"},
    ),
    "operand of the other major": (r"accumulate, 1, 1, 0, 0;", "accumulate, 1, 1, 0, 1;", None, {"values"}),
    "more registers than there are": (
        r"setmaxnreg\.inc\.sync\.aligned\.u32 232;",
        "setmaxnreg.inc.sync.aligned.u32 240;",
        None,
        {"deadlock"},
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", GEMM_FAULTS)
def test_planted_into_the_gemm(hopper, seed, fault):
    pattern, replacement, occurrence, expected = GEMM_FAULTS[fault]
    library = hopper.mutate(pattern, replacement, kernel=KERNEL, occurrence=occurrence)
    assert found(lambda: run_gemm(library, seed, m=128, n=120, k=384)[0]) & expected


COPY_FAULTS = {
    "no proxy fence": (r"fence\.proxy\.async\.shared::cta;", "", {"proxy"}),
    "proxy fence of other warps after the barrier": (
        r"(?s)(fence\.proxy\.async\.shared::cta;)(.*?)(bar\.sync\s+0;)",
        r"\3\2 @%p2 \1",
        {"proxy"},
    ),
    "no barrier before the store": (
        r"(?s)(fence\.proxy\.async\.shared::cta;.*?)bar\.sync\s+0;",
        r"\1",
        {"race", "proxy", "uninitialised read"},
    ),
    "no wait for the store": (r"cp\.async\.bulk\.wait_group\.read 0;", "", {"in flight"}),
    "store not committed": (r"cp\.async\.bulk\.commit_group;", "", {"in flight"}),
    "no wait for the load": (TRY_WAIT, NO_WAIT, {"race", "in flight"}),
    "tile at a wrong place": (r"\[%r17\]", "[%r17+64]", {"misaligned"}),
    "tile beyond shared memory": (r"\[%r17\]", "[%r17+16384]", {"out of bounds"}),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", COPY_FAULTS)
def test_planted_into_the_copy(hopper, seed, fault):
    pattern, replacement, expected = COPY_FAULTS[fault]
    library = hopper.mutate(pattern, replacement, kernel="copy")

    def run() -> float:
        x, y = run_copy(library, seed)
        return 2.0 * (x != y).any()

    assert found(run) & expected


def test_tensor_maps_have_limits(hopper):
    device = Device(hopper, capability=H100)
    x, y = device.array(np.zeros((64, 64), np.float16)), device.empty((64, 64), np.float16)
    for rows, columns in ((0, 64), (64, 0), (64, 60)):
        assert device.call("run_tma_copy", x, y, rows, columns) == -1
    assert device.call("run_tma_copy", x.pointer + 8, y, 64, 64) == -1
    assert device.launches == []


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), 0), (H100, 1), ((8, 0), 0)])
def test_which_kernels_a_device_runs(hopper, capability, expected):
    assert Device(hopper, capability=capability).call("is_sm90") == expected
