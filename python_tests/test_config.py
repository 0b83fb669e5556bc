import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vista_ext.config import ConfigError, RunConfig, load_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_the_files_that_come_along(file):
    assert load_config(file).folder == f"runs/{file.stem}"


def test_file_then_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\ntrain: {epochs: 7}\nmodel: {options: {num_seeds: 4, embedding: {dropout: 0.5}}}\n")
    config = load_config(file, ["train.epochs=9", "model.options.dim=48"])
    assert (config.seed, config.train.epochs) == (3, 9)
    vista = config.vista()
    assert (vista.dim, vista.num_seeds, vista.embedding.dropout, vista.embedding.time_buckets) == (48, 4, 0.5, 32)
    assert load_config() == RunConfig()


BAD = [
    (["train.epochs"], "override must look like key=value, found 'train.epochs'"),
    (["train.epochs=many"], "train.epochs"),
    (["train.epochs=0"], "train.epochs must be a finite number above 0, found 0"),
    (["train.learning_rate=nan"], "train.learning_rate must be a finite number above 0, found nan"),
    (["train.epoch=3"], "train.epoch"),
    (["seed=-1"], "seed must be a finite number at least 0, found -1"),
    (["model.name=sasrec"], "model.name must be vista, din or mean, found 'sasrec'"),
    (["train.precision=float16"], "train.precision must be float32 or bfloat16, found 'float16'"),
    (["model.preset=huge"], "model.preset must be one of .*found 'huge'"),
    (["model.options.seeds=middle"], "model.options: seeds must be one of source, target, found 'middle'"),
    (["model.options.depth=3"], "model.options: depth is not a field of the model"),
    (["model.options.embedding=3"], "model.options.embedding must be keys and values, found 3"),
    (["model.options.mlp=3"], "model.options: mlp must be a list of widths, found 3"),
    (["model.options.mlp=wide"], "model.options: mlp must be a list of widths, found 'wide'"),
    ([f"seed={2**63}"], r"seed must be below 2\^63, found 9223372036854775808"),
    (["store.group=7"], r"store.group: group must divide dim \(32\) and be at least 32, found 7"),
    (["store.scheme=int4", "model.options.dim=33"], "store.scheme, .*dim must be even for int4, found 33"),
    (["store.scheme=int2"], "store.scheme must be int8, int4 or fp8_e4m3, found 'int2'"),
    (["data=3"], "overrides: "),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[" ".join(o) for o, _ in BAD])
def test_bad_overrides(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


@pytest.mark.parametrize(
    "content", [b"a: [", b"- 1\n- 2\n", b"\xff\xfe\x00", b"3", b"nothing: here\n", b"seed: {a: 1}\n"]
)
def test_bad_files(tmp_path, content):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(file)


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: expected a YAML file"):
        load_config(tmp_path / "absent.yaml")


@given(st.text(max_size=20), st.one_of(st.text(max_size=20), st.floats(), st.integers()))
def test_any_override_is_taken_or_a_config_error(key, value):
    try:
        config = load_config(None, [f"{key}={value}"])
    except ConfigError as error:
        assert str(error)
    else:
        assert math.isfinite(config.train.learning_rate)
