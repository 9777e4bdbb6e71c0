"""The laws of surgery, for passes of any package.

    surgery.testing.check(MyPass())

runs all of them on a small model, and raises `LawError` with what is broken. As pytest tests:

    CASE = surgery.testing.Case(spec=MyPass())  # one: laws share a run of it

    @pytest.mark.parametrize("law", surgery.testing.LAWS)
    def test_my_pass(law):
        surgery.testing.LAWS[law](CASE)

`Case` says what a pass may do: perturb the forward (`forward=`), approximate gradients
(`gradient=`, `average=`). docs/write_a_pass.md has three passes with their tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surgery.testing.case import Case as Case
from surgery.testing.case import LawError as LawError
from surgery.testing.laws import LAWS as LAWS
from surgery.testing.models import Tiny as Tiny
from surgery.testing.models import tiny as tiny
from surgery.testing.models import tokens as tokens
from surgery.testing.ranks import two_ranks as two_ranks


def check(spec: Any, *, laws: Sequence[str] | None = None, ranks: bool = True, **case: Any) -> None:
    """Run the laws on a pass; raise LawError with every law that it breaks.

    Takes about half a minute on one core. spec: an instance, a registered name, or a list of these.
    laws: some of `LAWS` (default: all). ranks: whether to run the pass on two processes as well,
    under DDP and FSDP2; a script must then call this under `if __name__ == "__main__":`, since the
    processes import the script. case: fields of `Case`.
    """
    made = Case(spec=spec, **case)
    broken = []
    for name in LAWS if laws is None else laws:
        try:
            LAWS[name](made)
        except Exception as error:  # of a pass, of any kind: the next law is run all the same
            broken.append(f"law {name}: {type(error).__name__}: {error}")
    if ranks:
        try:
            two_ranks(made)
        except LawError as error:
            broken.append(f"law 12 two processes: {error}")
    if broken:
        raise LawError("\n".join([f"{len(broken)} laws are broken:", *broken]))
