"""Time and memory of metrics on features.

    python benchmarks/metrics.py

- the Frechet distance of 50,000 features of 2,048 numbers, in parts as from a network, to given
  statistics; beside it scipy's matrix square root, where scipy is installed;
- precision and recall of 10,000 features against 50,000.

Features are random: real ones take the same time. Memory is the process's peak
above what it had before, measured in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable

import numpy as np
from common import print_table, record

from llamagen.evaluation.metrics import FeatureStatistics, frechet_distance, precision_recall

WIDTH = 2048
SAMPLES = 50_000
PART = 500


def parts(count: int, seed: int):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
    for _ in range(0, count, PART):
        yield np.abs(rng.normal(size=(PART, WIDTH)).astype(np.float32) @ mixing)


def frechet() -> dict[str, float]:
    reference = FeatureStatistics(WIDTH)
    for part in parts(3 * WIDTH, seed=1):
        reference.update(part)
    statistics = FeatureStatistics(WIDTH)
    seconds = 0.0
    for part in parts(SAMPLES, seed=0):
        start = time.perf_counter()
        statistics.update(part)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    value = frechet_distance(statistics, reference)
    found = {
        "statistics, seconds": seconds,
        "distance, seconds": time.perf_counter() - start,
        "value": value,
    }
    try:
        from scipy.linalg import sqrtm
    except ImportError:
        return found
    start = time.perf_counter()
    root = sqrtm(statistics.covariance @ reference.covariance)
    found["scipy's square root, seconds"] = time.perf_counter() - start
    shift = statistics.mean - reference.mean
    traces = np.trace(statistics.covariance) + np.trace(reference.covariance)
    found["scipy's value"] = float(shift @ shift + traces - 2 * np.trace(root).real)
    return found


def neighbours() -> dict[str, float]:
    samples = np.concatenate(list(parts(10_000, seed=0)))
    reference = np.concatenate(list(parts(50_000, seed=1)))
    start = time.perf_counter()
    precision_recall(samples, reference)
    return {"seconds": time.perf_counter() - start}


def _child(work: Callable[[], dict[str, float]], queue) -> None:
    found = work()
    # Linux counts kilobytes.
    found["peak GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    queue.put(found)


def alone(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Run ``work`` in a new process; return its result and peak memory, torch included."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_child, args=(work, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    results = {"frechet": alone(frechet), "precision and recall": alone(neighbours)}
    rows = [
        [name, measure, f"{value:.4g}"]
        for name, found in results.items()
        for measure, value in found.items()
    ]
    print_table(["metric", "measure", "value"], rows)
    record("metrics", results)


if __name__ == "__main__":
    main()
