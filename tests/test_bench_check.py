"""The benchmark's check: it passes what is right and catches what is wrong, or silently dense."""

import pytest
import torch
from oracle import causal_oracle, relative_error
from torch import Tensor

from bench.check import kept_rows, reference, sample_positions, verify
from bench.synthetic import chunk_selection
from bench.workloads import Inputs, structured_inputs
from flexprefill_fa import BlockSelection

N = 700  # five blocks and a part of one


def make(dtype: torch.dtype = torch.float32) -> tuple[Inputs, BlockSelection]:
    inputs = structured_inputs(N, 4, 2, 32, sharpness=0.5, dtype=dtype)
    return inputs, chunk_selection(N, N, 4, 0.7)


def attend(inputs: Inputs, selection: BlockSelection | None, dtype: torch.dtype = torch.float64) -> Tensor:
    ranges = torch.tensor([[0, N]])
    exact, plain, _ = causal_oracle(inputs.query, inputs.key, inputs.value, selection, ranges=ranges)
    return exact if dtype == torch.float64 else plain


def test_sampled_positions_spread_over_the_length() -> None:
    positions = sample_positions(N)
    assert (positions[0], positions[-1], len(positions)) == (0, N - 1, 32)
    assert (positions.diff() > 0).all()
    assert len(set((positions % 128).tolist())) > 16  # not always the same place in a block
    assert sample_positions(5).tolist() == [0, 1, 2, 3, 4]


def test_reference_is_the_oracles() -> None:
    inputs, selection = make()
    found = reference(inputs, selection)
    rows = found.positions
    assert torch.equal(kept_rows(selection, rows), selection.to_dense()[:, :, rows // 128])
    torch.testing.assert_close(found.expected, attend(inputs, selection)[:, :, rows])
    torch.testing.assert_close(found.dense, attend(inputs, None)[:, :, rows])
    assert found.density == pytest.approx(0.7, abs=0.05)
    everything = reference(inputs, None)
    torch.testing.assert_close(everything.expected, everything.dense)
    torch.testing.assert_close(everything.recall, torch.ones(1, 4, dtype=torch.float64))


def test_recall_of_every_row_is_the_selections_recall() -> None:
    inputs, selection = make()
    recall = reference(inputs, selection, rows=N).recall
    torch.testing.assert_close(recall.float(), selection.recall(inputs.query, inputs.key), atol=1e-4, rtol=0)
    assert 0.3 < recall.min() < recall.max() < 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_outputs_pass(dtype: torch.dtype) -> None:
    inputs, selection = make(dtype)
    found = reference(inputs, selection)
    for out in (attend(inputs, selection).to(dtype), attend(inputs, selection, dtype)):
        verdict = verify(out, found)
        assert "error" not in verdict and verdict["check_error"] <= verdict["check_allowed"]
        assert verdict["check_sparse_share"] == pytest.approx(1, abs=0.05)
    assert verdict["check_error"] == pytest.approx(relative_error(found.plain, found.expected, torch.ones(1)))
    dense = verify(attend(inputs, None).to(dtype), reference(inputs, None))
    assert not {"error", "check_sparse_share"} & dense.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_output_is_caught(dtype: torch.dtype) -> None:
    inputs, selection = make(dtype)
    verdict = verify(attend(inputs, None).to(dtype), reference(inputs, selection))
    assert "relative error" in verdict["error"]


def test_dense_output_is_caught_even_within_the_allowed_error() -> None:
    """Where the dropped blocks hold next to nothing, the direction of the error still tells."""
    inputs, selection = make(torch.bfloat16)
    found = reference(inputs, selection)
    close = found.expected + 1e-4 * (found.dense - found.expected)
    nearly = type(found)(found.positions, found.expected, close, found.plain, found.recall, found.density)
    out = torch.zeros(1, 4, N, 32, dtype=torch.float64)
    out[:, :, found.positions] = close
    verdict = verify(out, nearly)
    assert verdict["check_error"] < verdict["check_allowed"]
    assert "those of dense attention" in verdict["error"]
    assert verdict["check_sparse_share"] == pytest.approx(0, abs=0.05)
    out[:, :, found.positions] = found.expected
    assert "error" not in verify(out, nearly)


def test_wrong_outputs_are_caught() -> None:
    inputs, selection = make(torch.bfloat16)
    found = reference(inputs, selection)
    right = attend(inputs, selection).bfloat16()
    one_head = right.clone()
    one_head[0, 2] = right[0, 3]
    last_row = right.clone()
    last_row[:, :, -1] = 0
    not_a_number = right.clone()
    not_a_number[0, 0, -1, 0] = float("nan")
    other_blocks = attend(inputs, chunk_selection(N, N, 4, 0.7, seed=9)).bfloat16()
    for wrong in (one_head, last_row, not_a_number, other_blocks, right * 1.02):
        problem = verify(wrong, found)["error"]
        assert "relative error" in problem and "allowed" in problem
