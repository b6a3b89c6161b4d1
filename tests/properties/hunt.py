"""``make hunt``: rounds of the property tests with random examples, until the time is up.

It stops at the first round that fails, shows the smallest example, and says how to repeat it.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

from tests.properties.checking import PROFILE

SETTINGS = Path(__file__).parents[2] / "pyproject.toml"


def main(arguments: list[str] | None = None, folder: Path = Path(__file__).parent) -> int:
    """Hunt with the tests in ``folder``; return 1 if a round fails, else 0."""
    parser = argparse.ArgumentParser(prog="make hunt", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all rounds")
    parser.add_argument("--seed", type=int, help="of the first round; the next count up")
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest")
    options = parser.parse_args(arguments)
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    started, longest, number = time.monotonic(), 0.0, 0
    # A first round in any case; others if they are likely to end in time.
    while number == 0 or time.monotonic() - started + longest < 60 * options.minutes:
        before, number = time.monotonic(), number + 1
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", str(folder), "-c", str(SETTINGS)),
                *("-q", "--tb=short", "--maxfail=1"),
                *(f"--hypothesis-seed={seed}", *options.pytest),
            ],
            env={**os.environ, PROFILE: "hunt"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - before
        longest = max(longest, seconds)
        if done.returncode != 0:
            print(done.stdout)
            print(f"round {number}, seed {seed}: failed after {seconds:.0f} s")
            print(f"to repeat it: make hunt HUNT_SEED={seed}")
            return 1
        summary = done.stdout.rstrip().rpartition("\n")[2].strip("= ")
        print(f"round {number}, seed {seed}: {summary}", flush=True)
        seed += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
