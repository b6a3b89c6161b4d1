"""``make hunt`` itself."""

from tests.properties.hunt import main

PROPERTY = """
from hypothesis import strategies as st
from tests.properties.checking import holds_for

@holds_for(number=st.integers())
def test_numbers_are_small(number):
    assert number < {limit}
"""


def hunt(folder, capsys, limit):
    (folder / "test_toys.py").write_text(PROPERTY.format(limit=limit))
    status = main(["--minutes", "0", "--seed", "7"], folder)
    return status, capsys.readouterr().out


def test_a_line_for_each_round(tmp_path, capsys):
    status, out = hunt(tmp_path, capsys, "float('inf')")
    assert status == 0
    assert out.startswith("round 1, seed 7: 1 passed")
    assert out.count("\n") == 1


def test_a_failure_is_shown_as_its_smallest_example(tmp_path, capsys):
    status, out = hunt(tmp_path, capsys, 1234)
    assert status == 1
    assert "number=1234," in out
    assert out.endswith("make hunt HUNT_SEED=7\n")
