"""Packages that are absent, broken or wrong are refused with their reason; present ones agree with fp64."""

import sys
import types

import pytest
import torch

from core import TokenLayout, UnsupportedCallError, attention, dense_packages
from core.dense_packages import PACKAGES, load_function, package_obstacle
from core.testing import dense_fp64, random_qkv

CPU = torch.device("cpu")
LAYOUT = TokenLayout(0, 1, 10, 20)


@pytest.fixture(autouse=True)
def fresh_caches():
    caches = load_function, dense_packages._known_answer_obstacle
    for cache in caches:  # other tests ask for installed packages
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def install(monkeypatch):
    """Put a module with one function in place of a package."""

    def put(name, function):
        package = PACKAGES[name]
        parts = package.module.split(".")
        for end in range(1, len(parts) + 1):
            module = types.ModuleType(".".join(parts[:end]))
            module.__path__ = []
            monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(module, package.function, function)
        load_function.cache_clear()

    return put


def softmax_attention(query, key, value, softmax_scale=None):
    """``[B, N, H, D]``, as FlashAttention takes them."""
    query, key, value = (part.float().transpose(1, 2) for part in (query, key, value))
    scores = query @ key.transpose(2, 3) * (softmax_scale or query.shape[-1] ** -0.5)
    return (torch.softmax(scores, -1) @ value).transpose(1, 2)


def known_answer(name, function, head_dim=64):
    return dense_packages._known_answer_obstacle(name, function, CPU, torch.bfloat16, head_dim)


@pytest.mark.parametrize("name", PACKAGES)
def test_the_cpu_and_other_dtypes_are_obstacles(name):
    qkv = random_qkv(LAYOUT)
    assert package_obstacle(name, *qkv) == "needs a CUDA device, got cpu"
    with pytest.raises(UnsupportedCallError, match=f"'{name}' needs a CUDA device.*backend='auto'"):
        attention(*qkv, backend=name)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_names_its_installation(name, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name].module.split(".")[0], None)
    load_function.cache_clear()
    monkeypatch.setattr(dense_packages.importlib, "import_module", _missing)
    assert load_function(name).endswith(f"which is not installed ({PACKAGES[name].install})")


def _missing(module):
    raise ModuleNotFoundError(f"No module named '{module}'", name=module.split(".")[0])


def test_a_package_that_does_not_load_gives_its_reason(monkeypatch):
    def undefined_symbol(module):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(dense_packages.importlib, "import_module", undefined_symbol)
    assert load_function("flash3") == "cannot be imported: undefined symbol: _ZN3c10"


def test_a_package_whose_own_dependency_is_missing_is_not_called_missing(monkeypatch):
    def no_cutlass(module):
        raise ModuleNotFoundError("No module named 'cutlass'", name="cutlass")

    monkeypatch.setattr(dense_packages.importlib, "import_module", no_cutlass)
    assert load_function("flash4") == "cannot be imported: No module named 'cutlass'"


def test_a_package_without_its_function_is_not_called_broken(monkeypatch):
    monkeypatch.setattr(dense_packages.importlib, "import_module", types.ModuleType)
    expected = "needs flash_attn_func of the package flash_attn, which has none (pip install flash-attn)"
    assert load_function("flash2") == expected


def test_the_installed_function_is_found(install):
    install("flash4", softmax_attention)
    assert load_function("flash4") is softmax_attention


def test_the_known_answer_passes_what_is_right():
    assert known_answer("flash4", softmax_attention) is None
    with_lse = lambda *qkv, softmax_scale: (softmax_attention(*qkv, softmax_scale), None)  # noqa: E731
    assert known_answer("flash3", with_lse, 128) is None


def test_the_known_answer_refuses_what_is_wrong():
    never_written = lambda query, *rest, **options: torch.full_like(query, float("nan"))  # noqa: E731
    assert "error nan" in known_answer("flash4", never_written)
    unscaled = lambda *qkv, softmax_scale: softmax_attention(*qkv, softmax_scale=1.0)  # noqa: E731
    assert "wrong results" in known_answer("flash4", unscaled)

    def no_image(*qkv, **options):
        raise RuntimeError("no kernel image is available\nfor execution")

    assert known_answer("flash2", no_image) == "fails on cpu: no kernel image is available"


def test_sage_gets_copied_keys_in_version_1_and_refuses_ragged_ones(monkeypatch):
    def centres_in_place(query, key, value, tensor_layout, is_causal, sm_scale):
        key -= key.mean(2, keepdim=True)
        return softmax_attention(*(part.transpose(1, 2) for part in (query, key, value))).transpose(1, 2)

    monkeypatch.setattr(dense_packages, "_sage_version", lambda: 1)
    query, key, value = random_qkv(LAYOUT)
    before = key.clone()
    output = dense_packages._call("sage", centres_in_place, query, key, value, None)
    assert torch.equal(key, before)
    assert (output - dense_fp64(query, key, value)).abs().max() < 1e-5
    assert "multiple of 64, got 200" in dense_packages._sage_obstacle(query, key)
    assert dense_packages._sage_obstacle(query, key[:, :, :192]) is None


def test_sage_has_no_backward():
    query, key, value = random_qkv(LAYOUT, dtype=torch.bfloat16)
    assert PACKAGES["sage"].backward is False
    if torch.cuda.is_available():
        reason = package_obstacle("sage", query.cuda().requires_grad_(), key.cuda(), value.cuda())
        assert reason == "has no backward; call it under torch.no_grad()"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", PACKAGES)
def test_installed_packages_agree_with_fp64(name, head_dim):
    layout = TokenLayout(64, 3, 10, 16)  # 544 tokens; SageAttention 1 wants a multiple of 64
    layout = layout if name != "sage" else TokenLayout(0, 3, 16, 16)
    qkv = random_qkv(layout, heads=2, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    if (reason := package_obstacle(name, *qkv)) is not None:
        pytest.skip(reason)
    before = [part.clone() for part in qkv]
    expected = dense_fp64(*qkv)
    error = (attention(*qkv, backend=name) - expected).norm() / expected.norm()
    assert error <= PACKAGES[name].tolerance
    assert all(torch.equal(part, copy) for part, copy in zip(qkv, before, strict=True))
