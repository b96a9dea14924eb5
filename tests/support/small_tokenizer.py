"""A real tokenizer, trained in the test: byte-level BPE behind transformers, with a chat template."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def small_tokenizer(
    *, adds_bos: bool = False, adds_eos: bool = False, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """A tokenizer that can spell any text; ``adds_bos`` and ``adds_eos`` are what it does when asked for specials."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["Problem: two plus two. Solution: four. Swali: mbili na mbili. Suluhisho: nne."], trainer)
    if adds_bos or adds_eos:
        single = f"{'<s> ' if adds_bos else ''}$A{' <|end|>' if adds_eos else ''}"
        bpe.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("<|end|>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="<|end|>",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=chat_template,
    )
