"""What one round of the engine costs, phase by phase, and how far the target's pass is from the memory floor.

    python benchmarks/round.py --run runs/quickstart
    python benchmarks/round.py --shape 100m
    python benchmarks/round.py --shape 8b --device cuda --dtype bfloat16

Times a trained pair, or one of random weights, at forced checkpoints, interleaved, medians with the interquartile
range; on CUDA eager and captured side by side, whose verify holds most of the commit. Counts operators, host reads
and (on CUDA) launches in rounds of their own. The floor is what a round's passes must read, all weights of the target
and of the head once per pass and the keys and values of the context, over the copy bandwidth measured here.
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

from graft_inference import (
    AcceptanceModel,
    Checkpoint,
    GraftEngine,
    Plan,
    Policy,
    QuotaCheckpoint,
    QuotaPlan,
    ScoredPlan,
    SourceModel,
    paper_policy,
)
from graft_inference.bundle import Bundle, load_successors, load_target_model
from graft_inference.decode.cuda_graph import waits
from graft_inference.heads.eagle3.checkpoint import load_head
from graft_inference.heads.eagle3.model import DraftHead, DraftHeadConfig, default_aux_layer_ids
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.template import depth_template
from graft_train.device import describe_device

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    "15m": {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 9},
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "32b": {
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
"""Of which the last three stand for Llama 3.2 1B, Llama 3.1 8B and Qwen3 32B."""
VOCABULARY = {"tiny": 512, "15m": 8192, "100m": 16384, "1b": 128256, "8b": 128256, "32b": 151936}
DRAFT_VOCABULARY = 32000
PHASES = ("draft", "graft", "verify", "commit")
LAUNCHES = {"cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch"}
TOPK, NUM_DRAFT_TOKENS = 4, 16
GPU_TOPK, GPU_NUM_DRAFT_TOKENS = 10, 64


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
    parser.add_argument("--against", choices=["hf"], help="compare with transformers' own ways instead (against_hf.py)")
    arguments = parser.parse_args()
    if arguments.against:
        if arguments.shape:
            parser.error("--against hf decodes the prompts of a run: pass --run, not --shape")
        import against_hf

        names = ("run", "device", "dtype", "threads")
        against_hf.main([part for name in names for part in (f"--{name}", str(getattr(arguments, name)))])
        return
    torch.set_num_threads(arguments.threads)
    if arguments.shape:
        engine = random_pair(arguments.shape, arguments.device, getattr(torch, arguments.dtype))
    else:
        engine = trained_pair(arguments.run, arguments.device, arguments.dtype)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(engine.target.config.vocab_size, (arguments.prompt,), generator=generator)
    is_cuda = engine.target.device.type == "cuda"
    plans = forced_plans(GPU_TOPK, GPU_NUM_DRAFT_TOKENS) if is_cuda else forced_plans(TOPK, NUM_DRAFT_TOKENS)
    if not arguments.shape:
        plans |= {method: engine.policy.plan(method) for method in ("graft", "eagle3")}
    title, costs = measure(engine, plans, prompt, arguments.rounds, arguments.repeats)
    Console(width=200).print(to_table(costs, title))


def measure(
    engine: GraftEngine, plans: dict[str, Plan], prompt: Tensor, rounds: int, repeats: int
) -> tuple[str, dict[str, "Cost"]]:
    """What a round costs under each plan, eager and, where the engine captures, captured; and of what device."""
    device, captured = engine.target.device, engine.captured
    rate = bandwidth(device)
    arms = {name: (plan, None) for name, plan in plans.items()}
    if captured is not None:
        arms |= {f"{name}, captured": (plan, captured) for name, plan in plans.items()}
    costs = {}
    for name, (plan, engine.captured) in arms.items():
        moved = pass_bytes(engine, len(prompt) + rounds // 2) + head_bytes(engine, plan.num_steps)
        costs[name] = Cost(*count(engine, prompt, plan, rounds), moved, 1e3 * moved / rate)
    # Its hooks wait for the device, which a capture cannot.
    models = ForwardClock(engine) if captured is None else None
    for repeat in range(repeats + 1):
        for name in arms if repeat % 2 else reversed(arms):
            plan, engine.captured = arms[name]
            if models:
                models.seconds = 0.0
            stats = engine.generate(prompt, rounds, plan=plan).stats
            if repeat and stats.rounds:  # the first warms up
                sample = {phase: 1e3 * stats.seconds[phase] / stats.rounds for phase in PHASES}
                if models:
                    sample["outside"] = 100 * (1 - models.since_prefill / stats.decode_seconds)
                costs[name].samples.append(sample | {"round": sum(sample[phase] for phase in PHASES)})
    engine.captured = captured
    floor = 1e3 * pass_bytes(engine, len(prompt) + rounds // 2) / rate
    of = describe_device(device)
    return f"{of['name']}, {of['threads']} threads: floor of a target pass {floor:.2f} ms", costs


@dataclass
class Cost:
    """Of one plan: what a round does, and a sample a generation, in ms and per cent.

    Attributes:
        operators: that the host runs.
        launches: of kernels and graphs; None off CUDA.
        moved: bytes that the passes read at least, in a round that drafts to its plan's end.
    """

    reads: float
    operators: float
    launches: float | None
    moved: int
    floor_ms: float
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
    config = LlamaConfig(**sizes, **ends, tie_word_embeddings=shape not in ("8b", "32b"))
    with torch.device(device):  # where a large one would not fit on the host
        model: Any = LlamaForCausalLM._from_config(config, dtype=dtype).eval().requires_grad_(False)
    return with_random_head(model)


def with_random_head(model: Any) -> GraftEngine:
    """An engine whose head and matrix are of random weights too."""
    config = model.config
    head = DraftHead(
        DraftHeadConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            draft_vocab_size=min(config.vocab_size // 2, DRAFT_VOCABULARY),
            aux_layer_ids=default_aux_layer_ids(config.num_hidden_layers),
            max_position_embeddings=2048,
        )
    )
    ids_VK = random_successors(config.vocab_size, 8)
    probs_VK = torch.rand(config.vocab_size, 8).softmax(dim=1).sort(dim=1, descending=True).values.half()
    return GraftEngine.from_bundle(Bundle(head, paper_policy(), SuccessorMatrix(ids_VK, probs_VK)), model)


def random_successors(vocab_size: int, k: int) -> Tensor:
    """k of every token, none twice, [V, k] int32."""
    offsets_k = torch.randperm(vocab_size)[:k]
    return ((torch.randint(vocab_size, (vocab_size, 1)) + offsets_k) % vocab_size).int()


def forced_plans(topk: int, num_draft_tokens: int) -> dict[str, Plan]:
    """Plans that leave no choice: the root alone, and full trees after so many steps, without and with retrieval."""
    template = depth_template(tuple(-(-count * num_draft_tokens // NUM_DRAFT_TOKENS) for count in (8, 6, 4, 3, 2, 1)))
    drafted = AcceptanceModel(drafted=((1.0, 0.0),) * 6)
    both = replace(drafted, sources=(SourceModel("matrix", template, (1.0,) * 6, ((0.0,) * 6,), (0.0,) * 8),))
    plans: dict[str, Plan] = {"autoregressive": QuotaPlan((QuotaCheckpoint(0),), topk=1)}
    for steps in (1, 3, 6):
        most = min(num_draft_tokens, 1 + topk + (steps - 1) * topk**2)
        checkpoint = Checkpoint(steps, num_draft_tokens=most)
        plans[checkpoint.name] = ScoredPlan((checkpoint,), topk, acceptance=drafted)
    for name, steps in (("d2, retrieval", 3), ("retrieval", 0)):
        full = Checkpoint(steps, num_draft_tokens=num_draft_tokens)
        plans[name] = ScoredPlan((full,), topk, acceptance=both, learns_accepted=True)
    return plans


class Counts(TorchDispatchMode):
    """Operators and host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        self.reads += waits(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))


