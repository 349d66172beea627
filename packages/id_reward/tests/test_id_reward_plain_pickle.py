"""Plain data out of pickles: what Python would read, or a refusal; nothing is ever run."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from id_reward.serving.plain_pickle import MOST_INSTRUCTIONS, read_plain, write_plain

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=300)
)
PLAIN = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=4) | st.tuples(inner, inner)
    ),
    max_leaves=12,
)


@given(PLAIN, st.sampled_from([3, 4, 5]))
@settings(deadline=None)
def test_plain_data_is_read_as_python_reads_it(data, protocol) -> None:
    assert read_plain(pickle.dumps(data, protocol=protocol)) == data


@given(st.dictionaries(st.text(), st.text() | st.lists(st.floats(allow_nan=False)), max_size=4))
@settings(deadline=None)
def test_what_is_written_python_reads(content) -> None:
    assert pickle.loads(write_plain(content)) == content == read_plain(write_plain(content))


class Evil:
    """Unpickling it would run a command."""

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.system, ("touch /tmp/id_reward_was_here",)


@pytest.mark.parametrize(
    "thing", [Evil(), {"x": [Evil()]}, OrderedDict(a=1), np.zeros(3), np.float64(1), {1, 2}, os.system, 1j, Evil]
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_everything_else_is_refused(thing, protocol) -> None:
    with pytest.raises(ValueError, match="must hold dictionaries, lists, strings, bytes and numbers"):
        read_plain(pickle.dumps(thing, protocol=protocol))
    assert not os.path.exists("/tmp/id_reward_was_here")


def test_mutated_pickles_give_data_or_a_refusal() -> None:
    rng = np.random.default_rng(0)
    good = pickle.dumps({"images": [b"x" * 30], "prompts": ["a", "b"], "metadata": {"n": [1, 2.5, None, (1, True)]}})
    refused: list[str] = []
    for _ in range(2000):
        data = bytearray(good[: rng.integers(1, len(good) + 1)])
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        try:
            read_plain(bytes(data))
        except ValueError as error:
            refused.append(str(error))
    assert 500 < len(refused) < 2000 and not any("\n" in message for message in refused)


def test_a_long_walk_is_cut_short() -> None:
    with pytest.raises(ValueError, match="at most 100,000 instructions"):
        read_plain(b"\x80\x04" + b"N" * MOST_INSTRUCTIONS + b".")
    with pytest.raises(ValueError, match="whole"):
        read_plain(b"\x80\x04]")
