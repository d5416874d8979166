"""What a launch says in the environment: the head that the settings describe comes out, or a refusal."""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from graft_inference import GraftError
from graft_train.accelerator import new_accelerator
from graft_train.distill import distill

from .test_distill import make_run

CHANGES = {"max_steps": 2, "batches_per_step": 2, "validation_samples": 0}


@pytest.fixture(autouse=True)
def as_before():
    yield
    AcceleratorState._reset_state()
    GradientState._reset_state()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load_file(distill(make_run(tmp_path_factory.mktemp("plain"), **CHANGES)) / "model.safetensors")


@pytest.mark.parametrize(
    "variables",
    [
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
        {"ACCELERATE_DYNAMO_BACKEND": "eager", "ACCELERATE_DYNAMO_MODE": "default"},
        {"ACCELERATE_GRADIENT_CLIPPING": "0.001"},
    ],
)
def test_variables_that_accelerate_reads_do_not_change_the_head(tmp_path, monkeypatch, plain, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    head = load_file(distill(make_run(tmp_path, **CHANGES)) / "model.safetensors")
    assert head.keys() == plain.keys()
    assert all(torch.equal(head[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("name", ["FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_a_launch_that_no_stage_follows_is_refused_by_the_variables_name(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "True")
    with pytest.raises(GraftError, match=f"ACCELERATE_USE_{name}=True: no stage trains with .*recipes/launch"):
        new_accelerator(cpu=True)


def test_nothing_is_left_to_the_environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state()
    accelerator = new_accelerator(cpu=True)
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    assert accelerator.mixed_precision == "no"
