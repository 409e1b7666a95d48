"""Tests the captured round: on a GPU as CUDA graphs, on a CPU as tapes of ops done again."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
import weakref
from collections import defaultdict
from functools import partial
from itertools import repeat

import pytest
import torch
from eagle_heads import LAYERS, make
from generations import Kept, ScriptedGate
from models import VOCAB, prompt, tiny_model
from tape import HostRead, TapeRecorder, Tapes
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from specextend import _C, SpecConfig, SpecExtend, graphs
from specextend.generation import Generation
from specextend.graphs import Capture, Graphs, Mailbox, Stopwatch, bucket, obstacle
from specextend.sampling import TokenChooser
from specextend.stopping import Stop

CONFIG = SpecConfig(
    chunk_size=8, budget=32, sink_chunks=1, recent_chunks=1, retrieve_every=2, prefill_chunk=40,
    draft_prefill_window=16, gate="off", tree_nodes=9, tree_depth=4, tree_threshold=0.0, seed=7,
)  # fmt: skip
CUDA = _C.has_cuda and torch.cuda.is_available()


@pytest.fixture(scope="module")
def models():
    return tiny_model("llama"), tiny_model("llama", seed=1, hidden_size=16, head_dim=8)


@pytest.fixture
def tapes():
    """Recorders, which count, for rounds on the CPU."""
    warnings.simplefilter("error", RuntimeWarning)  # what cannot be recorded is said so
    return Tapes()


def run(models, config, ids, recorder=None, **options) -> tuple[list[list[int]], SpecExtend]:
    spec = SpecExtend(*models, config, recorder=recorder)
    return [step.tokens for step in spec.stream(ids, **options)], spec


def flat(steps: list[list[int]]) -> list[int]:
    return [token for step in steps for token in step]


GREEDY = dict(do_sample=False)


class TestTapedRound:
    """The same functions, with lengths that change between replays, give the same tokens."""

    @pytest.mark.sweep(3)
    @pytest.mark.parametrize("draft_cache", ["full", "window", "retrieval"])
    @pytest.mark.parametrize("shape", ["opt", "top_k", "fixed"])
    def test_greedy(self, models, tapes, draft_cache, shape, monkeypatch):
        # Where the host follows, chunks are read when they are wanted; here neither does.
        monkeypatch.setattr("specextend.draft.causal_lm.follows", lambda *given: False)
        config = CONFIG.replace(draft_cache=draft_cache, tree_shape=shape, tree_widths=(3, 4, 2))
        ids = prompt(70)
        got, spec = run(models, config, ids, tapes, max_new_tokens=60, **GREEDY)
        expected, eager = run(models, config, ids, max_new_tokens=60, **GREEDY)
        assert flat(got) == flat(expected)
        # The depth follows the gain one round later when rounds overlap, and a window moves on
        # earlier where paddings are counted.
        if shape != "opt" and draft_cache != "window":
            assert got == expected
            assert spec.stats.retrieved_chunks == eager.stats.retrieved_chunks
        target, draft = tapes
        assert target.replays > 5 and draft.replays > 5
        assert draft.records <= 4 + 2  # a depth each, and the refill

    @pytest.mark.sweep(3)
    @pytest.mark.parametrize(
        "options",
        [
            dict(temperature=0.8, top_p=0.9),
            dict(top_k=0, min_p=0.02, typical_p=0.95),
            dict(repetition_penalty=1.3),  # splits the round: it wants the tokens before
            dict(eta_cutoff=0.001),  # splits the round: it asks the host
        ],
        ids=str,
    )
    def test_sampling(self, models, tapes, options):
        ids, options = prompt(70), dict(do_sample=True, max_new_tokens=40, **options)
        got, _ = run(models, CONFIG, ids, tapes, **options)
        assert all(recorder.replays > 4 for recorder in tapes)
        assert flat(got) == flat(run(models, CONFIG, ids, **options)[0])

    def test_an_identical_draft_is_accepted(self, models, tapes):
        """Padding of the tokens that a draft takes in changes nothing of its proposals."""
        config = CONFIG.replace(
            draft_cache="full", tree_shape="top_k", tree_nodes=4, tree_width=1, tree_top_k=1
        )
        _, spec = run(
            (models[0], models[0]), config, prompt(60), tapes, max_new_tokens=41, **GREEDY
        )
        assert spec.stats.acceptance_histogram == {4: 8}

    def test_the_host_follows(self, models, tapes):
        """Its lengths are those of the device after every round; also where the gate rests."""
        config = CONFIG.replace(gate="auto")
        kept, gaps = Kept(), iter([2, 0, 0, 0, 3, 0, 2, 2] * 20)
        spec = SpecExtend(
            *models, config, recorder=tapes, generation=partial(kept, gate=ScriptedGate(gaps))
        )
        out = []
        for step in spec.stream(prompt(40), max_new_tokens=80, **GREEDY):
            out += step.tokens
            caches = (kept[0].cache, spec.draft.caches.full, spec.draft.caches.work)
            assert all(cache.length == int(cache.lens) for cache in caches)
        plain = SpecExtend(models[0], None, config).generate(
            prompt(40), max_new_tokens=80, **GREEDY
        )
        assert out == plain[0, 40:].tolist()

    def test_trees_of_any_size_share_few_graphs(self, models, tapes):
        """N-gram look-up makes trees on the host; the target's passes are captured all the same."""
        config = CONFIG.replace(tree_nodes=13, tree_width=2)
        ids = prompt(20).repeat(1, 4)
        got, spec = run((models[0], "ngram"), config, ids, tapes, max_new_tokens=120, **GREEDY)
        assert spec.stats.num_accepted_tokens > 0
        assert tapes[0].records <= 5 and tapes[0].replays > 20  # a root alone, 13, 7, 4, 2 nodes
        expected, _ = run((models[0], "ngram"), config, ids, max_new_tokens=120, **GREEDY)
        assert got == expected

    @pytest.mark.sweep(3)
    @pytest.mark.parametrize("dialect", ["eagle1", "eagle3"])
    @pytest.mark.parametrize("draft_cache", ["full", "window", "retrieval"])
    def test_eagle_heads(self, tapes, dialect, draft_cache, tmp_path):
        """Their features come from the captured verify pass."""
        config = CONFIG.replace(draft_cache=draft_cache, tree_shape="top_k")
        pair = tiny_model("llama", num_hidden_layers=LAYERS), make(dialect).write(tmp_path)
        got, _ = run(pair, config, prompt(70), tapes, max_new_tokens=50, **GREEDY)
        assert all(recorder.replays > 5 for recorder in tapes)
        expected, _ = run(pair, config, prompt(70), max_new_tokens=50, **GREEDY)
        assert flat(got) == flat(expected)
        if draft_cache != "window":  # which moves on earlier where paddings are counted
            assert got == expected

    def test_scores_and_logits(self, models, tapes):
        options = dict(
            max_new_tokens=30, output_scores=True, output_logits=True, return_dict_in_generate=True
        )
        spec = SpecExtend(*models, CONFIG, recorder=tapes)
        got = spec.generate(prompt(50), **GREEDY, **options)
        expected = SpecExtend(*models, CONFIG).generate(prompt(50), **GREEDY, **options)
        for ours, theirs in zip(
            got.logits + got.scores, expected.logits + expected.scores, strict=True
        ):
            assert torch.equal(ours, theirs)

    def test_a_model_that_asks_the_host_is_run_uncaptured(self, models, tapes):
        """And the text is the same; it is said once."""
        target = tiny_model("llama")
        forward = target.model.layers[0].forward

        def asking(hidden, *args, **kwargs):
            assert float(hidden.abs().max()) >= 0
            return forward(hidden, *args, **kwargs)

        target.model.layers[0].forward = asking
        spec = SpecExtend(target, models[1], CONFIG, recorder=tapes)
        with pytest.warns(RuntimeWarning, match="the target LlamaForCausalLM .* waits") as said:
            got = spec.generate(prompt(50), max_new_tokens=30, **GREEDY)
        assert len(said) == 1
        assert torch.equal(got, models[0].generate(prompt(50), max_new_tokens=30, **GREEDY))

    def test_rounds_that_record_say_nothing_of_speed(self, models, tapes):
        config, gate = (
            CONFIG.replace(tree_shape="top_k", draft_cache="full"),
            ScriptedGate(repeat(4)),
        )
        spec = SpecExtend(
            *models, config, recorder=tapes, generation=partial(Generation, gate=gate)
        )
        spec.generate(prompt(50), max_new_tokens=40, **GREEDY)
        # Each graph is warmed up and recorded, again for the shallower trees of the last rounds.
        timed = sum(took.seconds is not None for took in gate.counted)
        assert spec.stats.num_rounds - 8 <= timed < spec.stats.num_rounds

    def test_nothing_is_left(self, models, tapes):
        """Graphs hold the caches, and recorders the memory that graphs share."""
        spec = SpecExtend(*models, CONFIG, recorder=tapes)
        spec.generate(prompt(50), max_new_tokens=30, **GREEDY)
        assert all(recorder.records for recorder in tapes)
        recorders = [weakref.ref(recorder) for recorder in tapes]
        tapes.clear()
        gc.collect()
        assert [recorder() for recorder in recorders] == [None, None]


