"""Memory-efficient training by model surgery: `surgery.apply(model, "misa")`, then any loop."""

import importlib as _importlib
import warnings as _warnings
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from typing import Any as _Any

from surgery.api import apply as apply
from surgery.api import coordinates as coordinates
from surgery.api import graphs as graphs
from surgery.api import remove as remove
from surgery.api import report as report
from surgery.api import step as step
from surgery.catalogue import available as available
from surgery.checkpoints.dcp import Stateful as Stateful
from surgery.checkpoints.plain import export as export
from surgery.checkpoints.run import load as load
from surgery.checkpoints.run import save as save
from surgery.checkpoints.run import saved_passes as saved_passes
from surgery.checkpoints.scalars import journal as journal
from surgery.checkpoints.scalars import replay as replay
from surgery.contract.registry import register as register
from surgery.errors import CaptureError as CaptureError
from surgery.errors import CheckpointError as CheckpointError
from surgery.errors import ConflictError as ConflictError
from surgery.errors import ModelError as ModelError
from surgery.errors import OptimizerError as OptimizerError
from surgery.errors import OptionError as OptionError
from surgery.errors import SurgeryError as SurgeryError
from surgery.errors import TargetError as TargetError
from surgery.errors import extra as _extra
from surgery.reports.exhausted import explain_oom as explain_oom
from surgery.reports.fitting import fit as fit
from surgery.reports.predicted import plan as plan
from surgery.weights.coordinate import Coordinates as Coordinates

__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
    if name == "testing":
        return _importlib.import_module("surgery.testing")
    if name == "TrainerCallback":  # loads transformers' Trainer, and with it a second of imports
        try:
            return _importlib.import_module("surgery.checkpoints.trainer").TrainerCallback
        except ModuleNotFoundError as error:
            raise _extra("hf", "the callback of the HF Trainer needs transformers") from error
    raise AttributeError(f"module 'surgery' has no attribute {name!r}")


def _warn_of_namesake() -> None:
    """Say so if the unrelated PyPI distribution `surgery` shares our import name."""
    try:
        other = _version("surgery")
    except _PackageNotFoundError:
        return
    _warnings.warn(
        f"the distribution 'surgery' {other} (a media metadata tool, not this library) is "
        "installed too and writes into the same folder. Remove it and reinstall this one: "
        "pip uninstall surgery && pip install --force-reinstall --no-deps model-surgery",
        RuntimeWarning,
        stacklevel=3,
    )


_warn_of_namesake()
