"""What one round of the engine costs, phase by phase, and how far the target's pass is from the memory floor.

    python benchmarks/round.py --run runs/quickstart
    python benchmarks/round.py --shape 100m

Times a trained pair, or one of random weights, at forced stages, interleaved, medians with the interquartile
range. Counts operators and host reads in rounds of their own. The floor is what the target's pass must read, all
weights and the keys and values of its context, over the copy bandwidth measured here.
"""

import argparse
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from graft_inference import GraftEngine, Plan, Scale, Stage, paper_policy
from graft_inference.bundle import Bundle, load_successors, load_target_model
from graft_inference.draft_head import DraftHead, DraftHeadConfig, default_tapped_layers
from graft_inference.head_checkpoint import load_head
from graft_inference.policy import Policy, depth_template
from graft_inference.retrieval import SuccessorMatrix
from graft_train.device import describe_device

SHAPES = {
    "15m": {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 9},
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
}
VOCABULARY = {"15m": 8192, "100m": 16384}
PHASES = ("draft", "graft", "verify", "commit")
READS = {"item", "is_nonzero", "_local_scalar_dense", "nonzero", "equal", "masked_select"}
"""Operators whose result, or its size, the host has to know; `tolist` reads without one."""
BEAM = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of a run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.shape:
        engine = random_pair(arguments.shape, arguments.device, getattr(torch, arguments.dtype))
    else:
        engine = trained_pair(arguments.run, arguments.device, arguments.dtype)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(engine.target.config.vocab_size, (arguments.prompt,), generator=generator)
    plans = forced_plans()
    if not arguments.shape:
        plans |= {method: engine.policy.plan(method) for method in ("graft", "eagle3")}
    costs = {name: Cost(*count(engine, prompt, plan, arguments.rounds)) for name, plan in plans.items()}
    models = ForwardClock(engine)
    for repeat in range(arguments.repeats + 1):
        for name in plans if repeat % 2 else reversed(plans):
            models.seconds = 0.0
            stats = engine.generate(prompt, arguments.rounds, plan=plans[name]).stats
            if repeat and stats.rounds:  # the first warms up
                sample = {phase: 1e3 * stats.seconds[phase] / stats.rounds for phase in PHASES}
                outside = 1 - models.since_prefill / stats.decode_seconds
                costs[name].samples.append(sample | {"round": sum(sample.values()), "outside": 100 * outside})
    floor_ms = 1e3 * pass_bytes(engine, arguments.prompt + arguments.rounds // 2) / bandwidth(engine.target.device)
    device = describe_device(engine.target.device)
    title = f"{device['name']}, {device['threads']} threads: floor of a target pass {floor_ms:.2f} ms"
    Console(width=160).print(to_table(costs, floor_ms, title))


@dataclass
class Cost:
    """Of one plan: host reads and operators of a round, and a sample a generation, in ms and per cent."""

    reads: float
    operators: float
    samples: list[dict[str, float]] = field(default_factory=list)


def trained_pair(run: Path, device: str, dtype: str) -> GraftEngine:
    model, _ = load_target_model(run / "target", device, dtype)
    head = load_head(run / "head")
    successors = load_successors(run / "corpus" / "successors.safetensors", head.config.vocab_size)
    policy = Policy.from_dict(json.loads((run / "policy" / "policy.json").read_text(encoding="utf-8")))
    return GraftEngine.from_bundle(Bundle(head, policy, successors), model)


def random_pair(shape: str, device: str, dtype: torch.dtype) -> GraftEngine:
    torch.manual_seed(0)
    sizes = SHAPES[shape] | {"vocab_size": VOCABULARY[shape], "max_position_embeddings": 2048}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = LlamaConfig(**sizes, **ends, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).to(device, dtype).eval().requires_grad_(False)  # type: ignore[arg-type]
    head = DraftHead(
        DraftHeadConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            draft_vocab_size=config.vocab_size // 2,
            tapped_layers=default_tapped_layers(config.num_hidden_layers),
            max_position_embeddings=2048,
        )
    )
    ids_VK = torch.randint(config.vocab_size, (config.vocab_size, 8), dtype=torch.int32)
    probs_VK = torch.rand(config.vocab_size, 8).softmax(dim=1).sort(dim=1, descending=True).values.half()
    return GraftEngine.from_bundle(Bundle(head, paper_policy(), SuccessorMatrix(ids_VK, probs_VK)), model)


