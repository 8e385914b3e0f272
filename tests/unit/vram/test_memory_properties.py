"""What the memory model predicts for any run: more work never takes less."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from qlora_vram.calibration import shipped
from qlora_vram.fast import GRAPH_TOKENS, SECOND_STREAM_BYTES
from qlora_vram.gpus import GIB
from qlora_vram.layers import detailed
from qlora_vram.memory import peak, slack_share, step_of
from qlora_vram.workload import Workload
from qlorajob.plan import ModelFacts
from tests.unit.vram.workloads import FACTS, llama, workload

WORKLOADS = st.builds(
    lambda facts, rows, length, rank, share, dropout, packing, engine, recast, changing, cached: workload(
        facts,
        rows,
        length,
        checkpointed=facts.layers * share // 4,
        rank=rank,
        dropout=dropout,
        packing=packing,
        engine=engine,
        recast=recast,
        changing=changing,
        cached=cached,
    ),
    FACTS,
    st.integers(1, 64),
    st.integers(8, 32768),
    st.integers(1, 512),
    st.integers(0, 4),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["plain", "fast"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


@given(WORKLOADS, st.integers(1, 4096))
def test_longer_rows_never_take_less(work: Workload, more: int) -> None:
    assert peak(replace(work, length=work.length + more)).total >= peak(work).total


def test_one_token_more_than_a_graph_holds_takes_no_less() -> None:
    """What a graph takes beside its tensors ends there, all at once."""
    facts = llama(2, 64, 4, 1, 512, 1000)
    largest_graph, larger, large = (
        peak(workload(facts, 1, length, engine="fast")) for length in (GRAPH_TOKENS, GRAPH_TOKENS + 1, 4 * GRAPH_TOKENS)
    )
    assert larger.total >= largest_graph.total
    assert large.components["context"] == largest_graph.components["context"] - SECOND_STREAM_BYTES


@given(WORKLOADS, st.integers(1, 16))
def test_more_rows_never_take_less(work: Workload, more: int) -> None:
    shape = replace(work.shape, rows=work.shape.rows + more)
    assert peak(replace(work, shape=shape)).total >= peak(work).total


@given(WORKLOADS, st.integers(1, 512))
def test_a_higher_rank_never_takes_less(work: Workload, more: int) -> None:
    assert peak(replace(work, rank=work.rank + more)).total >= peak(work).total


@given(WORKLOADS, st.integers(1, 20))
def test_more_layers_never_take_less(work: Workload, more: int) -> None:
    layers = work.facts.layers + more
    linears = tuple(
        linear.model_copy(update={"count": linear.count * layers // work.facts.layers}) for linear in work.facts.linears
    )
    added = sum(linear.parameters for linear in linears) - work.facts.quantized_parameters
    larger = work.facts.model_copy(
        update={"layers": layers, "linears": linears, "parameters": work.facts.parameters + added}
    )
    assert peak(replace(work, facts=larger, targets=linears)).total >= peak(work).total


@given(WORKLOADS)
def test_a_checkpointed_layer_never_takes_more_but_for_the_last(work: Workload) -> None:
    peaks = [
        peak(replace(work, shape=replace(work.shape, checkpointed_layers=layers))).total
        for layers in (0, (work.facts.layers - 1) // 2, work.facts.layers - 1, work.facts.layers)
    ]
    assert peaks[:-1] == sorted(peaks[:-1], reverse=True)
    share = slack_share(work, shipped())
    assert peaks[-1] <= peaks[-2] + (1 + share) * step_of(work).checkpoint + GIB // 64  # the last layer's own


@given(WORKLOADS)
def test_a_cache_of_weights_never_takes_less_and_on_the_fast_path_as_much_as_they_are(work: Workload) -> None:
    cached, without = (peak(replace(work, shape=replace(work.shape, cached=cached))) for cached in (True, False))
    weights = work.compute_bytes * work.facts.quantized_parameters if work.engine == "fast" else 0
    assert cached.total >= without.total
    assert cached.components.get("weightCache", 0) >= 0.99 * weights
    assert cached.total - without.total <= cached.components.get("weightCache", 0)


@given(FACTS)
def test_facts_without_details_are_taken_for_a_llama(facts: ModelFacts) -> None:
    bare = ModelFacts(
        model_type=facts.model_type,
        parameters=facts.parameters,
        layers=facts.layers,
        hidden_size=facts.hidden_size,
        vocabulary=facts.vocabulary,
    )
    found = detailed(bare)
    assert found.linears
    assert peak(workload(found)).total > 0
