"""XAttention and CoSA against independent oracles in float64, block for block but for near ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle_cosa
import oracle_xattention
import pytest
import torch
from oracle_groups import GroupOracle
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import blocky_qk, needle_qk, random_qk, structured_qk

from flexprefill_fa import CoSAConfig, XAttentionConfig, get_selector, select_blocks
from flexprefill_fa.masks.selector import select_plain

# A decision that is relatively closer than this may fall either way in fp32, and more of them would be no test.
NEAR_TIE, MOST_NEAR_TIES = 2e-6, 1e-3

CASES = [  # queries, keys, block size, stride, share, real positions, maker
    (1000, 1000, 128, 8, 0.9, None, random_qk),
    (1000, 1000, 128, 16, 0.8, None, structured_qk),
    (2048, 2048, 64, 8, 0.9, None, needle_qk),
    (2048, 2048, 128, 8, 0.95, None, blocky_qk),
    (5000, 5000, 128, 8, 0.9, None, needle_qk),
    (5000, 5000, 128, 16, 0.9, None, random_qk),
    (300, 1000, 128, 16, 0.7, None, needle_qk),  # a chunk at an offset that the block does not divide
    (256, 1000, 64, 32, 0.9, None, blocky_qk),
    (777, 777, 64, 8, 0.9, (70, 700), blocky_qk),
    (640, 900, 128, 8, 0.6, (131, 850), structured_qk),
    (127, 127, 64, 1, 0.5, None, blocky_qk),
    (1, 500, 128, 8, 0.9, None, random_qk),
    (129, 129, 64, 64, 0.3, None, random_qk),
]

ORACLES: list[tuple[Callable[..., GroupOracle], Callable[..., Any], str]] = [
    (oracle_xattention.oracle_select, XAttentionConfig, "threshold"),
    (oracle_cosa.oracle_select, CoSAConfig, "share"),
]


def make(case: tuple) -> tuple[Tensor, Tensor]:
    return case[6](1, 4, 2, case[0], case[1], 32, seed=case[1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[6].__name__}-{'-'.join(map(str, case[:5]))}")
@pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: oracle[2])
def test_equals_the_oracle(oracle: tuple, case: tuple) -> None:
    select, kind, knob = oracle
    _, kv_len, size, stride, share, real, _ = case
    query, key = make(case)
    start, end = real or (0, kv_len)
    place = {} if real is None else {"starts": [start], "lengths": [end - start]}
    config = kind(**{knob: share, "stride": stride, "block_size": size})
    keep = select_blocks(query, key, config, **place).to_dense()[0]
    found = select(query[0], key[0], **{knob: share}, stride=stride, block_size=size, start=start, end=end)
    clear = torch.from_numpy(found.margin) >= NEAR_TIE
    assert not ((keep != torch.from_numpy(found.keep)) & clear).any()
    assert (~clear).float().mean() <= MOST_NEAR_TIES


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: oracle[2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_summed_in_fp32(oracle: tuple, dtype: torch.dtype) -> None:
    select, kind, knob = oracle
    query, key = (x.to(dtype) for x in needle_qk(1, 4, 2, 1500, 1500, 64))
    keep = select_blocks(query, key, kind()).to_dense()[0]
    found = select(query[0], key[0], **{knob: 0.9}, stride=8, block_size=128)
    clear = torch.from_numpy(found.margin) >= NEAR_TIE
    assert not ((keep != torch.from_numpy(found.keep)) & clear).any()
    assert 0.1 < keep.float().mean() < 0.5


def test_the_scores_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = needle_qk(1, 4, 2, 1500, 1500, 32)
    for config in (XAttentionConfig(), CoSAConfig()):
        whole = select_blocks(query, key, config).to_dense()
        with monkeypatch.context() as patch:
            patch.setattr("flexprefill_fa.masks.element.SCORE_BYTES", 1)
            assert torch.equal(select_blocks(query, key, config).to_dense(), whole)


@pytest.mark.parametrize("name", ["xattention", "cosa"])
@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"share": 0}, ValueError, r"^{knob} must be in \(0, 1\], got 0"),
        ({"share": 1.5}, ValueError, r"^{knob} must be in \(0, 1\], got 1.5"),
        ({"share": "much"}, TypeError, "^{knob} must be a number, got str 'much'"),
        ({"stride": 0}, ValueError, "^stride must be at least 1, got 0"),
        ({"stride": 48}, ValueError, "^stride must divide block_size 128, got 48"),
        ({"stride": 128, "block_size": 64}, ValueError, "^stride must divide block_size 64, got 128"),
        ({"stride": 8.0}, TypeError, "^stride must be an integer, got float 8.0"),
        ({"block_size": 32}, ValueError, "^block_size must be one of"),
    ],
)
def test_settings_out_of_range(name: str, fields: dict[str, Any], kind: type, message: str) -> None:
    (knob,) = get_selector(name).sweep
    given = {knob if field == "share" else field: value for field, value in fields.items()}
    with pytest.raises(kind, match=message.replace("{knob}", knob)):
        get_selector(name)(**given)


class Launches(TorchDispatchMode):
    """Counts the operators that do something: what a GPU's host would launch."""

    VIEWS = ("view", "_unsafe_view", "expand", "slice", "select", "transpose", "unsqueeze", "alias", "detach")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in self.VIEWS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("config", "most"), [(XAttentionConfig(), 60), (CoSAConfig(), 70)], ids=["xattention", "cosa"])
def test_few_operators(config: Any, most: int) -> None:
    """At short lengths they are what the selection costs."""
    query, key = blocky_qk(1, 8, 2, 2048, 2048, 64)
    with Launches() as launches:
        lists = select_plain(query, key, None, None, config)
    assert 0 < lists[0].sum() + lists[1].sum() < 8 * 16 * 17 // 2
    assert launches.count <= most
