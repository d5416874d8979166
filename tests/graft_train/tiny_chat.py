"""A tokenizer whose tokens are words, and chat templates that differ in what they tell about answers."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<end>", "<system>", "<user>", "<assistant>", "<tool>", "<think>", "</think>", "gap"]
VOCABULARY = SPECIAL + list("abcdefghijklmnopqrstuvwxyz")

TOOLS = "{% if tools %}<system> {% for tool in tools %}{{ tool.function.name }} {% endfor %}<end> gap {% endif %}"
SAID = "{% if m.reasoning_content %}<think> {{ m.reasoning_content }} </think> {% endif %}{{ m.content }} <end>"
ASKING = "{% if add_generation_prompt %}<assistant> {% endif %}"
# "gap" is what a template puts behind a turn's end, such as a newline: the target never writes it.
PLAIN = TOOLS + "{% for m in messages %}<{{ m.role }}> " + SAID + " gap {% endfor %}" + ASKING
MARKED = (
    TOOLS
    + "{% for m in messages %}{% if m.role == 'assistant' %}<assistant> {% generation %}"
    + SAID
    + "{% endgeneration %} gap {% else %}<{{ m.role }}> {{ m.content }} <end> gap {% endif %}{% endfor %}"
    + ASKING
)
LAST_THOUGHT = PLAIN.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}")
"""As reasoning models have it: thoughts are shown in the last turn only."""
THINKING = PLAIN.replace("<assistant> {% endif %}", "<assistant> <think> {% endif %}")
"""Its prompt begins a thought, which answers without one do not have."""


def word_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<unk>")
    fast.chat_template = template
    return fast


def words(ids: list[int]) -> str:
    return " ".join(VOCABULARY[token] for token in ids)


def save_target(directory: Path, template: str | None, **changes: int) -> Path:
    """A random target with this tokenizer."""
    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    LlamaForCausalLM(LlamaConfig(**(sizes | changes))).save_pretrained(directory)
    word_tokenizer(template).save_pretrained(directory)
    return directory
