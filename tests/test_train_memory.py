"""Tests that training fits into the memory there is: what a step holds, and what is chosen."""

from __future__ import annotations

import json
import types

import pytest
import torch
from live_bytes import LiveBytes
from models import tiny_model
from test_train import words

from specextend import machine
from specextend.terminal import bytes_text
from specextend.train import run as run_module
from specextend.train.data import Batch
from specextend.train.eagle3 import Eagle3Recipe, new_head
from specextend.train.longspec import LongSpecRecipe, new_block
from specextend.train.memory import SHARE, fitting_micro_batch
from specextend.train.target import FrozenTarget

GIB = 1 << 30


def recipe_of(kind: str, dtype: torch.dtype, labels: str, tokens: int | None = None, **shape):
    torch.manual_seed(0)
    shape = {"initializer_range": 0.05, "max_position_embeddings": 4096, **shape}
    target = FrozenTarget(tiny_model("llama", dtype=dtype, **shape))
    if kind == "eagle3":
        ids = None if tokens is None else torch.arange(tokens)
        head = new_head(target, ids).float().requires_grad_(True)
        return Eagle3Recipe(target, head, 7, labels)
    block = new_block(target).float().requires_grad_(True)
    return LongSpecRecipe(target, block, True, 4, labels)


# Wide and short, long and narrow, a large vocabulary, many heads.
SHAPES = [
    dict(windows=2, length=96, hidden_size=256, intermediate_size=512, vocab_size=300),
    dict(windows=1, length=400, hidden_size=64, intermediate_size=256, vocab_size=500),
    dict(windows=2, length=32, hidden_size=64, intermediate_size=64, vocab_size=9000),
    dict(windows=1, length=192, hidden_size=64, intermediate_size=64, vocab_size=300,
         num_attention_heads=16, num_key_value_heads=4, head_dim=16),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "long", "vocabulary", "heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kind, labels, tokens",
    [("eagle3", "target", None), ("eagle3", "data", 200), ("longspec", "data", None),
     ("longspec", "target", None)],
)  # fmt: skip
def test_what_a_step_holds(kind, labels, tokens, dtype, shape):
    """It is no more than is said, and not much less: counted over two steps, with the optimizer."""
    shape = dict(shape)
    windows, length = shape.pop("windows"), shape.pop("length")
    recipe = recipe_of(kind, dtype, labels, tokens, **shape)
    ids = torch.randint(3, 300, (windows, length))
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
    optimizer = torch.optim.AdamW(recipe.module.parameters())
    with LiveBytes() as live:
        for _ in range(2):
            optimizer.zero_grad()
            recipe.backward(batch, [torch.Generator() for _ in range(windows)])
            optimizer.step()
    said = recipe.memory(windows, length)
    assert live.peak <= said <= 1.8 * live.peak, said / live.peak


def test_what_is_chosen():
    """As many windows as fit, by a divisor of the batch; else an error that says what helps."""
    recipe = types.SimpleNamespace(memory=lambda n, length: GIB + n * length, remedies="less")
    for windows, free, expected in (
        (16, 100 * GIB, 16), (16, 15 * GIB, 8), (12, 9 * GIB, 6), (7, 9 * GIB, 1), (1, 3 * GIB, 1),
    ):  # fmt: skip
        count, needed = fitting_micro_batch(recipe, windows, GIB, free)
        assert count == expected and needed == (1 + count) * GIB <= SHARE * free
    text = (
        r"training on one window of 1,073,741,824 tokens at a time needs about 2.5 GiB of memory, "
        "and 2.4 GiB are free: choose less; --micro-batch 1 tries it all the same"
    )
    with pytest.raises(ValueError, match=text):
        fitting_micro_batch(recipe, 16, GIB, int(2.4 * GIB))
    assert bytes_text(3 << 20) == "3 MiB"


