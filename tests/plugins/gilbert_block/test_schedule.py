import pytest

from plugins.gilbert_block.schedule import scheduled


def test_runs_from_the_first_to_the_last_value_along_a_sigmoid():
    values = [scheduled((0.98, 0.9), step, 50) for step in range(50)]
    assert values == sorted(values, reverse=True)
    # sigma(-6) = 0.00247 of the way, and as much before the end
    assert values[0] == pytest.approx(0.98 - 0.08 * 0.0024726) and values[-1] == pytest.approx(0.9001978)
    assert (values[24] + values[25]) / 2 == pytest.approx(0.94)
    assert scheduled((0.1, 0.5), 25, 51) == pytest.approx(0.3)


def test_stays_where_there_is_no_schedule():
    assert scheduled((0.7, 0.7), 3, 10) == 0.7
    assert scheduled((0.9, 0.5), 7, None) == 0.9
    assert scheduled((0.9, 0.5), 0, 1) == 0.9
    assert scheduled((0.9, 0.5), 70, 50) == scheduled((0.9, 0.5), 49, 50)
