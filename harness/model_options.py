"""The options of every command that runs a model: which one, how long, where, in what precision."""

from dataclasses import dataclass

from jsonargparse import ArgumentParser, Namespace

from harness.config import Dtype, default_prompts, read_prompts
from harness.environment import resolve_device
from harness.errors import BenchError
from harness.models import DEMO, MODEL_CHOICE, LoadedModel, check_request, load_model


@dataclass(frozen=True)
class ModelOptions:
    """Which model to run, and how.

    Args:
        model (str): as in `harness.models.load_model`.
        steps (int, Optional): steps of the schedule. Default: the model's
        device (str): ``auto``, ``cpu`` or ``cuda[:INDEX]``.
        dtype (str, Optional): None means the model's usual one.
    """

    model: str
    steps: int | None
    device: str
    dtype: str | None

    def load(self) -> LoadedModel:
        """The model on its device.

        Raises:
            BenchError: it cannot be loaded, or the device is not there.
        """
        requested = {"steps": self.steps}
        check_request(self.model, requested)
        return load_model(self.model, requested, resolve_device(self.device), self.dtype)

    def first_prompts(self, count: int, asked: str) -> list[str]:
        """The first prompts of the file that fits the model.

        Args:
            count (int): how many.
            asked (str): the options that ask for so many, for the message.

        Raises:
            BenchError: the file cannot be read or has fewer.
        """
        path = default_prompts(self.model)
        prompts = read_prompts(path)
        if len(prompts) < count:
            raise BenchError(f"{asked} need {count} prompts, {path} has {len(prompts)}")
        return prompts[:count]


def add_model_options(parser: ArgumentParser, choose_dtype: bool = True) -> None:
    """Let a command line choose a model, and its dtype unless the command fixes that."""
    parser.add_argument("--model", type=str, default=DEMO, help=MODEL_CHOICE)
    parser.add_argument("--steps", type=int, help="steps of the schedule (default: the model's)")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda[:INDEX]")
    if choose_dtype:
        parser.add_argument("--dtype", type=Dtype, help="default: float32 on CPU, half on CUDA")


def read_model_options(options: Namespace) -> ModelOptions:
    """What the command line chose."""
    return ModelOptions(options.model, options.steps, options.device, options.dtype)
