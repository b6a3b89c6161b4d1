import pytest

from llamagen.support.names import as_index, is_visible, normal_name


def test_composes_names():
    assert normal_name(" cafe\u0301 ") == "caf\u00e9"


@pytest.mark.parametrize(("text", "number"), [("0", 0), (" 12 ", 12), ("007", 7)])
def test_reads_ascii_digits(text, number):
    assert as_index(text) == number


@pytest.mark.parametrize("text", ["", "-1", "+1", "1_0", "1.0", "\u0663", "\uff11", "9" * 5000])
def test_other_texts_are_no_numbers(text):
    assert as_index(text) is None


@pytest.mark.parametrize(
    "text", ["", " \n", "\u200b\u2060\ufeff", "\u3000", "\u2800\u3164", "\ufe0f", "\u0301", "\xad"]
)
def test_nothing_to_see(text):
    assert not is_visible(text)


@pytest.mark.parametrize("text", ["a", "\u200ba", "!", "\u732b", "\U0001f469\u200d\U0001f680"])
def test_something_to_see(text):
    assert is_visible(text)
