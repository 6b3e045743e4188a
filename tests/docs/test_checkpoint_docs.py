"""The snippets of docs/checkpoints.md run, on a model with few channels under the name of the paper's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from flax_arrays import make_arrays

from fastmixer.blocks import model
from fastmixer.checkpoint import load
from fastmixer.configs.models import MixerConfig

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_snippets_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = MixerConfig(patch_size=16, num_blocks=2, embed_dim=8)
    monkeypatch.setitem(model.MODELS, "mixer_b16_224", tiny)
    monkeypatch.chdir(tmp_path)
    arrays = make_arrays(patch=16, tokens=196, channels=8, token_hidden=4, channel_hidden=32, classes=21843)
    np.savez("Mixer-B_16.npz", **arrays)
    snippets = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(snippets) == 5
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "4 GELUs set to approximate='tanh'" in printed
    assert "mlp_ratio=(2.0, 4.0), and load with resize='block_diagonal'" in printed
    assert names["large"].stem.grid_size == (28, 28)


def test_the_table_of_names_is_the_codes() -> None:
    from fastmixer.checkpoint.flax import flax_name

    rows = re.findall(
        r"^\| `(\S+/kernel|\S+/scale)`(?:, `(\w+)`)? \| `(\S+)`(?:, `(\w+)`)? \|", PAGE.read_text(), re.M
    )
    assert len(rows) == 6
    for flax, other_flax, ours, other in rows:
        assert flax_name(ours.replace(".i.", ".3.")) == flax.replace("_i/", "_3/")
        if other:
            layer = ours.split(".")[-2]
            second = flax_name(ours.replace(".i.", ".3.").replace(layer, other))
            assert second == re.sub(r"(LayerNorm|Dense)_0", other_flax, flax).replace("_i/", "_3/")


@pytest.mark.parametrize("setting", [*load.GELUS[1:], load.RESIZES[1]])
def test_every_setting_is_explained(setting: str) -> None:
    assert f'="{setting}"' in PAGE.read_text()
