"""What vLLM is told of our configuration."""


def test_draft_lengths_get_their_graphs():
    """On a GPU vLLM captures graphs for the lengths of the table that it is given."""
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    from clasp_vllm.engine.translate import graph_lengths

    assert set(build_dynamic_sd_schedule_lookup(graph_lengths(5), 16, 5)[1:]) == {0, 1, 2, 4, 5}
    assert set(build_dynamic_sd_schedule_lookup(graph_lengths(8), 2, 8)[1:]) == {0, 8}
