"""Labels of one method at several settings are a curve."""

from harness.curves import curve_names


def test_labels_that_differ_in_one_value_share_a_curve():
    dense = [f"sparge:order=gilbert,density={value}" for value in (0.2, 0.3, 0.5)]
    plain = [f"sparge:density={value}" for value in (0.2, 0.3, 0.5)]
    names = curve_names([*plain, "radial", *dense, "tome:r=8"])
    assert names == dict.fromkeys(dense, "sparge:order=gilbert") | dict.fromkeys(plain, "sparge")


def test_two_points_are_no_curve_and_presets_can_be_one():
    presets = [f"combined:preset={name}" for name in ("fast", "demo", "fine")]
    assert curve_names([*presets, "tome:r=8", "tome:r=9"]) == dict.fromkeys(presets, "combined")


def test_a_label_lies_on_its_largest_curve_only():
    labels = ["a:x=1,y=1", "a:x=2,y=1", "a:x=3,y=1", "a:x=4,y=1", "a:x=1,y=2", "a:x=1,y=3"]
    assert curve_names(labels) == dict.fromkeys(labels[:4], "a:y=1")


def test_commas_inside_brackets_belong_to_the_value():
    labels = [f"a:window=[{size},1],b=2" for size in (1, 3, 5)]
    assert set(curve_names(labels).values()) == {"a:b=2"}
