"""Measures whole answers: from the prompt to the first token, and to the last.

    python bench/bench_answer.py --target FOLDER --draft FOLDER --documents FILE.jsonl
    python bench/bench_answer.py [--quick] [--lengths 2048,8192] [--new 128] [--json out.json]
    python bench/bench_answer.py --questions 2

A document is asked about, in the model's chat template if it has one, and every contestant writes
the answer greedily, in turns: Hugging Face's `generate` alone, with the draft as its assistant, and
with its prompt look-up; ours without a draft, with n-gram look-up, with the draft, and with both.
openvino-genai runs where it is installed and `--gguf` names the target's weights, plain and with
its prompt look-up; its weights may have fewer bits.

A line has the seconds to the last token, how many times as long Hugging Face's plain `generate`
takes, and behind it the seconds to the first token, the rate of the others, and the process's peak
of resident memory (on a GPU, of what torch has allocated), in which all models are contained.

With `--questions 2` a second question of about 50 tokens takes the place of the first one behind
the same document, and has lines of its own. Who can keeps what the first has left, and goes back to
the end of the document: ours by itself, Hugging Face's plain `generate` with its cache, cropped and
given back. The others read the whole prompt again; Hugging Face's speculative ways, given a cache,
do so behind it, and write another text. How many tokens were there stands in the line.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from bench_record import Report, add_pair, numbers, parse, parser
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from specextend import SpecConfig, SpecExtend, assets
from specextend.compat import CACHE, num_cached
from specextend.draft import WORDS
from specextend.eval.memory import PeakMemory
from specextend.eval.prompts import read_documents
from specextend.pair import Pair, load_pair, load_target
from specextend.testing import Spread
from specextend.timing import parting, time_hugging_face, time_loop

QUESTIONS = (
    "\n\nSummarise the text above in a few paragraphs.",
    "\n\nWhich part of the text above would you read first if you had five minutes only, what is "
    "it about, and what would you miss if you left out the rest? Say why in one paragraph, with a "
    "quotation of a line or two.",
)
WHICH = ("", "second question, ")  # in the names of lines
LOOK_UP = 10  # tokens per look-up of the peers; the value in Hugging Face's documentation


@dataclass
class Answer:
    """Holds one answer.

    Attributes:
        tokens: of it; None where only their number is known.
        count: how many.
        first: seconds to the first.
        last: seconds to the last.
        passes: tokens per forward of the target behind the first token; None: not known.
        cached: tokens of the prompt that were there.
        peak: bytes; None: not known.
    """

    tokens: list[int] | None
    count: int
    first: float
    last: float
    passes: float | None = None
    cached: int = 0
    peak: int | None = None

    @property
    def rate(self) -> float:
        """Divide the tokens behind the first by their seconds."""
        return (self.count - 1) / (self.last - self.first) if self.last > self.first else 0.0


#: answers prompts [1, L], the questions on one document, with a number of new tokens each
Contestant = Callable[[list[Tensor], int], Iterator[Answer]]


def hugging_face(pair: Pair, **options) -> Contestant:
    """Make a contestant of the model's own ``generate``."""

    def answers(prompts: list[Tensor], new: int) -> Iterator[Answer]:
        cache, before, cached = None, None, 0
        for ids in prompts:
            given = dict(options)
            if len(prompts) > 1 and not options:
                given[CACHE] = cache = kept(pair, cache, before, ids)
                cached, before = num_cached(cache) or 0, ids
            timed = time_hugging_face(
                pair.target, ids, new, lambda *_: None, do_sample=False,
                attention_mask=torch.ones_like(ids), **given,
            )  # fmt: skip
            count = len(timed.tokens)
            passes = (count - timed.first) / max(timed.rounds, 1)
            yield Answer(timed.tokens, count, timed.to_first, timed.to_last, passes, cached)

    return answers


def kept(pair: Pair, cache: Cache | None, before: Tensor | None, ids: Tensor) -> Cache:
    """Cut the cache of the last prompt back to what a new one has in common with it; make an empty
    one where there is none or its layers cannot go back."""
    if cache is not None and num_cached(cache) is not None:
        surplus = num_cached(cache) - parting(before[0].tolist(), ids[0].tolist())
        try:
            if surplus:
                cache.crop(-surplus)
            return cache
        except (RuntimeError, ValueError):  # windows and states
            pass
    return DynamicCache(config=pair.target.config.get_text_config(decoder=True))


