"""Captured rounds on a CUDA device: real graphs give what eager rounds give."""

import threading
from contextlib import contextmanager

import pytest
import torch

from graft_inference import METHODS
from graft_inference.decode.cuda_graph import CannotCapture, Captured, CudaGraphs, undone
from graft_inference.target import kv_cache as bucket_cache

from .families import FAMILIES, WINDOW, family_model
from .recorded import RecordedGraphs
from .test_block_drafter import LAYOUTS, tiny_block_head
from .test_captured import SMALL, pair, same
from .test_engine import prompt
from .tiny import learned_policy, tiny_engine, tiny_model, tiny_policy

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch):
    monkeypatch.setattr(bucket_cache, "SMALLEST", 32)
    # Reduced precision would part the two on near ties.
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@contextmanager
def no_host_reads():
    """Whatever would wait for the device raises RuntimeError, in this process."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class EagerSegments(RecordedGraphs):
    """Runs segments one operator after the other, refusing whatever waits for the device."""

    def capture(self, function, changing) -> Captured:
        with undone(changing):
            outputs = [tensor.clone() for tensor in function()]

        def replay() -> None:
            with no_host_reads():
                for kept, tensor in zip(outputs, function(), strict=True):
                    kept.copy_(tensor)

        return Captured(replay, outputs)

    def host(self, size):
        return torch.zeros(size, dtype=torch.long, pin_memory=True)

    def wait(self):
        self.reads += 1
        torch.cuda.current_stream().synchronize()


@pytest.mark.parametrize("graphs", [lambda: CudaGraphs(CUDA), EagerSegments], ids=["graphs", "eager segments"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("policy", [tiny_policy, learned_policy])
def test_captured_rounds_equal_eager_ones(policy, method, temperature, graphs):
    eager, captured = pair(policy(0.5), graphs=graphs(), device=CUDA)
    for length in (30, 3, 30):
        same(eager, captured, prompt(length, length, SMALL), 40, temperature, method, seed=length)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captured_rounds_of_every_kind_of_block_head(layout):
    model = tiny_model("llama", vocab_size=SMALL)
    head = tiny_block_head(model, **LAYOUTS[layout])
    eager, captured = pair(learned_policy(0.5), model, CudaGraphs(CUDA), CUDA, head)
    for length in (30, 3, 30):
        same(eager, captured, prompt(length, length, SMALL), 40, seed=length)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_captured_or_runs_eagerly(family):
    model = family_model(family, seed=5 if "qwen2" in family else 3, vocab_size=SMALL)
    eager, captured = pair(model=model, graphs=CudaGraphs(CUDA), device=CUDA)
    has_experts = any(name in family for name in ("mixtral", "moe", "gpt-oss"))
    for length in (WINDOW - 3, 24):
        ids = prompt(length, length, SMALL)
        out = captured.generate(ids, 30)
        assert out.sequences.tolist() == eager.generate(ids, 30).sequences.tolist()
        assert out.stats.captured == out.stats.rounds or (has_experts and out.stats.uncaptured)


@pytest.mark.parametrize("scope", ["request", "engine"])
def test_chats_and_changes_of_scope(scope):
    eager, captured = pair(retrieval_scope=scope, keep_prefix=True, graphs=CudaGraphs(CUDA), device=CUDA)
    ids = prompt(9, 0, SMALL)
    for turn in range(3):
        _, out = same(eager, captured, ids, 20)
        ids = torch.cat((out.sequences, prompt(4, turn, SMALL)), dim=1)
    assert torch.equal(captured.successors.ids_VK, eager.successors.ids_VK)


def test_a_function_that_reads_on_the_host_is_refused_and_leaves_the_device_usable():
    value = torch.ones(3, device=CUDA)
    graphs = CudaGraphs(CUDA)
    with torch.inference_mode():
        for function in (lambda: [value * value.sum().item()], lambda: [value[value > 0]]):
            with pytest.raises(CannotCapture):
                graphs.capture(function, [])
        captured = graphs.capture(lambda: [value + 1], [])
        value.fill_(4)
        captured.replay()
        graphs.wait()
        assert captured.outputs[0].tolist() == [5, 5, 5]


def test_graphs_may_all_go_and_others_come():
    """What a first graph needs to be captured outlives the last one: a longer request drops them all."""
    eager, captured = pair(graphs=CudaGraphs(CUDA), device=CUDA)
    for length in (6, 60, 200):
        same(eager, captured, prompt(length, 0, SMALL), 20)


def test_an_engine_that_may_fall_back_is_captured_too():
    _, captured = pair(graphs=CudaGraphs(CUDA), device=CUDA, fallback=True)
    stats = captured.generate(prompt(9, 0, SMALL), 60).stats
    assert stats.captured == stats.rounds, stats.uncaptured


def test_a_capture_leaves_other_threads_alone():
    graphs, stop, troubles = CudaGraphs(CUDA), threading.Event(), []

    def reading():
        while not stop.is_set():
            try:
                torch.ones(3, device=CUDA).sum().item()
            except RuntimeError as error:
                troubles.append(error)

    thread = threading.Thread(target=reading)
    thread.start()
    value = torch.ones(3, device=CUDA)
    for _ in range(20):
        graphs.capture(lambda: [value + 1], [])
    stop.set()
    thread.join()
    assert not troubles


def test_an_engine_on_cuda_captures_unless_told_otherwise():
    engine = tiny_engine(tiny_model("llama").to(CUDA))
    engine.head.to(CUDA)
    assert engine.captured is not None
