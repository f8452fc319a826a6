"""The loss in slices and the masks of documents, as a GPU computes them, against plain formulas.

A GPU's limits are set on a CPU here; fake CUDA tensors show what a GPU would be asked to do.
"""
import functools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from engine import ops
from model import MiniCPM, MiniCPMConfig, init_weights

SMALL = MiniCPMConfig(vocab_size=97, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_ff=96)


class Recorder(TorchDispatchMode):
    """Records the shapes of all matrix products, and the size of the largest tensor."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default:
            self.products.append((*args[0].shape, out.shape[1]))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


# ---- the loss

def problem(N, V, C=8, dtype=torch.float32):
    """Return (hidden, weight, targets, gradient of each loss); every fifth target is -100."""
    generator = torch.Generator().manual_seed(N + V)
    hidden = torch.randn(N, C, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[1::5] = -100
    return hidden, weight, targets, torch.randn(N, generator=generator)


def plain_loss(hidden, weight, targets):
    logits = F.linear(hidden, weight.to(hidden.dtype))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")


def loss_and_gradients(loss_fn, hidden, weight, targets, grad):
    nll = loss_fn(hidden, weight, targets)
    return nll, *torch.autograd.grad(nll, (hidden, weight), grad.to(nll.dtype))


@pytest.mark.parametrize("compiled", [False, True])
def test_sliced_loss_equals_the_plain_one_at_odd_sizes(monkeypatch, compiled):
    """Whatever is kept, with and without padding of the last slice (V no multiple of 128)."""
    for N, V in ((1, 1), (7, 127), (300, 128), (300, 129), (1, 1000), (7, 1000), (3, 122753)):
        hidden, weight, targets, grad = problem(N, V)
        exact = loss_and_gradients(plain_loss, *(x.detach().double().requires_grad_() for x in
                                                 (hidden, weight)), targets, grad)
        monkeypatch.setitem(ops.MAX_LOGITS, "cpu", N * V // 4)
        for keep in (0, N * V // 2, 2 * N * (V + 128)):
            def loss(h, w, t):
                return ops.chunked_cross_entropy(h, w, t, keep, compiled)
            found = loss_and_gradients(loss, hidden, weight, targets, grad)
            for a, b in zip(found, exact):
                assert a.dtype == torch.float32
                assert (a - b).abs().max() <= 3e-5 * max(1, b.abs().max()), (N, V, keep)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kept_logits_change_nothing_in_16_bits(monkeypatch, dtype):
    monkeypatch.setitem(ops.MAX_LOGITS, "cpu", 300 * 256)
    hidden, weight, targets, grad = problem(300, 1000, C=32, dtype=dtype)
    results = {keep: loss_and_gradients(
        lambda h, w, t: ops.chunked_cross_entropy(h, w, t, keep, False),
        hidden, weight, targets, grad) for keep in (0, 300 * 500, 300 * 1024)}
    plain = loss_and_gradients(plain_loss, hidden, weight, targets, grad)
    for found in results.values():
        assert all(map(torch.equal, found, results[0]))
        assert torch.allclose(found[0], plain[0], atol=1e-4)
        for a, b in zip(found[1:], plain[1:]):
            assert (a - b).abs().max() < 0.02 * b.abs().max()


def test_logits_that_are_kept_are_not_computed_again(monkeypatch):
    """1,000 columns in four slices of 256: three products for each that is kept, four otherwise."""
    monkeypatch.setitem(ops.MAX_LOGITS, "cpu", 40 * 256)
    for kept in range(5):
        monkeypatch.setitem(ops.KEPT_LOGITS, "cpu", kept * 40 * 256)
        inputs = problem(40, 1000)
        with Recorder() as seen:
            loss_and_gradients(ops.cross_entropy, *inputs)
        assert len(seen.products) == 4 * 4 - kept


def test_logits_are_not_kept_without_gradients(monkeypatch):
    monkeypatch.setitem(ops.MAX_LOGITS, "cpu", 1000)
    monkeypatch.setitem(ops.KEPT_LOGITS, "cpu", 2 ** 20)
    asked = []
    monkeypatch.setattr(ops, "chunked_cross_entropy", lambda *args: asked.append(args[3]))
    hidden, weight, targets, _ = problem(40, 1000)
    with torch.no_grad():
        ops.cross_entropy(hidden, weight, targets)
    ops.cross_entropy(hidden, weight, targets)
    assert asked == [0, 2 ** 20]


def test_a_second_backward_pass_gives_the_same_gradients(monkeypatch):
    monkeypatch.setitem(ops.MAX_LOGITS, "cpu", 40 * 256)
    hidden, weight, targets, grad = problem(40, 1000)
    nll = ops.chunked_cross_entropy(hidden, weight, targets, 40 * 512, False)
    first = torch.autograd.grad(nll, (hidden, weight), grad, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(nll, (hidden, weight), grad)))


@pytest.mark.parametrize("N, V", [(8192, 122753), (12288, 122753), (16384, 73440), (16384, 50257)])
def test_a_gpu_is_given_aligned_products_and_keeps_at_most_its_budget(monkeypatch, N, V):
    """Fake tensors with a GPU's limits, C = 64. All logits of 8,192 tokens of the 2.4B are kept."""
    monkeypatch.setitem(ops.MAX_LOGITS, "cpu", ops.MAX_LOGITS["cuda"])
    monkeypatch.setitem(ops.KEPT_LOGITS, "cpu", ops.KEPT_LOGITS["cuda"])
    with FakeTensorMode():
        hidden = torch.empty(N, 64, dtype=torch.bfloat16, requires_grad=True)
        weight, targets = torch.empty(V, 64, requires_grad=True), torch.empty(N, dtype=torch.int64)
        with Recorder() as seen:
            nll = ops.cross_entropy(hidden, weight, targets)
            kept = list(nll.grad_fn.kept.values())
            nll.sum().backward()
    assert sum(map(torch.Tensor.numel, kept)) <= ops.KEPT_LOGITS["cuda"]
    assert {logits.dtype for logits in kept} == {torch.bfloat16}
    assert all(size % 128 == 0 or size == 64 for product in seen.products for size in product)
    assert seen.largest <= ops.MAX_LOGITS["cuda"]
    slices = len(range(0, V, ops.slice_width(N, V, "cpu")))
    assert len(seen.products) == 4 * slices - len(kept)
    assert (len(kept) == slices) == (N * V <= ops.KEPT_LOGITS["cuda"])


