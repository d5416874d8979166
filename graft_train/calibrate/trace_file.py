"""A file of traces, read strictly: replays count and index by what is in it."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graft_inference.errors import GraftError
from graft_inference.files import own_file, parse_json
from graft_inference.retrieval.sources import SOURCES
from graft_inference.template import check_template
from graft_inference.tree import MAX_NODES, drafted_nodes
from graft_train.calibrate.traces import COLUMNS, SourceTraces, Traces

WHOLE = (torch.int16, torch.int32, torch.int64)
ROUNDING = 1e-3
"""By which sums of probabilities may be above one."""


def read_traces(path: Path, made_of: dict[str, Any]) -> Traces:
    """What `Traces.save` wrote.

    Raises:
        GraftError: a missing or damaged file, or one made of other weights or data.
    """
    tensors, recorded = _stored(path)
    for name, expected in made_of.items():
        if recorded.get(name) != expected:
            raise GraftError(
                f"{path} was traced with another {name} ({recorded.get(name)}, now {expected}): give the settings "
                f"that it was traced with, or delete {path.parent} and run graft calibrate without "
                "policy.latency_only and policy.latency_from"
            )
    parts = [one.name for one in fields(SourceTraces)]
    if set(tensors) != {*COLUMNS, *(f"{source}.{part}" for source in SOURCES for part in parts)}:
        raise GraftError(f"{path} is not a file of traces; delete {path.parent} and run graft calibrate")
    sources = {source: SourceTraces(*(tensors.pop(f"{source}.{part}") for part in parts)) for source in SOURCES}
    traces = Traces(**tensors, sources=sources)
    try:
        _check(traces)
    except ValueError as error:
        raise GraftError(f"{path} is damaged ({error}); delete {path.parent} and run graft calibrate") from error
    return traces


def _stored(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what they were made of."""
    remedy = "run graft calibrate without latency_only and latency_from"
    try:
        with safe_open(own_file(path, remedy), "pt") as file:
            recorded = parse_json((file.metadata() or {}).get("made_of", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except GraftError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise GraftError(f"{path} cannot be read ({error}): {remedy}") from error
    return tensors, recorded if isinstance(recorded, dict) else {}


def _check(traces: Traces) -> None:
    """Raises ValueError for a column of another shape, type or range."""
    positions, steps = len(traces.prompt_T), _shape(traces.confidence_TP, 2)[1]
    _need(positions > 0 and steps > 0, "it has no position or no draft step")
    topk = int((traces.depths_C == 1).sum())
    _need(1 <= topk <= MAX_NODES and steps <= MAX_NODES, f"it has {topk} nodes at depth 1 and {steps} draft steps")
    depths = [1] * topk + [step for step in range(2, steps + 1) for _ in range(topk**2)]
    _whole("depths_C", traces.depths_C, (len(depths),), 1)
    _need(traces.depths_C.tolist() == depths, "depths_C is none of a draft")
    candidates, depth = drafted_nodes(topk, steps), _shape(traces.truth_TD, 2)[1]
    _need(depth >= steps, "truth_TD is shorter than a draft")
    _whole("prompt_T", traces.prompt_T, (positions,), 0)
    _whole("context_T", traces.context_T, (positions,), 0)
    _whole("truth_TD", traces.truth_TD, (positions, depth), -1)
    _whole("tokens_TC", traces.tokens_TC, (positions, candidates), 0)
    _whole("parents_TC", traces.parents_TC, (positions, candidates), -1)
    _check_order(traces)
    _check_parents(traces.parents_TC, topk)
    _chances("confidence_TP", traces.confidence_TP, (positions, steps))
    _chances("reach_TC", traces.reach_TC, (positions, candidates))
    _logs("logp_TC", traces.logp_TC, (positions, candidates), may_lack=False)
    for name, source in traces.sources.items():
        _check_source(name, source, positions, depth)


def _check_order(traces: Traces) -> None:
    """Positions of a prompt stand one behind the other."""
    prompt_T, context_T = traces.prompt_T.diff(), traces.context_T.diff()
    _need(bool((prompt_T >= 0).all()), "prompt_T falls")
    _need(bool((context_T[prompt_T == 0] == 1).all()), "context_T has gaps")


def _check_parents(parents_TC: Tensor, topk: int) -> None:
    """Each layer's parents are of the layer before; those of the first are the root, -1."""
    _need(bool((parents_TC[:, :topk] == -1).all()), "parents_TC begins with others than the root")
    first, end = 0, topk
    while end < parents_TC.shape[1]:
        layer_TM = parents_TC[:, end : end + topk**2]
        _need(bool(((layer_TM >= first) & (layer_TM < end)).all()), "parents_TC skips a layer")
        first, end = end, end + topk**2


def _check_source(name: str, source: SourceTraces, positions: int, depth: int) -> None:
    paths, longest = _shape(source.template_RL, 2)
    shape = (positions, paths)
    _need(paths > 0 and longest <= depth, f"{name} has no template, or one of longer paths than truth_TD")
    _whole(f"{name}.template_RL", source.template_RL, (paths, longest), -1)
    ends_RL = source.template_RL < 0
    _need(bool((ends_RL[:, 1:] >= ends_RL[:, :-1]).all()), f"{name}.template_RL has a gap in a path")
    check_template(source.template, f"the template of {name}")
    _whole(f"{name}.tokens_TR", source.tokens_TR, shape, -1)
    _whole(f"{name}.evidence_T", source.evidence_T, (positions,), 0)
    _need(int(source.evidence_T.max()) <= SOURCES[name].kinds, f"{name}.evidence_T has an unknown kind")
    _chances(f"{name}.reach_TR", source.reach_TR, shape)
    _logs(f"{name}.logp_TR", source.logp_TR, shape, may_lack=True)


def _shape(tensor: Tensor, dimensions: int) -> torch.Size:
    _need(tensor.dim() == dimensions, f"a column of shape {list(tensor.shape)} must have {dimensions} dimensions")
    return tensor.shape


def _whole(name: str, tensor: Tensor, shape: tuple[int, ...], least: int) -> None:
    """Whole numbers that a token, a place or a count can be."""
    _need(tensor.shape == shape and tensor.dtype in WHOLE, f"{name} is {tensor.dtype} {list(tensor.shape)}")
    inside = bool(((tensor >= least) & (tensor.long() < 2**31)).all())
    _need(inside, f"{name} holds numbers below {least}, or too large ones")


def _chances(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    _need(tensor.shape == shape and tensor.dtype == torch.float32, f"{name} is {tensor.dtype} {list(tensor.shape)}")
    _need(bool(((tensor >= 0) & (tensor <= 1 + ROUNDING)).all()), f"{name} holds what is no probability")


def _logs(name: str, tensor: Tensor, shape: tuple[int, ...], may_lack: bool) -> None:
    """Of probabilities; -inf where nothing was found, if that may be."""
    _need(tensor.shape == shape and tensor.dtype == torch.float32, f"{name} is {tensor.dtype} {list(tensor.shape)}")
    known = tensor[tensor > -torch.inf] if may_lack else tensor
    sound = bool((known.isfinite() & (known <= ROUNDING)).all()) and not bool(tensor.isnan().any())
    _need(sound, f"{name} holds what is no logarithm of a probability")


def _need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
