"""Tile sizes of the sparse GEMV: the user's file, and the launchers that take a tile."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from teal.errors import UserError
from teal.kernels.gemv import tuning
from teal.kernels.gemv.tuning import GemvTile, default_tile, gemv_tile
from tests.products import DEVICE


def test_user_tiles_are_read_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    row: dict[str, Any] = {
        "device": DEVICE.type,
        "bits": 16,
        "K": 64,
        "N": 48,
        "tile": {"block_n": 16, "lanes": 1, "unroll": 2, "splits": 3},
    }
    row["tile"] |= {"num_warps": 1}
    monkeypatch.setattr(tuning, "_device_facts", lambda device: (device.type, 132))
    path = tuning.user_tiles_path()
    path.parent.mkdir(parents=True)
    try:
        tuning.user_tiles.cache_clear()
        rule = gemv_tile(64, 48, 1, DEVICE, torch.bfloat16)
        path.write_text(json.dumps([row]))
        tuning.user_tiles.cache_clear()
        assert gemv_tile(64, 48, 1, DEVICE, torch.bfloat16) == GemvTile(16, 1, 2, 3, 1) != rule
        assert gemv_tile(64, 48, 2, DEVICE, torch.bfloat16) == default_tile(64, 48, 2, 132)
        for content in ("{", '[{"device": 1}]', json.dumps([row | {"tile": {"block_n": 17}}])):
            path.write_text(content)
            tuning.user_tiles.cache_clear()
            with pytest.raises(UserError, match="tiles"):
                gemv_tile(64, 48, 1, DEVICE, torch.bfloat16)
        with pytest.raises(UserError, match="power of two"):
            GemvTile(17, 1, 2, 3, 1)
    finally:
        tuning.user_tiles.cache_clear()
