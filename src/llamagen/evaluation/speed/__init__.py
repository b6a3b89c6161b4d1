"""How fast this machine is, and how near to its limits decoding comes."""

from llamagen.evaluation.speed.decoding import Measurement, measure_decoding
from llamagen.evaluation.speed.machine import MachineLimits, machine, measure_limits
from llamagen.evaluation.speed.timing import median_and_spread, table, time_in_turn

__all__ = [
    "MachineLimits",
    "Measurement",
    "machine",
    "measure_decoding",
    "measure_limits",
    "median_and_spread",
    "table",
    "time_in_turn",
]
