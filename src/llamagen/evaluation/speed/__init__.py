"""Measurements of this machine: decoding and its limits, seconds per image."""

from llamagen.evaluation.speed.decoding import Measurement, measure_decoding
from llamagen.evaluation.speed.images import Speed, SpeedSummary, measure_speed
from llamagen.evaluation.speed.limits import MachineLimits, machine, measure_limits
from llamagen.evaluation.speed.timing import median_and_spread, table, time_in_turn

__all__ = [
    "MachineLimits",
    "Measurement",
    "Speed",
    "SpeedSummary",
    "machine",
    "measure_decoding",
    "measure_limits",
    "measure_speed",
    "median_and_spread",
    "table",
    "time_in_turn",
]
