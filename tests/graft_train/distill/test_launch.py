"""Settings that a launch cannot follow."""

from unittest import mock

import pytest
import torch

from graft_inference import GraftError
from graft_train import distill as stage_module
from graft_train.config.head import HeadTrainConfig
from graft_train.data.target import load_target
from graft_train.distill import distill
from graft_train.distill.parallel import make_accelerator

from .test_distill import make_run


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("zero3", r"head\.shard_target=zero3 needs a launch under DeepSpeed ZeRO-3: accelerate launch"),
        ("tp", r"head\.shard_target=tp needs several processes without DeepSpeed.*target\.device_map=auto"),
    ],
)
def test_one_process_cannot_share_a_target_out(tmp_path, shard, message):
    with pytest.raises(GraftError, match=message):
        make_accelerator(HeadTrainConfig(shard_target=shard, mixed_precision="no"), torch.device("cpu"), tmp_path)


def test_a_target_is_spread_or_shared_out_but_not_both(tmp_path):
    config = make_run(tmp_path)
    config.target.device_map = "auto"
    with pytest.raises(GraftError, match=r"head\.shard_target=tp and target\.device_map=auto exclude each other"):
        load_target(config.target, "tp")


def test_a_target_spread_over_all_devices_is_one_process(tmp_path, monkeypatch):
    config = make_run(tmp_path)
    config.target.device_map = "auto"
    monkeypatch.setattr(stage_module, "make_accelerator", lambda *_: mock.Mock(num_processes=2))
    with pytest.raises(GraftError, match=r"target\.device_map=auto would give each of 2 processes.*--num_processes 1"):
        distill(config)


def test_an_unknown_way_to_share_out_is_named():
    with pytest.raises(GraftError, match=r"head\.shard_target=fsdp must be one of null, zero3, tp"):
        HeadTrainConfig(shard_target="fsdp")
