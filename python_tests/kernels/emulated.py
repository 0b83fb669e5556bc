"""What the tests of all kernel families do alike: compile for the emulator, and plant faults."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from python_tests.ptx_emulator import DeviceTrap, EmulatedLibrary, EmulationError, toolkit

# The last: what should have raised did not.
FOUND = (EmulationError, DeviceTrap, AssertionError, pytest.fail.Exception)


def library_of(build_library: Callable[[], EmulatedLibrary]):
    """A module's fixture: `library = library_of(build_library)`."""

    @pytest.fixture(scope="module", name="library")
    def emulated() -> EmulatedLibrary:
        if toolkit() is None:
            pytest.skip("no nvcc on this machine")
        return build_library()

    return emulated


def assert_found(
    library: EmulatedLibrary,
    kernel: str,
    pattern: str,
    replacement: str,
    occurrence: int | None,
    check: Callable[[EmulatedLibrary, int], object],
) -> None:
    """One of two schedules shows `check(library, seed)` the fault."""
    mutant = library.mutate(pattern, replacement, kernel=kernel, occurrence=occurrence)
    with pytest.raises(FOUND):
        for seed in range(2):
            check(mutant, seed)
