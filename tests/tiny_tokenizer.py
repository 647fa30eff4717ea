"""A tokenizer for tests: byte-level BPE of 300 tokens with a ChatML template, made offline.

Any Unicode text round-trips, and common English words take more than one byte a token, so that
merges across boundaries really happen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 300
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Their ids are 0, 1, 2; `<|im_end|>` ends a turn."""
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = (
    "system user assistant The quick brown fox jumps over the lazy dog. What is the name of the "
    "ship, and who is the captain? There was a storm in the night, and then the sun came out."
)


def write_tokenizer(
    folder: Path,
    *,
    chat_template: str | None = CHATML_TEMPLATE,
    more_special: Sequence[str] = (),
) -> None:
    """Write the tokenizer's files into `folder`, as AutoTokenizer reads them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*SPECIAL_TOKENS, *more_special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([_TEXT] * 2, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
    ).save_pretrained(str(folder))


BAD_TEMPLATES = [
    "{{ raise_exception('roles must alternate') }}",
    "{% for m in messages %}",
    "{{ messages[9]['content'] + 'x' }}",
    "{{ messages.append(messages[0]) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "{{ '{0.__class__.__mro__}'.format('') + ''.__class__.__name__ }}",
]
"""Chat templates that fail or reach for what is not theirs."""
