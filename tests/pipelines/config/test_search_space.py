"""Domains know their values, and values get to their keys in the parameters."""

import pytest
from pydantic import TypeAdapter

from pipelines.config.search_space import Domain, flatten, get, nest, put


def test_put_changes_the_given_keys_alone() -> None:
    before = {"a": {"b": {"c": 1, "d": 2}}, "e": 3}
    after = put(before, {"a.b.c": 7})
    assert after == {"a": {"b": {"c": 7, "d": 2}}, "e": 3}
    assert before["a"] == {"b": {"c": 1, "d": 2}}
    assert get(after, "a.b.c") == 7
    assert nest({"a.b.c": 7, "a.x": 1}) == {"a": {"b": {"c": 7}, "x": 1}}
    assert dict(flatten(nest({"a.b.c": 7, "a.x": 1}))) == {"a.b.c": 7, "a.x": 1}


@pytest.mark.parametrize("key", ["a.x", "a.b.c.d", "z", "a..c"])
def test_put_refuses_an_unknown_key(key: str) -> None:
    with pytest.raises(ValueError, match="there is no"):
        put({"a": {"b": {"c": 1}}}, {key: 1})


@pytest.mark.parametrize(
    ("domain", "inside", "outside"),
    [
        ({"kind": "uniform", "low": 0, "high": 1}, [0, 0.5, 1], [-0.1, 1.1, "0.5", True]),
        ({"kind": "log_uniform", "low": 0.1, "high": 10}, [0.1, 10], [0.01]),
        ({"kind": "integer", "low": 2, "high": 4}, [2, 4], [1, 5]),
        ({"kind": "choice", "values": ["a", "b"]}, ["a"], ["c", 1]),
    ],
)
def test_a_domain_contains_its_bounds_and_no_value_outside(
    domain: dict, inside: list, outside: list
) -> None:
    built = TypeAdapter(Domain).validate_python(domain)
    assert all(built.contains(value) for value in inside)
    assert not any(built.contains(value) for value in outside)
    assert all(built.contains(bound) for bound in built.bounds())
