"""Public data is not in this repository: tests that need it read the folder named by VISTA_DATA.

Without it they skip, but under CI they fail: there a skip would pass for a success.
"""

import os
from pathlib import Path

import pytest

from python_tests.needs import missing


@pytest.fixture(scope="session")
def public_data():
    def folder(name):
        root = os.environ.get("VISTA_DATA")
        if not root:
            missing("VISTA_DATA is not set: it names the folder that holds the public data sets")
        path = Path(root) / name
        if not path.is_dir():
            missing(f"VISTA_DATA holds no folder {name}")
        return path

    return folder
