"""Graft's plug-in among SGLang's own classes, where there is no GPU: `python sglang_driver.py JOB.json RESULT.json`.

SGLang's Python is the real one, and its Triton kernels run in Triton's interpreter. What it imports for GPUs alone is
stubbed. No model runs: the job says what a head proposed.

The job:
    bundle, target  directories
    candidates      a safetensors file: p_I and ids_I of each step I, [B, topk] and then [B * topk, topk]; lengths [B]
    texts           of each request, its prompt and what it has written, the last token included
    nodes           of a verification
    corpus          a file that `graft texts` wrote
    predict         of each request, by the tokens of a path below the root, joined by spaces, what the target says next

The result has what the functions below return, and by mode of the mask the trees that SGLang made and that Graft made.
"""

import json
import os
import re
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
STUBBED = {"torchvision", "compressed_tensors", "sgl_kernel", "partial_json_parser", "setproctitle"}


class Stub(types.ModuleType):
    __path__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class Stubs:
    """Finds the modules that only GPUs need."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.split(".")[0] in STUBBED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> Stub:
        return Stub(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


import transformers.utils.import_utils as available  # noqa: E402

available.is_torchvision_available()  # before there is a stub of it
sys.meta_path.insert(0, Stubs())  # type: ignore[arg-type]

import sglang  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from sglang.kernels.ops.speculative import spec_tree  # noqa: E402
from sglang.srt.arg_groups.overrides import resolved_view  # noqa: E402
from sglang.srt.managers.io_struct import AddExternalCorpusReqInput  # noqa: E402
from sglang.srt.managers.overlap_utils import RelayPayload  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode  # noqa: E402
from sglang.srt.runtime_context import publish  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from sglang.srt.speculative import eagle_worker_v2  # noqa: E402
from sglang.srt.speculative.cpp_ngram.external_corpus import iter_external_corpus_chunks  # noqa: E402
from sglang.srt.speculative.eagle_info import EagleVerifyInput  # noqa: E402
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm  # noqa: E402
from sglang.srt.speculative.spec_registry import CustomSpecAlgo  # noqa: E402
from sglang.srt.speculative.spec_utils import select_top_k_tokens  # noqa: E402
from transformers import AutoConfig, AutoTokenizer  # noqa: E402

from graft_inference import GraftError  # noqa: E402
from graft_inference.integrations import sglang as plugin  # noqa: E402


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    stock_worker = eagle_worker_v2.EagleDraftWorker
    plugin.register()
    algorithm = SpeculativeAlgorithm.from_string("graft")
    result = {"algorithm": answers(algorithm), "eagle3": answers(SpeculativeAlgorithm.EAGLE3), "asked": asked()}
    worker = plugin.worker_class(None)
    result["hooks"] = {
        "worker": worker is eagle_worker_v2.EAGLEWorkerV2,
        "draft worker": issubclass(eagle_worker_v2.EagleDraftWorker, stock_worker)
        and eagle_worker_v2.EagleDraftWorker is not stock_worker,
        "organize": eagle_worker_v2.organize_draft_results.__wrapped__ is not None,
    }
    target = job["target"]
    result |= {"refused": refusals(target), "defaults": defaults(target), "relayed": relayed(target)}
    result |= {"corpus": read_corpus(Path(job["corpus"]), target)}
    for mode in ("FULL_MASK", "QLEN_ONLY"):
        result[mode] = rounds(job, spec_tree.TreeMaskMode[mode])
    Path(result_path).write_text(json.dumps(result))


def answers(algorithm: Any) -> dict[str, Any]:
    """What an algorithm says of itself, by every question that SGLang asks its own algorithms."""
    names = [name for name in vars(SpeculativeAlgorithm) if name.startswith(("is_", "supports_", "has_", "need_"))]
    return {name: getattr(algorithm, name)() for name in names if not name.startswith("is_frozen")}


def asked() -> dict[str, list[str]]:
    """Methods that some file of SGLang calls on whichever algorithm is chosen, and who lacks which."""
    called = set()
    for path in Path(sglang.__file__).parent.rglob("*.py"):
        called |= set(re.findall(r"\bspec_algo(?:rithm)?\.([a-z_]+)\(", path.read_text(encoding="utf-8")))
    called -= {"from_string", "register"}
    kinds = {"SGLang's own": SpeculativeAlgorithm, "stock": CustomSpecAlgo, "graft": plugin.GraftAlgorithm}
    return {name: sorted(method for method in called if not hasattr(kind, method)) for name, kind in kinds.items()}


def relayed(target: str) -> dict[str, Any]:
    """What SGLang keeps from round to round for an algorithm, made and written as its scheduler does; or the error."""
    publish(started(target, "EAGLE3"), role="scheduler")
    SpeculativeAlgorithm.register("STOCK")(lambda server_args: None)
    pool = types.SimpleNamespace(req_to_token=torch.zeros(4, 8, dtype=torch.int32))
    row, p, ids = torch.tensor([2]), torch.tensor([[0.5, 0.3]]), torch.tensor([[7, 1]])
    payload = RelayPayload(bonus_tokens=torch.tensor([5]), topk_p=p, topk_index=ids, hidden_states=torch.ones(1, 4))
    found: dict[str, Any] = {}
    for name in ("GRAFT", "EAGLE3", "STOCK"):
        algorithm = SpeculativeAlgorithm.from_string(name)
        try:
            needs = {"needs_cpu_seq_lens": True, "needs_confidence_relay": False}
            kept = algorithm.create_future_map(torch.device("cpu"), pool, **needs)
            kept.stash(row, payload)
            buffers = kept.output_tokens_buf, kept.topk_p_buf, kept.topk_index_buf, kept.hidden_states_buf
            found[name] = [buffer[row].tolist() for buffer in buffers]
        except AttributeError as error:
            found[name] = str(error)
    return found


def refusals(target: str) -> dict[str, str | None]:
    """What SGLang, asking the plug-in, says of settings and of an SGLang that is another one; None for nothing."""
    odd = {"speculative_num_steps": None, "speculative_eagle_topk": 1, "disable_overlap_schedule": False, "pp_size": 2}
    odd |= dict.fromkeys(("speculative_use_rejection_sampling", "speculative_adaptive"), True)
    odd |= {"attn_dp_size": 2, "disaggregation_mode": "decode", "attention_backend": "flashmla"}
    found = {"what the help says": refusal(started(target, "graft").resolve_once)}
    for name, value in odd.items():
        found[name] = refusal(started(target, "graft", tp_size=2, **{name: value}).resolve_once)
    found["pages of triton"] = refusal(started(target, "graft", attention_backend="triton", page_size=64).resolve_once)
    version, sglang.__version__ = sglang.__version__, "0.5.22"
    found["another version"] = refusal(plugin.register)
    sglang.__version__ = version
    organize, eagle_worker_v2.organize_draft_results = eagle_worker_v2.organize_draft_results, lambda score_list: None
    found["another worker"] = refusal(plugin.worker_class, None)
    eagle_worker_v2.organize_draft_results = organize
    return found


def started(target: str, algorithm: str, **changes: Any) -> ServerArgs:
    """SGLang's settings, as the help says but for the changes."""
    settings = {"speculative_num_steps": 4, "speculative_eagle_topk": 3, "speculative_num_draft_tokens": 12}
    settings |= {"disable_overlap_schedule": True, "enable_mixed_chunk": True, "device": "cpu"}
    settings |= {"model_path": target, "speculative_draft_model_path": target}
    return ServerArgs(speculative_algorithm=algorithm, **settings | changes)


