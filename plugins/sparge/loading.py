"""Calibrations by name or file, checked against the parameters they are used with."""

from pathlib import Path
from typing import Any

from core.calibration import Calibration
from core.errors import ParameterError
from plugins.sparge.published import PUBLISHED_SUFFIX, read_published

FOLDER = Path(__file__).parent / "calibrations"
RULES = ("topk", "cdf")
CALIBRATED = (*RULES, "similarity_threshold", "skip_threshold")


def load_calibration(named: str, parameters: Any) -> Calibration:
    """A calibration of sparge.

    Args:
        named (str): name of one that comes with this plugin, or a file.
        parameters (SpargeParameters): what it is used with.

    Raises:
        ParameterError: it does not exist, is of another strategy, or was made with other parameters.
    """
    calibration = _read(named)
    names = set(calibration.values)
    if calibration.strategy != "sparge" or not names <= {*CALIBRATED} or len(names & {*RULES}) != 1:
        raise ParameterError(
            f"calibration {named} is for {', '.join(calibration.values)} of strategy "
            f"'{calibration.strategy}'; sparge takes one for either {' or '.join(RULES)} of its own, and "
            f"perhaps {' and '.join(CALIBRATED[2:])}"
        )
    for name in calibration.values:
        if getattr(parameters, name) is not None:
            raise ParameterError(f"calibration {named} sets {name} of every head; leave {name} out")
    for name, value in calibration.parameters.items():
        if getattr(parameters, name, value) != value:
            raise ParameterError(
                f"calibration {named} was made with {name}={value}, got {getattr(parameters, name)}; set it "
                "likewise, or run python -m harness.tune with your value"
            )
    return calibration


def _read(named: str) -> Calibration:
    own = FOLDER / f"{named}.json"
    path = own if own.is_file() else Path(named)
    return read_published(path) if path.suffix == PUBLISHED_SUFFIX else Calibration.load(path)
