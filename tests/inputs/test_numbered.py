"""Numbers in names: the order of files, and which are missing."""

import random

import pytest

from inputs import files, numbered


@pytest.mark.parametrize(
    "names",
    [
        "frame_2.jpg frame_10.jpg frame_100.jpg",
        "0.25.jpg 0.5.jpg 0.75.jpg 1.0.jpg 1.25.jpg 10.0.jpg",
        "0.050.jpg 0.100.jpg 1.000.jpg",
        "-10.jpg -2.5.jpg -1.jpg 0.jpg 3.jpg",
        "t_-1.5.jpg t_-0.5.jpg t_2.jpg",
        "t=-3.jpg t=4.jpg",
        "1e-05.jpg 1e-3.jpg 0.5.jpg 1.5e+2.jpg 151.jpg 1E+16.jpg",
        "t_-1e-3.jpg t_-1e-5.jpg t_1e-3.jpg",
        # a minus that separates, or joins
        "frame-2.jpg frame-10.jpg",
        "v1-2_9.jpg v1-2_10.jpg v1-10_1.jpg",
        "2023-12-31.jpg 2024-01-02.jpg 2024-01-10.jpg 2024-02-01.jpg",
        "002-003_37775.jpg 002-003_37779.jpg 002-004_5.jpg",
        # a point that does
        "a.b.3.jpg a.b.10.jpg",
        "1.2.9.jpg 1.2.10.jpg 1.3.1.jpg",
        "2024.01.02.jpg 2024.01.10.jpg",
        "1.1.jpg 1.2.jpg 1.9.jpg 1.10.jpg 1.11.jpg 2.1.jpg",
        # an e that is no exponent: in an episode, in hexadecimal
        "s1e3.jpg s1e10.jpg s2e1.jpg",
        "f2e-9.jpg f2e-10.jpg",
        "v1_9.jpg v1_10.jpg v2_1.jpg",
        "1.jpg 01.jpg 2.jpg",
        "cover.jpg poster.jpg",
    ],
)
def test_names_are_in_the_order_of_their_numbers(names, tmp_path):
    names = names.split()
    mixed = random.Random(0).sample(names, len(names))
    expected = sorted(names[:2]) + names[2:] if names[0] == "1.jpg" else names  # equal numbers: by name
    assert numbered.in_order(tuple(mixed)) == tuple(expected)
    for name in mixed:
        (tmp_path / name).touch()
    assert files.listed(tmp_path.parent, tmp_path.name) == [f"{tmp_path.name}/{name}" for name in expected]


def test_numbers_are_compared_where_names_are_alike_otherwise():
    assert numbered.numbers(["v/f_1.jpg", "v/f_0.5.jpg"]) == [(1,), (0.5,)]
    assert numbered.numbers(["v/f_1.jpg", "v/g_2.jpg"]) == numbered.numbers(["v/f_1.jpg", "w/f_2.jpg"]) == []
    assert numbered.numbers([]) == []
