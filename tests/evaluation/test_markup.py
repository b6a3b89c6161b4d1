import math

import numpy as np
import pytest

from llamagen.evaluation.markup import (
    column_texts,
    escaped,
    fixed_text,
    number_text,
    setting_text,
    spelled,
    value_text,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (2.19731, "2.197"),
        (3.80, "3.8"),
        (0.83449, "0.8345"),
        (0.99999, "1"),
        (999.96, "1,000"),
        (123456.78, "123,457"),
        (50_000, "50,000"),
        (-3, "\N{MINUS SIGN}3"),
        (0.00012345, "0.0001234"),
        (0.0000123456, "1.235 \N{MULTIPLICATION SIGN} 10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT FIVE}"),
        (1.5e12, "1.5 \N{MULTIPLICATION SIGN} 10\N{SUPERSCRIPT ONE}\N{SUPERSCRIPT TWO}"),
        (math.nan, "not a number"),
        (math.inf, "infinite"),
        (-math.inf, "minus infinite"),
        (np.float32(0.5), "0.5"),
        (np.int64(1234), "1,234"),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert number_text(value) == text


def test_a_column_has_common_decimals():
    assert column_texts([5.46, 3.8, 3.07]) == ["5.46", "3.80", "3.07"]
    assert column_texts([1, 1.5, 2]) == ["1.0", "1.5", "2.0"]


def test_numbers_far_apart_keep_their_own_decimals():
    assert column_texts([0.00123, 12.3]) == ["0.00123", "12.3"]


def test_columns_take_what_is_no_number():
    assert column_texts(["all", 100, 2000, None]) == ["all", "100", "2,000", "\N{EN DASH}"]
    assert column_texts([math.nan, 2.5, math.inf]) == ["not a number", "2.5", "infinite"]
    assert column_texts([True, None]) == ["yes", "\N{EN DASH}"]
    assert column_texts([]) == []


def test_what_rounds_to_zero_has_no_sign():
    assert fixed_text(-0.0004, 2) == "0.00"
    assert fixed_text(-0.04, 2) == "\N{MINUS SIGN}0.04"
    assert column_texts([-0.0, 0.5]) == ["0.0", "0.5"]


def test_settings_keep_all_digits():
    assert setting_text(0.123456789) == "0.123456789"
    assert setting_text(20240601) == "20240601"
    assert setting_text([1, None, 2.5]) == "1, \N{EN DASH}, 2.5"
    assert setting_text({"top_k": 3}) == "top k 3"
    assert setting_text(False) == "no"
    assert setting_text(math.nan) == "not a number"


def test_names_are_spelled_for_people():
    assert spelled("best_fid") == "best FID"
    assert spelled("bits_per_code") == "bits per code"
    assert spelled("/data/my_fid") == "/data/my_fid"


def test_text_is_escaped():
    assert escaped("""<b a='"'>&""") == "&lt;b a=&#x27;&quot;&#x27;&gt;&amp;"


def test_what_no_page_can_hold_is_replaced():
    text = escaped("a\x00b\udcffc\nd")
    assert text == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c\nd"
    text.encode("utf-8")


def test_none_is_a_dash():
    assert value_text(None) == "\N{EN DASH}"