class TestFreeMemory:
    """What is free, by files as Linux has them."""

    @pytest.fixture
    def linux(self, monkeypatch, tmp_path):
        """Give files contents: of /proc as named, of control groups below their folder."""
        files = {"/proc/meminfo": "MemTotal: 99 kB\nMemAvailable:   4096 kB\n"}
        read = machine.Path.read_text

        def read_text(path, *args, **kwargs):
            if str(path).startswith(("/proc", "/sys")):
                if str(path) not in files:
                    raise FileNotFoundError(path)
                return files[str(path)]
            return read(path, *args, **kwargs)

        monkeypatch.setattr(machine.Path, "read_text", read_text)
        return files

    @pytest.mark.parametrize("version", [1, 2])
    def test_groups(self, linux, version):
        free = lambda: machine.free_memory(torch.device("cpu"))  # noqa: E731
        assert free() is None  # no such files
        one = version == 1
        linux["/proc/self/cgroup"] = "3:cpu,memory:/a/b\n" if one else "0::/a/b\n"
        assert free() == 4096 * 1024
        root = "/sys/fs/cgroup/memory" if one else "/sys/fs/cgroup"
        limit, usage, cache = ("memory.max", "memory.current", "inactive_file")
        if one:
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"

        def group(path, most, used, inactive):
            linux[f"{root}{path}/{limit}"], linux[f"{root}{path}/{usage}"] = f"{most}\n", f"{used}"
            linux[f"{root}{path}/memory.stat"] = f"anon 5\n{cache} {inactive}\nother 1\n"

        group("/a/b", "max", 100, 0)
        assert free() == 4096 * 1024
        group("/a", 1000, 600, 50)
        assert free() == 450  # the group above counts
        group("/a/b", 300, 200, 0)
        assert free() == 100
        group("", 10, 20, 0)
        assert free() == 0

    def test_elsewhere(self, monkeypatch):
        monkeypatch.setattr(machine, "CGROUPS", machine.Path("/nowhere"))
        free = machine.free_memory(torch.device("cpu"))
        assert free is None or 1 << 20 < free < 1 << 50


class TestCommand:
    @pytest.fixture
    def train(self, tmp_path, capsys, monkeypatch):
        """Run the command with so much memory free; returns status and standard error."""
        from test_cli import byte_tokenizer

        from specextend import cli

        tiny_model("llama", vocab_size=257).save_pretrained(tmp_path / "target")
        byte_tokenizer().save_pretrained(tmp_path / "target")
        capsys.readouterr()
        (tmp_path / "text.txt").write_text(" ".join(words(300)))

        def call(free: int | None, *options: str) -> tuple[int, str]:
            monkeypatch.setattr(run_module, "free_memory", lambda device: free)
            common = ["--target", "target", "--data", "text.txt", "--output", "out"]
            common += ["--length", "32", "--batch", "8", "--no-tensorboard", "--lr", "1e-3"]
            monkeypatch.chdir(tmp_path)
            code = cli.main(["train", *common, *options])
            return code, capsys.readouterr().err

        return call

    @pytest.mark.parametrize("kind", ["eagle3", "longspec"])
    def test_default(self, train, kind, tmp_path):
        code, err = train(GIB, "--kind", kind, "--steps", "2")
        assert code == 0 and err.startswith("8 of 8 windows at a time: about ")
        assert "of the 1.0 GiB of memory that are free" in err
        (tmp_path / "out").rename(tmp_path / "first")
        assert train(None, "--kind", kind, "--steps", "2")[1].startswith("1 of 8 windows at a time")
        logs = [
            json.loads((tmp_path / folder / "log.jsonl").read_text()) for folder in ("first", "out")
        ]
        assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-4)
        # Going on takes what was taken before, and a number that is named is taken as it is.
        code, err = train(GIB, "--kind", kind, "--steps", "2", "--resume")
        assert code == 0 and "windows at a time" not in err
        (tmp_path / "out").rename(tmp_path / "second")
        code, err = train(0, "--kind", kind, "--steps", "2", "--micro-batch", "4")
        assert code == 0 and "windows at a time" not in err

    @pytest.mark.parametrize("kind", ["eagle3", "longspec"])
    def test_nothing_fits(self, train, kind, tmp_path):
        code, err = train(1 << 18, "--kind", kind, "--steps", "2")
        assert code == 1 and err.count("\n") == 1
        assert "one window of 32 tokens at a time needs about " in err and "256 KiB are free" in err
        assert "--length" in err and ("--ttt-steps" in err) == (kind == "eagle3")
        assert not (tmp_path / "out" / "checkpoint.pt").exists()
