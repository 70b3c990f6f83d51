from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from profiles.ids import Ids

names = st.lists(st.text(max_size=4))


@given(names=names, begin=st.integers(-5, 5), end=st.integers(-5, 5), step=st.sampled_from([1, 2]))
def test_ids_are_a_sequence_of_the_strings_they_were_made_of(
    names: list[str], begin: int, end: int, step: int
) -> None:
    ids = Ids.of(names)
    assert list(ids) == names
    assert [ids[i] for i in range(-len(names), len(names))] == names + names
    part = ids[begin:end:step]
    assert list(part) == names[begin:end:step]
    assert list(part[1:]) == names[begin:end:step][1:]
