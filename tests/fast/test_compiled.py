"""compiled: a C file compiles where the CPU has what it asks for and there is a compiler; elsewhere its tests skip."""
import shutil

import pytest

from fast import compiled, gemm, onepass


@pytest.mark.parametrize("module", [gemm, onepass])
def test_a_c_file_compiles_where_it_can_run(module):
    if module.FEATURES.keys() <= compiled.flags_of_cpu() and any(map(shutil.which, ("cc", "gcc", "clang"))):
        assert module.available()
    else:
        assert not module.available()
