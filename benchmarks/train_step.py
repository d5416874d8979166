"""One optimizer step of the draft head: our fast path, our plain reference, and the `speculators` trainer's step.

    python benchmarks/train_step.py --tokens 512 --width 256 --vocab 8192 --draft-vocab 4096 --steps 4
    python benchmarks/train_step.py --arms loss reference-loss --tokens 4096 --vocab 32000 --draft-vocab 8192
    python benchmarks/train_step.py --arms block block-speculators --tokens 1024 --draft-vocab 8192 --anchors 64

Each arm lives in a process of its own; the parent asks them for steps in turn and reports medians, the quartiles
around them, the processor's time, which other work on the machine disturbs less, and the peak of the memory that a step
takes beyond what is held between steps. The target is left out: its states are random. `speculators` 0.9 pins other
packages than ours and is best installed beside them:

    pip install --target SOMEWHERE --no-deps speculators==0.9.0 hs-connectors==0.9.0
    pip install --target SOMEWHERE openai aiohttp loguru pydantic-settings
    PYTHONPATH=SOMEWHERE python benchmarks/train_step.py ...
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from block_arms import block_speculators_step, block_step
from torch import Tensor

from graft_inference.heads.eagle3.model import DraftHead, DraftHeadConfig
from graft_train.config.head import HeadTrainConfig
from graft_train.data.states import TargetStates
from graft_train.device import describe_device
from graft_train.distill.batches import PackedBatch
from graft_train.distill.eagle3.attention import reference_attention
from graft_train.distill.eagle3.layout import make_layout
from graft_train.distill.eagle3.loss import distillation_loss, reference_loss, taught_positions
from graft_train.distill.eagle3.strategy import Eagle3Strategy
from graft_train.distill.eagle3.unroll import unroll
from graft_train.distill.optimizer import make_optimizers
from graft_train.distill.teacher import final_state_teacher

ARMS = ("fast", "reference", "speculators")
EXTRA = ("loss", "reference-loss", "block", "block-speculators")
HEAD_SIZE = 64


class Shapes:
    """The row, the same for all arms: documents of a quarter prompt, three quarters answer."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(0)
        self.args, self.device = args, device
        self.dtype = torch.float32
        length = args.tokens // args.documents
        self.lengths = [length] * args.documents
        answer_L = torch.arange(length) >= length // 4
        self.loss_mask_S = answer_L.repeat(args.documents)
        self.layout = make_layout(self.lengths, self.loss_mask_S).to(device)
        self.tokens_S = torch.randint(args.vocab, (length * args.documents,), device=device)
        self.kept_D = torch.randperm(args.vocab)[: args.draft_vocab].sort().values
        count = len(self.tokens_S)
        self.embedding_VH = torch.randn(args.vocab, args.width, device=device)
        self.lm_head_VH = torch.randn(args.vocab, args.width, device=device) * args.width**-0.5
        aux_SE = torch.randn(count, 3 * args.width, device=device)
        final_SH = torch.randn(count, args.width, device=device)
        self.states = TargetStates(aux_SE, (final_SH @ self.lm_head_VH.T).argmax(-1), final_SH)
        self.weights = HeadTrainConfig(ttt_steps=args.steps).weights()

    def head(self) -> DraftHead:
        args = self.args
        head = DraftHead(
            DraftHeadConfig(
                hidden_size=args.width,
                intermediate_size=3 * args.width,
                num_attention_heads=args.width // HEAD_SIZE,
                num_key_value_heads=args.width // HEAD_SIZE,
                head_dim=HEAD_SIZE,
                vocab_size=args.vocab,
                draft_vocab_size=args.draft_vocab,
                aux_layer_ids=(0, 1, 2),
                max_position_embeddings=args.tokens + 16,
            )
        )
        head.set_draft_vocabulary(self.kept_D)
        return head.to(self.device)


