"""What the emulator has to say about a launch."""

from __future__ import annotations

from dataclasses import dataclass

MOST_FINDINGS = 20  # per launch: past these the launch is given up


@dataclass
class Problem:
    # "race", "out of bounds", "misaligned", "uninitialised read", "in flight", "proxy", "wgmma", "mbarrier",
    # "divergence", "deadlock" or "launch"
    kind: str
    kernel: str
    instruction: str
    detail: str  # where: block, thread, address, the other party
    count: int = 1

    def __str__(self) -> str:
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{self.kind}: {self.detail}{times}\n    at `{self.instruction}` in {self.kernel}"


class EmulationError(AssertionError):
    """A launch with findings. An AssertionError, so that pytest shows it as a failed test and not as a broken one."""

    def __init__(self, problems: list[Problem]):
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


class DeviceTrap(Exception):
    """A thread executed `trap`: how our kernels answer arguments that they cannot serve."""

    def __init__(self, kernel: str, detail: str):
        super().__init__(f"trap in {kernel}: {detail}")
        self.kernel = kernel


class Abandoned(Exception):
    """Ends a launch whose findings make going on pointless."""


class Findings:
    """Problems of one launch, each instruction's counted once per kind."""

    def __init__(self, kernel: str):
        self.kernel = kernel
        self._problems: dict[tuple[str, str], Problem] = {}

    def add(self, kind: str, instruction: str, detail: str) -> None:
        known = self._problems.get((kind, instruction))
        if known:
            known.count += 1
            if known.count < 1000:
                return
            raise Abandoned
        self._problems[kind, instruction] = Problem(kind, self.kernel, instruction, detail)
        if len(self._problems) >= MOST_FINDINGS:
            raise Abandoned

    def fatal(self, kind: str, instruction: str, detail: str) -> Abandoned:
        self.add(kind, instruction, detail)
        return Abandoned()

    @property
    def problems(self) -> list[Problem]:
        return list(self._problems.values())
