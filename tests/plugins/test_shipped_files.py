"""Files that come with plugins for the demo model name it as `harness.tune` and `harness.compose` would."""

import json
from pathlib import Path

import pytest
import torch

from core.assignment import HeadAssignment
from core.calibration import Calibration
from core.denoiser_record import DenoiserRecord
from harness.demo_model import WEIGHTS_DIR
from plugins.combined import composition
from plugins.sparge import loading

FILES = {
    **dict.fromkeys(sorted(loading.FOLDER.glob("*.json")), Calibration),
    **dict.fromkeys(sorted(composition.FOLDER.glob("*.json")), HeadAssignment),
}


@pytest.fixture(scope="module")
def record():
    from diffusers import CogVideoXTransformer3DModel

    config = CogVideoXTransformer3DModel.load_config(WEIGHTS_DIR / "transformer")
    with torch.device("meta"):
        return DenoiserRecord.of(CogVideoXTransformer3DModel.from_config(config))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_the_record_is_the_demo_models(path: Path, record, tmp_path):
    file = FILES[path].load(path)
    assert file.model == "demo" and file.denoisers == [record]
    file.save(tmp_path / "again.json")
    written, shipped = json.loads((tmp_path / "again.json").read_text()), json.loads(path.read_text())
    assert written["denoisers"] == shipped["denoisers"]
    assert list(written["denoisers"][0]["config"]) == list(shipped["denoisers"][0]["config"])
