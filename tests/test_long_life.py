"""A long life: hypothesis does to a model what its users may, and a plain model is led along."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from long_life import ACTIONS, KINDS, Draw, Life

STEPS = 20  # of each kind, twice
QUICK = settings(
    max_examples=2,  # the first makes nothing but the same step
    stateful_step_count=STEPS,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[*HealthCheck],
)


def machine_of(kind: str, made: Counter[str]) -> type[RuleBasedStateMachine]:
    """Return the machine of one kind of life. made: counts what was done."""

    class LongLife(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.life = Life(kind)

        @invariant()
        def the_two_agree(self) -> None:
            self.life.check()

        def teardown(self) -> None:
            self.life.end()

    def action(name: str, does: Callable[[Life, Draw], None]) -> Callable[..., None]:
        def run(self: LongLife, data: st.DataObject) -> None:
            made[name] += 1
            does(self.life, lambda below: data.draw(st.integers(0, below - 1)))

        return rule(data=st.data())(run)

    for name, does in ACTIONS.items():
        setattr(LongLife, name, action(name, does))
    for i in range(6):  # of all that happens, half are steps; hypothesis begins with the first name
        setattr(LongLife, f"a_step_{i}", action("step", ACTIONS["step"]))
    return LongLife


@pytest.mark.parametrize("kind", KINDS)
def test_it_stays_the_plain_model_that_is_led_along(kind):
    made: Counter[str] = Counter()
    machine = seed([*KINDS].index(kind))(machine_of(kind, made))
    run_state_machine_as_test(machine, settings=QUICK)
    assert made.total() == 2 * STEPS and len(made) >= 5, made
