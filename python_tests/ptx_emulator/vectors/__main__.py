"""`python -m python_tests.ptx_emulator.vectors` recomputes vectors.json; `--gpu` confirms it on this machine's GPU."""

from __future__ import annotations

import argparse
import sys

from . import compute, load, save


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="run the vectors on a GPU and note which it confirms")
    if not parser.parse_args().gpu:
        save(compute())
        return 0
    from .gpu import confirm

    vectors = load()
    wrong = confirm(vectors)
    save(vectors)
    confirmed = sum(vector.confirmed_on_gpu is not None for vector in vectors)
    print("\n".join(wrong) or f"{confirmed} of {len(vectors)} vectors confirmed, by this or another GPU")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
