"""Tests what the embedded draft is distilled from: the target's text, and the decoder's caches."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from specextend import ops
from specextend.assets import draft_path, held_out_documents, target_path

TOOLS = Path(__file__).resolve().parents[1] / "tools"
if not TOOLS.is_dir():
    pytest.skip("tools/ is not part of this installation", allow_module_level=True)
sys.path.insert(0, str(TOOLS))

from embedded import distil_draft  # noqa: E402
from embedded.distil_draft import BUDGET, CHUNK, SPAN, Lesson, Student, Target  # noqa: E402

COUNT = 2 * CHUNK


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(target_path())
    return tokenizer(held_out_documents()[0][1][:8_000], return_tensors="pt").input_ids[0]


@torch.inference_mode()
def test_continuations_and_their_chunks(ids):
    model = LlamaForCausalLM.from_pretrained(
        target_path(), dtype=torch.float32, attn_implementation="eager"
    )
    ids, starts = ids[:1024], torch.tensor([BUDGET + 3 * CHUNK, BUDGET + 9 * CHUNK])
    lesson = Target(model).lesson(ids, starts, COUNT)
    for row, start in enumerate(starts.tolist()):
        text = torch.cat([ids[:start], lesson.texts[row]])
        read = model.model(text[None], output_attentions=True)
        hidden = read.last_hidden_state[0, start - 1 :]
        assert model.lm_head(hidden[:-1]).argmax(-1).tolist() == lesson.texts[row].tolist()
        torch.testing.assert_close(lesson.wanted[row], hidden[1:], atol=1e-4, rtol=1e-4)

        last_layer = read.attentions[-1][0].mean(0)  # [L, L]
        for piece, kept in enumerate(lesson.chunks[row]):
            end = start + piece * CHUNK
            mass = last_layer[end, :end].view(1, -1, CHUNK).sum(-1)
            want, _ = ops.select_chunks(
                mass, torch.tensor([end], dtype=torch.int32), chunk_size=CHUNK,
                budget=BUDGET // CHUNK, num_sinks=1, num_recent=4,
            )  # fmt: skip
            assert kept.tolist() == want[0].tolist()


def test_the_student_reads_as_the_draft_does(ids):
    draft = LlamaForCausalLM.from_pretrained(draft_path(), dtype=torch.float32)
    text = ids[: BUDGET + CHUNK]
    chunks = torch.arange(BUDGET // CHUNK)[None, None]
    lesson = Lesson(
        text[:BUDGET], torch.tensor([BUDGET]), text[None, BUDGET:], torch.zeros(0), chunks
    )
    drafted, slid = Student(draft)(lesson)
    with torch.inference_mode():  # the whole document fits the working cache
        want = draft.model(text[None]).last_hidden_state[:, BUDGET:]
    torch.testing.assert_close(drafted, want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(slid, want, atol=1e-2)  # a window of 512 slides out of it

    drafted.sum().backward()  # keys of the document learn, too
    assert draft.model.layers[0].self_attn.k_proj.weight.grad.norm() > 0


def test_a_working_cache_of_chunks(ids):
    """Chunks that are left out change nothing but through what the kept ones have read."""
    draft = LlamaForCausalLM.from_pretrained(draft_path(), dtype=torch.float32)
    size = 3 * SPAN
    document, text = ids[:size], ids[size : size + 2 * CHUNK]
    start, last = torch.tensor([size]), size // CHUNK
    recent = torch.arange(last - BUDGET // CHUNK, last + 1)
    chunks = torch.stack((torch.cat((torch.arange(4), recent[4:-1])), recent[1:]))[None]
    with torch.inference_mode():
        student = Student(draft)
        before = student(Lesson(document, start, text[None], torch.zeros(0), chunks))[0]
        changed = document.clone()
        changed[5 * CHUNK : 6 * CHUNK] += 1  # not kept, and further than SPAN before what is
        far = student(Lesson(changed, start, text[None], torch.zeros(0), chunks))[0]
        changed = document.clone()
        changed[:CHUNK] += 1  # kept for the first tokens, not for the others
        near = student(Lesson(changed, start, text[None], torch.zeros(0), chunks))[0]
    assert torch.equal(far, before)
    assert not torch.allclose(near[:, :CHUNK], before[:, :CHUNK], atol=1e-3)
    assert torch.equal(near[:, CHUNK:], before[:, CHUNK:])


def test_from_text_to_a_draft(tmp_path, monkeypatch, capsys):
    """A text becomes lessons, which a resumed run keeps; a few steps change the draft."""
    name, text = held_out_documents()[0]
    monkeypatch.setattr(distil_draft, "held_out_documents", lambda: [(name, text[:10_000])])
    data = tmp_path / "text.txt"
    data.write_text(text[:10_000])
    threads = torch.get_num_threads()
    arguments = [
        "--data", str(data), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "draft"),
        "--length", "1536", "--long", "0", "--places", "2", "--new", str(CHUNK), "--lessons", "1",
    ]  # fmt: skip
    try:
        distil_draft.main([*arguments, "--stages", "lessons"])
        assert capsys.readouterr().out.count("1536 tokens") == 2  # one is held out
        distil_draft.main([*arguments, "--minutes", "0.005"])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "1536 tokens" not in printed
    assert "held out: 0." in printed
    before, after = (
        LlamaForCausalLM.from_pretrained(path).state_dict()
        for path in (draft_path(), tmp_path / "draft")
    )
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    AutoTokenizer.from_pretrained(tmp_path / "draft")
