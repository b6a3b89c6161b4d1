"""Default precision of a CPU."""

import pytest
import torch

from llamagen.support import devices

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def measured_anew():
    devices._fast_dtype.cache_clear()
    yield
    devices._fast_dtype.cache_clear()


@pytest.mark.parametrize(
    ("half", "chosen"), [(0.5, torch.bfloat16), (0.7, torch.float32), (20.0, torch.float32)]
)
def test_bfloat16_if_fast(monkeypatch, half, chosen):
    seconds = {torch.float32: 1.0, torch.bfloat16: half}
    threads = []

    def measured(dtype):
        threads.append(torch.get_num_threads())
        return seconds[dtype]

    before = torch.get_num_threads()
    monkeypatch.setattr(devices, "_matmul_seconds", measured)
    assert devices.find_dtype(None, CPU) == chosen
    assert threads == [1, 1]
    assert torch.get_num_threads() == before


def test_measures_once(monkeypatch):
    first = devices.find_dtype("auto", CPU)
    monkeypatch.setattr(devices, "_matmul_seconds", lambda _: pytest.fail("measured again"))
    assert devices.find_dtype("auto", CPU) == first


def test_explicit_dtype_is_kept():
    assert devices.find_dtype("float32", CPU) == torch.float32
    assert devices.find_dtype(torch.bfloat16, CPU) == torch.bfloat16
