"""The README's examples run as they stand there, one after another."""

import re
from pathlib import Path

import pytest

from vista_ext.data.synthetic import make_synthetic

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def at_work(tmp_path, monkeypatch):
    """A folder in which a demo has been."""
    monkeypatch.chdir(tmp_path)
    make_synthetic(Path("runs/demo/data"), users=60, items=50, events_per_user=80, recent=20, clusters=5, liked=1)


def test_examples_run(at_work):
    names: dict[str, object] = {}
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        exec(example, names)
    assert names["logits"].shape[0] == len(names["batch"].labels)
    assert names["found"].hits.all() and names["back"].shape == names["summaries"].shape
