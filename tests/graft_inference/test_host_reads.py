"""How often a round waits for the device: once at its end, and once for each decision on the way."""

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graft_inference import METHODS
from graft_inference.decode.cuda_graph import waits

from .tiny import learned_policy, tiny_engine, tiny_model, tiny_policy


class HostReads(TorchDispatchMode):
    """Counts them; `tolist` reads without an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += waits(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def tolist(self, tensor):
        self.count += 1
        return TOLIST(tensor)


TOLIST = Tensor.tolist


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_kind_of_read_is_counted(mode):
    values = torch.arange(3)
    with (
        mode(),
        HostReads() as reads,
        mock.patch.object(Tensor, "tolist", lambda tensor: reads.tolist(tensor)),
    ):
        values[0].item(), int(values[1]), bool(values[0] > 1), values.tolist(), values[values > 0], float(values[0])
        assert reads.count == 6
        assert (values + 1)[1:].sum().shape == values[torch.tensor([1])].sum().shape
        assert reads.count == 6


@pytest.mark.parametrize("prompts", [1, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("policy", [tiny_policy, learned_policy])
def test_a_round_reads_once_and_at_each_checkpoint_however_many_prompts(policy, method, temperature, prompts):
    engine = tiny_engine(tiny_model("llama"), policy())
    plan = engine.policy.plan(method)
    decided = {}
    for place, checkpoint in enumerate(plan.checkpoints):
        # Every earlier checkpoint, and this one unless it is the last.
        decided[checkpoint.name] = set(range(place + (checkpoint is not plan.checkpoints[-1])))
    rounds, run = [], engine._round

    def counted(states):
        before, checkpoints = reads.count, [state.stats.checkpoints.copy() for state in states]
        emitted = run(states)
        reached = [
            next((state.stats.checkpoints - old).elements()) for state, old in zip(states, checkpoints, strict=True)
        ]
        rounds.append((reads.count - before, reached))
        return emitted

    engine._round = counted
    batch = [torch.arange(9 + 3 * index) for index in range(prompts)]
    with HostReads() as reads, mock.patch.object(Tensor, "tolist", lambda tensor: reads.tolist(tensor)):
        engine.generate(batch, 40 if prompts == 1 else 16, temperature, method, seed=1, pad_token_id=0)
    assert len(rounds) > 5
    for count, reached in rounds:
        assert count == 1 + len(set().union(*(decided[checkpoint] for checkpoint in reached)))
