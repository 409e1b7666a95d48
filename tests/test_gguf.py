"""Tests GGUF files on the command line: tiny Llamas, as `transformers` reads them."""

from __future__ import annotations

import json
import sys

import gguf_files
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from specextend import cli

TEXT = "the width and the height of that thing, then the other: "
SIZES = dict(vocab_size=258, intermediate_size=64)


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer with one merge; id 0 ends a text, and has the
    name that `transformers` would add to a file that lacks it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0, **{c: 1 + i for i, c in enumerate(alphabet)}, "th": 257}
    made = Tokenizer(models.BPE(vocab, [("t", "h")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Target and draft as GGUF files, the target also with quantized matrices and as a folder."""
    folder = tmp_path_factory.mktemp("files")
    target, draft = tiny_model(**SIZES), tiny_model(seed=1, **SIZES)
    gguf_files.write(folder / "target.gguf", target, tokenizer())
    gguf_files.write(folder / "draft.gguf", draft, tokenizer())
    gguf_files.write(folder / "small.gguf", target, tokenizer(), Kind.Q8_0)
    target.save_pretrained(folder / "target")
    tokenizer().save_pretrained(folder / "target")
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


def expected(folder, name: str, new: int) -> list[int]:
    """Return what `transformers` writes with this model."""
    options = {"gguf_file": name} if name.endswith(".gguf") else {}
    path = folder if options else folder / name
    ids = AutoTokenizer.from_pretrained(path, **options)(TEXT, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    return model.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :].tolist()


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    "target, draft",
    [
        ("target.gguf", "none"), ("target.gguf", "self"), ("target.gguf", "ngram"),
        ("target.gguf", "draft.gguf"), ("target", "draft.gguf"), ("target.gguf", "target"),
        ("small.gguf", "draft.gguf"), ("target", "small.gguf"),
    ],
)  # fmt: skip
def test_generate(folder, capsys, target, draft):
    """The text is that of `transformers` with the same file."""
    given = folder / draft if "." in draft or draft == "target" else draft
    code, out, err = run(
        capsys, "generate", "--target", folder / target, "--draft", given, "--dtype", "float32",
        "--json", "--max-new-tokens", 20, "--prompt", TEXT, "--gate", "off",
    )  # fmt: skip
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["tokens"] == expected(folder, target, 20)
    assert result["text"] == tokenizer().decode(result["tokens"], skip_special_tokens=True)
    assert bool(result["stats"]["num_draft_tokens"]) == (draft != "none")
    if target == "target.gguf":  # it has the weights of the folder, bit for bit
        assert result["tokens"] == expected(folder, "target", 20)


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    "command",
    [
        "chat --draft DIR/draft.gguf --max-new-tokens 4",
        "demo --draft DIR/draft.gguf --document DIR/text.txt --tokens 60 --max-new-tokens 6",
        "eval --draft DIR/draft.gguf --draft ngram --lengths 40 --prompts DIR/text.jsonl "
        "--methods hf,plain,tree_attention,ngram --max-new-tokens 4 --runs 1 --output DIR/eval",
        "train --kind eagle3 --data DIR/text.txt --length 16 --batch 1 --steps 1 "
        "--no-tensorboard --output DIR/head",
    ],
)
def test_other_commands(folder, capsys, monkeypatch, command):
    (folder / "text.txt").write_text(TEXT * 4)
    (folder / "text.jsonl").write_text(json.dumps({"text": TEXT * 4}) + "\n")
    monkeypatch.setattr("builtins.input", _lines("the"))
    words = command.replace("DIR", str(folder)).split()
    code, out, err = run(capsys, *words, "--target", folder / "target.gguf")
    assert code == 0, err
    assert "error" not in err and "NO" not in out


def _lines(*lines: str):
    """Return an ``input`` that reads these."""
    left = list(lines)

    def read(prompt: str = "") -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    return read


@pytest.mark.parametrize("role", ["--target", "--draft"])
@pytest.mark.parametrize(
    "name, text",
    [
        ("text.gguf", "text.gguf is a file, but no GGUF file; a folder, a hub id or a GGUF file"),
        ("empty.gguf", "empty.gguf is a file, but no GGUF file"),
        ("cut.gguf", "cut.gguf cannot be read: "),
        ("short.gguf", "short.gguf cannot be read: "),
        ("other.gguf", "other.gguf cannot be read: GGUF model with architecture rwkv6 is not"),
        ("nothing.gguf", "there is no folder"),
        ("without.gguf", "to be read with the package gguf: pip install gguf"),
    ],
)
def test_errors(folder, tmp_path, capsys, monkeypatch, role, name, text):
    whole = (folder / "target.gguf").read_bytes()
    contents = {
        "text.gguf": b"once upon a time", "empty.gguf": b"", "cut.gguf": whole[:3000],
        "short.gguf": whole[:-3000], "without.gguf": whole,
    }  # fmt: skip
    if name in contents:
        (tmp_path / name).write_bytes(contents[name])
    if name == "other.gguf":
        gguf_files.write(tmp_path / name, tiny_model(**SIZES), tokenizer(), Kind.F32, "rwkv6")
    if name == "without.gguf":
        monkeypatch.setitem(sys.modules, "gguf", None)
    pair = {"--target": folder / "target", "--draft": folder / "target", role: tmp_path / name}
    options = [word for item in pair.items() for word in item]
    code, out, err = run(capsys, "generate", "--prompt", "a", *options)
    assert (code, out) == (1, "") and text in err
    assert err.startswith("specextend: error: ") and err.count("\n") == 1
