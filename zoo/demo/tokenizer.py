"""The demo zoo's tokenizer: one token per byte, so one per character of plain English."""

import json
from pathlib import Path

BOS, EOS, PAD = 0, 1, 2
SPECIALS = ("<s>", "</s>", "<pad>")
VOCAB_SIZE = len(SPECIALS) + 256

# The experts see `<s>` + prompt + "\n". The template writes the `<s>` itself: chat endpoints tokenise a rendered chat
# without adding special tokens. The newline is an expression because Jinja swallows a literal one after a tag.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
)


def encode(text: str) -> list[int]:
    """Turn text into token ids, as the saved tokenizer does but without specials.

    Args:
        text: any text.

    Returns:
        One id per byte of its UTF-8 encoding.
    """
    return [len(SPECIALS) + byte for byte in text.encode()]


def save_tokenizer(directory: Path, *, max_length: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

    Args:
        directory: an existing directory.
        max_length: the model's context length.

    Raises:
        OSError: if a file cannot be written.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[BOS],
        "eos_token": SPECIALS[EOS],
        "pad_token": SPECIALS[PAD],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    for name, content in (("tokenizer.json", _tokenizer()), ("tokenizer_config.json", config)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _tokenizer() -> dict:
    """Describe the tokenizer in the format of the `tokenizers` library: byte-level BPE without a single merge."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    specials = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, token in enumerate(SPECIALS)
    ]
    bos = {"SpecialToken": {"id": SPECIALS[BOS], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": specials,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {SPECIALS[BOS]: {"id": SPECIALS[BOS], "ids": [BOS], "tokens": [SPECIALS[BOS]]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate([*SPECIALS, *_byte_letters()])},
            "merges": [],
        },
    }


def _byte_letters() -> list[str]:
    """List the letter that stands for each byte in byte-level BPE: itself where printable, else one past U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = (chr(code) for code in range(0x100, 0x200))
    return [chr(byte) if byte in printable else next(spare) for byte in range(256)]
