import pytest
import torch
from backends import capture
from emulation import KINDS
from isa_bits import hard_logits

from specextend import ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 2, 15, 16, 17, 100, 511, 512, 513, 1024, 1500, 5003]
INF = torch.inf


def random_logits(vocab: int, dtype=torch.float32, rows=(2, 3), scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(vocab + seed)
    return (torch.randn(*rows, vocab, generator=generator) * scale).to(dtype)


def assert_draws(logits, uniforms, tokens, slack=2e-6):
    """The exact distribution function at each token encloses its uniform, up to rounding."""
    probs = logits.double().softmax(-1)
    above = probs.cumsum(-1).gather(-1, tokens[..., None])[..., 0]
    width = probs.gather(-1, tokens[..., None])[..., 0]
    uniforms = uniforms.double()
    assert ((uniforms >= above - width - slack) & (uniforms <= above + slack)).all()
    assert (width > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", SIZES)
def test_argmax(vocab, dtype, device):
    logits = random_logits(vocab, dtype).to(device)
    tokens = ops.sample_nodes(logits)
    assert tokens.dtype == torch.int64 and tokens.shape == (2, 3)
    assert torch.equal(tokens, reference.sample_nodes(logits))
    assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [17, 512, 1111])
def test_argmax_at_every_place(vocab, dtype, device):
    logits = random_logits(vocab, dtype, rows=(1, 1)).expand(1, vocab, -1).clone()
    ids = torch.arange(vocab)
    logits[0, ids, ids] = 100.0
    assert torch.equal(ops.sample_nodes(logits.to(device)).cpu()[0], ids)
    logits[0, ids, ids] = torch.nan
    assert (ops.sample_nodes(logits.to(device)) == -1).all()
    assert (ops.sample_nodes(logits.to(device), torch.rand(1, vocab).to(device)) == -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_takes_the_first_of_equal_logits(dtype, device):
    for vocab in SIZES:
        logits = torch.randint(0, 3, (1, 40, vocab), generator=torch.Generator().manual_seed(vocab))
        first = [row.index(max(row)) for row in logits[0].tolist()]
        assert ops.sample_nodes(logits.to(dtype).to(device))[0].tolist() == first
    zeros = torch.tensor([[[-1.0, -0.0, 0.0, -0.0], [-1.0, -1.0, 0.0, -0.0]]], dtype=dtype)
    assert ops.sample_nodes(zeros.to(device)).tolist() == [[1, 2]]


def test_argmax_of_infinities(device):
    logits = torch.full((1, 3, 700), -INF)
    logits[0, 1, 600] = -1e38
    logits[0, 2, [5, 650]] = INF
    assert ops.sample_nodes(logits.to(device)).tolist() == [[-1, 600, 5]]


@pytest.mark.sweep(10)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("uniform_dtype", [torch.float32, torch.float64])
def test_draws(dtype, uniform_dtype, device):
    agree = total = 0
    for vocab in SIZES:
        for scale in (0.01, 1.0, 10.0):
            logits = random_logits(vocab, dtype, rows=(2, 10), scale=scale)
            uniforms = torch.rand(2, 10, dtype=uniform_dtype)
            tokens = ops.sample_nodes(logits.to(device), uniforms.to(device)).cpu()
            assert_draws(logits, uniforms, tokens)
            agree += (tokens == reference.sample_nodes(logits.double(), uniforms.double())).sum()
            total += tokens.numel()
    assert agree >= 0.998 * total


def test_draws_where_the_maximum_comes_late(device):
    # Blocks are summed relative to the largest logit so far, and rescaled.
    logits = torch.linspace(-300, 300, 5000).expand(1, 200, -1)
    uniforms = torch.linspace(0, 1 - 1e-9, 200, dtype=torch.float64)[None]
    tokens = ops.sample_nodes(logits.to(device), uniforms.to(device)).cpu()
    assert_draws(logits[:, 1:], uniforms[:, 1:], tokens[:, 1:])
    reverse = ops.sample_nodes(logits.flip(-1).to(device), uniforms.to(device)).cpu()
    assert_draws(logits.flip(-1)[:, :-1], uniforms[:, :-1], reverse[:, :-1])


def test_the_frequencies_are_the_probabilities(device, schedule):
    # A regular grid of uniforms gives every token its share, to within one grid point.
    probs = torch.tensor([0.5, 0.0, 0.23, 0.2, 0.07], dtype=torch.float64)
    count = 500 if schedule.emulated else 10_000
    logits = probs.log().float().expand(1, count, -1)
    uniforms = (torch.arange(count, dtype=torch.float64)[None] + 0.5) / count
    tokens = ops.sample_nodes(logits.to(device), uniforms.to(device)).cpu()
    assert (tokens[0].diff() >= 0).all()
    counts = tokens[0].bincount(minlength=5)
    assert ((counts - probs * count).abs() <= 1).all()


@pytest.mark.not_emulated("20,000 rows")
def test_random_draws_pass_a_chi_square_test(device):
    generator = torch.Generator().manual_seed(7)
    count = 20_000
    logits = torch.randn(1, 1, 40, generator=generator)
    uniforms = torch.rand(1, count, generator=generator, dtype=torch.float64)
    tokens = ops.sample_nodes(logits.expand(1, count, -1).to(device), uniforms.to(device)).cpu()
    expected = logits[0, 0].double().softmax(-1) * count
    statistic = ((tokens[0].bincount(minlength=40) - expected) ** 2 / expected).sum()
    # P(chi-square with 39 degrees of freedom > x) = 1 - gammainc(39 / 2, x / 2)
    p = 1 - torch.special.gammainc(torch.tensor(19.5, dtype=torch.float64), statistic / 2)
    assert p > 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_draw_of_probability_zero(dtype, device):
    uniforms = torch.cat([torch.rand(97), torch.tensor([0.0, 1 - 2.0**-24, 1.0])])[None]
    for vocab in SIZES:
        logits = random_logits(vocab, dtype, rows=(1, 100))
        masked = torch.rand(1, 100, vocab) < 0.9
        masked[..., vocab // 3] = False
        logits[masked] = -INF
        tokens = ops.sample_nodes(logits.to(device), uniforms.to(device)).cpu()
        assert (logits.gather(-1, tokens[..., None]) > -INF).all()


def test_extreme_uniforms(device):
    logits = torch.full((1, 6, 1300), -INF)
    logits[..., [3, 700, 1200]] = 1.0
    uniforms = torch.tensor([[0.0, 1 - 2.0**-53, 1.0, -1.0, 7.0, torch.nan]], dtype=torch.float64)
    got = ops.sample_nodes(logits.to(device), uniforms.to(device))
    assert got.tolist() == [[3, 1200, 1200, 3, 1200, -1]]


def test_no_choice(device):
    logits = torch.zeros(1, 4, 600)
    logits[0, 0, 555] = torch.nan
    logits[0, 1] = -INF
    logits[0, 2, 3] = INF
    got = ops.sample_nodes(logits.to(device), torch.full((1, 4), 0.5, device=device))
    assert got.tolist() == [[-1, -1, -1, 300]]


@pytest.mark.not_emulated("2,000 rows")
def test_rounding_of_the_logits_rarely_changes_a_draw(device):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 2000, 300, generator=generator) * 3
    noise = (torch.rand(logits.shape, generator=generator) - 0.5) * 2e-6
    uniforms = torch.rand(1, 2000, generator=generator)
    one = ops.sample_nodes(logits.to(device), uniforms.to(device)).cpu()
    other = ops.sample_nodes((logits + noise).to(device), uniforms.to(device)).cpu()
    moved = one != other
    assert moved.sum() <= 5
    edges = logits.double().softmax(-1).cumsum(-1)
    distance = (edges - uniforms[..., None]).abs().amin(-1)
    assert (distance[moved] < 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_is_the_same(dtype, device):
    for vocab in (100, 5003):
        logits = random_logits(vocab, dtype, rows=(3, 5)).to(device)
        uniforms = torch.rand(3, 5, device=device)
        together = ops.sample_nodes(logits, uniforms)
        for b in range(3):
            for n in range(5):
                row = logits[b, n].clone()[None, None]
                assert ops.sample_nodes(row, uniforms[b : b + 1, n : n + 1]) == together[b, n]


def test_any_number_of_threads():
    logits = random_logits(33_000, rows=(2, 8))
    uniforms = torch.rand(2, 8)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append((ops.sample_nodes(logits), ops.sample_nodes(logits, uniforms)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype, device):
    padded = torch.full((7, 4, 6000), torch.nan, dtype=dtype)
    logits = padded.transpose(0, 1)[1:3, 2:7, 3:5006]
    logits.copy_(random_logits(5003, dtype, rows=(2, 5)))
    uniforms = torch.rand(2, 5)
    assert not logits.is_contiguous()
    for u in (None, uniforms.to(device)):
        got = ops.sample_nodes(logits.to(device), u)
        assert torch.equal(got, ops.sample_nodes(logits.contiguous().to(device), u))
        assert (got >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_device_gives_the_same_tokens(dtype, device, schedule):
    """Also where the uniform number is that of a boundary, so that every rounding counts."""
    if device == "cpu" and not schedule.emulated:
        pytest.skip("the CPU's tokens are the expected ones")
    on_cpu = torch.ops.specextend.sample_nodes
    for vocab in (1, 5, 100, 512, 1500, 9000):
        logits = hard_logits(dtype, vocab)
        assert torch.equal(ops.sample_nodes(logits.to(device)).cpu(), on_cpu(logits))
        cumulative = logits.double().softmax(-1).cumsum(-1)
        for u in (0.0, 0.3, 0.7, 0.999, 1.0):
            token = (cumulative < u).sum(-1, keepdim=True).clamp(max=vocab - 1)
            uniforms = cumulative.gather(-1, token)[..., 0]
            got = ops.sample_nodes(logits.to(device), uniforms.to(device)).cpu()
            assert torch.equal(got, on_cpu(logits, uniforms))


def test_more_blocks_than_a_warp_has_runs(device):
    """Cumulative sums over the blocks take several turns of a warp."""
    vocab = 2 * 32 * 16 * 512 + 1000
    logits = torch.full((1, 3, vocab), -INF)
    logits[..., [7, vocab // 2, vocab - 3]] = 0.0
    uniforms = torch.tensor([[0.1, 0.5, 0.9]])
    got = ops.sample_nodes(logits.to(device), uniforms.to(device))
    assert got.tolist() == [[7, vocab // 2, vocab - 3]]
    assert ops.sample_nodes(logits.to(device)).tolist() == [[7] * 3]


def test_any_schedule(device, schedule):
    logits, uniforms = random_logits(1500).to(device), torch.rand(2, 3, device=device)
    expected = ops.sample_nodes(logits), ops.sample_nodes(logits, uniforms)
    for kind in KINDS:
        with schedule(kind=kind, seed=3, multiprocessors=2):
            assert torch.equal(ops.sample_nodes(logits), expected[0])
            assert torch.equal(ops.sample_nodes(logits, uniforms), expected[1])


def test_graph_replay(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    logits, uniforms = random_logits(5003).to(device), torch.rand(2, 3, device=device)
    graph, (largest, drawn) = capture(
        lambda: (ops.sample_nodes(logits), ops.sample_nodes(logits, uniforms))
    )
    logits.copy_(random_logits(5003, seed=1))
    uniforms.uniform_()
    graph.replay()
    assert torch.equal(largest, ops.sample_nodes(logits))
    assert torch.equal(drawn, ops.sample_nodes(logits, uniforms))


def test_empty(device):
    assert ops.sample_nodes(torch.zeros(2, 0, 5, device=device)).shape == (2, 0)
    assert ops.sample_nodes(torch.zeros(0, 3, 5, device=device)).shape == (0, 3)


@pytest.mark.parametrize("uniforms", [None, torch.rand(2, 3)])
@pytest.mark.not_emulated("the registered op is asked")
def test_opcheck(uniforms, device):
    uniforms = uniforms if uniforms is None else uniforms.to(device)
    arguments = (random_logits(50).to(device), uniforms)
    torch.library.opcheck(torch.ops.specextend.sample_nodes.default, arguments)


LOGITS = torch.zeros(2, 3, 5)
UNIFORMS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("logits", "uniforms", "message"),
    [
        (LOGITS[0], None, r"logits must be \[B, N, V\], got \[3, 5\]"),
        (LOGITS.double(), None, "logits must be float32, float16 or bfloat16, got float64"),
        (LOGITS.mT, None, "logits must have a last stride of 1, got 5"),
        (LOGITS[..., :0], None, r"the vocabulary size V must be in \[1, .*\], got 0"),
        (LOGITS, UNIFORMS[:, :2], r"uniforms must have shape \[2, 3\], got \[2, 2\]"),
        (LOGITS, UNIFORMS.half(), "uniforms must be float32 or float64, got float16"),
        (LOGITS, torch.zeros(3, 2).mT, "uniforms must be contiguous"),
    ],
)
def test_errors(logits, uniforms, message):
    with pytest.raises(RuntimeError, match=f"sample_nodes: {message}"):
        ops.sample_nodes(logits, uniforms)
