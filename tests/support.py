"""What is tested with what, read off the parameters of the tests: docs/support_matrix.md.

python tests/support.py    # writes the page
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import test_backend
import test_compress
import test_distributed
import test_export
import test_flat_lora
import test_freezing
import test_fsdp
import test_laws
import test_lightning
import test_optimizers
import test_other_code
import test_other_trainers
import test_peft
import test_sherl_runs
import test_trainer
import test_trim
import test_zeroth_runs
from laws import ADAPTED, BARE, PASSES, SIDE, WORDS
from ranks import SHARDED

import surgery

PAGE = Path(__file__).parent.parent / "docs" / "support_matrix.md"
TITLE = """# Support matrix

Made from the parameters of the tests (`python tests/support.py`). *yes*: a test runs the pass
with it, alone or with others. *error*: a test sees an error that names the pass. A dot: no test
tries it. *Copies* are those of `deepcopy` and `pickle`, *closures* those of
`optimizer.step(closure)`, *hooks* those on modules; *freezing* is switching weights off and on
during a run. [What to expect of each integration](support.md).
"""

# Table -> what stands in its columns.
TABLES = {
    "A run": ["plain loop", "save, load", "export", "copies", "PEFT"],
    "Other code": ["other optimizers", "closures", "hooks", "freezing"],
    "Trainers": ["HF Trainer", "TRL SFT", "Lightning", "Fabric"],
    "Several processes, compilers": ["Accelerate", "DDP", "FSDP2", "backend="],
}


EVERY = PASSES | ADAPTED | WORDS | SIDE | BARE


@dataclass(frozen=True, kw_only=True)
class Tested:
    """works, refused: tests, whose parameters name passes. also: passes of tests without any."""

    works: Iterable[Callable[..., Any]]
    refused: Iterable[Callable[..., Any]] = ()
    specs: Mapping[str, Callable[[], Any]] = field(default_factory=lambda: EVERY)
    also: Mapping[Callable[..., Any], str] = field(default_factory=dict)


WITH = {
    "plain loop": Tested(works=[test_laws.test_law]),
    "save, load": Tested(works=[test_laws.test_law]),
    "export": Tested(
        works=[test_export.test_5_a_checkpoint_at_any_step_is_a_plain_one],
        also={
            test_flat_lora.test_checkpoints_have_no_noise: "flat_lora",
            test_trim.test_checkpoints_are_whole: "trim",
            test_sherl_runs.test_an_export_loads_with_its_recipe_and_without_it: "sherl",
        },
    ),
    "copies": Tested(works=[test_laws.test_law]),
    "other optimizers": Tested(
        works=[
            test_optimizers.test_rounds_state_and_resume,
            test_optimizers.test_passes_without_coordinates_do_not_mind_the_optimizer,
        ]
    ),
    "closures": Tested(
        works=[
            test_other_code.test_a_step_whose_closure_is_not_finite_changes_nothing,
            test_lightning.test_automatic_optimization_gives_the_plain_loop,
        ]
    ),
    "hooks": Tested(
        works=[test_other_code.test_hooks_on_modules_are_heard_whenever_they_are_put_on]
    ),
    "freezing": Tested(
        works=[test_other_code.test_freezing_holds_and_unfreezing_trains_again],
        specs=test_other_code.ALL_AT_ONCE,
        also={test_freezing.test_a_slope_is_of_what_is_moved: "mezo"},
    ),
    "PEFT": Tested(
        works=[
            test_peft.test_each_pass_moves_what_it_trains_and_nothing_else,
            test_peft.test_exact_passes_leave_the_run_as_it_is,
        ],
        specs=test_peft.MOVING | test_peft.EXACT,
        also={test_compress.test_under_autocast_and_adapters: "compress"},
    ),
    "Accelerate": Tested(works=[test_laws.test_11_accelerate_gives_the_plain_loop]),
    "HF Trainer": Tested(
        works=[test_trainer.test_the_plain_loop_gives_the_same_run],
        also={test_sherl_runs.test_the_trainer_gives_the_plain_loop: "sherl"},
    ),
    "TRL SFT": Tested(
        works=[test_other_trainers.test_sft_trainer],
        refused=[test_other_trainers.test_what_the_fused_head_of_sft_trainer_leaves_no_room_for],
    ),
    "Lightning": Tested(works=[test_lightning.test_automatic_optimization_gives_the_plain_loop]),
    "Fabric": Tested(works=[test_other_trainers.test_fabric]),
    "DDP": Tested(
        works=[
            test_distributed.test_two_ranks_are_one_process_on_the_joined_batch,
            test_zeroth_runs.test_two_ranks_take_the_step_of_one_on_the_joined_batch,
        ],
        also={
            test_flat_lora.test_two_processes_take_the_step_of_one: "flat_lora",
            test_trim.test_ddp_takes_the_step_of_one_process: "trim",
            test_sherl_runs.test_two_processes_take_the_step_of_one: "sherl",
        },
    ),
    "FSDP2": Tested(
        works=[test_fsdp.test_two_ranks_are_one_process_on_the_joined_batch],
        refused=[test_trim.test_fsdp2_is_refused],
        specs=SHARDED | WORDS,
        also={
            test_fsdp.test_a_transformer_is_trained_and_exported: "chunked_loss",
            test_flat_lora.test_two_processes_take_the_step_of_one: "flat_lora",
            test_sherl_runs.test_two_processes_take_the_step_of_one: "sherl",
        },
    ),
    "backend=": Tested(
        works=[test_backend.test_aot_autograd_gives_eagers_run],
        refused=[test_backend.test_passes_that_a_compiler_would_fix_are_refused_by_name],
        specs=test_backend.FIXED | {name: lambda n=name: n for name in surgery.available()},
    ),
}


def words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Iterable):
        for each in value:
            yield from words(each)


def passes_of(
    tests: Iterable[Callable[..., Any]], specs: Mapping[str, Callable[[], Any]]
) -> set[str]:
    """Return the passes that the parameters of tests name."""
    marks = [mark for test in tests for mark in getattr(test, "pytestmark", ())]
    given = {word for mark in marks if mark.name == "parametrize" for word in words(mark.args[1])}
    found = set()
    for name in given & set(specs):
        made = specs[name]()
        for each in made if isinstance(made, list) else [made]:
            found.add(each if isinstance(each, str) else each.name)
    return found


def matrix() -> str:
    """Return the page."""
    own = {file.stem for file in (Path(__file__).parent.parent / "passes").glob("*.py")}
    names = [name for name in surgery.available() if name in own]  # tests register others
    state = {}
    for what, tested in WITH.items():
        works = passes_of(tested.works, tested.specs) | {*tested.also.values()}
        refused = passes_of(tested.refused, tested.specs)
        assert works and not works & refused, what
        state[what] = dict.fromkeys(works, "yes") | dict.fromkeys(refused, "error")
    assert sorted(each for columns in TABLES.values() for each in columns) == sorted(WITH)
    page = TITLE
    for title, columns in TABLES.items():
        lines = [["pass", *columns], ["---"] * (1 + len(columns))]
        lines += [[f"`{n}`", *(state[what].get(n, "·") for what in columns)] for n in names]
        page += f"\n## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return page


if __name__ == "__main__":
    PAGE.write_text(matrix())