def test_a_gpu_is_not_given_an_unaligned_vocabulary_at_once(monkeypatch):
    sliced = []
    monkeypatch.setattr(ops, "chunked_cross_entropy", lambda *args: sliced.append(len(args[1])))
    with FakeTensorMode():
        for V in (256, 259):
            hidden, weight = torch.empty(10, 64, device="cuda"), torch.empty(V, 64, device="cuda")
            targets = torch.empty(10, device="cuda", dtype=torch.int64)
            ops.cross_entropy(hidden, weight, targets)
    assert sliced == [259]


def test_the_slices_of_a_compiled_run_are_compiled(monkeypatch):
    """The loss stands outside the compiled model, and what it calls must be compiled all the same:
    one frame forward, one backward, for all slices and steps."""
    counter, outer = CompileCounter(), CompileCounter()
    compile_once = functools.cache(functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(ops, "compile_once", compile_once)
    monkeypatch.setattr(ops, "COLUMN_MULTIPLE", 16)
    monkeypatch.setitem(ops.MAX_LOGITS, "cpu", 40 * 32)
    model = MiniCPM(SMALL)
    init_weights(model, 0)
    idx = torch.randint(0, 97, (2, 20))
    expected = model(idx, idx)[0]
    assert counter.frame_count == 0
    model.numerics.compiled = True
    for forward in (model, torch.compile(model, backend=outer)):
        for _ in range(2):
            nll, _ = forward(idx, idx)
            nll.sum().backward()
            assert torch.allclose(nll, expected, atol=1e-5)
        assert counter.frame_count == 2
    assert outer.frame_count > 0


def test_a_run_says_whether_the_loss_is_compiled(monkeypatch, train_tiny):
    said = []
    loss = ops.cross_entropy
    monkeypatch.setattr(ops, "cross_entropy", lambda *args: said.append(args[3]) or loss(*args[:3]))
    monkeypatch.setattr("engine.device.reason_not_to_compile", lambda config, *_:
                        None if config.compile else "as requested")
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    for compiled in (True, False):
        said.clear()
        train_tiny(f"compiled_{compiled}", f"--compile={compiled}", "--max_steps=1")
        assert set(said) == {compiled}


# ---- masks of documents

def documents(kind, B, T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "sorted":
        return (torch.rand(B, T, generator=generator) < 0.01).cumsum(1)
    if kind == "unsorted":              # documents that come back, and runs of one
        runs = torch.randint(0, 4, (B, T // 90 + 1), generator=generator)
        return runs.repeat_interleave(90, 1)[:, :T]
    return torch.randint(0, 3, (B, T), generator=generator)


@pytest.mark.parametrize("kind", ["sorted", "unsorted", "random"])
@pytest.mark.parametrize("T", [1, 100, 128, 129, 1000, 1024])
def test_blocks_of_a_document_mask_cover_the_dense_mask(kind, T):
    """No visible token is missed, full blocks are visible throughout; sorted documents give the
    lists of create_block_mask, for forward and backward."""
    doc_ids = documents(kind, 3, T)
    found = ops.document_mask(doc_ids)
    dense = ops.attention_mask(doc_ids, T, T, doc_ids.device, flex=False)
    expected = flex.create_block_mask(found.mask_mod, 3, None, T, T, device="cpu")
    n = found.kv_indices.shape[-1]

    def blocks_of(counts, indices):
        listed = torch.arange(n) < counts[..., None]
        return torch.zeros(3, 1, n, n, dtype=torch.bool).scatter_(3, indices.long(), listed)
    partial = blocks_of(found.kv_num_blocks, found.kv_indices)
    full = blocks_of(found.full_kv_num_blocks, found.full_kv_indices)
    padded = F.pad(dense, (0, n * 128 - T, 0, n * 128 - T)).view(3, 1, n, 128, n, 128)
    some, every = padded.any(5).any(3), padded.all(5).all(3)
    assert not (partial & full).any() and ((partial | full) >= some).all()
    assert torch.equal(full, every)
    assert torch.equal(partial.mT, blocks_of(found.q_num_blocks, found.q_indices))
    assert torch.equal(full.mT, blocks_of(found.full_q_num_blocks, found.full_q_indices))
    if kind == "sorted":
        for name in flex.BlockMask._TENSOR_ATTRS[:8]:
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_a_document_mask_of_131072_tokens_holds_no_t_by_t_tensor():
    """At most the (T / 128)^2 pairs of blocks, a row more of them in torch's own lists."""
    with Recorder() as seen:
        ops.attention_mask(documents("sorted", 1, 131072), 131072, 131072, "cpu", flex=True)
    assert seen.largest <= 1024 * 1025


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("T", [100, 300])
def test_attention_with_a_document_mask_equals_the_written_out_one(monkeypatch, T):
    monkeypatch.setattr(ops, "compile_once", lambda function: function)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    check_attention(T)


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 100, 129, 300])
def test_compiled_attention_with_a_document_mask_equals_the_written_out_one(T):
    """The CPU's kernel reads the lists of blocks, as a GPU's does. 20 seconds of C++ each."""
    torch._dynamo.reset()               # torch 2.13's C++ for lengths that vary does not compile
    check_attention(T)


@torch.no_grad()
def check_attention(T):
    for kind in ("sorted", "unsorted", "random"):
        doc_ids = documents(kind, 2, T)
        q, k, v = torch.randn(2, 4, T, 32), *torch.randn(2, 2, 2, T, 32)
        dense = ops.attention_mask(doc_ids, T, T, "cpu", flex=False)
        found = ops.attention(q, k, v, ops.document_mask(doc_ids), flash=True)
        assert (found - ops.explicit_attention(q, k, v, dense)).abs().max() < 1e-5


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_other_documents_do_not_compile_a_block_again(monkeypatch, whole, recompute):
    """As on a GPU, alone (the whole model is compiled) and under FSDP (its blocks): the mask closes
    over the documents of a batch, and blocks may be recomputed. Gradients are the dense mask's."""
    T, dense = 300, ops.attention_mask
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)      # no gradients on a CPU

    def gradients(forward, seed):
        model.zero_grad()
        forward(idx, idx, documents("sorted", 2, T, seed))[0].sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    torch._dynamo.reset()
    model, idx = MiniCPM(SMALL), torch.randint(0, 97, (2, T))
    init_weights(model, 0)
    expected = [gradients(model, seed) for seed in range(3)]
    monkeypatch.setattr(ops, "attention_mask", lambda *args: dense(*args[:4], flex=True))
    counter = CompileCounterWithBackend("aot_eager")
    if recompute:
        for block in model.blocks:
            block.forward = recomputed(block.forward)
    if not whole:
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=True, dynamic=False)
    forward = torch.compile(model, backend=counter, dynamic=False) if whole else model
    frames = []
    for seed in range(3):
        for a, b in zip(gradients(forward, seed), expected[seed]):
            assert (a - b).abs().max() < 1e-5 * b.abs().max()
        frames.append(counter.frame_count)
    assert frames == ([2, 2, 2] if whole else [1, 1, 1])        # rope_tables parts the whole model


def recomputed(forward):
    def run(*args):
        return checkpoint(forward, *args, use_reentrant=False)
    return run
