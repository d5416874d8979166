"""Targets whose weights are quantised: loaded as they are, frozen, and trained with."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from graft_inference import GraftError
from graft_train.data.states import PackedTarget
from graft_train.data.target import load_target
from graft_train.distill import distill

from .pair import tiny_target
from .test_distill import make_run, metrics

BLOCK = 8


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values, and the scale of each block."""
    blocks = weight.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3)) / 448
    return (blocks / spread(scale).view_as(blocks)).to(torch.float8_e4m3fn).view_as(weight), scale


def spread(scale: torch.Tensor) -> torch.Tensor:
    return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def as_fp8_says(target: Path) -> None:
    """Rewrites a checkpoint with the numbers that its fp8 form stands for."""
    tensors = load_file(target / "model.safetensors")
    for name, weight in list(tensors.items()):
        if "_proj" in name:
            values, scale = quantised(weight)
            tensors[name] = values.float() * spread(scale)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def to_fp8(target: Path) -> None:
    """Rewrites a checkpoint as DeepSeek's and Qwen's are: e4m3 weights of the layers, a scale per block."""
    tensors = load_file(target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    for name, weight in list(tensors.items()):
        if "_proj" in name:
            values, scale = quantised(weight)
            tensors |= {name: values, f"{name}_scale_inv": scale}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }
    (target / "config.json").write_text(json.dumps(config))


def assert_trains_as(config, exact: Path, tolerance: float) -> None:
    for one, two in zip(metrics(exact), metrics(distill(config)), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=tolerance)


def test_an_fp8_target_is_trained_with(tmp_path):
    """Without a GPU transformers unpacks its weights."""
    plain = make_run(tmp_path / "plain", max_steps=3)
    as_fp8_says(Path(plain.target.name_or_path))
    config = make_run(tmp_path / "fp8", max_steps=3)
    to_fp8(Path(config.target.name_or_path))
    assert_trains_as(config, distill(plain), 1e-4)


def test_an_fp8_target_is_not_shared_out_by_deepspeed(tmp_path):
    config = make_run(tmp_path)
    to_fp8(Path(config.target.name_or_path))
    with pytest.raises(GraftError, match=r"cannot share out a quantised target; set head\.shard_target=tp"):
        load_target(config.target, "zero3")


@pytest.mark.parametrize(
    ("bits", "kind", "embeddings"),
    [(8, "Int8Tensor", False), (8, "Int8Tensor", True), (4, "IntxUnpackedToInt8Tensor", False)],
)
def test_a_target_of_integers_stays_so_and_trains_as_the_numbers_it_stands_for(tmp_path, bits, kind, embeddings):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import TorchAoConfig

    plain, config = (make_run(tmp_path / name, max_steps=3) for name in ("plain", "integers"))
    place = config.target.name_or_path
    eight, four = torchao.Int8WeightOnlyConfig, torchao.IntxWeightOnlyConfig
    how = eight(version=2) if bits == 8 else four(weight_dtype=torch.int4, granularity=torchao.PerGroup(BLOCK))
    how = TorchAoConfig(how, include_input_output_embeddings=embeddings)
    AutoModelForCausalLM.from_pretrained(place, quantization_config=how, dtype=torch.float32).save_pretrained(place)

    model, unpacked = load_target(config.target), tiny_target()
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == kind
    assert (type(model.get_output_embeddings().weight).__name__ == kind) == embeddings
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for packed, parameter in zip(model.parameters(), unpacked.parameters(), strict=True):
        parameter.copy_(packed.dequantize() if type(packed).__name__ == kind else packed)
    torch.testing.assert_close(PackedTarget(model, (0, 2, 3)).lm_head_VH, unpacked.lm_head.weight)
    unpacked.save_pretrained(plain.target.name_or_path)
    assert_trains_as(config, distill(plain), 1e-4)