def chooser_of(processor) -> TokenChooser:
    stop = Stop([], 9, torch.ones(1, 3, dtype=torch.int64))
    return TokenChooser(LogitsProcessorList([processor]), True, 0, stop)


class TestProcessors:
    """Recording finds out which processors of `transformers` may be captured."""

    @pytest.mark.parametrize(
        "processor",
        [
            hf.TemperatureLogitsWarper(0.7), hf.TopKLogitsWarper(5), hf.TopPLogitsWarper(0.9),
            hf.MinPLogitsWarper(0.1), hf.TypicalLogitsWarper(0.9), hf.EpsilonLogitsWarper(0.01),
            hf.LogitNormalization(), hf.InfNanRemoveLogitsProcessor(),
        ],
        ids=lambda p: type(p).__name__,
    )  # fmt: skip
    def test_on_the_device(self, processor):
        chooser = chooser_of(processor)
        assert not chooser.needs_host
        logits = torch.randn(1, 5, VOCAB)
        positions = torch.arange(5)[None]

        def choose():
            return chooser.choose(chooser.scores(logits), positions)

        with torch.inference_mode():
            expected = choose()
            replay, got = TapeRecorder().record(choose)
            assert torch.equal(got, expected)
            logits.copy_(torch.randn(1, 5, VOCAB))
            replay()
            replay()
            assert torch.equal(got, choose())

    @pytest.mark.parametrize(
        "processor",
        [hf.EtaLogitsWarper(0.01), hf.RepetitionPenaltyLogitsProcessor(1.2), lambda ids, x: x],
        ids=["eta", "repetition", "user"],
    )
    def test_on_the_host(self, processor):
        assert chooser_of(processor).needs_host


