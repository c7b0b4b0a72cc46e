"""Labels and their closure, by hand: what is bound, frozen, and a grid of other axes."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import numpy as np

from lightning_prune.graph.closure import Closure, close
from lightning_prune.graph.labels import ANY, FIXED, LabelSpace


def labels(*values: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(values, np.int64)


# Labels


def test_a_split_axis_merges_back_into_the_labels_it_had() -> None:
    space = LabelSpace()
    flat = space.fresh(12)
    outer, inner = space.split(flat, (3, 4))
    assert (outer.tolist(), inner.tolist()) == ([12, 13, 14], [15, 16, 17, 18])
    assert space.merge([outer, inner]) is flat
    again = space.split(flat, (3, 1, 4))
    assert again[0] is outer
    assert again[1] == ANY
    assert again[2] is inner
    assert len(space.products) == 1


def test_a_merged_axis_splits_back_into_the_labels_it_had() -> None:
    space = LabelSpace()
    a, b = space.fresh(2), space.fresh(3)
    flat = space.merge([a, b])
    assert flat.tolist() == [5, 6, 7, 8, 9, 10]
    assert [axis is label for axis, label in zip(space.split(flat, (2, 3)), (a, b), strict=True)] == [True, True]


def test_binding_follows_what_meets() -> None:
    space = LabelSpace()
    a, b = space.fresh(3), space.fresh(3)
    assert space.bind(a, b, str) is a
    assert space.bind(ANY, b, str) is b
    assert space.bind(ANY, FIXED, str) == FIXED
    assert space.bind(ANY, ANY, str) == ANY
    assert [(x.tolist(), y.tolist()) for x, y in space.pairs] == [([0, 1, 2], [3, 4, 5])]
    assert space.frozen == []
    assert space.bind(a, FIXED, lambda: "the reason") is a
    assert [(axis.tolist(), reason) for axis, reason in space.frozen] == [([0, 1, 2], "the reason")]


# Closure


def test_bindings_of_whole_axes_and_of_parts_of_them_give_the_components_of_their_labels() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        space = LabelSpace()
        axes = [space.fresh(6) for _ in range(12)]
        axes += [axis[rng.permutation(6)] for axis in axes[:2]]
        parts = [axis[start : start + 3] for axis in axes for start in (0, 3)]
        for alike in (axes, parts):
            for _ in range(int(rng.integers(2, 12))):
                space.bind(alike[int(rng.integers(len(alike)))], alike[int(rng.integers(len(alike)))], str)
        expected = np.arange(space.size)
        for _ in range(space.size):
            for a, b in space.pairs:
                expected[a] = expected[b] = np.minimum(expected[a], expected[b])
        found = close(space, space.pairs, []).classes
        assert found.tolist() == np.unique(expected, return_inverse=True)[1].tolist()


def test_axes_of_the_same_channels_are_one_strand() -> None:
    space = LabelSpace()
    a, b, c = (space.fresh(6) for _ in range(3))
    space.bind(a, b, str)
    space.bind(a[:3], c[:3], str)
    space.split(a, (2, 3))
    closure = close(space, space.pairs, [])
    strand = closure.along(a)
    assert strand is closure.along(b)
    assert strand is closure.along(a.copy())
    assert strand is not closure.along(c)
    assert list(closure.strands([b, ANY, c, a])) == [strand, closure.along(c)]
    assert strand.is_grid
    assert strand.positions.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert strand.classes.tolist() == closure.classes[a].tolist()
    twice = closure.along(np.concatenate([a[::-1], a]))
    assert twice.first.tolist() == [5, 4, 3, 2, 1, 0]


def test_a_copy_of_a_closure_does_not_take_other_axes_for_its_own() -> None:
    space = LabelSpace()
    a, b = space.fresh(2), space.fresh(2)
    closure = close(space, [], [])
    assert closure.along(a).classes.tolist() == [0, 1]
    twin = copy.deepcopy(closure)
    twin._along[id(b)] = twin._along.pop(id(a))  # as if b had been made where a once was
    assert twin.along(b).classes.tolist() == [2, 3]


def classes_of(closure: Closure, *values: int) -> list[bool]:
    """Return for each pair of neighbours whether they are one class."""
    found = closure.classes[labels(*values)]
    return [bool(a == b) for a, b in pairwise(found)]


def test_bound_labels_are_one_class_and_share_what_froze_first() -> None:
    space = LabelSpace()
    space.fresh(6)
    closure = close(space, [(labels(0, 1), labels(2, 3)), (labels(3), labels(4))], [(labels(5), 7), (labels(4), 8)])
    assert closure.count == 3
    assert classes_of(closure, 0, 2) == [True]
    assert classes_of(closure, 1, 3, 4) == [True, True]
    assert closure.frozen[closure.classes].tolist() == [False, True, False, True, True, True]
    assert closure.reason[closure.classes].tolist() == [-1, 8, -1, 8, 8, 7]


def test_an_element_of_a_grid_lives_while_both_factors_do() -> None:
    space = LabelSpace()
    flat = space.fresh(6)
    rows, columns = space.split(flat, (2, 3))
    closure = close(space, [], [])
    assert closure.derived[closure.classes].tolist() == [True] * 6 + [False] * 5
    dead = np.zeros(closure.count, np.bool_)
    dead[closure.classes[rows[1]]] = dead[closure.classes[columns[0]]] = True
    assert closure.alive(dead)[flat].tolist() == [False, True, True, False, False, False]


def test_a_frozen_element_freezes_the_factors_it_lives_by() -> None:
    space = LabelSpace()
    flat = space.fresh(6)
    rows, columns = space.split(flat, (2, 3))
    closure = close(space, [], [(flat[4:5], 0)])
    frozen = closure.frozen[closure.classes]
    assert frozen[rows].tolist() == [False, True]
    assert frozen[columns].tolist() == [False, True, False]


def test_a_grid_with_one_free_factor_is_that_factor() -> None:
    space = LabelSpace()
    flat = space.fresh(6)
    rows, columns = space.split(flat, (2, 3))
    closure = close(space, [], [(rows, 0)])
    assert classes_of(closure, flat[0], flat[3], columns[0]) == [True, True]
    assert classes_of(closure, flat[0], flat[1]) == [False]
    assert not closure.frozen[closure.classes[columns]].any()


def test_a_grid_of_frozen_factors_is_frozen() -> None:
    space = LabelSpace()
    flat = space.fresh(6)
    rows, columns = space.split(flat, (2, 3))
    assert close(space, [], [(rows, 0), (columns, 1)]).frozen.all()


def test_equal_grids_have_equal_factors() -> None:
    space = LabelSpace()
    a, b = space.fresh(6), space.fresh(6)
    (rows, columns), (others, more) = space.split(a, (2, 3)), space.split(b, (2, 3))
    closure = close(space, [(a, b)], [])
    assert classes_of(closure, rows[1], others[1]) == [True]
    assert classes_of(closure, columns[2], more[2]) == [True]
    assert classes_of(closure, rows[0], columns[0]) == [False]


def test_grids_of_equal_factors_are_equal() -> None:
    space = LabelSpace()
    a, b = space.fresh(6), space.fresh(6)
    (rows, columns), (others, more) = space.split(a, (2, 3)), space.split(b, (2, 3))
    closure = close(space, [(rows, others), (columns, more)], [])
    assert classes_of(closure, a[4], b[4]) == [True]


def test_repeated_heads_follow_the_one_they_repeat() -> None:
    space = LabelSpace()
    queries = space.fresh(4)  # two of each key-value head
    heads, repeats = space.split(queries, (2, 2))
    closure = close(space, [], [(repeats, 0)])
    assert classes_of(closure, *queries) == [True, False, True]
    assert classes_of(closure, queries[0], heads[0]) == [True]


def test_two_factorisations_of_one_axis_agree_on_the_finer() -> None:
    space = LabelSpace()
    flat = space.fresh(12)
    a, b = space.split(flat, (3, 4))
    c, d = space.split(flat, (6, 2))
    closure = close(space, [], [])
    (b_outer, b_inner), (c_outer, c_inner) = space.split(b, (2, 2)), space.split(c, (3, 2))
    assert classes_of(closure, a[1], c_outer[1]) == [True]
    assert classes_of(closure, b_outer[1], c_inner[1]) == [True]
    assert classes_of(closure, b_inner[1], d[1]) == [True]
    dead = np.zeros(closure.count, np.bool_)
    dead[closure.classes[b_outer[1]]] = True
    alive = closure.alive(dead)
    assert alive[b].tolist() == [True, True, False, False]
    assert alive[c].tolist() == [True, False] * 3
    assert alive[flat].tolist() == [True, True, False, False] * 3


def test_what_a_finer_factorisation_splits_is_split_in_turn() -> None:
    space = LabelSpace()
    few = space.fresh(6)
    twice = space.merge((few, space.fresh(2)))
    flat = space.merge((twice, space.fresh(2)))
    heads, _ = space.split(flat, (3, 8))
    closure = close(space, [], [])
    dead = np.zeros(closure.count, np.bool_)
    dead[closure.classes[heads[1]]] = True
    assert closure.alive(dead)[few].tolist() == [True, True, False, False, True, True]


def test_rows_of_a_grid_over_a_concatenation_agree_with_the_grid_of_a_part() -> None:
    space = LabelSpace()
    part, other = space.fresh(12), space.fresh(6)
    groups, channels = space.split(part, (6, 2))
    whole = np.concatenate([other, part])
    heads, inner = space.split(whole, (3, 6))  # the first is of the other part
    closure = close(space, [], [])
    outer, low = space.split(inner, (3, 2))
    assert classes_of(closure, low[1], channels[1]) == [True]
    dead = np.zeros(closure.count, np.bool_)
    dead[closure.classes[channels[1]]] = True
    alive = closure.alive(dead)
    assert alive[inner].tolist() == [True, False] * 3
    assert alive[whole].tolist() == [True, False] * 9
    dead[closure.classes[channels[1]]] = False
    dead[closure.classes[heads[2]]] = True
    assert closure.alive(dead)[groups].tolist() == [True] * 3 + [False] * 3
    assert len(outer) == 3


def test_factorisations_that_do_not_nest_stay_as_they_are() -> None:
    space = LabelSpace()
    flat = space.fresh(6)
    (rows, columns), (others, more) = space.split(flat, (2, 3)), space.split(flat, (3, 2))
    closure = close(space, [], [])
    assert len(space.products) == 2
    assert len(set(closure.classes[np.concatenate([rows, columns, others, more])])) == 10
