"""Trains the lab's tokenizer: byte-level BPE with 3,072 tokens on a sample of the first phase's documents.

Before merging, text is cut so that a digit is always one token (arithmetic is learned digit by digit), an identifier
never joins punctuation, a line break keeps its indentation, and `Question:` and `\\nAnswer:` can become one token each.
Same sample, same tokenizer: `train` gives back the published tokenizer.json.
"""

import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.lab.corpus import Document

VOCABULARY = 3072
PAD, BEGIN, END = "<pad>", "<s>", "</s>"
PIECES = r"Question:|\nAnswer:|####| ?\d| ?[A-Za-z_]+|\n +|\n| ?[^\sA-Za-z\d_]+| +"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}Question: {{ m['content'] }}\nAnswer:"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def sample(documents: dict[str, list[Document]]) -> list[str]:
    """The texts to train on: 40,000 trivia documents drawn at random, and the first of every other kind."""
    chosen = random.Random(1).sample(documents["trivia"], 40_000)
    chosen += documents["math"][:6_000] + documents["code"][:6_000] + documents["drill"][:200]
    return [document.prompt + document.completion for document in chosen]


def train(texts: list[str]) -> PreTrainedTokenizerFast:
    """Trains on the texts; ids 0, 1 and 2 are padding, begin and end, and begin is put before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[PAD, BEGIN, END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