class TestGraphs:
    def test_calls_warm_up_record_and_replay(self):
        recorder, lens, done = TapeRecorder(), torch.zeros(1), []

        def function(x):
            done.append(1)
            lens.add_(x)
            return lens * 2

        g = Graphs(recorder, "it")
        got = [float(g.call("key", function, torch.tensor([float(i)]))) for i in range(6)]
        assert got == [2 * sum(range(i + 1)) for i in range(6)]
        assert len(done) == 2 and (recorder.records, recorder.replays) == (1, 5)
        g.close()
        assert g._recordings == {}

    def test_a_failed_recording_is_said_once_and_then_called(self):
        g = Graphs(TapeRecorder(), "the thing")
        x = torch.ones(1)
        with pytest.warns(RuntimeWarning, match="the thing runs without CUDA graphs: .* waits"):
            assert [g.call("key", lambda t: float(t), x) for _ in range(4)] == [1.0] * 4
        assert not g.enabled

    def test_host_reads_are_seen(self):
        x = torch.arange(4.0)
        for read in (
            lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.tolist(), lambda: x.numpy(),
            lambda: x[x > 1], lambda: x.nonzero(), lambda: torch.tensor([1.0, 2.0, 3.0, 4.0]) + x,
        ):  # fmt: skip
            with pytest.raises(HostRead):
                TapeRecorder().record(read)

    def test_mailbox_and_stopwatch(self):
        cpu = torch.device("cpu")
        mailbox = Mailbox(2, cpu)
        mailbox.send(torch.tensor([1.0, 2.0]))
        assert mailbox.receive() == [1.0, 2.0]
        with Stopwatch(cpu) as watch:
            sum(range(1000))
        assert 0 < watch.seconds < 10

    def test_buckets(self):
        """The root counts: with a group of 4, trees of 3, 7, 15, 31, 63 nodes fill the kernels."""
        assert [bucket(n, 63, 4) for n in (1, 3, 4, 7, 8, 15, 16, 31, 32, 63)] == [
            3, 3, 7, 7, 15, 15, 31, 31, 63, 63,
        ]  # fmt: skip
        assert [bucket(n, 63, 1) for n in (1, 15, 16, 31, 32)] == [15, 15, 31, 31, 63]
        # Seven heads in a group: 2, 4, 9, 18 rows in 16, 32, 64, 128.
        assert [bucket(n, 40, 7) for n in (1, 2, 3, 8, 9, 17, 18, 35, 36)] == [
            1, 3, 3, 8, 17, 17, 35, 35, 40,
        ]  # fmt: skip
        # As many as the options allow, and no more; more where there are more.
        assert [bucket(n, 8, 4) for n in (1, 4, 8, 9)] == [3, 7, 8, 9]
        assert bucket(5, 8, 32) == 7 and bucket(1, 8, 64) == 1

    @pytest.mark.parametrize("group", [1, 2, 4, 5, 7, 8, 12, 16])
    @pytest.mark.parametrize("major", [8, 9])
    def test_buckets_fill_what_the_kernels_compute(self, group, major):
        """The partition itself says so: a node more would take half as much again, or twice."""
        sizes = sorted({bucket(n, 127, group) for n in range(1, 128)})
        assert len(sizes) <= 7

        def padded(nodes: int) -> int:
            plan = _C.plan_attention(
                num_rows=1 + nodes, num_heads=2 * group, num_kv_heads=2, head_dim=128,
                prefix_len=16384, major=major,
            )  # fmt: skip
            assert plan["packed_rows"] == (1 + nodes) * group
            return plan["padded_rows"]

        for nodes in sizes[:-1]:
            rows = (1 + nodes) * group
            assert rows <= padded(nodes) < rows + group
            assert padded(nodes + 1) > padded(nodes)
        if group == 4:
            assert {nodes: padded(nodes) for nodes in sizes} == {
                3: 16, 7: 32, 15: 64, 31: 128, 63: 256, 127: 512,
            }  # fmt: skip
            # One of the round numbers, and what it costs.
            assert (padded(32), padded(64)) == ((192, 320) if major == 8 else (256, 512))


