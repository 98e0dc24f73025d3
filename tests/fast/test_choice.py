"""The libraries that compute on the CPU: chosen by rule, or as recorded."""
import pytest
import torch

from fast import choice, gemm


@pytest.mark.parametrize("library, name", [("onednn", "oneDNN"), ("gemm", "fast/gemm.c")])
def test_a_library_that_cannot_be_had_is_told_in_one_line(monkeypatch, library, name):
    module, check = {"onednn": (choice, "has_onednn"), "gemm": (gemm, "available")}[library]
    monkeypatch.setattr(module, check, lambda: False)
    with pytest.warns(UserWarning, match=f"matmuls by {name}.* cannot be had here, PyTorch's own are used: sums"):
        choice.use_matmul(library)
    assert choice.matmul() == "torch"
    choice.use_matmul(77)  # nothing usable was recorded: by rule, without a warning, which would be an error here
    assert choice.matmul() == choice.fastest_matmul()


@pytest.mark.parametrize("cpu, width, compiler, library", [
    ("vendor_id : AuthenticAMD", "AVX512", True, "gemm"), ("vendor_id : AuthenticAMD", "AVX512", False, "onednn"),
    ("vendor_id : AuthenticAMD", "AVX2", True, "torch"), ("vendor_id : GenuineIntel", "AVX512", True, "torch")])
def test_the_library_is_chosen_by_vendor_and_width(monkeypatch, cpu, width, compiler, library):
    monkeypatch.setattr(choice, "cpu_description", lambda: cpu)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: width)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(choice, "has_onednn", lambda: True)
    monkeypatch.setattr(gemm, "available", lambda: compiler)
    monkeypatch.setattr(choice, "slow_by_mkl", choice.slow_by_mkl.__wrapped__)
    assert choice.fastest_matmul() == library
