"""Tests that text comes as ``decode`` makes it, whatever the tokenizer and the tokens."""

from __future__ import annotations

import io
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specextend.terminal import Detokenizer, LiveText, Output, gap

WORDS = ["▁a", "▁the", "▁", "▁▁", "b", "日", "▁naïve", "\ufffd", ".", "▁.", ",", "▁?", "!", "'"]
WORDS += ["▁'", "n't", "▁n't", "'s", "▁'ve", "'re", "m", "▁n", "t", "x", "▁e", "\n", "▁'▁", "vr"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPACES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def _words(*more: str) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys([*WORDS, *more]))}


def _byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return models.BPE({c: i for i, c in enumerate(alphabet)}, []), decoders.ByteLevel()


def _fallback(*after):
    model = models.BPE(_words(*BYTES), [], byte_fallback=True)
    return model, decoders.Sequence([*SPACES, *after])


def _metaspace(scheme: str):
    model = models.WordLevel(_words(*BYTES), unk_token="x")
    return model, decoders.Metaspace(prepend_scheme=scheme)


def _word_piece():
    pieces = [("" if word[0] == "▁" else "##") + word.strip("▁") for word in WORDS]
    pieces = [*pieces, *(word for word in WORDS if "▁" not in word)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(filter(None, pieces)))}
    return models.WordPiece(vocab, unk_token="x"), decoders.WordPiece(cleanup=False)


# What makes model and decoder, and whether `transformers` cleans up behind it.
KINDS = {
    "byte level": (_byte_level, False),
    "byte level, said to be cleaned": (_byte_level, True),
    "SentencePiece, Llama": (lambda: _fallback(decoders.Strip(" ", 1, 0)), False),
    "SentencePiece, Gemma": (_fallback, False),
    "Metaspace, always": (lambda: _metaspace("always"), False),
    "Metaspace, first": (lambda: _metaspace("first"), True),
    "Metaspace, never": (lambda: _metaspace("never"), False),
    "WordPiece": (_word_piece, True),
    "suffixes": (lambda: (models.BPE(_words("a</w>", "b</w>"), []), decoders.BPEDecoder()), False),
    "words": (lambda: (models.WordLevel(_words(), unk_token="x"), None), True),
}


def make(kind: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer with special tokens, and with added ones that are not special."""
    parts, cleans = KINDS[kind]
    model, decoder = parts()
    tokenizer = Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "</s>", "<|tool|>"])
    tokenizer.add_tokens(["<think>", AddedToken(" .", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=cleans,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=kind == "words",
    )  # fmt: skip


def draw(tokenizer, rng: random.Random) -> list[int]:
    """Draw tokens: rows of one kind, bytes whole and broken among them, specials anywhere."""
    vocab = tokenizer.get_vocab()
    special = [vocab[name] for name in ("<s>", "</s>", "<|tool|>", "<think>", " .")]
    single = [vocab[name] for name in BYTES if name in vocab]
    others = sorted(set(vocab.values()) - set(special) - set(single))
    tokens: list[int] = []
    for _ in range(rng.choice((1, 4, 40))):
        source = rng.choice([others, others, single or others, rng.sample(others, 3)])
        if single and rng.random() < 0.3:
            tokens += [single[byte] for byte in "日本 é".encode()[: rng.randrange(12)]]
        for _ in range(rng.randrange(9)):
            tokens.append(rng.choice(special if rng.random() < 0.2 else source))
    return [*tokens, len(tokenizer) + 7] if rng.random() < 0.1 else tokens  # of a padded head


@pytest.mark.sweep(3)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_joined_are_the_decoded_text(kind):
    tokenizer, rng, waited = make(kind), random.Random(kind), 0
    for _ in range(120):
        tokens = draw(tokenizer, rng)
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.add(token) for token in tokens]
        last = detokenizer.end()
        expected = tokenizer.decode(tokens, skip_special_tokens=True)
        assert "".join(pieces) + last == expected, tokens
        assert detokenizer.end() == ""
        waited += len(last) < 40
        live = LiveText(None, tokenizer)
        for i in range(0, len(tokens), 3):
            live.add(tokens[i : i + 3], 1)
        live.end()
        assert live.text == expected
    assert waited > 80  # it comes as it is written, not at the end


@pytest.mark.parametrize("kind", ["WordPiece", "words", "Metaspace, first"])
def test_signs_in_any_order(kind):
    """Spaces that are taken away before signs, and brought back by the next."""
    tokenizer, rng = make(kind), random.Random(0)
    signs = [i for t, i in tokenizer.get_vocab().items() if set(t) <= set("▁ .'ntsx#,")]
    for _ in range(300):
        tokens = rng.choices(signs, k=rng.randrange(60))
        detokenizer = Detokenizer(tokenizer)
        text = "".join(map(detokenizer.add, tokens)) + detokenizer.end()
        assert text == tokenizer.decode(tokens, skip_special_tokens=True), tokens


def test_long_texts_cost_the_same_for_each_token():
    """However long the text, so many tokens at most are decoded at a time."""
    tokenizer, longest = make("SentencePiece, Llama"), 0
    decode = tokenizer.decode

    def counted(ids, **options):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids, **options)

    tokenizer.decode = counted
    detokenizer, rng = Detokenizer(tokenizer), random.Random(0)
    tokens = [i for _ in range(300) for i in draw(tokenizer, rng)]
    text = "".join(map(detokenizer.add, tokens))
    assert len(tokens) > 3000 and longest < 300
    assert text + detokenizer.end() == decode(tokens, skip_special_tokens=True)


def test_space_behind_the_prompt():
    """It is shown where the prompt is shown, and is none of the text."""
    tokenizer = make("SentencePiece, Llama")
    the, x, bos = (tokenizer.convert_tokens_to_ids(t) for t in ("▁the", "x", "<s>"))
    assert gap(tokenizer, [bos, the], [the, x]) == " "
    assert gap(tokenizer, [bos, the], [x]) == gap(tokenizer, [], [the]) == ""
    half = [tokenizer.convert_tokens_to_ids(t) for t in ("<0xE6>", "<0x97>", "<0xA5>")]
    assert gap(tokenizer, half[:1], half[1:]) == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_characters_that_the_encoding_lacks(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    output = Output(stream)
    output.line("naïve 日本 \ud800\n")
    output.table(["", "β"], [["é", "1"]])
    expected = "naïve 日本 \ud800\n\n   β\né  1\n"
    written = stream.buffer.getvalue().decode(encoding)
    assert written == expected.encode(encoding, "replace").decode(encoding)
    assert written.isascii() == (encoding == "ascii") and "na" in written
