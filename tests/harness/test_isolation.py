import os
import time

from harness.isolation import run_isolated


def work(item, setting):
    if item == "hang":
        time.sleep(60)
    if item == "crash":
        os._exit(7)
    if item == "raise":
        raise ValueError("bad\nmore")
    return f"{item} on {setting}".encode()


def test_hangs_and_crashes_are_results_and_the_rest_goes_on():
    items = ["first", "raise", "crash", "second", "hang", "last"]
    results = run_isolated(work, items, "gpu", timeout_s=0.5, start_s=20.0)
    found = dict(results)
    assert list(found) == items
    assert found["first"] == b"first on gpu" and found["last"] == b"last on gpu"
    assert found["raise"] == "ValueError: bad"
    assert "exit code 7" in found["crash"]
    assert "within 0.5 s: it hangs" in found["hang"]