def defaults(target: str) -> list[Any]:
    """What SGLang settles for the algorithm: requests at a time, and whether chunks are mixed."""
    server_args = started(target, "graft")
    server_args.resolve_once()
    settled = resolved_view(server_args)
    return [settled.max_running_requests, settled.enable_mixed_chunk]


def refusal(call: Any, *arguments: Any) -> str | None:
    try:
        call(*arguments)
    except GraftError as error:
        return str(error)
    return None


def read_corpus(file: Path, target: str) -> dict[str, Any]:
    """What SGLang's own reader makes of a file, and the request that its endpoint would take."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    request = AddExternalCorpusReqInput(corpus_id="run", file_path=str(file))
    try:
        list(iter_external_corpus_chunks(str(file), tokenizer, 9))
        refused = ""
    except ValueError as error:
        refused = str(error)
    return {
        "chunks": list(iter_external_corpus_chunks(str(file), tokenizer, 1000)),
        "request": {"corpus_id": request.corpus_id, "file_path": request.file_path},
        "too few": refused,
    }


class Recorded:
    """In place of SGLang's draft worker: drafts what the job says, and organises and builds it with SGLang's code."""

    def __init__(self, job: dict[str, Any], mode: Any) -> None:
        self.said = load_file(job["candidates"])
        self.nodes, self.mode = job["nodes"], mode
        self.topk = self.said["p_0"].shape[1]
        self.speculative_num_steps = sum(name.startswith("p_") for name in self.said)
        self.speculative_num_draft_tokens, self.tree_mask_mode = job["nodes"], mode
        config = types.SimpleNamespace(hf_text_config=AutoConfig.from_pretrained(job["target"]))
        runner = types.SimpleNamespace(attn_backend=types.SimpleNamespace(verify_mask=None))
        self.target_worker = types.SimpleNamespace(model_config=config, model_runner=runner)
        self.server_args = types.SimpleNamespace(speculative_draft_model_path=job["bundle"])
        self.roots = torch.tensor([text[-1] for text in job["texts"]])

    def draft(self, batch: Any) -> Any:
        scores, lists = None, ([], [], [])
        for step in range(self.speculative_num_steps):
            p, ids = self.said[f"p_{step}"], self.said[f"ids_{step}"]
            hidden = torch.zeros(len(p), 1)
            _, _, scores, info = select_top_k_tokens(step, p, ids, hidden, scores, self.topk)
            for kept, part in zip(lists, info, strict=True):
                kept.append(part)
        parents, best, tokens = self.organize(*lists, self.nodes)
        return self.built(batch.seq_lens, parents, best, tokens)

    def built(self, lengths: Any, parents: Any, best: Any, tokens: Any) -> Any:
        """What SGLang's `build_tree_kernel_efficient` returns, as its verification takes it."""
        size, nodes = len(lengths), self.nodes
        links = torch.full((3, size, nodes), -1, dtype=torch.long)
        room = size * nodes**2 + (int(lengths.sum()) * nodes if self.mode.name == "FULL_MASK" else 0)
        mask, positions = torch.ones(room, dtype=torch.bool), torch.zeros(size * nodes, dtype=torch.long)
        shape = (self.topk, self.speculative_num_steps, nodes, self.mode)
        spec_tree.sgl_build_tree_kernel_triton(parents, best, lengths, mask, positions, *links, *shape)
        return EagleVerifyInput(
            draft_token=torch.cat((self.roots[:, None], tokens), dim=1).flatten(),
            custom_mask=mask,
            positions=positions,
            retrieve_index=links[0],
            retrieve_next_token=links[1],
            retrieve_next_sibling=links[2],
            retrieve_cum_len=None,
            spec_steps=self.speculative_num_steps,
            topk=self.topk,
            draft_token_num=nodes,
            capture_hidden_mode=CaptureHiddenMode.FULL,
            seq_lens_sum=int(lengths.sum()),
            seq_lens_cpu=lengths,
        )


