"""Calibrations by name or file, checked against the parameters they are used with."""

from pathlib import Path
from typing import Any

from core.calibration import Calibration
from core.errors import ParameterError
from core.parameters import StrategyParameters
from plugins.sparge.published import PUBLISHED_SUFFIX, read_published

FOLDER = Path(__file__).parent / "calibrations"
RULES = ("topk", "cdf")
CALIBRATED = (*RULES, "similarity_threshold", "skip_threshold")
# What no calibration depends on.
FREE = {*StrategyParameters.model_fields, "calibration", "backend"}


def load_calibration(named: str, parameters: Any) -> Calibration:
    """A calibration of sparge.

    Args:
        named (str): name of one that comes with this plugin, or a file.
        parameters (SpargeParameters): what it is used with.

    Raises:
        ParameterError: it does not exist, is of another strategy, has values out of their range, or was made
            with other parameters; those that it does not name count as the defaults.
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
    _check_ranges(named, calibration, type(parameters))
    defaults = {name: field.default for name, field in type(parameters).model_fields.items()}
    for name, value in (defaults | calibration.parameters).items():
        if name not in FREE and (given := getattr(parameters, name, None)) != value:
            raise ParameterError(
                f"calibration {named} was made with {name}={value}, got {given}; set it likewise, or run "
                "python -m harness.tune with your value"
            )
    return calibration


def _check_ranges(named: str, calibration: Calibration, parameters: type[StrategyParameters]) -> None:
    """Refuse values that the parameter itself would; a gate may also be below 0, which is off."""
    for name, table in calibration.values.items():
        numbers = [number for row in table for number in row]
        for number in (min(numbers), max(numbers)):
            value = max(number, 0.0) if name == "similarity_threshold" else number
            try:
                parameters.build(calibration.strategy, {name: value})
            except ParameterError as error:
                raise ParameterError(f"calibration {named}: {error}") from None


def _read(named: str) -> Calibration:
    own = FOLDER / f"{named}.json"
    path = own if own.is_file() else Path(named)
    return read_published(path) if path.suffix == PUBLISHED_SUFFIX else Calibration.load(path)
