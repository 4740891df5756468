"""How far a mean could lie from the truth: intervals that know which questions belong together."""

import math
import statistics

import numpy as np


def clustered_interval(values: list, groups: list, lowest: float = 0.0, resamples: int = 2000) -> list[float] | None:
    """The 95 % interval [low, high] of the mean of `values` (n,), by a bootstrap over complete groups.

    The questions of one image or patient are not independent: resampled one by one they give an interval that is far
    too narrow. None for a single group, which says nothing about another.

    Percentiles alone are far too narrow as well near 100 %, and for few groups. So two groups are added to those
    resampled, one of the highest value (1) and one of the `lowest` (0; of differences -1), as Agresti and Coull (1998)
    add a success and a failure or two to a proportion; and the percentiles are widened as a t interval is (Hesterberg
    2015, section 4.4, "expanded percentile").
    """
    of = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    if len(of) < 2:
        return None
    values, index = np.asarray(values, dtype=float), np.array([of[group] for group in groups])
    sums, sizes = np.bincount(index, values), np.bincount(index).astype(float)  # (groups,)
    # each added group is worth one independent question: the design effect, from 1 to the size of a group
    alone = values.var() * len(values)
    together = np.sum((sums - values.mean() * sizes) ** 2) * len(of) / (len(of) - 1)
    size = min(max(together / alone, 1.0), sizes.mean()) if alone else sizes.mean()
    sums, sizes = np.append(sums, [size, lowest * size]), np.append(sizes, [size, size])  # (groups + 2,)
    random, means = np.random.default_rng(0), []
    for _ in range(0, resamples, 100):  # a few at a time: memory does not grow with their number
        drawn = random.integers(len(sums), size=(100, len(sums)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    tail = tail_of(len(sums))
    return np.quantile(np.concatenate(means), [tail, 1 - tail]).tolist()


def tail_of(groups: int) -> float:
    """The share of resamples that lies outside on either side: 2.5 %, less for few groups, as a t interval is wider."""
    normal, freedom = statistics.NormalDist(), groups - 1
    z = normal.inv_cdf(0.975)
    # Student's t from the normal quantile (Abramowitz & Stegun 26.7.5)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return normal.cdf(-t * math.sqrt(groups / freedom))


def resampled_intervals(figures, groups: list, resamples: int = 2000) -> list[list[float] | None] | None:
    """The 95 % interval of each of figures(places), a list of numbers without bounds, over complete groups as above.

    Nothing can be added to these groups. So it is None for fewer than six: the truth lies between the lowest and the
    highest of five in less than 95 % of cases. A figure that is undefined (NaN) in a resample has no interval either.
    """
    of = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    if len(of) < 6:
        return None
    index, random = np.array([of[group] for group in groups]), np.random.default_rng(0)
    drawn = (np.bincount(random.integers(len(of), size=len(of)), minlength=len(of)) for _ in range(resamples))
    found = [figures(np.repeat(np.arange(len(index)), times[index])) for times in drawn]
    ends = np.quantile(found, [tail_of(len(of)), 1 - tail_of(len(of))], axis=0).T
    return [None if np.isnan(pair).any() else pair.tolist() for pair in ends]


def united(sets: list) -> dict:
    """{member: number}: the same for members of one set, and of sets that share members, also through others."""
    parent = {}

    def root(member):
        while parent.setdefault(member, member) != member:
            parent[member] = member = parent[parent[member]]
        return member

    for members in sets:
        for member in members:
            parent[root(member)] = root(members[0])
    numbers = {}
    return {member: numbers.setdefault(root(member), len(numbers)) for member in list(parent)}