@pytest.fixture
def capturing(monkeypatch):
    """torch.cuda as far as a recorder sees it: which stream, and in which mode, captures."""
    seen = []

    class Graph:
        def capture_begin(self, **options):
            seen.append((current[-1], torch.is_inference_mode_enabled()))

        def capture_end(self):
            pass

        def replay(self):
            pass

    current, made = [None], iter(range(1, 100))

    @contextlib.contextmanager
    def stream(s):
        current.append(s)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: pointer)
    monkeypatch.setattr(graphs._C, "create_stream", lambda index: next(made), raising=False)
    monkeypatch.setattr(graphs, "_idle_streams", defaultdict(list))
    return seen


class TestRecorder:
    def test_captures_begin_outside_inference_mode(self, capturing):
        recorder = graphs.CudaRecorder(torch.device("cuda", 0))
        with torch.inference_mode():
            _, mode = recorder.record(torch.is_inference_mode_enabled)
        assert mode and capturing == [(1, False)]

    def test_a_stream_belongs_to_one_recorder(self, capturing):
        device = torch.device("cuda", 0)
        recorders = [graphs.CudaRecorder(device) for _ in range(3)]
        for recorder in recorders:
            recorder.record(lambda: None)
        assert [stream for stream, _ in capturing] == [1, 2, 3]
        replay, _ = recorders.pop().record(lambda: None)
        del recorder
        assert graphs.CudaRecorder(device)._stream == 4  # a replay is left of the third one
        del replay
        gc.collect()
        assert graphs.CudaRecorder(device)._stream in (3, 4)  # used again, once nobody has it