def ours(spec: SpecExtend) -> Contestant:
    """Make a contestant of a loop."""

    def answers(prompts: list[Tensor], new: int) -> Iterator[Answer]:
        for ids in prompts:
            timed = time_loop(spec, ids, new, lambda *_: None, do_sample=False)
            stats, count = timed.stats, len(timed.tokens)
            passes, cached = stats.mean_acceptance_length, stats.num_cached_tokens
            yield Answer(timed.tokens, count, timed.to_first, timed.to_last, passes, cached)
        spec.forget()

    return answers


def openvino(file: Path, look_up: bool) -> Contestant:
    """Make a contestant of openvino-genai's pipeline."""
    import openvino
    import openvino_genai

    options = dict(prompt_lookup=True) if look_up else {}
    pipeline = openvino_genai.LLMPipeline(file, "CPU", **options)

    def answer(ids: Tensor, new: int) -> Answer:
        config = openvino_genai.GenerationConfig(max_new_tokens=new, do_sample=False)
        if look_up:
            config.num_assistant_tokens, config.max_ngram_size = LOOK_UP, 3
        given = (openvino.Tensor(x.numpy()) for x in (ids, torch.ones_like(ids)))
        result = pipeline.generate(openvino_genai.TokenizedInputs(*given), config)
        metrics = result.perf_metrics
        first, last = metrics.get_ttft().mean, metrics.get_generate_duration().mean
        return Answer(None, metrics.get_num_generated_tokens(), first / 1e3, last / 1e3)

    return lambda prompts, new: (answer(ids, new) for ids in prompts)


def contestants(
    pair: Pair, config: SpecConfig, gguf: Path | None, questions: int = 1
) -> dict[str, Contestant]:
    """Make all that can run with these models; ours keep nothing for a single question."""
    made = {"Hugging Face plain": hugging_face(pair)}
    if pair.draft is not None:
        made["Hugging Face assisted"] = hugging_face(pair, assistant_model=pair.draft)
    made["Hugging Face look-up"] = hugging_face(pair, prompt_lookup_num_tokens=LOOK_UP)
    drafts = {"plain": None, "n-gram": "ngram"}
    if pair.draft is not None:
        drafts |= {"draft": pair.draft, "draft and n-gram": [pair.draft, "ngram"]}
    for name, draft in drafts.items():
        spec = SpecExtend(pair.target, draft, config, keep_contexts=questions - 1)
        made[f"ours {name}"] = ours(spec)
    if gguf is not None and find_spec("openvino_genai"):
        made["openvino plain"] = openvino(gguf, look_up=False)
        made["openvino look-up"] = openvino(gguf, look_up=True)
    return made


def ask(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, questions: int
) -> list[Tensor] | None:
    """Ask about the beginning of a text.

    Returns:
        A prompt per question, [1, L], L about ``length``; None: the text is too short. Without a
        chat template the first question is to continue the text.
    """
    ids = tokenizer(text).input_ids
    if len(ids) < length:
        return None
    if tokenizer.chat_template is None:
        further = [tokenizer(q, add_special_tokens=False).input_ids for q in QUESTIONS[1:questions]]
        return [torch.tensor([ids[:length] + asked]) for asked in ([], *further)]
    text = tokenizer.decode(ids[: length - 64])
    prompts = (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text + question}], add_generation_prompt=True,
            return_tensors="pt", return_dict=True,
        )
        for question in QUESTIONS[:questions]
    )  # fmt: skip
    return [prompt["input_ids"] for prompt in prompts]


def run(
    made: dict[str, Contestant], documents: list[list[Tensor]], new: int, rounds: int,
    memory: PeakMemory,
) -> list[dict[str, list[Answer]]]:  # fmt: skip
    """Let all contestants answer the questions on all documents, in turns; by question."""
    found = [{name: [] for name in made} for _ in documents[0]]
    for _ in range(rounds):
        for prompts in documents:
            for name, contestant in made.items():
                answers = contestant(prompts, new)
                for answered in found:
                    gc.collect()
                    memory.start()
                    answer = next(answers)
                    answer.peak = memory.peak()
                    answered[name].append(answer)
                next(answers, None)  # to its end, where it frees what it has kept
    return found


