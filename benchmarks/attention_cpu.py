"""Attention in bf16 on a CPU: torch's fused kernel against the products written out (`diptych.nn.transformer`).

    python benchmarks/attention_cpu.py [--json FILE]

Prints the time of a forward and backward pass of each as a ratio, for a few shapes, alternating in one process. Fails
when the written-out form is not the faster one in any shape: then `attention` should stop using it.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.nn.transformer import attention

SHAPES = ((64, 4, 20, 32), (32, 4, 76, 32), (32, 6, 104, 64), (32, 6, 170, 64))
"""Rows, heads, positions, width of a head."""


def seconds(function, inputs: list[Tensor]) -> float:
    began = time.perf_counter()
    function(*inputs).sum().backward()
    return time.perf_counter() - began


def compare(shape: tuple[int, ...], repeats: int) -> float:
    """Median over pairs of (fused time / written-out time)."""
    inputs = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    ratios = []
    for repeat in range(repeats + 2):
        fused, written = seconds(F.scaled_dot_product_attention, inputs), seconds(attention, inputs)
        if repeat >= 2:
            ratios.append(fused / written)
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    found = {"x".join(map(str, shape)): compare(shape, options.repeats) for shape in SHAPES}
    for shape, ratio in found.items():
        print(f"{shape:>14}: fused takes {ratio:.1f} times as long")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    good = min(found.values()) > 1
    print(f"verdict: {'written out is faster everywhere' if good else 'the fused kernel has caught up'}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
