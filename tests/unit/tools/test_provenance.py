"""What is said of the machine beside a result."""

from pathlib import Path

import pytest

from clasp_vllm.tools.provenance import about


@pytest.mark.parametrize(
    ("flags", "said"),
    [("fpu avx2 avx512f avx512_vnni", "Some CPU (avx2 avx512f avx512_vnni), "), ("fpu", "Some CPU, ")],
)
def test_the_instructions_that_decide_how_fast_products_are(monkeypatch, flags, said):
    text = f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n"
    monkeypatch.setattr(Path, "read_text", lambda path, **_: text)
    assert about()["machine"].startswith(said)
