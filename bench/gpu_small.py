"""Every op, dtype and scheme once at small ugly shapes: what compute-sanitizer watches (`python -m bench.gpu_small`).

Values are the tests' business. The sanitizer sees most where each tensor is an allocation of its own:
PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

import sys

import torch

from python_tests.ops.gpu_calls import GROUPS


def main(device: str) -> None:
    count = 0
    for group in GROUPS.values():
        for _, call in group(device):
            call()
            count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} calls")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["cuda"]))
