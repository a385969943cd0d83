"""Units: sizes and counts as people write them, read back exactly, and everything else refused."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from growlm.errors import ConfigError, GrowlmError
from growlm.units import format_count, format_seconds, format_size, parse_count, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("17", 17),
        ("17B", 17),
        ("1kB", 1_000),
        ("1KB", 1_000),
        ("2MB", 2_000_000),
        ("2GB", 2_000_000_000),
        ("2gb", 2_000_000_000),
        ("2G", 2_000_000_000),
        ("500m", 500_000_000),
        ("1TB", 10**12),
        ("1KiB", 1024),
        ("512MiB", 512 * 1024**2),
        ("2GiB", 2 * 1024**3),
        ("1TiB", 1024**4),
        ("1.5GB", 1_500_000_000),
        ("0.5KiB", 512),
        (" 2 GB ", 2_000_000_000),
        (1_000_000, 1_000_000),
    ],
)
def test_parse_size(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("1000", 1000),
        ("250k", 250_000),
        ("250K", 250_000),
        ("4M", 4_000_000),
        ("1.5m", 1_500_000),
        ("2B", 2 * 10**9),
        ("1T", 10**12),
        (" 3 k ", 3000),
        (12, 12),
    ],
)
def test_parse_count(text, count):
    assert parse_count(text) == count


BAD = ["", " ", "-1", "+1", "GB", "1,5", "1_000", "1e9", "0x10", ".5", "1.", "nan", "inf", "1 2", "1MM", "None", "True"]


@pytest.mark.parametrize("text", [*BAD, "2GG", "4Q", "1kib/s", "2 G B"])
def test_a_bad_size_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="is not a size") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)
    assert "2GB" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [*BAD, "4MB", "4KiB"])
def test_a_bad_count_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="is not a count") as caught:
        parse_count(text)
    assert repr(text) in str(caught.value)
    assert "4M" in str(caught.value)


@pytest.mark.parametrize("parse", [parse_size, parse_count])
@pytest.mark.parametrize("value", [-1, True, None, 1.0e30])
def test_numbers_that_are_none_are_refused(parse, value):
    with pytest.raises(ConfigError):
        parse(value)


@given(st.integers(0, 2**53))
def test_whole_numbers_come_back(number):
    assert parse_size(number) == parse_size(str(number)) == parse_count(number) == number


@given(st.text(max_size=12) | st.from_regex(r"\s*\d{0,400}(\.\d{0,20})?\s*[A-Za-z]{0,4}\s*", fullmatch=True))
@example("9" * 400)
def test_any_text_is_a_number_or_an_error_of_ours(text):
    for parse in (parse_size, parse_count):
        with suppress(GrowlmError):
            assert parse(text) >= 0


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_400_000_000, "1.4 GB"),
        (25_000_000, "25.0 MB"),
        (3 * 10**12, "3.0 TB"),
        (5 * 10**15, "5000.0 TB"),
        (-2000, "-2.0 kB"),
    ],
)
def test_format_size(num_bytes, text):
    assert format_size(num_bytes) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (8_200_000, "8.2 M"), (1500, "1.5 k"), (7 * 10**9, "7.0 B"), (2 * 10**12, "2.0 T")],
)
def test_format_count(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 0 min"),
        (86_400, "24 h 0 min"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


@given(st.integers(0, 10**15))
def test_what_is_formatted_can_be_parsed_and_is_near(number):
    for text, parse in ((format_size(number), parse_size), (format_count(number), parse_count)):
        assert parse(text) == pytest.approx(number, rel=0.06, abs=0.5)