def optimized(parameters: list[Tensor], optimizers: list[torch.optim.Optimizer], loss_of: Callable[[], Tensor]) -> None:
    loss_of().backward()
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def our_step(shapes: Shapes, fast: bool) -> Callable[[], None]:
    head, steps = shapes.head(), shapes.args.steps
    settings = HeadTrainConfig(ttt_steps=steps)
    strategy = Eagle3Strategy(head, SimpleNamespace(lm_head_VH=shapes.lm_head_VH), settings).to(shapes.device)
    optimizers = make_optimizers(head, settings)
    layout, states = shapes.layout, shapes.states
    batch = PackedBatch(list(range(len(shapes.lengths))), shapes.lengths, shapes.tokens_S, shapes.loss_mask_S)
    precision = torch.autocast(shapes.device.type, torch.bfloat16, enabled=shapes.device.type == "cuda")

    def fast_loss() -> Tensor:
        prepared = strategy.prepare(batch, states, seed=0)
        embedding_SH = shapes.embedding_VH[shapes.tokens_S]
        return strategy(prepared, embedding_SH, strategy.coefficients(prepared.trained_K))[0]

    def plain_loss() -> Tensor:
        taught = taught_positions(layout, states.choice_S, head.t2d, steps)
        weights = strategy.coefficients(taught.trained_NK.sum(0)).tolist()
        embedding_SH, logits_SV = shapes.embedding_VH[shapes.tokens_S], states.final_SH @ shapes.lm_head_VH.T
        outputs = unroll(head, embedding_SH, states.aux_SE, layout, steps, reference_attention)
        return reference_loss(head, outputs, logits_SV, layout, shapes.loss_mask_S.to(shapes.device), weights)

    def loss() -> Tensor:
        with precision:
            return fast_loss() if fast else plain_loss()

    return lambda: optimized(list(head.parameters()), optimizers, loss)


def loss_step(shapes: Shapes, fast: bool) -> Callable[[], None]:
    """The loss and its gradients alone, from the head's outputs on."""
    head, steps, states, layout = shapes.head(), shapes.args.steps, shapes.states, shapes.layout
    outputs = [torch.randn(len(layout.columns_C), shapes.args.width, device=shapes.device) for _ in range(steps)]
    for output in outputs:
        output.requires_grad_()
    teacher_DH = shapes.lm_head_VH[head.target_ids]
    loss_mask_S = shapes.loss_mask_S.to(shapes.device)

    def step() -> None:
        if fast:
            taught = taught_positions(layout, states.choice_S, head.t2d, steps)
            weights_K = torch.tensor(shapes.weights, device=shapes.device)
            loss, _ = distillation_loss(
                head, outputs, final_state_teacher(states.final_SH, teacher_DH), taught, weights_K
            )
        else:
            logits_SV = states.final_SH @ shapes.lm_head_VH.T
            loss = reference_loss(head, outputs, logits_SV, layout, loss_mask_S, shapes.weights)
        loss.backward()
        head.zero_grad()
        for output in outputs:
            output.grad = None

    return step


def speculators_step(shapes: Shapes) -> Callable[[], None]:
    """The package's EAGLE-3 model, loss and optimizer, as its trainer drives them."""
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.models.eagle3.core import Eagle3DraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    args, cuda = shapes.args, shapes.device.type == "cuda"
    layer = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_attention_heads=args.width // HEAD_SIZE,
        num_key_value_heads=args.width // HEAD_SIZE,
        head_dim=HEAD_SIZE,
        num_hidden_layers=1,
        max_position_embeddings=args.tokens + 16,
        pad_token_id=None,
    )
    layer._attn_implementation = "simple_flex_attention" if cuda else "sdpa"
    proposal = GreedyTokenProposalConfig(speculative_tokens=args.steps)
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=args.draft_vocab,
        norm_before_residual=False,
        eagle_aux_hidden_state_layer_ids=[1, 2, 3],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[proposal],
            default_proposal_method="greedy",
            verifier=VerifierConfig.from_config(layer, name_or_path=None),
        ),
    )
    model = Eagle3DraftModel(config)
    with torch.no_grad():
        for weight in (model.lm_head.weight, model.verifier_lm_head.weight):
            weight.copy_(shapes.lm_head_VH[shapes.kept_D].cpu())
        model.embed_tokens.weight.copy_(shapes.embedding_VH.cpu())
    model.lm_head.weight.requires_grad_(True)  # ours is trained, too
    model = model.to(shapes.device).train()
    losses = resolve_loss_config("kl_div", "fused" if cuda else "eager")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    precision = torch.autocast(shapes.device.type, torch.bfloat16, enabled=cuda)

    def loss() -> Tensor:
        with precision:
            return model(
                hidden_states=shapes.states.aux_SE[None],
                input_ids=shapes.tokens_S.roll(-1)[None],
                document_ids=shapes.layout.document_S[None],
                loss_mask=shapes.loss_mask_S[None].to(shapes.device),
                position_ids=shapes.layout.positions_S[None],
                verifier_last_hidden_states=shapes.states.final_SH.roll(-1, 0)[None],
                ttt_steps=args.steps,
                ttt_step_loss_decay=0.8,
                loss_config=losses,
            )[1]

    return lambda: optimized(list(model.parameters()), [optimizer], loss)


