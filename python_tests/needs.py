"""What a test needs of its machine. What is missing is a visible skip, under CI a failure: a skip would pass there."""

import os
import shutil
from importlib.util import find_spec

import pytest

from vista_ext.train.row_wise import INSTALL

# Not on CI, whose environment holds what pip resolves.
torchrec = pytest.mark.skipif(not find_spec("torchrec"), reason=f"TorchRec is not installed: {INSTALL}")
TORCHREC = pytest.param("torchrec", marks=torchrec)


def missing(what):
    if os.environ.get("CI"):
        pytest.fail(f"{what} (CI is set: tests may not skip)")
    pytest.skip(what)


def program(*names, package):
    """The path of the first of some programs that is there."""
    for name in names:
        if found := shutil.which(name):
            return found
    missing(f"{' or '.join(names)} is not installed (Debian: apt-get install {package})")
