"""The op schemas are a promise to other codebases: this file is the frozen copy, changed knowingly or not at all."""

import json
from pathlib import Path

import pytest
import torch

import vista_ext  # noqa: F401  (registers the ops)

FROZEN = Path(__file__).parent / "schemas.json"
OPS = sorted({schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("vista::")})


def test_schemas_are_the_frozen_ones():
    """After a wanted change: python -m python_tests.ops.test_schema"""
    assert current() == json.loads(FROZEN.read_text())


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_cpu_and_a_fake_kernel(name):
    namespace, op = name.split("::")
    for overload in getattr(getattr(torch.ops, namespace), op).overloads():
        qualified = name if overload == "default" else f"{name}.{overload}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU"), f"{qualified} has no CPU kernel"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "Meta"), f"{qualified} has no fake kernel"


def current() -> list[str]:
    return sorted(str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("vista::"))


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(current(), indent=1) + "\n")
