"""The target's states of the samples, kept while it answers them, so that no later stage runs it again.

They lie beside the samples, in the layout that `head.states=disk` writes (`distill/state_source.py`).
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft_inference.errors import GraftError
from graft_inference.target.model import Target
from graft_train.config.head import HeadTrainConfig
from graft_train.config.target import TargetConfig
from graft_train.data.prompts import Prompt
from graft_train.data.samples import Sample, keep_lines, read_lines, read_samples
from graft_train.data.states import PackedTarget, TargetStates, states_of
from graft_train.data.target import target_path, text_config
from graft_train.distill.batches import TokenSample
from graft_train.distill.families import aux_layers
from graft_train.distill.shards import shard_path
from graft_train.distill.state_source import (
    INDEX,
    bytes_of_token,
    check_top,
    identity_of,
    save_shard,
    stored_dtype,
)
from graft_train.files import write_json
from graft_train.processes import say
from graft_train.stage import fingerprint_of

SHARD_TOKENS = 1 << 13
"""Of a shard; answers are written when theirs is, so a kill loses no more."""


class CapturingTarget(Target):
    """A target under our engine whose final state, which lm_head reads, comes behind its aux states.

    Raises:
        GraftError: what `Target` or distillation refuses.
    """

    def __init__(self, model: Any, aux_layer_ids: tuple[int, ...]) -> None:
        PackedTarget(model, aux_layer_ids).release()  # refuses what no head could be trained for, before any work
        super().__init__(model, aux_layer_ids)
        self._final_NH = torch.empty(0)
        self._hooks.append(model.get_decoder().register_forward_hook(self._keep_final))

    def _keep_final(self, module: nn.Module, args: Any, output: Any) -> None:
        self._final_NH = output.last_hidden_state[0]

    def _aux_states(self, tokens_N: Tensor, dtype: torch.dtype) -> Tensor:
        final_NH = self._final_NH.to(tokens_N.device)
        return torch.cat((super()._aux_states(tokens_N, dtype), final_NH), dim=-1)


def captured_settings(head: HeadTrainConfig, target: TargetConfig) -> dict[str, Any]:
    """What decides the captured states, beside what decides the samples.

    Raises:
        GraftError: a head that would not read them, or whose aux layers are not known yet.
    """
    if head.states != "disk":
        raise GraftError(
            f"regenerate.states=true keeps the states that head.states=disk reads, but it is {head.states}: set it"
        )
    if head.init_from and not head.aux_layer_ids:
        raise GraftError(f"regenerate.states=true needs the layers of {head.init_from}: set head.aux_layer_ids")
    return {
        "aux_layer_ids": list(aux_layers(head, text_config(target).num_hidden_layers)),
        "dtype": head.states_dtype,
        "top_k": head.states_top_k,
        "max_length": head.max_length,
    }


class StateShards:
    """Writes the states of samples, shard by shard, in the order in which they come.

    Samples are cut as distillation cuts them. Which samples a shard holds follows from their lengths alone.

    Args:
        directory: of the shards; made if it is not there.
        model: the target.

    Raises:
        GraftError: head.states_top_k is more than the target has tokens.
    """

    def __init__(self, directory: Path, model: Any, head: HeadTrainConfig) -> None:
        check_top(head.states_top_k, model.config.get_text_config().vocab_size)
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.head = head
        self.hidden = model.config.get_text_config().hidden_size
        self.lm_head = model.get_output_embeddings()
        self.dtype = stored_dtype(head.states_dtype, model.dtype)
        self._number = 0
        self._parts: list[TargetStates] = []
        self._tokens = 0

    def check_disk(self, prompts: list[Prompt], new_tokens: int, aux_layers: int) -> None:
        """Says what the states will take. Raises GraftError where not even those of the prompts fit.

        Args:
            new_tokens: most that an answer has.
        """
        per_token = bytes_of_token(self.hidden, aux_layers, self.dtype, self.head.states_top_k)
        lengths = [min(len(prompt.ids), self.head.max_length) for prompt in prompts]
        least, most = sum(lengths), sum(min(length + new_tokens, self.head.max_length) for length in lengths)
        free = shutil.disk_usage(self.directory).free
        taken = f"{least * per_token / 2**30:.2f} to {most * per_token / 2**30:.2f} GiB"
        say(f"regenerate: target states need {taken} on disk; {free / 2**30:.1f} are free")
        if least * per_token > free:
            raise GraftError(
                f"{self.directory} has {free / 2**30:.1f} GiB free, but target states need {taken}: set "
                "regenerate.states=false, head.states_dtype=bfloat16, or another run_dir"
            )

    def resume(self, path: Path) -> set[str]:
        """Cuts the samples that have no shard yet.

        Returns:
            Ids of the others.
        """
        samples = [sample for sample in read_lines(path) if sample.split == "train"]
        shards = groups([self._length(sample) for sample in samples])
        kept = 0
        while self._number < len(shards) - 1 and shard_path(self.directory, self._number).exists():
            kept += len(shards[self._number])
            self._number += 1
        keep_lines(path, kept)
        return {sample.id for sample in samples[:kept]}

    @torch.inference_mode()
    def add(self, sample: Sample, states_SE: Tensor) -> bool:
        """Takes a sample's states, [S, aux and final]; whether all samples so far are in whole shards."""
        length = self._length(sample)
        if length:
            aux_SE, final_SH = states_SE[:length].split((states_SE.shape[1] - self.hidden, self.hidden), dim=1)
            states = states_of(aux_SE, final_SH, iter([self.lm_head(final_SH)]), self.head.states_top_k)
            self._parts.append(states.to(torch.device("cpu")))
            self._tokens += length
        if self._tokens >= SHARD_TOKENS:
            self.flush()
        return not self._parts

    def flush(self) -> None:
        """Writes the last shard, which need not be full."""
        if self._parts:
            save_shard(self.directory, self._number, TargetStates.cat(self._parts), self.dtype)
            self._number, self._parts, self._tokens = self._number + 1, [], 0

    def finish(self, target: TargetConfig, path: Path, aux_layer_ids: tuple[int, ...]) -> None:
        """Writes the index, which says that all is there."""
        cut = [sample.cut(self.head.max_length) for sample in read_samples(path, "train")]
        rows = [TokenSample(torch.tensor(one.ids, dtype=torch.long), one.loss_mask_S) for one in cut if one]
        lengths = [len(row.tokens_S) for row in rows]
        fingerprint = fingerprint_of(target_path(target))
        identity = identity_of(fingerprint, rows, aux_layer_ids, self.dtype, self.head.states_top_k)
        shards = [shard for shard in groups(lengths) if shard]
        write_json(self.directory / INDEX, identity | {"shards": shards, "lengths": lengths})

    def _length(self, sample: Sample) -> int:
        cut = sample.cut(self.head.max_length)
        return 0 if cut is None else len(cut.ids)


def groups(lengths: list[int]) -> list[list[int]]:
    """Numbers of samples by shard; all but the last are full."""
    shards: list[list[int]] = [[]]
    tokens = 0
    for number, length in enumerate(lengths):
        shards[-1].append(number)
        tokens += length
        if tokens >= SHARD_TOKENS:
            shards.append([])
            tokens = 0
    return shards
