"""One launch: a grid of blocks, wave by wave."""

from __future__ import annotations

import random

import numpy as np

from .decode import Program
from .findings import Abandoned, Findings
from .memory import GlobalMemory
from .metrics import KernelMetrics
from .races import GlobalRaces
from .registers import RegisterFile
from .wave import WARP, Wave

LANES_PER_WAVE = 2048
LONGEST_BURST = 1 << 14  # instructions before other warps get a turn
MOST_WARP_INSTRUCTIONS = 200_000_000  # a launch past this is taken for an endless loop


class Scheduler:
    """Decides by a seed what the hardware decides: which warps run and how far, in which order atomics happen.

    Seed 0 runs all warps of a wave in lockstep, the fastest way; others interrupt at random places.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._random = random.Random(seed)

    def choose(self, wave: Wave) -> tuple[int, int]:
        """A range of warps of which some lane is ready."""
        if self.seed == 0 or self._random.random() < 0.5:
            return 0, wave.warps
        ready = np.flatnonzero(wave.ready.reshape(-1, WARP).any(axis=1))
        warp = int(ready[self._random.randrange(len(ready))])
        size = 1 << self._random.randrange(max(wave.warps - 1, 1).bit_length() + 1)
        first = warp // size * size
        return first, min(first + size, wave.warps)

    def burst(self) -> int:
        return LONGEST_BURST if self.seed == 0 else self._random.choice((8, 64, 512, LONGEST_BURST))

    def gives_up(self) -> bool:
        """Whether a try_wait returns before its phase has ended, though others could go on."""
        return self.seed != 0 and self._random.random() < 0.1

    def landing(self, loads: list) -> list:
        """Which of the copies under way land now."""
        if self.seed == 0 or not loads or self._random.random() < 0.7:
            return []
        return self._random.sample(loads, self._random.randrange(len(loads)) + 1)

    def order(self, count: int) -> np.ndarray:
        order = np.arange(count)
        if self.seed:
            np.random.default_rng(self._random.randrange(1 << 32)).shuffle(order)
        return order

    def blocks(self, count: int) -> np.ndarray:
        return self.order(count)

    def garbage(self, count: int) -> np.ndarray:
        return np.frombuffer(self._random.randbytes(8 * count), np.uint64)


class Launch:
    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        metrics: KernelMetrics,
        scheduler: Scheduler,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        parameters: bytes,
        dynamic_shared: int,
        variables: dict[str, int],
    ):
        self.variables = variables  # addresses of .global and .const variables
        self._registers: dict[int, RegisterFile] = {}
        self.program = program
        self.memory = memory
        self.metrics = metrics
        self.scheduler = scheduler
        self.grid, self.block = grid, block
        self.threads = block[0] * block[1] * block[2]
        self.parameters = np.frombuffer(parameters.ljust(program.kernel.parameter_bytes + 16, b"\0"), np.uint8)
        self.dynamic_shared = dynamic_shared
        self.shared_layout = program.shared_layout(dynamic_shared)
        self.findings = Findings(program.kernel.name)
        self.counts = [0] * (program.end + 1)
        self.races = GlobalRaces(memory.top + 4096, program.global_granule)
        self._spent = 0

    def registers(self, lanes: int) -> RegisterFile:
        if lanes not in self._registers:
            self._registers[lanes] = RegisterFile(self.program.sources, lanes)
        return self._registers[lanes]

    def run(self) -> Findings:
        count = self.grid[0] * self.grid[1] * self.grid[2]
        per_wave = max(1, LANES_PER_WAVE // (-(-self.threads // WARP) * WARP))
        order = self.scheduler.blocks(count)
        try:
            with np.errstate(all="ignore"):
                for first in range(0, count, per_wave):
                    Wave(self, np.sort(order[first : first + per_wave])).run()
        except Abandoned:
            pass
        finally:
            self._account(count)
        return self.findings

    def _account(self, blocks: int) -> None:
        self.metrics.launches += 1
        self.metrics.blocks += blocks
        self.metrics.warp_instructions += sum(self.counts)
        for ins, count in zip(self.program.kernel.instructions, self.counts, strict=False):
            self.metrics.instructions[".".join([ins.opcode, *ins.modifiers])] += count

    def check_budget(self) -> None:
        self._spent += 1
        if self._spent % 16 == 0 and sum(self.counts) > MOST_WARP_INSTRUCTIONS:
            busiest = max(range(self.program.end - 1), key=self.counts.__getitem__)
            text = self.program.kernel.instructions[busiest].text
            raise self.findings.fatal("deadlock", text, f"no end after {MOST_WARP_INSTRUCTIONS} warp instructions")

    def block_name(self, number: int) -> str:
        x, y, _ = self.grid
        return str((number % x, number // x % y, number // (x * y)))

    def special(self, wave: Wave, name: str) -> np.ndarray:
        """A special register over the wave's lanes, or one value for all."""
        if "." in name:
            register, axis = name[1:].split(".")
            at = "xyz".index(axis)
            # Clusters have one block.
            register = {"clusterid": "ctaid", "nclusterid": "nctaid"}.get(register, register)
            ones, zeros = (1, 1, 1), (0, 0, 0)
            fixed = {
                "ntid": self.block,
                "nctaid": self.grid,
                "cluster_nctaid": ones,
                "cluster_ctaid": zeros,
            }.get(register)
            if fixed:
                return np.array([fixed[at]], np.uint32)
            flat, extent = (
                (wave.thread, self.block) if register == "tid" else (wave.blocks[wave.local_block], self.grid)
            )
            return flat // int(np.prod(extent[:at], dtype=np.int64)) % extent[at]  # x runs fastest
        lane = wave.thread % WARP
        one = np.uint64(1)
        below = (one << lane.astype(np.uint64)) - one
        bit = one << lane.astype(np.uint64)
        everything = np.uint64(0xFFFFFFFF)
        values = {
            "%laneid": lane,
            "%warpid": wave.thread // WARP,
            "%nwarpid": np.array([wave.warps_per_block]),
            "%smid": np.array([0]),
            "%nsmid": np.array([1]),
            "%gridid": np.array([0]),
            "%cluster_ctarank": np.array([0]),
            "%cluster_nctarank": np.array([1]),
            "%dynamic_smem_size": np.array([self.dynamic_shared]),
            "%total_smem_size": np.array([self.dynamic_shared + self.program.static_shared]),
            "%lanemask_eq": bit,
            "%lanemask_lt": below,
            "%lanemask_le": below | bit,
            "%lanemask_gt": everything & ~(below | bit),
            "%lanemask_ge": everything & ~below,
        }
        return values[name]