def rounds(job: dict[str, Any], mode: Any) -> dict[str, Any]:
    """One round of the batch, by SGLang alone and with Graft."""
    organize = eagle_worker_v2.organize_draft_results  # with Graft's hook around it
    plain, hooked = organize.__wrapped__, plugin.draft_worker_class(Recorded, EagleVerifyInput)
    Recorded.organize = staticmethod(plain)
    requests = [types.SimpleNamespace(origin_input_ids=text[:-2], output_ids=text[-2:]) for text in job["texts"]]
    stock = Recorded(job, mode)
    batch = types.SimpleNamespace(reqs=requests, seq_lens=stock.said["lengths"])
    batch.forward_mode = types.SimpleNamespace(is_idle=lambda: False)
    theirs = stock.draft(batch)
    Recorded.organize = staticmethod(organize)
    graft = hooked(job, mode)
    hooked.found = property(lambda self: eagle_worker_v2.EagleDraftWorker.found)  # where SGLang's own hook leaves it
    ours = graft.draft(batch)
    sizes = [ours.max_tree_depth, ours.tree_topk, isinstance(ours, EagleVerifyInput)]
    return {"stock": shown(theirs, batch, job), "graft": shown(ours, batch, job), "sizes": sizes}


def shown(made: Any, batch: Any, job: dict[str, Any]) -> dict[str, Any]:
    """A verification input as lists, and what SGLang's greedy verification accepts of it."""
    size, nodes = len(batch.reqs), job["nodes"]
    tokens, depth = made.draft_token.view(size, nodes), made.max_tree_depth
    rows, place = [], 0
    for length in batch.seq_lens.tolist() if made.custom_mask.numel() > size * nodes**2 else [0] * size:
        rows.append(made.custom_mask[place : place + nodes * (length + nodes)].view(nodes, -1))
        place += rows[-1].numel()
    says = torch.zeros_like(tokens)
    for request in range(size):
        for node in range(nodes):
            seen = rows[request][node, -nodes:].nonzero().flatten().tolist()[1:]
            path = " ".join(str(int(tokens[request, one])) for one in seen)
            says[request, node] = job["predict"][request].get(path, -1)
    predicts = torch.full((size * nodes,), -1, dtype=torch.int32)
    accepted, count = torch.full((size, depth), -1, dtype=torch.int32), torch.zeros(size, dtype=torch.int32)
    links = made.retrieve_index, made.retrieve_next_token, made.retrieve_next_sibling
    spec_tree.verify_tree_greedy_triton(predicts, accepted, count, tokens, *links, says)
    places = [[int(one) - request * nodes for one in row if one >= 0] for request, row in enumerate(accepted)]
    return {
        "tokens": tokens.tolist(),
        "positions": made.positions.view(size, nodes).tolist(),
        "child": made.retrieve_next_token.tolist(),
        "sibling": made.retrieve_next_sibling.tolist(),
        "sees": [row[:, -nodes:].int().tolist() for row in rows],
        "sees text": all(bool(row[:, :-nodes].all()) for row in rows),
        "accepted": [[int(tokens[request, one]) for one in row[1:]] for request, row in enumerate(places)],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
