"""Public data is not in this repository: tests that need it read the folder named by VISTA_DATA."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def public_data():
    def folder(name):
        root = os.environ.get("VISTA_DATA")
        if not root:
            pytest.skip("VISTA_DATA is not set: it names the folder that holds the public data sets")
        path = Path(root) / name
        if not path.is_dir():
            pytest.skip(f"VISTA_DATA holds no folder {name}")
        return path

    return folder
