"""Frame patterns on queries, keys and values of the demo model."""

import pytest
import torch

from core import create_strategy
from core.strategy import AttentionStrategy, dense_result
from harness.generate import denoise
from harness.models import DEMO, load_model
from harness.tuning import relative_l1
from plugins.combined.classes import ClassOptions, pattern_heads

THRESHOLDS = (0.8, 0.85, 0.9)
FORMS = {
    "anchors": {"anchors": 3, "exact_rows": 0.0},
    "anchors and rows": {"anchors": 3, "exact_rows": 0.2},
    "columns": {"form": "columns"},
}


class Probe(AttentionStrategy):
    """Dense attention that measures frame patterns in the last step."""

    name = "probe"

    def __init__(self):
        super().__init__()
        self.errors = {form: [] for form in FORMS}
        self.alike = {threshold: [] for threshold in THRESHOLDS}
        options = {"classes": "pattern", "places": 32}
        self.forms = {form: create_strategy("combined", **options, **given) for form, given in FORMS.items()}

    def attend(self, query, key, value, context):
        exact = dense_result(query, key, value)
        if context.step_index == context.num_steps - 1:
            for form, strategy in self.forms.items():
                output = strategy.attend(query, key, value, context).output
                self.errors[form].append(relative_l1(output, exact.output))
            for threshold in THRESHOLDS:
                numbers = ClassOptions(32, 3, 1.0, threshold, 0)
                self.alike[threshold].append(pattern_heads(query, key, context, numbers)[0])
        return exact


@pytest.fixture(scope="module")
def measured():
    model = load_model(DEMO, {"steps": 2}, torch.device("cpu"))
    probe = Probe()
    denoise(model, probe, "a large red ball bounces by the sea", 0)
    errors = {form: torch.stack(parts).flatten() for form, parts in probe.errors.items()}
    return errors, {threshold: torch.stack(parts).flatten() for threshold, parts in probe.alike.items()}


def test_patterns_come_close_to_attention_on_real_inputs(measured):
    errors, _ = measured
    means = {form: float(error.mean()) for form, error in errors.items()}
    assert means["anchors and rows"] < means["anchors"] < means["columns"] < 0.3


def test_a_higher_threshold_leaves_fewer_heads_with_smaller_errors(measured):
    errors, alike = measured
    shares = [float(alike[threshold].float().mean()) for threshold in THRESHOLDS]
    assert 1 > shares[0] > shares[1] > shares[2] > 0
    for form in ("anchors", "anchors and rows"):
        assert errors[form][alike[0.9]].mean() < errors[form].mean()
