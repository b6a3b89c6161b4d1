"""What is checked before the kernels get a pointer or a number."""

import threading

import numpy as np
import pytest
import torch

from llamagen.backends.cpu import library


def test_address_of_what_was_expected():
    tensor, array = torch.zeros(2, 3), np.zeros((2, 3), np.int32)
    assert library.address(tensor, torch.float32, (2, 3)) == tensor.data_ptr()
    assert library.address(tensor.T, torch.float32, (3, 2), (1, 3)) == tensor.data_ptr()
    assert library.address(array, np.int32, (2, 3)) == array.ctypes.data


@pytest.mark.parametrize(
    "buffer",
    [
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(2, 3, dtype=torch.bfloat16),
        torch.zeros(3, 2),
        torch.zeros(6),
        torch.zeros(3, 2).T,
        torch.zeros(2, 6)[:, ::2],
        torch.zeros(2, 3, device="meta"),
        np.zeros((2, 3)),
        np.zeros((3, 2), np.float32),
        np.zeros((3, 2), np.float32).T,
        np.zeros((2, 6), np.float32)[:, ::2],
    ],
    ids=lambda buffer: f"{type(buffer).__name__} {tuple(buffer.shape)} {buffer.dtype}",
)
def test_refuses_addresses_of_anything_else(buffer):
    dtype = torch.float32 if isinstance(buffer, torch.Tensor) else np.float32
    with pytest.raises(ValueError, match="expected"):
        library.address(buffer, dtype, (2, 3))


def test_addresses_of_rows():
    matrix = torch.zeros(4, 200)[:, 64:128]
    found = library.row_addresses(matrix, torch.float32, 64)
    assert found.tolist() == [row.data_ptr() for row in matrix]
    for wrong in (matrix.double(), matrix[:, ::2], matrix[:, :32], matrix.to("meta")):
        with pytest.raises(ValueError, match="expected"):
            library.row_addresses(wrong, torch.float32, 64)


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**32, 10**30])
def test_refuses_integers_that_are_cut_off(value):
    with pytest.raises(OverflowError, match="rows is"):
        library.Step(rows=value)
    step = library.Step()
    with pytest.raises(OverflowError, match="rows is"):
        step.rows = value
    step.rows, step.slot_stride = 2**31 - 1, 2**40
    assert (step.rows, step.slot_stride) == (2**31 - 1, 2**40)


def test_scratch_grows_and_is_each_thread_s_own():
    scratch, others = library.Scratch(), []
    first = scratch.address(1000)
    assert scratch.address(10) == first
    thread = threading.Thread(target=lambda: others.append(scratch.address(1000)))
    thread.start()
    thread.join()
    assert others[0] != first
