"""An exported stage 2 against the model that it came from, with and without Python, and packages that are damaged."""

import json
import random
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest
import torch

import vista_ext
from vista_ext import ops
from vista_ext.data.batch import Candidates, Histories
from vista_ext.models import FeatureSchema, Vista, VistaConfig
from vista_ext.runs import Run
from vista_ext.serve.export import LiveModel, Stage2Program
from vista_ext.serve.package import Manifest, Package, PackageError, sealed
from vista_ext.yaml_config import ConfigError

# slots, users (some without a slot), candidates of each request
SIZES = {
    "one of all": (1, 1, [1]),
    "many candidates": (3, 1, [700]),
    "many users": (50, 9, [1, 2, 0, 30, 4, 0, 0, 5, 6, 1, 1]),
    "none of the first": (2, 2, [0, 5]),
}


@pytest.fixture(scope="session")
def live(trained):
    return LiveModel(Run.open(trained))


@pytest.fixture(scope="session")
def loaded(package):
    return Package(package)


def arguments(manifest, slots, users, counts):
    draw = torch.Generator().manual_seed(slots)
    spec, m = manifest.spec, sum(counts)
    rows = ops.quantize_rows(torch.randn(slots, spec.tokens, spec.dim, generator=draw), scheme=spec.scheme)
    context = [torch.randint(0, count, (m,), generator=draw) for count in manifest.context.values()]
    return (
        rows,
        torch.randint(-1, slots, (users,), generator=draw),
        torch.tensor([0, *counts]).cumsum(0),
        torch.randint(0, manifest.num_items + 1, (m,), generator=draw),
        torch.stack(context, 1) if context else torch.zeros(m, 0, dtype=torch.int64),
        torch.randint(0, users, (len(counts),), generator=draw),
    )


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_round_trip(live, loaded, sizes):
    given = arguments(loaded.manifest, *sizes)
    compiled, eager = loaded(*given), live(*given)
    assert compiled.shape == (sum(sizes[2]), len(loaded.manifest.tasks))
    assert torch.allclose(compiled, eager, rtol=1e-5, atol=1e-6)  # both round in float32


def test_scores_are_the_models(live, trained):
    run = Run.open(trained)
    rows, slots, offsets, items, context, kv_index = arguments(live.manifest, 5, 3, [2, 3, 4])
    slots = torch.tensor([4, -1, 0])
    summaries = ops.dequantize_rows(rows, run.vista.config.num_seeds, run.vista.config.dim)
    none = torch.zeros(0, dtype=torch.int64)
    nobody = Histories(torch.zeros(2, dtype=torch.int64), 0, none, none, none, torch.tensor([1_700_000_000]))
    summaries = torch.stack([summaries[4], run.vista.summarize(nobody)[0], summaries[0]])
    with torch.no_grad():
        expected = run.vista.score(summaries, Candidates(offsets, len(items), items, context), kv_index)
    assert torch.equal(live(rows, slots, offsets, items, context, kv_index), expected)


WITHOUT_PYTHON = """
import sys, torch
torch.ops.load_library(sys.argv[1])
code = torch._C._aoti.AOTIModelPackageLoader(sys.argv[2] + "/stage2.pt2", "model", False, 1, -1)
given, expected = torch.load(sys.argv[3], weights_only=True)
assert torch.allclose(code.boxed_run(list(given))[0], expected, rtol=1e-5, atol=1e-6)
assert "vista_ext" not in sys.modules
sys.modules["vista_ext.models"] = None  # whoever imports it gets an ImportError
from vista_ext.serve.package import Package
assert torch.allclose(Package(sys.argv[2])(*given), expected, rtol=1e-5, atol=1e-6)
"""


def test_without_the_models_code(live, package, tmp_path):
    given = arguments(live.manifest, 5, 3, [2, 0, 300])
    torch.save((given, live(*given)), tmp_path / "expected")
    library = f"{vista_ext.__path__[0]}/_ops.so"
    command = [sys.executable, "-c", WITHOUT_PYTHON, library, str(package), str(tmp_path / "expected")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


BAD_ARGUMENTS = {
    "cache": (0, lambda x: x[:, :-1].contiguous(), r"cache must be \[slots, \d+\], found \[50, \d+\]"),
    "no slots": (0, lambda x: x[:0], "cache must be"),
    "slots": (1, lambda x: x.int(), "slots must be torch.int64 with 1 dimensions on cpu, found torch.int32"),
    "offsets": (2, lambda x: x + 1, "candidates.offsets must go from 0 to 50, the number of items, found 1 to 51"),
    "items": (3, lambda x: x.clone().fill_(51), r"items must be in \[0, 50\], found 51"),
    "shape": (4, lambda x: x[:-1], "candidates.context must be integers"),
    "kv_index": (5, lambda x: x + 9, r"kv_index must be in \[0, 8\]"),
    "stride": (3, lambda x: x.repeat_interleave(2)[::2], "items must be contiguous"),
}


@pytest.mark.parametrize("bad", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_named(live, bad):
    position, change, message = bad
    given = list(arguments(live.manifest, *SIZES["many users"]))
    given[position] = change(given[position])
    with pytest.raises((ValueError, IndexError), match=message):
        live(*given)


def flip_a_byte(folder):
    with (folder / "stage2.pt2").open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))


def set_to(name, value):
    def change(folder):
        file = folder / "manifest.json"
        values = json.loads(file.read_text())
        del values["crc32"], values["format"]
        file.write_text(sealed(values | {name: value}))

    return change


DAMAGES = {
    "code": (flip_a_byte, "stage2.pt2: expected SHA-256 .* damaged"),
    "no code": (lambda folder: (folder / "stage2.pt2").unlink(), "expected an exported model"),
    "no JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: Expecting"),
    "format": (lambda folder: (folder / "manifest.json").write_text('{"format": 2}'), "expected format 1"),
    "key": (set_to("surprise", 2), "expected the keys"),
    "kind": (set_to("num_items", "50"), "num_items must be a int, found '50'"),
    "context": (set_to("context", {"tab": 0}), "context must be numbers of values"),
    "spec": (set_to("spec", {"scheme": "int8"}), "spec: expected the keys"),
    "torch": (set_to("torch", "1.13.0"), r"torch: expected .*, found 1\.13\.0"),
    "vista": (set_to("vista", "99.0"), r"vista: expected .*, found 99\.0"),
    "processor": (set_to("processor", "AVX1024"), "processor: expected at most .*, found 'AVX1024'"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_package_is_refused(package, tmp_path, damage):
    change, message = damage
    folder = shutil.copytree(package, tmp_path / "package")
    change(folder)
    with pytest.raises(PackageError, match=message):
        Package(folder)


def test_broken_bytes_of_a_manifest_are_refused(package):
    text, draw = (package / "manifest.json").read_bytes(), random.Random(0)
    whole = Manifest.from_json(text.decode(), "here")
    for _ in range(500):
        broken = bytearray(text)
        for _ in range(draw.randint(1, 3)):
            broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
        broken = bytes(broken)[: draw.choice([None, draw.randrange(len(text))])]
        with suppress(PackageError):
            assert Manifest.from_json(broken.decode("utf-8", "replace"), "here") == whole  # white space, then


def test_what_a_store_does_not_hold_cannot_be_served(live):
    model = Vista(FeatureSchema(50, 3), VistaConfig(recent_events=4))
    with pytest.raises(ConfigError, match="recent_events must be 0 to serve from summaries alone, found 4"):
        Stage2Program(model, live.manifest.spec)
