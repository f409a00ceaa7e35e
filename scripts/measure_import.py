"""How much `import hf_coar` costs beside `import torch`: fresh processes, alternating, the median of the ratios.

    python scripts/measure_import.py

Fails if the ratio is above 1.3.
"""

import argparse
import statistics
import subprocess
import sys
import time

LIMIT = 1.3


def seconds(module: str) -> float:
    """Wall time of a fresh interpreter that imports a module."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - started


def main() -> int:
    """Print the ratio; exit code 1 if it is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    pairs = parser.parse_args().pairs
    seconds("hf_coar")  # files into the cache
    times = [(seconds("torch"), seconds("hf_coar")) for _ in range(pairs)]
    ratio = statistics.median(ours / torch for torch, ours in times)
    torch, ours = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"import torch {torch:.2f} s, import hf_coar {ours:.2f} s, ratio {ratio:.2f} (limit {LIMIT}), {pairs} pairs")
    return ratio > LIMIT


if __name__ == "__main__":
    sys.exit(main())
