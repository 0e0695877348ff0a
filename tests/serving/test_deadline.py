from __future__ import annotations

import pytest

from llmsparse.serving.deadline import TooSlowError, within


def test_work_that_ends_in_time_gives_what_it_gives() -> None:
    assert within(60, lambda: 5) == 5
    with pytest.raises(KeyError):
        within(60, lambda: {}["x"])


def test_work_that_does_not_end_is_given_up() -> None:
    def forever() -> None:
        while True:
            pass

    with pytest.raises(TooSlowError):
        within(0.05, forever)
    assert within(60, lambda: sum(range(10**5))) > 0, "and the thread goes on"
