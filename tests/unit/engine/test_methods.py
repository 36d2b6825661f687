"""Every method that a configuration may name has a class that makes its masks and policy."""

from clasp_vllm.config import METHODS
from clasp_vllm.engine import methods


def test_every_method_has_a_class():
    assert methods.METHODS.keys() == METHODS.keys()