def count(engine: GraftEngine, prompt: Tensor, plan: Plan, rounds: int) -> tuple[float, float, float | None]:
    """Host reads, operators and launches of a round, the prefill's left out."""
    holder, name = (engine, "_round") if engine.captured is None else (engine.captured, "round")
    engine.generate(prompt, rounds, plan=plan)  # captures
    run, read, found = getattr(holder, name), Tensor.tolist, []

    def tolist(tensor: Tensor) -> Any:
        counts.reads += 1
        return read(tensor)

    def counted(*args: Any) -> Any:
        before = counts.reads, counts.operators
        emitted = run(*args)
        found.append((counts.reads - before[0], counts.operators - before[1]))
        return emitted

    with Counts() as counts, mock.patch.object(Tensor, "tolist", tolist), mock.patch.object(holder, name, counted):
        engine.generate(prompt, rounds, plan=plan)
    reads, operators = zip(*found, strict=True)
    return sum(reads) / len(found), sum(operators) / len(found), launches(engine, prompt, plan, rounds)


def launches(engine: GraftEngine, prompt: Tensor, plan: Plan, rounds: int) -> float | None:
    """Kernels and graphs that the host launches in a round; None off CUDA."""
    if engine.target.device.type != "cuda":
        return None
    counts = []
    for tokens in (1, rounds):
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            done = engine.generate(prompt, tokens, plan=plan).stats.rounds
        counts.append(sum(event.count for event in profile.key_averages() if event.key in LAUNCHES))
    return (counts[1] - counts[0]) / max(done, 1)


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


def head_bytes(engine: GraftEngine, passes: int) -> int:
    """What so many passes of the draft head read at least: of embeddings a few rows; the first one alone fuses."""
    own = {name: value.nbytes for name, value in engine.head.named_parameters() if not name.startswith("embed_tokens")}
    fuse = own.pop("fc.weight")
    return passes * sum(own.values()) + (fuse if passes else 0)


def bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy, of which starting it is little: the best of ten."""
    size = 1 << (31 if device.type == "cuda" else 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def to_table(costs: dict[str, Cost], title: str) -> Table:
    table = Table(title=title)
    columns = (*PHASES, "round", "outside the models %", "MB", "floor", "round / floor", "host reads", "operators")
    for name in ("ms per round", *columns, "launches"):
        table.add_column(name, justify="left" if name == "ms per round" else "right")
    for name, cost in costs.items():
        cells = []
        for key in (*PHASES, "round", "outside"):
            values = [sample[key] for sample in cost.samples if key in sample]
            low, middle, high = quantiles(values, n=4) if len(values) > 1 else (values or [float("nan")]) * 3
            cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})" if values else "")
        ratio = median(sample["round"] for sample in cost.samples) / cost.floor_ms
        cells += [f"{cost.moved / 1e6:,.0f}", f"{cost.floor_ms:.2f}", f"{ratio:.2f}"]
        launched = "" if cost.launches is None else f"{cost.launches:.0f}"
        table.add_row(name, *cells, f"{cost.reads:.1f}", f"{cost.operators:.0f}", launched)
    return table


if __name__ == "__main__":
    main()