def forced_plans() -> dict[str, Plan]:
    """Plans that leave no choice: one row, and 16 rows after so many passes, without and with retrieval."""
    flat = ((1.0, 0.0),) * 6
    both = Scale(flat, flat, (0.0,) * 8, depth_template((8, 6, 4, 3, 2, 1)))
    drafted = replace(both, template=())
    plans = {"autoregressive": Plan((Stage(0),), 1, 1)}
    for passes in (1, 3, 6):
        plans[f"d{passes - 1}"] = Plan((Stage(passes, widths=(5 if passes == 1 else 16,)),), BEAM, 16, drafted)
    plans["d2, retrieval"] = Plan((Stage(3, widths=(16,)),), BEAM, 16, both, learns_accepted=True)
    plans["retrieval"] = Plan((Stage(0, widths=(16,)),), BEAM, 16, both, learns_accepted=True)
    return plans


class Counts(TorchDispatchMode):
    """Operators and host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        self.reads += name in READS or by_mask
        return func(*args, **(kwargs or {}))


def count(engine: GraftEngine, prompt: Tensor, plan: Plan, rounds: int) -> tuple[float, float]:
    """Host reads and operators of a round, the prefill's left out."""
    run, read, found = engine._round, Tensor.tolist, []

    def tolist(tensor: Tensor) -> Any:
        counts.reads += 1
        return read(tensor)

    def counted(state: Any) -> Any:
        before = counts.reads, counts.operators
        emitted = run(state)
        found.append((counts.reads - before[0], counts.operators - before[1]))
        return emitted

    with Counts() as counts, mock.patch.object(Tensor, "tolist", tolist), mock.patch.object(engine, "_round", counted):
        engine.generate(prompt, rounds, plan=plan)
    reads, operators = zip(*found, strict=True)
    return sum(reads) / len(found), sum(operators) / len(found)


class ForwardClock:
    """Seconds inside the two models' forwards."""

    def __init__(self, engine: GraftEngine) -> None:
        self.device = engine.target.device
        self.seconds = self.prefill = 0.0
        head: Any = engine.head
        for module in (engine.target.model, head.fc, head.midlayer, head.norm, head.lm_head):
            module.register_forward_pre_hook(self._start)
            module.register_forward_hook(self._stop)
        engine._prefill = self._marking(engine._prefill)  # type: ignore[method-assign]

    def _marking(self, prefill: Any) -> Any:
        def marked(*args: Any, **kwargs: Any) -> Any:
            out = prefill(*args, **kwargs)
            self.prefill = self.seconds
            return out

        return marked

    @property
    def since_prefill(self) -> float:
        return self.seconds - self.prefill

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _start(self, module: nn.Module, args: Any) -> None:
        self._since = self._now()

    def _stop(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seconds += self._now() - self._since


def pass_bytes(engine: GraftEngine, context: int) -> int:
    """What one target pass reads at least. Embeddings count only where they are the output layer too."""
    model, config = engine.target.model, engine.target.config
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        weights -= engine.target.embedding_weight.nbytes
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return weights + context * rows * model.dtype.itemsize


def bandwidth(device: torch.device, size: int = 1 << 28) -> float:
    """Bytes read and written per second by a large copy: the best of ten."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def to_table(costs: dict[str, Cost], floor_ms: float, title: str) -> Table:
    table = Table(title=title)
    columns = (*PHASES, "round", "outside the models %", "verify / floor", "host reads", "operators")
    for name in ("ms per round", *columns):
        table.add_column(name, justify="left" if name == "ms per round" else "right")
    for name, cost in costs.items():
        cells = []
        for key in (*PHASES, "round", "outside"):
            values = [sample[key] for sample in cost.samples]
            low, _, high = quantiles(values, n=4)
            cells.append(f"{median(values):.2f} ({low:.2f}-{high:.2f})")
        ratio = median(sample["verify"] for sample in cost.samples) / floor_ms
        table.add_row(name, *cells, f"{ratio:.1f}", f"{cost.reads:.1f}", f"{cost.operators:.0f}")
    return table


if __name__ == "__main__":
    main()
