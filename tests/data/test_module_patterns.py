"""Patterns of module names have PEFT's meaning; ranks and alphas of single modules follow them."""
import pytest
from peft.utils.other import get_pattern_key

from data.module_patterns import checked_names, fits, size_of
from machine.errors import UserError
from options.schema import LoRAOptions

NAMES = ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj", "transformer.h.11.mlp.c_proj", "c_attn", "xc_attn")
PATTERNS = ("c_attn", "attn.c_attn", "h.1.mlp.c_proj", "transformer", r"h\.[01]\..*", "mlp.*", "c_(attn|proj)", "")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_fits_the_names_that_it_fits_in_peft(pattern):
    assert [fits(pattern, name) for name in NAMES] == [get_pattern_key([pattern], name) == pattern for name in NAMES]


def test_the_first_pattern_that_fits_gives_the_size():
    options = LoRAOptions(rank=8, alpha=16.0, rank_pattern=("h.1.mlp.c_proj=2", "c_proj=4"), alpha_pattern=("c_attn=0.5",))
    assert [size_of(options, name) for name in NAMES[:3]] == [(8, 0.5), (2, 16.0), (4, 16.0)]
    assert checked_names(options, list(NAMES)) == list(NAMES)


@pytest.mark.parametrize("pattern, said", [("c_atn", "--rank-pattern c_atn=2: fits none"), ("(", "no regular expression")])
def test_a_pattern_that_fits_nothing_is_one_line(pattern, said):
    with pytest.raises(UserError, match=said) as error:
        checked_names(LoRAOptions(rank_pattern=(f"{pattern}=2",)), list(NAMES))
    assert "\n" not in str(error.value)