class TestObstacle:
    def test_models(self):
        assert obstacle(tiny_model("llama")) is None
        assert obstacle(tiny_model("gemma3_text")) is None
        rope = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
        assert "dynamic rotary" in obstacle(tiny_model("llama", rope_parameters=rope))

    def test_experts(self):
        moe = tiny_model("qwen3_moe")
        moe.config._experts_implementation = "eager"
        assert "mixture of experts" in obstacle(moe)
        moe.config._experts_implementation = "grouped_mm"
        assert obstacle(moe) is None

    def test_hooks(self):
        model = tiny_model("llama")
        model.model.layers[0]._hf_hook = object()
        assert "hooks" in obstacle(model)

    def test_is_said_once(self):
        device, tapes = torch.device("cpu"), Tapes()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not Capture().graphs(device, "the target", "its reason").enabled  # a CPU
            assert not Capture(tapes, enabled=False).graphs(device, "it", "its reason").enabled
        capture = Capture(tapes)
        with pytest.warns(RuntimeWarning, match="the target .* its reason") as said:
            for _ in range(2):
                assert not capture.graphs(device, "the target", "its reason").enabled
        assert len(said) == 1 and not tapes
        assert capture.graphs(device, "the draft", None).enabled and len(tapes) == 1


@pytest.fixture(scope="module")
def on_gpu():
    return [tiny_model("llama", seed=seed).to("cuda") for seed in (0, 1)]


@pytest.mark.skipif(not CUDA, reason="no GPU, or built without CUDA kernels")
class TestOnCuda:
    """Tests with cuda in their names run in bench/gpu/b_round.py."""

    CONFIG = CONFIG.replace(tree_shape="top_k")

    @pytest.mark.parametrize("draft_cache", ["full", "window", "retrieval"])
    @pytest.mark.parametrize("options", [GREEDY, dict(do_sample=True, top_p=0.9)], ids=str)
    def test_cuda_capture_equals_eager(self, on_gpu, draft_cache, options):
        ids = prompt(70).cuda()
        config = self.CONFIG.replace(draft_cache=draft_cache)
        warnings.simplefilter("error", RuntimeWarning)
        steps = [
            run(on_gpu, config.replace(graphs=how), ids, max_new_tokens=60, **options)[0]
            for how in ("auto", "off")
        ]
        assert flat(steps[0]) == flat(steps[1])
        if draft_cache != "window":
            assert steps[0] == steps[1]

    def test_cuda_round_does_not_synchronise(self, on_gpu):
        spec = SpecExtend(*on_gpu, self.CONFIG)
        stream = spec.stream(prompt(70).cuda(), max_new_tokens=200, **GREEDY)
        steps = [next(stream) for _ in range(24)]  # each part has been captured by now
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps += [next(stream) for _ in range(12)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stream.close()
        plain = SpecExtend(on_gpu[0], None, self.CONFIG.replace(graphs="off"))
        ids = plain.generate(prompt(70).cuda(), max_new_tokens=200, **GREEDY)
        tokens = flat([step.tokens for step in steps])
        assert tokens == ids[0, 70 : 70 + len(tokens)].tolist()

    def test_cuda_two_streams_and_two_threads(self, on_gpu):
        """Two generations run at once, on models of their own."""
        config, results = self.CONFIG, {}

        def work(index):
            models = [m.to("cuda") for m in (tiny_model("llama"), tiny_model("llama", seed=1))]
            with torch.cuda.stream(torch.cuda.Stream()):
                ids = prompt(50 + index).cuda()
                results[index] = flat(run(models, config, ids, max_new_tokens=80, **GREEDY)[0])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, got in results.items():
            ids = prompt(50 + index).cuda()
            off = config.replace(graphs="off")
            assert got == flat(run(on_gpu, off, ids, max_new_tokens=80, **GREEDY)[0])
        assert len(results) == 2