def remarks(answers: list[Answer], plain: list[Answer]) -> str:
    """Say what a line's seconds to the last token do not."""
    text = f"first {median(a.first for a in answers):.1f} s"
    if any(a.cached for a in answers):
        text += f" ({median(a.cached for a in answers):.0f} tokens were there)"
    text += f", then {median(a.rate for a in answers):.1f} tokens/s"
    passes = [a.passes for a in answers if a.passes is not None]
    if passes:
        text += f", {median(passes):.2f} per pass"
    if any(a.peak for a in answers):
        text += f", peak {max(a.peak or 0 for a in answers) / 2**20:.0f} MiB"
    pairs = [(a.tokens, p.tokens) for a, p in zip(answers, plain, strict=True) if a.tokens]
    same = sum(parting(a, p) is None for a, p in pairs)
    return f"{text}; {same} of {len(answers)} texts as Hugging Face's" if pairs else text


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    add_pair(made)
    made.add_argument("--gguf", type=Path, help="the target's weights for openvino-genai")
    made.add_argument("--count", type=int, default=1, help="documents; default 1")
    made.add_argument("--lengths", type=numbers, help="of prompts; default 2048,8192,16384")
    made.add_argument(
        "--questions", type=int, default=1, choices=(1, 2), help="on each document; default 1"
    )
    made.add_argument("--new", type=int, help="tokens of an answer; default 128, quick 16")
    made.add_argument("--rounds", type=int, default=1, help="times that all answer all")
    made.add_argument("--ways", default="", help="only contestants with one of these, by commas")
    return made


def main() -> None:
    arguments = parse(options())
    quick = arguments.quick
    lengths = arguments.lengths or ([512] if quick else [2048, 8192, 16384])
    new = arguments.new or (16 if quick else 128)
    device = torch.device(arguments.device)
    pair = load_pair(arguments.target, arguments.draft, arguments.dtype, device)
    if isinstance(pair.draft, Path) or pair.draft not in (None, *WORDS):  # for the assistant, too
        draft, _ = load_target(str(pair.draft), arguments.dtype, device)
        pair = replace(pair, draft=draft)
    config = SpecConfig(**(assets.SETTINGS if arguments.target is None else {}))
    made = contestants(pair, config, arguments.gguf, arguments.questions)
    wanted = [w for w in arguments.ways.split(",") if w]
    made = {n: c for n, c in made.items() if not wanted or any(w in n for w in wanted)}
    memory = PeakMemory(device)
    results = Report(
        arguments, target=Path(arguments.target or "embedded").name, dtype=arguments.dtype,
        new_tokens=new, documents=arguments.count, rounds=arguments.rounds,
    )  # fmt: skip
    texts = [text for _, text in read_documents(arguments.documents)]
    for length in lengths:
        asked = (ask(pair.tokenizer, text, length, arguments.questions) for text in texts)
        documents = [prompts for prompts in asked if prompts is not None][: arguments.count]
        if not documents:
            raise SystemExit(f"no document has {length} tokens")
        documents = [[ids.to(device) for ids in prompts] for prompts in documents]
        found = run(made, documents, new, arguments.rounds, memory)
        for ids, answered, which in zip(documents[0], found, WHICH, strict=False):
            add_lines(results, f"{ids.shape[1]} tokens, {which}", answered)


def add_lines(results: Report, case: str, answered: dict[str, list[Answer]]) -> None:
    """Add a line per contestant."""
    first = next(iter(answered))
    plain = answered[first]
    peer = Spread([a.last for a in plain])
    for name, answers in answered.items():
        results.add(
            case + name, Spread([a.last for a in answers]), "s", peers={first: peer},
            remarks=remarks(answers, plain), first=[a.first for a in answers],
            rate=[a.rate for a in answers], passes=[a.passes for a in answers],
            peak=[a.peak for a in answers], counts=[a.count for a in answers],
            cached=[a.cached for a in answers],
        )  # fmt: skip


if __name__ == "__main__":
    main()