def make_step(arm: str, shapes: Shapes) -> Callable[[], None]:
    match arm:
        case "block" | "block-speculators":
            step = block_step(shapes) if arm == "block" else block_speculators_step(shapes)
            return lambda: optimized(*step)
        case "fast" | "reference":
            return our_step(shapes, arm == "fast")
        case "loss" | "reference-loss":
            return loss_step(shapes, arm == "loss")
    return speculators_step(shapes)


def memory(device: torch.device, field: str) -> int:
    """Bytes now (VmRSS) or at the peak since the last reset (VmHWM)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else 0


def work(arm: str, args: argparse.Namespace) -> None:
    """Answers every line on stdin with the seconds and the extra memory of one step."""
    device = torch.device(args.device)
    step = make_step(arm, Shapes(args, device))
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        held, started, worked = memory(device, "VmRSS"), time.perf_counter(), time.process_time()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds, worked = time.perf_counter() - started, time.process_time() - worked
        answer = {"seconds": seconds, "worked": worked, "bytes": memory(device, "VmHWM") - held}
        print(json.dumps(answer), flush=True)


def measure(args: argparse.Namespace) -> None:
    """Interleaves the arms and prints their medians."""
    workers = {}
    for arm in args.arms:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", arm]
        # Freed memory goes back at once, so that the peak is what a step needs.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        workers[arm] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        while (line := workers[arm].stdout.readline()).strip() != "ready":
            if not line:
                sys.exit(f"the {arm} arm did not start; for speculators see how to install it at the top of {__file__}")
    taken: dict[str, list[dict[str, float]]] = {arm: [] for arm in args.arms}
    for _ in range(args.repeats):
        for arm, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            taken[arm].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    print(json.dumps({**describe_device(torch.device(args.device)), **vars(args)}))
    print("| arm | ms | quartiles | x | processor ms | x | peak MiB of a step |\n|---|---:|---:|---:|---:|---:|---:|")
    first = {what: statistics.median(one[what] for one in taken[args.arms[0]]) for what in ("seconds", "worked")}
    for arm, steps in taken.items():
        times = [one["seconds"] for one in steps]
        low, seconds, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        worked = statistics.median(one["worked"] for one in steps)
        peak = max(one["bytes"] for one in steps) / 2**20
        print(
            f"| {arm} | {seconds * 1e3:.0f} | {low * 1e3:.0f}-{high * 1e3:.0f} | {seconds / first['seconds']:.2f} | "
            f"{worked * 1e3:.0f} | {worked / first['worked']:.2f} | {peak:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tokens": 512, "width": 256, "vocab": 8192, "draft-vocab": 4096, "steps": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--documents", type=int, default=4)
    for name, default in {"layers": 2, "block-size": 8, "anchors": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="of the block arms")
    parser.add_argument("--block-loss", choices=("forward_kl", "cross_entropy"), default="forward_kl")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arms", nargs="+", choices=ARMS + EXTRA, default=list(ARMS))
    parser.add_argument("--worker", choices=ARMS + EXTRA, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args)
    else:
        measure(args)


if __name__ == "__main__":
    main()
