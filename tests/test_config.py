"""FlexPrefillConfig: what it refuses, and that its numbers survive the trip through the operator."""

import math
import re
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch
from workloads import random_qk

from flexprefill_fa import FlexPrefillConfig, create_flexprefill_block_mask, get_selector


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 1.5}, "gamma must be in (0, 1], got 1.5"),
        ({"gamma": 0}, "gamma must be in (0, 1], got 0"),
        ({"gamma": -0.1}, "gamma must be in (0, 1], got -0.1"),
        ({"gamma": math.nan}, "gamma must be in (0, 1], got nan"),
        ({"gamma": math.inf}, "gamma must be in (0, 1], got inf"),
        ({"tau": -0.1}, "tau must be in [0, 1], got -0.1"),
        ({"tau": 1.01}, "tau must be in [0, 1], got 1.01"),
        ({"tau": math.nan}, "tau must be in [0, 1], got nan"),
        ({"min_budget": 0}, "min_budget must be at least 1, got 0"),
        ({"min_budget": -128}, "min_budget must be at least 1, got -128"),
        ({"max_budget": 0}, "max_budget must be at least 1, got 0"),
        ({"max_budget": 1023}, "max_budget must be at least max(min_budget, 3 * block_size) = 1024, got 1023"),
        (
            {"min_budget": 1, "max_budget": 383},
            "max_budget must be at least max(min_budget, 3 * block_size) = 384, got 383",
        ),
        (
            {"min_budget": 1, "max_budget": 191, "block_size": 64},
            "max_budget must be at least max(min_budget, 3 * block_size) = 192, got 191",
        ),
        ({"block_size": 32}, "block_size must be one of (64, 128), got 32"),
        ({"variant": "Paper"}, "variant must be one of ('published', 'paper'), got 'Paper'"),
        ({"variant": None}, "variant must be one of ('published', 'paper'), got None"),
    ],
)
def test_values_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FlexPrefillConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": True}, "gamma must be a number, got bool True"),
        ({"gamma": "0.9"}, "gamma must be a number, got str '0.9'"),
        ({"gamma": None}, "gamma must be a number, got NoneType None"),
        ({"tau": False}, "tau must be a number, got bool False"),
        ({"tau": [0.1]}, "tau must be a number, got list [0.1]"),
        ({"min_budget": 1024.0}, "min_budget must be an integer, got float 1024.0"),
        ({"min_budget": True}, "min_budget must be an integer, got bool True"),
        ({"min_budget": None}, "min_budget must be an integer, got NoneType None"),
        ({"max_budget": 2048.5}, "max_budget must be an integer, got float 2048.5"),
        ({"max_budget": "2048"}, "max_budget must be an integer, got str '2048'"),
        ({"block_size": 128.0}, "block_size must be an integer, got float 128.0"),
        ({"block_size": True}, "block_size must be an integer, got bool True"),
        ({"block_size": [128]}, "block_size must be an integer, got list [128]"),
        ({"block_size": None}, "block_size must be an integer, got NoneType None"),
    ],
)
def test_wrong_types(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        FlexPrefillConfig(**arguments)


def test_limits_are_allowed() -> None:
    FlexPrefillConfig(gamma=1, tau=0, min_budget=1, max_budget=384)
    FlexPrefillConfig(gamma=1e-9, tau=1, min_budget=1, max_budget=192, block_size=64)
    FlexPrefillConfig(min_budget=2048, max_budget=2048)


def test_defaults_are_the_published_settings() -> None:
    assert FlexPrefillConfig() == FlexPrefillConfig(0.95, 0.1, 1024, None, 128, "published")


def test_frozen() -> None:
    config = FlexPrefillConfig()
    for field in fields(config):
        with pytest.raises(FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))
    assert hash(config) == hash(FlexPrefillConfig())


@pytest.mark.parametrize(
    "config",
    [
        FlexPrefillConfig(),
        FlexPrefillConfig(0.9, 0.5, 1, 4097, 64, "paper"),
        FlexPrefillConfig(1, 0, 2**30, None, 128, "paper"),
    ],
)
def test_settings_round_trip(config: FlexPrefillConfig) -> None:
    settings = config.settings()
    assert settings.dtype == torch.float64 and settings.device.type == "cpu"
    assert FlexPrefillConfig.from_settings(settings, config.block_size) == config


@pytest.mark.parametrize(
    ("min_budget", "block_size", "tokens"), [(1, 128, 256), (1024, 128, 1024), (1000, 128, 1024), (129, 64, 192)]
)
def test_dense_tokens(min_budget: int, block_size: int, tokens: int) -> None:
    assert FlexPrefillConfig(min_budget=min_budget, block_size=block_size).dense_tokens == tokens


def test_get_selector() -> None:
    assert get_selector("flexprefill") is FlexPrefillConfig
    with pytest.raises(ValueError, match=r"^unknown selector 'flex', expected one of .*flexprefill"):
        get_selector("flex")


def test_create_block_mask_takes_a_config_or_its_fields() -> None:
    query, key = random_qk(1, 1, 1, 300, 300, 16)
    by_config = create_flexprefill_block_mask(query, key, config=FlexPrefillConfig(gamma=0.5, min_budget=1))
    by_fields = create_flexprefill_block_mask(query, key, gamma=0.5, min_budget=1)
    assert torch.equal(by_config.kv_num_blocks, by_fields.kv_num_blocks)
    with pytest.raises(TypeError, match="give either config or its fields, got both: config and gamma"):
        create_flexprefill_block_mask(query, key, config=FlexPrefillConfig(), gamma=0.5)
    with pytest.raises(TypeError, match="unexpected argument gama; FlexPrefillConfig has gamma, tau"):
        create_flexprefill_block_mask(query, key, gama=0.5)
    with pytest.raises(TypeError, match="config must be a FlexPrefillConfig, got dict"):
        create_flexprefill_block_mask(query, key, config={"gamma": 0.5})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gamma must be in \(0, 1\], got 2"):
        create_flexprefill_block_mask(query, key, gamma=2)
