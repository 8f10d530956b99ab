"""Tests of MT-GAN: every fast path against a slow one, every gradient against float64 finite differences.

    pytest test_mtgan.py
"""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # must be set before anything imports triton, as torchvision does

import contextlib
import functools
import itertools
import json
import math
import pickle
import signal
import struct
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import mtgan
from kernels import fused_linear

HERE = Path(__file__).parent
TINY = ["--source", "digits:0-5", "--target", "garments:0-2", "--source-steps", "1", "--dry-run"]     # 4 x 2 pairs to train on, 2 held out


# ----------------------------------------------------------------------------------------------------------------------
# Gradients: the dual form against explicit weights, and both against finite differences
# ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def small(monkeypatch, request):
    """Networks of a few units in float64, and an episode for them: leaves, batches, query. Of the layers of D, the first has
    its memory folded at every step, or with the parameters WIDE after some steps."""
    pixels, width, steps = getattr(request, "param", (7, 14, 2))
    monkeypatch.setattr(mtgan, "NOISE", 3)
    monkeypatch.setattr(mtgan, "FAKES", 4)
    monkeypatch.setattr(mtgan, "GENERATOR_SIZES", (3, 16, 14, 12, pixels))
    monkeypatch.setattr(mtgan, "DISCRIMINATOR_SIZES", (pixels, width, 12, 16, 1))
    torch.set_default_dtype(torch.float64)
    rng = torch.Generator().manual_seed(3)
    leaves = mtgan.tensors(mtgan.init_network(mtgan.GENERATOR_SIZES, rng), mtgan.init_network(mtgan.DISCRIMINATOR_SIZES, rng))
    rates = torch.log(0.2 + 0.3 * torch.rand(steps + 1, 2, 4, generator=rng))
    leaves = [(1.5 * t).requires_grad_() for t in leaves] + [rates.requires_grad_()]
    source, support, query = (torch.rand(2, n, pixels, generator=rng) * 2 - 1 for n in (5, 5, 6))
    yield leaves, [source, *[support] * steps], query
    torch.set_default_dtype(torch.float32)


WIDE = (70, 80, 8)


def mlp(weights, x, slope):
    """The explicit form: a network of plain weights, for one task."""
    for i in range(0, len(weights), 2):
        x = x @ weights[i].T + weights[i + 1]
        x = F.leaky_relu(x, slope) if i + 2 < len(weights) else x
    return x


def explicit_episode(leaves, batches, query, score, seed, create_graph=True, alias=True, frozen=None, record=None):
    """Slow reference of an episode: explicit weights, one task after the other, no dual form; the mean outer loss.

    alias=False makes the classic mistake: inner gradients with respect to tensors that earlier steps depend on.
    record: a list that gets what each step showed to the opponent; frozen: such a list, shown instead, as constants.
    """
    rng = torch.Generator().manual_seed(seed)
    half = 1 + len(batches) // 2                # scored after the source and half of the steps on the support, and at the end
    noises = [mtgan.noise(len(query), n, rng) for k in range(1, len(batches) + 1) for n in [mtgan.FAKES] + [query.shape[1]] * (k in (half, len(batches)))]
    alpha = leaves[-1].exp().repeat_interleave(2, 2)         # a layer's rate is its weight's and its bias's  # [steps, 2, 8]
    shown = iter(frozen or ())
    losses = []

    def show(value):
        if record is not None:
            record.append([t.detach() for t in value])
        return next(shown) if frozen else value

    for t in range(len(query)):
        theta, phi, z = leaves[:8], leaves[8:16], (n[t] for n in noises)
        for k, real in enumerate(batches, 1):
            seed = next(z)
            [fake] = show([mlp(theta, seed, 0).tanh()])
            mine = [p.clone() for p in phi] if alias else phi
            loss = mtgan.loss_d(mlp(mine, real[t], 0.2)[:, 0], mlp(mine, fake, 0.2)[:, 0])
            phi = [p - a * g for p, a, g in zip(phi, alpha[k - 1, 1], torch.autograd.grad(loss, mine, create_graph=create_graph, retain_graph=True))]
            judge = show(phi)
            mine = [p.clone() for p in theta] if alias else theta
            loss = mtgan.loss_g(mlp(judge, mlp(mine, seed, 0).tanh(), 0.2)[:, 0])
            theta = [p - a * g for p, a, g in zip(theta, alpha[k - 1, 0], torch.autograd.grad(loss, mine, create_graph=create_graph, retain_graph=True))]
            if k not in (half, len(batches)):
                continue
            fake = mlp(theta, next(z), 0).tanh()
            if score != "adversarial":
                losses.append(sum(mtgan.energy_distance(view(fake[None]), view(query[t][None]))[0] for view in VIEWS[score]))
            else:
                [other], judge = show([fake]), show(phi)
                losses.append(mtgan.loss_d(mlp(phi, query[t], 0.2)[:, 0], mlp(phi, other, 0.2)[:, 0]) + mtgan.loss_g(mlp(judge, fake, 0.2)[:, 0]))
    return torch.stack(losses).mean()


VIEWS = {"energy": [mtgan.pixels], "two views": [mtgan.pixels, lambda images: images.sin() @ torch.linspace(-1, 1, 14).view(7, 2)], "adversarial": []}


def meta_gradient(small, algorithm="maml", score="energy"):
    leaves, batches, query = small
    return mtgan.meta_gradient(leaves, batches, query, algorithm, VIEWS[score], torch.Generator().manual_seed(5))


def relative(a, b):
    flat = lambda v: torch.cat([t.detach().flatten() for t in v])
    return ((flat(a) - flat(b)).norm() / flat(b).norm()).item()


GROUPS = {"theta": slice(0, 8), "phi": slice(8, 16), "rates": slice(16, 17)}


@pytest.mark.parametrize("score", VIEWS)
def test_meta_gradient_is_that_of_finite_differences(small, score):
    leaves, batches, query = small
    _, gradient = meta_gradient(small, score=score)
    frozen = None
    if score == "adversarial":      # each player differentiates through its own steps only: hold what the opponent shows
        explicit_episode(leaves, batches, query, score, 5, record=(frozen := []))
    value = lambda point: explicit_episode(point, batches, query, score, 5, create_graph=False, frozen=frozen).item()
    for group, part in GROUPS.items():
        slopes, expected = [], []
        for trial in range(8):
            rng = torch.Generator().manual_seed(trial)
            direction = [torch.zeros_like(t) for t in leaves]
            direction[part] = [torch.randn(t.shape, generator=rng) for t in leaves[part]]
            h = 1e-5 / math.sqrt(sum(d.square().sum() for d in direction))
            ends = [value([(t + sign * h * d).detach().requires_grad_() for t, d in zip(leaves, direction)]) for sign in (1, -1)]
            slopes.append((ends[0] - ends[1]) / (2 * h))
            expected.append(sum((g * d).sum() for g, d in zip(gradient, direction)).item())
        slopes, expected = torch.tensor(slopes), torch.tensor(expected)
        assert expected.norm() > 1e-4, group
        assert (slopes - expected).norm() / expected.norm() < 1e-6, group


@pytest.mark.parametrize("score", ["energy", "adversarial"])
def test_second_order_is_not_first_order(small, score):
    _, second = meta_gradient(small, "maml", score)
    _, first = meta_gradient(small, "fomaml", score)
    for group, part in GROUPS.items():
        assert relative(first[part], second[part]) > 0.01, group


@pytest.mark.parametrize("small", [WIDE], indirect=True)
def test_the_support_is_remembered_once(small):
    """What D's first layer remembers: a new batch and its fakes, then only the fakes, until it is folded; then a quarter of that."""
    leaves, batches, _ = small
    steps = mtgan.adapt(*mtgan.players(leaves), leaves[-1].exp(), batches, torch.Generator().manual_seed(5))
    memory = [phi[0].inputs for _, phi in steps]
    assert [0 if m is None else m.shape[1] for m in memory] == [0, 9, 18, 22, 26, 30, 34, 0, 9, 0]
    assert all(torch.equal(m[:, :5], batches[step - 1]) for step, m in enumerate(memory) if m is not None)


@pytest.mark.parametrize("score", ["energy", "adversarial"])
@pytest.mark.parametrize("small", [WIDE], indirect=True)
def test_dual_form_is_the_explicit_form_where_the_support_is_remembered(small, score):
    leaves, batches, query = small
    loss, gradient = meta_gradient(small, score=score)
    frozen = None
    if score == "adversarial":
        explicit_episode(leaves, batches, query, score, 5, record=(frozen := []))
    expected = explicit_episode(leaves, batches, query, score, 5, frozen=frozen)
    assert abs(loss - expected) < 1e-12
    assert relative(gradient, torch.autograd.grad(expected, leaves)) < 1e-12


def test_dual_form_is_the_explicit_form(small):
    leaves, batches, query = small
    loss, gradient = meta_gradient(small)
    expected = explicit_episode(leaves, batches, query, "energy", 5)
    assert abs(loss - expected) < 1e-12
    assert relative(gradient, torch.autograd.grad(expected, leaves)) < 1e-12
    loop_loss, loop = mtgan.explicit_gradient(leaves, batches, query, "maml", VIEWS["energy"], torch.Generator().manual_seed(5))
    assert abs(loop_loss - expected) < 1e-12 and relative(loop, gradient) < 1e-12      # what --benchmark compares with


@pytest.mark.parametrize("score", ["energy", "adversarial"])
def test_first_order_is_the_explicit_first_order(small, score):
    leaves, batches, query = small
    _, gradient = meta_gradient(small, "fomaml", score)
    frozen = None
    if score == "adversarial":
        explicit_episode(leaves, batches, query, score, 5, record=(frozen := []))
    expected = torch.autograd.grad(explicit_episode(leaves, batches, query, score, 5, create_graph=False, frozen=frozen), leaves,
                                   allow_unused=True, materialize_grads=True)
    assert relative(gradient, expected) < 1e-12


@pytest.mark.skipif(bool(kernels.why_not_triton("cpu")), reason="triton's interpreter is not on")
def test_meta_gradient_through_triton(small, monkeypatch):
    loss, expected = meta_gradient(small)
    monkeypatch.setattr(mtgan, "KERNEL", "triton")
    with_kernel, gradient = meta_gradient(small)
    assert abs(loss - with_kernel) < 1e-12 and relative(gradient, expected) < 1e-12


def test_inner_gradients_are_partial(small):
    """Reusing the fake batch and the parameters of earlier steps un-aliased is another, wrong, gradient; ours is not it."""
    leaves, batches, query = small
    wrong = explicit_episode(leaves, batches, query, "energy", 5, alias=False)
    right = explicit_episode(leaves, batches, query, "energy", 5)
    loss, _ = meta_gradient(small)
    assert abs(wrong - right) > 1e-4 and abs(loss - right) < 1e-12


def test_reptile_moves_towards_the_adapted_weights(small):
    leaves, batches, query = small
    _, gradient = meta_gradient(small, "reptile")
    rng = torch.Generator().manual_seed(5)
    for steps, (theta, phi) in enumerate(mtgan.adapt(*mtgan.players(leaves), leaves[-1].exp(), batches, rng)):
        if steps == 2:
            mtgan.noise(len(query), query.shape[1], rng)        # for the loss that is shown
    ends = mtgan.tensors(*([mtgan.fold(layer) for layer in layers] for layers in (theta, phi)))
    assert relative(gradient[:16], [start - end.mean(0) for start, end in zip(leaves, ends)]) < 1e-12
    assert gradient[16].abs().max() == 0


def test_both_adds_two_directions_of_length_one(small):
    _, second = meta_gradient(small)
    _, back = meta_gradient(small, "reptile")
    of_length_one = lambda parts: [t / torch.cat([p.flatten() for p in parts]).norm() for t in parts]
    loss, gradient = meta_gradient(small, "both")
    assert loss == meta_gradient(small)[0]
    assert relative(gradient, [a + b for a, b in zip(of_length_one(second), of_length_one(back))]) < 1e-12
    assert relative(gradient, of_length_one(second)) > 0.1 and relative(gradient, of_length_one(back)) > 0.1


def test_an_episode_is_scored_after_half_of_the_steps_on_the_support():
    source, support = torch.zeros(1), torch.ones(1)
    for sources, steps, expected in ((0, 10, [5, 10]), (0, 5, [3, 5]), (0, 1, [1]), (1, 2, [2, 3]), (10, 10, [15, 20]), (3, 1, [4])):
        assert mtgan.scored([source] * sources + [support] * steps) == expected


def test_memory_folds_into_weights_where_those_are_cheaper(small):
    leaves, batches, _ = small
    theta, _ = mtgan.players(leaves)
    shapes = [layer.weight.shape for layer in theta]
    _, (adapted, _) = mtgan.adapt(*mtgan.players(leaves), leaves[-1].exp(), batches[:1], torch.Generator().manual_seed(5))
    *_, (folded, _) = mtgan.adapt(*mtgan.players(leaves), leaves[-1].exp().repeat(4, 1, 1), batches * 4, torch.Generator().manual_seed(5))
    assert [layer.inputs is None for layer in adapted] == [4 * (n + k) > n * k for n, k in shapes]
    assert all(layer.inputs is None or layer.inputs.shape[1] * sum(shape) <= math.prod(shape) for layer, shape in zip(folded, shapes))
    assert any(layer.inputs is None for layer in folded) and any(layer.inputs is not None for layer in adapted)
    for own, rows in ((False, 5), (False, 6), (True, 1), (True, 2)):        # 12 x 12: as many rows as 6, own weights 1.5
        weight = torch.zeros(2, 12, 12) if own else torch.zeros(12, 12)
        (layer,) = mtgan.remember([mtgan.Layer(weight, weight[..., 0])], [1.0], [torch.ones(2, rows, 12)], [torch.ones(2, rows, 12)])
        assert (layer.inputs is None) == (rows == 2 if own else False)
        (layer,) = mtgan.remember([layer], [1.0], [torch.ones(2, 1, 12)], [torch.ones(2, 1, 12)])
        assert (layer.inputs is None) == (rows == (1 if own else 6))
    z = mtgan.noise(2, 5, torch.Generator().manual_seed(1))
    same = mtgan.generator([mtgan.fold(layer) for layer in adapted], z)
    assert (mtgan.generator(adapted, z) - same).abs().max() < 1e-12


def test_float32_meta_gradient_at_full_size():
    """The published networks in float32 against the same episode in float64."""
    rng = torch.Generator().manual_seed(0)
    leaves = mtgan.tensors(mtgan.init_network(mtgan.GENERATOR_SIZES, rng), mtgan.init_network(mtgan.DISCRIMINATOR_SIZES, rng))
    leaves = [*leaves, torch.full((2, 2, 4), math.log(0.1))]
    support, query = torch.rand(2, 5, 784, generator=rng) * 2 - 1, torch.rand(2, 6, 784, generator=rng) * 2 - 1
    gradients = []
    noise = mtgan.noise
    for dtype in (torch.float32, torch.float64):
        cast = lambda t: t.to(dtype)
        mtgan.noise = lambda *args: cast(noise(*args))
        try:
            gradients.append(mtgan.meta_gradient([cast(t).requires_grad_() for t in leaves], [cast(support)] * 2, cast(query), "maml", [mtgan.pixels],
                                                 torch.Generator().manual_seed(1))[1])
        finally:
            mtgan.noise = noise
    assert relative(*gradients) < 1e-4


def test_written_out_backpropagation_is_autograds(small):
    """Gradients of the pre-activations and of the input, with and without memory, against autograd's."""
    leaves, batches, query = small
    for steps in (0, 2):
        *_, (_, phi) = mtgan.adapt(*mtgan.players(leaves), leaves[-1].exp(), batches[:steps], torch.Generator().manual_seed(5))
        x, seen = query.clone().requires_grad_(), []
        logits = mtgan.discriminator(phi, x, seen)
        g = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        gradients = mtgan.backpropagate(phi, seen, g.unsqueeze(-1), 0.2)
        biases = torch.autograd.grad((logits * g).sum(), [*leaves[9:16:2], x], retain_graph=True)
        if not steps:                   # without memory that of a bias is the sum of those of its pre-activations
            assert relative([gradient.sum((0, 1)) for gradient in gradients], biases[:-1]) < 1e-12
        assert relative([mtgan.input_gradient(phi[0], gradients[0])], biases[-1:]) < 1e-12


class Unfused(torch.optim.Adam):
    found_inf = property(lambda self: None, lambda self, value: None)        # only the fused one looks for it


def test_gan_step_is_plain_adam(monkeypatch):
    """With shared weights and with a task's own ones (whose gradients come transposed), against torch's unfused Adam."""
    for name in ("GENERATOR_SIZES", "DISCRIMINATOR_SIZES"):
        monkeypatch.setattr(mtgan, name, tuple(min(n, 100) for n in getattr(mtgan, name)[:-1]) + (784 if name[0] == "G" else 1,))
    monkeypatch.setattr(mtgan, "DISCRIMINATOR_SIZES", (784, *mtgan.DISCRIMINATOR_SIZES[1:]))
    rng = torch.Generator().manual_seed(0)
    flat = mtgan.tensors(mtgan.init_network(mtgan.GENERATOR_SIZES, rng), mtgan.init_network(mtgan.DISCRIMINATOR_SIZES, rng))
    real = torch.rand(1, 9, 784, generator=rng) * 2 - 1
    shared, own = mtgan.new_phase(flat, 1), mtgan.new_phase([t.expand(1, *t.shape) for t in flat], 1)
    plain = mtgan.new_phase(flat, 1)
    plain["optimizers"] = [Unfused(mtgan.tensors(layers), 2e-4, betas=(0.5, 0.999)) for layers in mtgan.players(plain["leaves"])]
    for _ in range(5):
        for phase in (shared, own, plain):
            assert mtgan.gan_step(phase, real, 9)[0]
    assert relative(plain["leaves"], flat) > 1e-3
    assert relative(shared["leaves"], plain["leaves"]) < 1e-5 and relative([t[0] for t in own["leaves"]], plain["leaves"]) < 1e-5


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (50, 50)])
def test_an_orthogonal_step(shape):
    """The singular vectors stay, the singular values come near 1, however different they were; nothing comes of nothing."""
    rng = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=rng, dtype=torch.float64), full_matrices=False)
    scale = torch.logspace(0, -1.5, min(shape), dtype=torch.float64)
    step = mtgan.orthogonal(1e-3 * u * scale @ v)
    values = u.mT @ step @ v.mT
    assert relative([values.diag().diag()], [values]) < 1e-9
    assert 0.65 < values.diag().min() and values.diag().max() < 1.25
    assert not mtgan.orthogonal(torch.zeros(shape)).any()


def test_muon_is_torchs():
    """Step by step, against torch.optim.Muon, which computes in bfloat16 and takes a fifth of Adam's size for its unit."""
    rng, shapes = torch.Generator().manual_seed(0), [(60, 20), (30, 90)]
    mine, theirs = ([(torch.ones(shape) / 9).requires_grad_() for shape in shapes] for _ in range(2))
    muon = mtgan.Muon([{"params": mine, "lr": torch.tensor(1e-3)}])
    trusted = torch.optim.Muon(theirs, 5e-3, weight_decay=0.0, momentum=0.8, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        gradients = [torch.randn(shape, generator=rng) for shape in shapes]
        for leaf, gradient in zip(theirs, gradients):
            leaf.grad = gradient
        trusted.step()
        if step == 2:                   # in between, something that must change nothing
            before = [leaf.detach().clone() for leaf in mine]
            assert not mtgan.update([muon], mine, [gradients[0].clone(), torch.full(shapes[1], math.nan)])
            assert all(map(torch.equal, before, mine))
        assert mtgan.update([muon], mine, [gradient.clone() for gradient in gradients])
    change = lambda leaves: [leaf.detach() - 1 / 9 for leaf in leaves]
    assert relative(change(mine), change(theirs)) < 0.02
    assert 0.7e-3 < (mine[0] - before[0]).square().mean().sqrt() / 3 ** 0.5 < 2.5e-3        # three more steps


def test_who_takes_the_outer_step():
    """Muon the matrices, Adam the biases, D's last weight, which is a row, and, faster, the rates; each leaf once."""
    settings = mtgan.parse_arguments(["--meta-lr", "1e-3"])
    phase = mtgan.new_phase(mtgan.random_start(0, torch.device("cpu")), 0, settings)
    muon, adam = phase["optimizers"]
    parts = [(type(optimizer), group["lr"].item(), [tuple(leaf.shape) for leaf in group["params"]])
             for optimizer in (muon, adam) for group in optimizer.param_groups]
    shapes = [tuple(leaf.shape) for leaf in phase["leaves"]]
    assert parts[0] == (mtgan.Muon, pytest.approx(1e-3), [shapes[i] for i in (0, 2, 4, 6, 8, 10, 12)])
    assert parts[1] == (torch.optim.Adam, pytest.approx(1e-3), [shapes[i] for i in (1, 3, 5, 7, 9, 11, 13, 14, 15)])
    assert parts[2] == (torch.optim.Adam, pytest.approx(12.5e-3), [shapes[16]])


# ----------------------------------------------------------------------------------------------------------------------
# The meta-step on a device: no waiting, a CUDA graph, a benchmark
# ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def narrow(monkeypatch):
    """Networks of a few units for images of the usual size; settings for them."""
    monkeypatch.setattr(mtgan, "GENERATOR_SIZES", (100, 12, 12, 12, 784))
    monkeypatch.setattr(mtgan, "DISCRIMINATOR_SIZES", (784, 12, 12, 12, 1))
    settings = mtgan.parse_arguments(["--shots", "5", "--meta-batch", "2", "--inner-steps", "2", "--source-steps", "1"])
    settings.queries = 6
    return settings


class NoWaiting(TorchDispatchMode):
    """Raises where a value is asked from the device or sent to it: what a CUDA graph cannot hold."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "lift_fresh", "masked_select", "unique_dim", "_unique2"):
            raise AssertionError(f"{name} in the meta-step")
        return function(*args, **(kwargs or {}))


def test_a_meta_step_never_waits_for_the_device(narrow):
    domains, phase = numbered_domains(), mtgan.new_phase(mtgan.random_start(0, torch.device("cpu")), 0, narrow)
    before = phase["leaves"][0].detach().clone()
    for _ in range(2):
        with NoWaiting():
            numbers = mtgan.meta_step(phase, domains, narrow, [mtgan.pixels])
    assert numbers.shape == (10,) and numbers[0] == 1 and not torch.equal(before, phase["leaves"][0])
    for forbidden in (lambda: bool(numbers[0]), lambda: numbers[1].item(), lambda: torch.tensor([1.0])):
        with NoWaiting(), pytest.raises(AssertionError, match="in the meta-step"):
            forbidden()


class GraphOnCpu:
    """torch.cuda.CUDAGraph as far as a CPU can play it: what is captured runs when replayed."""
    fails = None

    def register_generator_state(self, rng):
        self.rng = rng

    def replay(self):
        self.result.copy_(self.step(self.phase))


@contextlib.contextmanager
def capture_on_cpu(graph, stream):
    if GraphOnCpu.fails and "begin" in GraphOnCpu.fails:
        raise RuntimeError(GraphOnCpu.fails)
    yield
    if GraphOnCpu.fails:
        raise RuntimeError(GraphOnCpu.fails)


@pytest.mark.parametrize("fails", [None, "cannot begin a capture", "cannot end the capture"])
def test_captured_steps_are_the_eager_ones(narrow, monkeypatch, capsys, fails):
    """The bookkeeping around a capture, with stand-ins for CUDA; the real one is compared in the next test."""
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {"CUDAGraph": GraphOnCpu, "graph": capture_on_cpu, "Stream": lambda: stream, "current_stream": lambda: stream,
                           "stream": lambda stream: contextlib.nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(GraphOnCpu, "fails", fails)
    domains, start, recorded = numbered_domains(), mtgan.random_start(0, torch.device("cpu")), []
    eager, graphed = (mtgan.new_phase(start, 0, narrow) for _ in range(2))

    def step(phase):
        recorded.append(phase["step"])
        if phase is graphed and phase["step"] == 3 and "begin" not in (fails or "") and recorded.count(3) == 1:
            GraphOnCpu.step, GraphOnCpu.phase = staticmethod(step), phase
            GraphOnCpu.result = torch.zeros(10)         # recording runs nothing
            return GraphOnCpu.result
        return mtgan.meta_step(phase, domains, narrow, [mtgan.pixels])

    run = mtgan.captured(step)
    for graphed["step"] in range(6):
        numbers = run(graphed)
    for _ in range(6):
        expected = mtgan.meta_step(eager, domains, narrow, [mtgan.pixels])
    assert torch.equal(numbers, expected) and all(map(torch.equal, eager["leaves"], graphed["leaves"]))
    assert torch.equal(eager["rng"].get_state(), graphed["rng"].get_state())
    assert (f"going on without a CUDA graph ({fails})" in capsys.readouterr().err) == bool(fails)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_takes_the_eager_steps():
    settings, device = mtgan.parse_arguments(["--shots", "5", "--meta-batch", "2"]), torch.device("cuda")
    settings.queries = 8
    domains = mtgan.load_domains(["digits:0-5"], ["garments:0-5"], 13, "", device)
    eager, graphed = (mtgan.new_phase(mtgan.random_start(0, device), 0, settings) for _ in range(2))
    views = [mtgan.pixels, mtgan.edges, mtgan.learned_view(mtgan.new_classifier(12).to(device).requires_grad_(False)[0])]
    run = mtgan.captured(lambda phase: mtgan.meta_step(phase, domains, settings, views))
    for _ in range(8):
        expected, numbers = mtgan.meta_step(eager, domains, settings, views).clone(), run(graphed).clone()
        assert torch.allclose(numbers, expected, rtol=1e-3)
    assert relative(graphed["leaves"], eager["leaves"]) < 1e-4
    assert torch.equal(eager["rng"].get_state(), graphed["rng"].get_state())


def test_a_benchmark_prints_every_row(narrow, monkeypatch, capsys):
    monkeypatch.setattr(mtgan.timed, "__defaults__", (1,))
    monkeypatch.setattr(mtgan, "draw_built_in", functools.partial(mtgan.draw_built_in, each=110))
    assert mtgan.main(["--benchmark", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:34].strip() for line in lines[2:7]] == ["one meta-step", "MT-GAN", "second order alone", "first order", "plain loop over the tasks"]
    tables = {line[:24].strip(): [float(cell) for cell in line[24:].split()] for line in lines if line[:1] in "tismh"}
    assert tables["tasks"] == [1, 4, 16, 64] and tables["inner steps"] == [1, 5, 10, 20] and tables["shots"] == [5, 25, 100]
    for line in lines[3:7]:
        seconds, ratio, gflop, speed, _ = map(float, line[34:].split())
        assert seconds > 0 and ratio > 0 and gflop > 0 and speed >= 0
    [optimisers] = [line for line in lines if line.startswith("optimisers alone")]
    assert 0 < float(optimisers[34:].split()[0]) < float(lines[6][34:].split()[0])      # a part of the loop's step


# ----------------------------------------------------------------------------------------------------------------------
# Networks, losses, metrics
# ----------------------------------------------------------------------------------------------------------------------

def test_published_networks():
    rng = torch.Generator().manual_seed(0)
    theta, phi = mtgan.init_network(mtgan.GENERATOR_SIZES, rng), mtgan.init_network(mtgan.DISCRIMINATOR_SIZES, rng)
    assert [tuple(layer.weight.shape) for layer in theta] == [(256, 100), (512, 256), (1024, 512), (784, 1024)]
    assert [tuple(layer.weight.shape) for layer in phi] == [(1024, 784), (512, 1024), (256, 512), (1, 256)]
    assert sum(t.numel() for t in mtgan.tensors(theta)) == 1_486_352
    assert sum(t.numel() for t in mtgan.tensors(phi)) == 1_460_225
    images = mtgan.generator(theta, mtgan.noise(2, 3, rng))
    logits = mtgan.discriminator(phi, images)
    assert images.shape == (2, 3, 784) and images.abs().max() <= 1 and logits.shape == (2, 3)
    one, other = (mtgan.discriminator(phi, images, dropout=0.3, rng=rng) for _ in range(2))
    assert not torch.equal(one, other)
    traces = [[] for _ in range(500)]
    for trace in traces:
        mtgan.network(phi[:2], images, 0.2, trace, dropout=0.3, rng=rng)
    many = torch.stack([trace[1] for trace in traces])
    undropped = F.leaky_relu(F.linear(images, *phi[0][:2]), 0.2)
    assert abs((many.mean(0) * undropped).sum() / undropped.square().sum() - 1) < 0.02      # dropout keeps the mean


def test_losses_stay_finite():
    logits = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    for loss in (mtgan.loss_d(logits, logits), mtgan.loss_g(logits)):
        assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()
    log = lambda x: math.log(1 + math.exp(x))
    real, fake = torch.tensor([[2.0, -1.0]]), torch.tensor([[-3.0, 0.5]])
    assert abs(mtgan.loss_d(real, fake).item() - (log(-2) + log(1) + log(-3) + log(0.5)) / 2) < 1e-6
    assert abs(mtgan.loss_g(fake).item() - (log(3) + log(-0.5)) / 2) < 1e-6
    assert mtgan.loss_g(torch.zeros(2, 3)).allclose(torch.full((2,), math.log(2)))
    assert mtgan.loss_d(torch.zeros(2, 3), torch.zeros(2, 3)).allclose(torch.full((2,), 2 * math.log(2)))


def test_energy_distance():
    x, y = torch.randn(2, 5, 3).double(), torch.randn(2, 4, 3).double()
    mean = lambda a, b, same: sum((p - q).norm() for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)) / (len(a) * (len(b) - same))
    expected = [2 * mean(a, b, 0) - mean(a, a, 1) - mean(b, b, 1) for a, b in zip(x, y)]
    assert torch.allclose(mtgan.energy_distance(x, y), torch.stack(expected))
    rng = torch.Generator().manual_seed(0)
    draws = torch.cat([mtgan.energy_distance(*torch.randn(2, 500, 20, 3, generator=rng)) for _ in range(4)])
    assert abs(draws.mean()) < 3 * draws.std() / math.sqrt(len(draws))      # unbiased: zero in the mean for one distribution
    far = mtgan.energy_distance(torch.randn(1, 20, 3, generator=rng), torch.randn(1, 20, 3, generator=rng) + 3)
    assert far > 1


def test_energy_distance_where_images_are_the_same():
    """Rounding must not make a distance of nothing a root of a negative number, or its gradient infinite."""
    image = torch.rand(1, 1, 784, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x, y = image.expand(1, 6, 784).clone().requires_grad_(), torch.cat([image, -image], 1)
    distance = mtgan.energy_distance(x, y)
    apart = 2 * image.norm()                                # E|x - y| is half of it, E|y - y'| the whole
    assert abs(distance.item()) < 1e-3 * apart and torch.autograd.grad(distance.sum(), x)[0].isfinite().all()


def test_edges_are_differences_of_neighbours():
    image = torch.zeros(1, 1, 784)
    image[..., 5 * 28 + 7] = 1                              # one bright pixel: an edge on either side of it, in both directions
    seen = mtgan.edges(image)
    assert seen.shape == (1, 1, 2 * 27 * 28) and sorted(seen[seen != 0].tolist()) == [-1, -1, 1, 1]
    across, down = seen[0, 0].view(2, -1)
    assert across.view(28, 27)[5, 6:8].tolist() == [1, -1] and down.view(27, 28)[4:6, 7].tolist() == [1, -1]


def whitened(n, d, seed):
    """n points whose sample mean is 0 and whose sample covariance is the identity."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double()
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_frechet_distance():
    a, b = whitened(50, 4, 0), whitened(60, 4, 1)
    s, r, shift = torch.tensor([1.0, 2, 3, 0.5]).double(), torch.tensor([2.0, 1, 3, 1]).double(), torch.tensor([1.0, 0, 0, 2]).double()
    closed = (shift.square().sum() + (s - r).square().sum()).item()
    distance = mtgan.frechet_distance(a * s, b * r + shift)
    assert abs(distance - closed) < 1e-9
    assert mtgan.frechet_distance(a * s, a * s) < 1e-9
    assert abs(mtgan.frechet_distance(b * r + shift, a * s) - closed) < 1e-9
    turn = torch.linalg.qr(torch.randn(4, 4).double()).Q
    assert abs(mtgan.frechet_distance((a * s) @ turn + 5, (b * r + shift) @ turn + 5) - closed) < 1e-9
    assert abs(mtgan.frechet_distance(3 * a * s, 3 * (b * r + shift)) - 9 * closed) < 1e-8
    mixing = torch.randn(4, 4).double()                                     # covariances that do not commute
    cov_a, cov_b = torch.diag(s**2), mixing @ mixing.T
    expected = (cov_a.trace() + cov_b.trace() - 2 * torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()).item()
    assert abs(mtgan.frechet_distance(a * s, b @ mixing.T) - expected) < 1e-9
    assert mtgan.frechet_distance(torch.full((3, 2), math.nan), a) == math.inf


def test_interval():
    values = [1.0, 2.0, 4.0, 7.0, 11.0, 3.0, 2.0, 5.0, 6.0, 9.0]
    mean, half = mtgan.interval(values)
    assert mean == 5 and abs(half - 2.2622 * np.std(values, ddof=1) / math.sqrt(10)) < 0.01


def test_rows_without_a_gan():
    support = torch.rand(2, 25, 784) * 2 - 1
    rows = dict(mtgan.without_a_gan(support, 30, torch.Generator().manual_seed(0)))
    assert list(rows) == ["mean image", "support repeated", "pairwise mix", "Gaussian on 8 components"]
    assert all(x.shape == (2, 30, 784) and x.abs().max() <= 1 for x in rows.values())
    assert torch.cdist(rows["support repeated"], support).amin(-1).max() < 0.1
    assert torch.allclose(rows["mean image"][0, 3], support[0].mean(0))
    assert len(dict(mtgan.without_a_gan(support[:, :1], 5, torch.Generator()))) == 4


def test_judging_samples():
    rng = torch.Generator().manual_seed(0)
    support, fresh, reference = (torch.rand(1, 40, 784, generator=rng) for _ in range(3))
    classifier = mtgan.new_classifier(3)
    judge = lambda samples: mtgan.judge_samples(samples, (None, support, fresh, reference), [0], classifier)[0]
    assert judge(support)["nearest"] < 1e-3 and abs(judge(fresh)["nearest"] - 1) < 1e-5
    assert judge(reference)["frechet"] < 1e-6 < judge(torch.zeros(1, 40, 784))["frechet"]
    labels = classifier(fresh[0]).argmax(-1)
    assert abs(judge(fresh)["recognised"] - (labels == 0).double().mean()) < 1e-9


# ----------------------------------------------------------------------------------------------------------------------
# Domains
# ----------------------------------------------------------------------------------------------------------------------

def numbered_domains(classes=8, each=40):
    """Domains in which every image carries its own number, so that an image can be recognised."""
    number = np.arange(classes * each)
    images = np.zeros((len(number), 784), np.uint8)
    images[:, 0], images[:, 1] = number // 250, number % 250
    count = torch.full((classes,), each)
    roles = {"train": [[0, 1, 2], [3, 4, 5]], "test": [[6], [7]]}
    return mtgan.Domains(torch.from_numpy(images), count.cumsum(0) - count, count, [f"d {c}" for c in range(classes)], "d", roles,
                         torch.cartesian_prod(*map(torch.tensor, roles["train"])), each)


def numbers_of(images):
    pixels = (images[..., :2] + 1) * 127.5
    return (pixels[..., 0].round() * 250 + pixels[..., 1].round()).long()


def test_support_and_query_are_disjoint_and_of_their_class():
    domains, rng = numbered_domains(), torch.Generator().manual_seed(0)
    for _ in range(20):
        pairs = mtgan.sample_pairs(domains, 4, rng)
        sources, support, query = mtgan.sample_episode(domains, pairs, 10, 30, 2, rng)
        assert len(sources) == 2 and support.shape == (4, 10, 784) and query.shape == (4, 30, 784)
        for i, (source, target) in enumerate(pairs.tolist()):
            both = torch.cat([numbers_of(support)[i], numbers_of(query)[i]])
            assert len(both.unique()) == 40 and (both // 40 == target).all()
            assert all((numbers_of(batch)[i] // 40 == source).all() and len(numbers_of(batch)[i].unique()) == 10 for batch in sources)


def test_a_small_class_never_lends_from_its_neighbour():
    domains, rng = numbered_domains(), torch.Generator().manual_seed(0)
    count = torch.tensor([40, 3, 40, 2])
    small = domains._replace(count=count, first=count.cumsum(0) - count)
    for n in (2, 10, 60):
        drawn = numbers_of(mtgan.sample_images(small, torch.arange(4), n, rng))
        for c in range(4):
            assert (drawn[c] >= small.first[c]).all() and (drawn[c] < small.first[c] + count[c]).all()
            assert len(drawn[c].unique()) == min(n, count[c])


def test_images_are_drawn_evenly():
    domains, rng = numbered_domains(), torch.Generator().manual_seed(0)
    drawn = torch.cat([numbers_of(mtgan.sample_images(domains, torch.tensor([2]), 10, rng)).flatten() for _ in range(800)]) - 80
    frequency = drawn.bincount(minlength=40)
    assert len(frequency) == 40 and frequency.min() > 130 and frequency.max() < 270


def test_a_new_domain_is_one_change_for_all_its_images():
    rng = torch.Generator().manual_seed(0)
    image = torch.from_numpy(mtgan.draw_built_in("digits", 1)["4"]) / 127.5 - 1
    same = image.expand(60, 5, 784)
    made = mtgan.new_domain(same, same, rng)
    assert made.shape == same.shape and made.min() >= -1 and made.max() <= 1
    assert (made - made[:, :1]).abs().max() < 1e-5                          # alike within a task
    assert len({tuple(task[0].mul(50).round().tolist()) for task in made}) > 40     # unlike between tasks
    mixed = mtgan.new_domain(torch.full((300, 10, 784), -1.0), torch.ones(300, 10, 784), rng)
    share = (mixed.amax(-1) > 0).double().mean(1)
    assert 0.15 < (share > 0).double().mean() < 0.45 and ((share > 0) & (share < 1)).any()


def test_a_drawn_domain_is_one_design_a_task():
    rng, pen = torch.Generator().manual_seed(0), torch.arange(40) % 2 == 0
    images = mtgan.drawn_domain(pen, 12, rng)
    assert images.shape == (40, 12, 784) and images.isfinite().all() and images.min() >= -1 and images.max() <= 1
    assert torch.equal(images, mtgan.drawn_domain(pen, 12, rng.manual_seed(0)))
    assert (images.amax(-1) > -0.6).double().mean() > 0.95                  # hardly an image is empty
    distance = torch.cdist(images.flatten(0, 1), images.flatten(0, 1)).view(40, 12, 40, 12)
    same = distance.diagonal(dim1=0, dim2=2)                                # [12, 12, 40]
    assert (same[~torch.eye(12, dtype=torch.bool)] > 1e-3).all()            # a task's images differ,
    assert same.mean() < 0.6 * distance.mean()                              # but less than those of two tasks
    square = images.view(40, 12, 28, 28)
    symmetric = (square - square.flip(-1)).abs().mean((1, 2, 3)) < 0.12     # but for light and shade
    assert 8 < symmetric.sum() < 32


def test_what_a_pen_draws_is_thin(monkeypatch):
    rng, pen = torch.Generator().manual_seed(0), torch.arange(80) % 2 == 0
    share = mtgan.thin(mtgan.drawn_domain(pen, 12, rng)).double().mean(1)
    assert share[pen].mean() > 0.25 and share[~pen].mean() < 0.1
    monkeypatch.setattr(mtgan, "SHAPES", 1)
    dark = mtgan.drawn_domain(pen, 12, rng).view(-1, 1, 28, 28) < 0
    outside = dark.clone()
    outside[..., 1:-1, 1:-1] = False
    for _ in range(60):                                                     # floods what is dark from the border
        outside = dark & (F.max_pool2d(outside.float(), 3, 1, 1) > 0)
    holes = (dark & ~outside).flatten(1).any(1).view(80, 12).double().mean(1)
    assert 0.1 < holes[pen].mean() < 0.7 and holes[~pen].mean() < 0.05      # outlines are closed, or only arcs of them


def test_strokes_are_told_from_areas():
    images = torch.full((3, 28, 28), -1.0)
    images[0, 5:9, 3:25], images[1, 5:15, 3:25] = 1, 1                      # 4 and 10 pixels wide; and nothing at all
    assert mtgan.thin(images.view(3, 784)).tolist() == [True, False, False]
    assert mtgan.thin(images.view(3, 1, 784)).shape == (3, 1)
    images[0], images[0, :4] = -1, 1
    assert not mtgan.thin(images[0].view(784))                              # it may go on beyond the border
    share = lambda name: mtgan.thin(torch.from_numpy(np.concatenate(list(mtgan.draw_built_in(name, 20).values()))) / 127.5 - 1).double().mean()
    assert share("digits") > 0.7 and share("garments") < 0.3


def test_domains_are_drawn_as_the_classes_are_that_they_replace(monkeypatch):
    asked = []
    monkeypatch.setattr(mtgan, "drawn_domain", lambda pen, n, rng: asked.append(pen) or torch.zeros(len(pen), n, 784))
    images = torch.full((3, 2, 28, 28), -1.0)
    images[0, 0, 5:9, 3:25], images[1, 0, 5:15, 3:25], images[2, 1, 5:9, 3:25] = 1, 1, 1
    mtgan.made_up_domain(images.view(3, 2, 784), images.view(3, 2, 784), torch.Generator().manual_seed(0))
    assert asked[0].tolist() == [True, False, False]


def test_a_share_of_the_made_up_domains_is_drawn(monkeypatch):
    drawn = lambda pen, n, rng: torch.full((len(pen), n, 784), 0.5)
    monkeypatch.setattr(mtgan, "drawn_domain", drawn)
    monkeypatch.setattr(mtgan, "new_domain", lambda images, other, rng: images + other)
    made = mtgan.made_up_domain(torch.zeros(2000, 2, 784), torch.ones(2000, 2, 784), torch.Generator().manual_seed(0))
    assert set(made.unique().tolist()) == {1.0, 1.5} and (made.amin((1, 2)) == made.amax((1, 2))).all()
    assert abs((made[:, 0, 0] == 1.5).double().mean() - mtgan.DRAWN) < 0.05


def test_what_is_made_up_and_what_is_only_changed(monkeypatch, narrow):
    """Drawn domains are for episodes and the end of the warm start; rates are chosen on real images."""
    domains, asked, phase = numbered_domains(), [], mtgan.new_phase(mtgan.random_start(0, torch.device("cpu")), 0, narrow)
    for name in ("made_up_domain", "new_domain"):
        monkeypatch.setattr(mtgan, name, lambda images, other, rng, name=name: asked.append((name, images.shape)) or images)
    gan = mtgan.new_phase(phase["leaves"][:-1], 0)
    mtgan.pretraining_step(gan, domains, augment=False)
    mtgan.sample_episode(domains, domains.pairs[:2], 5, 8, 0, phase["rng"])
    assert asked == []
    mtgan.pretraining_step(gan, domains, augment=True)
    mtgan.meta_step(phase, domains, narrow, [mtgan.pixels])
    assert asked == [("made_up_domain", (4, 16, 784)), ("made_up_domain", (2, 11, 784))]
    settings = types.SimpleNamespace(seed=0, tune_tasks=3, test_steps=[0], gan_rates=[1e-3], shots=5, source_steps=0)
    method = lambda lr, sources, support, n, rng, test_steps: [(0, [support[:, :1].expand(-1, n, -1)])]
    mtgan.choose_rates(method, domains, settings, mtgan.new_classifier(len(domains.names)))
    assert asked[2:] == [("new_domain", (3, 39, 784))]


def test_held_out_classes_never_reach_training(tmp_path, monkeypatch):
    drawn = set()
    sample, test = mtgan.sample_images, mtgan.meta_test
    monkeypatch.setattr(mtgan, "sample_images", lambda domains, classes, *rest: drawn.update(classes.tolist()) or sample(domains, classes, *rest))

    def stop(run, domains, *rest):
        train, held_out = (set(sum(domains.roles[role], [])) for role in ("train", "test"))
        assert drawn and drawn <= train and not drawn & held_out and len(held_out) == 3 and len(train) == 6
        raise mtgan.UserError("seen enough")

    monkeypatch.setattr(mtgan, "meta_test", stop)
    features = lambda domains, classes, *rest, augment=False: drawn.update(classes.tolist() if augment else []) or (mtgan.new_classifier(len(domains.names)), 1.0)
    monkeypatch.setattr(mtgan, "train_classifier", features)
    assert mtgan.main([*TINY, "--out", str(tmp_path)]) == 2


def test_features_never_see_held_out_classes():
    """Other pixels in every other class, and the features of the outer loss are the same to the bit."""
    domains, known = numbered_domains(), torch.tensor([0, 1, 4])
    held_out = ~torch.isin(torch.arange(8).repeat_interleave(40), known)
    other = domains._replace(images=torch.where(held_out[:, None], 255 - domains.images, domains.images))
    (first, _), (second, _), (all_classes, _) = (mtgan.train_classifier(d, c, 3, 0, augment=True) for d, c in
                                                 ((domains, known), (other, known), (other, torch.arange(8))))
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert not all(map(torch.equal, first.parameters(), all_classes.parameters()))


def test_adaptation_goes_on_with_adam(narrow, monkeypatch):
    """Up to inner_steps the samples are those of `adapt`, from there on those of training with Adam from its weights, and of
    the mean of G's weights over these steps; once they are many, the first of them fade."""
    domains, rng = numbered_domains(), torch.Generator()
    leaves = mtgan.new_phase(mtgan.random_start(0, torch.device("cpu")), 0, narrow)["leaves"]
    leaves[-1] = torch.linspace(0.01, 0.2, 24).log().view(3, 2, 4)         # every step has its own rates
    support = mtgan.sample_images(domains, torch.tensor([4, 5]), 5, rng.manual_seed(1))
    results = dict(mtgan.few_shot(leaves, 2e-4, [], support, 3, rng.manual_seed(2), [0, 1, 3, 5, 8], 3))
    assert [(steps, len(takes)) for steps, takes in results.items()] == [(0, 1), (1, 1), (3, 1), (5, 2), (8, 2)]
    assert all(samples.shape == (2, 3, 784) for takes in results.values() for samples in takes)
    rng.manual_seed(2)
    players = mtgan.players([t.detach() for t in leaves])
    for steps, (theta, phi) in enumerate(mtgan.adapt(*players, leaves[-1].detach().exp(), [support] * 3, rng, second_order=False)):
        if steps in results:
            assert torch.equal(results[steps][0], mtgan.generator(theta, mtgan.noise(2, 3, rng)))
    phase = {**mtgan.new_phase(mtgan.tensors(*([mtgan.fold(layer) for layer in layers] for layers in (theta, phi))), 0), "rng": rng}
    for adam in phase["optimizers"]:
        adam.param_groups[0]["lr"] = 2e-4
    been = [[t.detach().clone() for t in phase["leaves"]]]
    for steps, more in ((5, 2), (8, 3)):
        for _ in range(more):
            mtgan.gan_step(phase, support, mtgan.FAKES)
            been.append([t.detach().clone() for t in phase["leaves"]])
        z, mean = mtgan.noise(2, 3, rng), [torch.stack(of_all_steps).mean(0) for of_all_steps in zip(*been)]
        assert torch.equal(results[steps][0], mtgan.generator(mtgan.players(phase["leaves"])[0], z))
        assert relative(results[steps][1], mtgan.generator(mtgan.players(mean)[0], z)) < 1e-4 < relative(*results[steps])
    late = dict(mtgan.few_shot(leaves, 2e-4, [], support, 3, rng.manual_seed(2), [8], 3))         # nothing between is asked for
    assert list(late) == [8] and late[8][0].shape == (2, 3, 784) and not torch.equal(late[8][0], results[3][0])
    monkeypatch.setattr(mtgan, "AVERAGE", 0.0)              # the first ones fade at once
    (_, takes), = mtgan.few_shot(leaves, 2e-4, [], support, 3, rng.manual_seed(2), [8], 3)
    assert torch.equal(*takes) and not torch.equal(*late[8])
    early = dict(mtgan.few_shot(leaves, 2e-4, [], support, 3, rng.manual_seed(2), [0, 1], 3))     # fewer than were learned
    assert list(early) == [0, 1] and torch.equal(early[1][0], results[1][0])
    state = rng.get_state()
    dict(mtgan.few_shot(leaves, 2e-4, [], support, 3, rng.manual_seed(2), [0, 1], 1))
    assert torch.equal(state, rng.get_state())              # nor did it take steps that nobody asked for
    source = mtgan.sample_images(domains, torch.tensor([0, 1]), 5, rng.manual_seed(3))            # the first rates are for sources
    (_, [samples]), = mtgan.few_shot(leaves, 2e-4, [source], support, 3, rng.manual_seed(2), [1], 2)
    rng.manual_seed(2)
    *_, (theta, _) = mtgan.adapt(*players, leaves[-1].exp(), [source, support], rng, second_order=False)
    assert torch.equal(samples, mtgan.generator(theta, mtgan.noise(2, 3, rng)))


def test_rates_are_compared_with_the_same_random_numbers(narrow):
    """The better of two rates at every number of steps, and of G and its average; where a rate does nothing, the smallest one.
    A third is at first so much worse, averaged as well, that nobody sees how it ends."""
    domains, rates = numbered_domains(), {1e-3: (0, 1, 3, 1.2), 1e-1: (0, 1.1, 1, 3), 1.0: (0, 9, 0, 0)}
    averaged = {1e-3: (0, 1.1, 3, 1.1), 1e-1: (0, 1.2, 1.2, 1), 1.0: (0, 8, 0, 0)}
    settings = types.SimpleNamespace(seed=0, tune_tasks=2, test_steps=[0, 1, 3, 5], gan_rates=list(rates), shots=5, source_steps=0)
    classifier, draws, seen = mtgan.new_classifier(len(domains.names)), [], []

    def method(lr, sources, support, n, rng, test_steps):
        draws.append(torch.rand(4, generator=rng))
        for steps, *both in zip(test_steps, rates[lr], averaged[lr]):       # how far from the support
            seen.append((lr, steps))
            off = torch.rand(len(support), n, 784, generator=rng)
            yield steps, [support[:, :1].expand(-1, n, -1) + far * off for far in both]

    assert mtgan.choose_rates(method, domains, settings, classifier) == {0: (1e-3, False), 1: (1e-3, False), 3: (1e-1, False), 5: (1e-1, True)}
    assert (1.0, 1) in seen and (1.0, 3) not in seen and len(seen) == 10
    assert all(torch.equal(draws[0], other) for other in draws[1:])


def test_a_class_held_out_in_one_spec_is_held_out_in_all():
    domains = mtgan.load_domains(["digits"], ["digits:0-6"], 5, "", torch.device("cpu"))
    train, test = (set(sum(domains.roles[role], [])) for role in ("train", "test"))
    assert test == {5, 6, 7, 8, 9} and train == {0, 1, 2, 3, 4} and len(domains.names) == 10


def test_held_out_pairs_give_every_target_its_turn():
    domains = numbered_domains(20)._replace(roles={"train": [[0], [1]], "test": [list(range(10)), list(range(10, 20))]})
    pairs = mtgan.held_out_pairs(domains, 0)
    assert pairs.shape == (6, 2) and len(set(pairs[:, 1].tolist())) == 6 and set(pairs[:, 1].tolist()) <= set(range(10, 20))
    few = mtgan.held_out_pairs(domains._replace(roles={"test": [[0, 1, 2], [3, 4]]}), 0)
    assert few.tolist() == [[0, 3], [1, 3], [2, 3], [0, 4], [1, 4], [2, 4]]
    assert torch.equal(pairs, mtgan.held_out_pairs(domains, 0)) and not torch.equal(pairs, mtgan.held_out_pairs(domains, 1))


@pytest.mark.parametrize("name", ["digits", "garments"])
def test_built_ins_take_more_than_one_image_a_class_to_tell(name):
    classes = mtgan.draw_built_in(name, 60)
    assert len(classes) == 10 and all(images.shape == (60, 784) and images.dtype == np.uint8 for images in classes.values())
    x, y = torch.from_numpy(np.concatenate(list(classes.values()))).float(), torch.arange(10).repeat_interleave(60)
    accuracy = {}
    for shots in (1, 30):
        known = torch.cat([torch.where(y == c)[0][:shots] for c in range(10)])
        rest = torch.cat([torch.where(y == c)[0][30:] for c in range(10)])
        accuracy[shots] = (y[known][torch.cdist(x[rest], x[known]).argmin(1)] == y[rest]).double().mean()
    assert accuracy[1] < 0.8 and accuracy[30] > accuracy[1] + 0.1 and accuracy[30] > 0.6
    assert all(np.array_equal(images, again) for images, again in zip(classes.values(), mtgan.draw_built_in(name, 60).values()))


def test_class_lists():
    name, classes = mtgan.load_dataset("digits:7,0-2", "")
    assert name == "digits" and list(classes) == ["0", "1", "2", "7"]


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape) + array.astype(np.uint8).tobytes())


def write_mnist(root, each=12, classes=10):
    rng = np.random.default_rng(0)
    labels = np.arange(classes).repeat(each)
    images = rng.integers(0, 256, (len(labels), 28, 28))
    images[:, 0, 1] = labels
    for part in ("train", "t10k"):
        write_idx(root / "MNIST" / "raw" / f"{part}-images-idx3-ubyte", images)
        write_idx(root / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte", labels)


def test_torchvision_datasets_are_read(tmp_path):
    write_mnist(tmp_path)
    name, classes = mtgan.load_dataset("mnist:0-6,9", tmp_path)
    assert name == "mnist" and list(classes) == ["0", "1", "2", "3", "4", "5", "6", "9"]
    assert all(images.shape == (24, 784) and (images[:, 1] == int(label)).all() for label, images in classes.items())
    for part in ("train", "test"):
        write_idx(tmp_path / "EMNIST" / "raw" / f"emnist-balanced-{part}-images-idx3-ubyte", np.arange(784).reshape(1, 28, 28) % 256)
        write_idx(tmp_path / "EMNIST" / "raw" / f"emnist-balanced-{part}-labels-idx1-ubyte", np.array([46]))
    _, classes = mtgan.load_dataset("emnist", tmp_path)
    assert len(classes) == 47 and classes["t"].reshape(-1, 28, 28)[0, 3, 0] == 3       # turned upright


def test_datasets_of_other_shapes(monkeypatch):
    """QMNIST's labels have eight columns, USPS's images 16 × 16 pixels and no names."""
    part = lambda images, targets: lambda root, train: type("Part", (), {"data": images, "targets": targets})()
    monkeypatch.setattr(mtgan.torchvision.datasets, "QMNIST", part(torch.full((20, 28, 28), 9), torch.arange(20)[:, None].repeat(1, 8) // 2))
    _, classes = mtgan.load_dataset("qmnist", "")
    assert len(classes) == 10 and all(images.shape == (4, 784) for images in classes.values())
    monkeypatch.setattr(mtgan.torchvision.datasets, "USPS", part(np.full((20, 16, 16), 7, np.uint8), [c // 2 for c in range(20)]))
    _, classes = mtgan.load_dataset("usps:3", "")
    assert list(classes) == ["3"] and classes["3"].shape == (4, 784) and (classes["3"] == 7).all()


def test_image_folders(tmp_path):
    stroke = np.zeros((40, 20), np.uint8)
    stroke[10:30, 8:12] = 255
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    dark = Image.fromarray(stroke)
    dark.save(tmp_path / "a" / "dark.png")
    Image.fromarray(255 - stroke).convert("RGB").save(tmp_path / "a" / "deep" / "light.jpg", quality=95)
    Image.fromarray(255 - stroke).convert("1").save(tmp_path / "a" / "bit.png")
    Image.fromarray(255 - stroke).convert("P").save(tmp_path / "b" / "palette.gif")
    Image.merge("LA", (Image.new("L", dark.size, 0), dark)).save(tmp_path / "b" / "black-on-clear.png")
    Image.merge("RGBA", (*[Image.new("L", dark.size, 255)] * 3, dark)).save(tmp_path / "b" / "white-on-clear.png")
    Image.fromarray(stroke.astype(np.uint16) * 256).save(tmp_path / "b" / "sixteen.png")
    Image.fromarray(np.asarray(dark.rotate(90, expand=True))).save(tmp_path / "turned.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0", quality=95)
    (tmp_path / "b" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    name, classes = mtgan.load_dataset(str(tmp_path), "")
    assert {label: len(images) for label, images in classes.items()} == {"a": 3, "b": 4, "(loose)": 1}
    assert mtgan.load_dataset(f"{tmp_path}/a/..", "")[0] == name                   # however a folder is spelled
    for image in np.concatenate(list(classes.values())).reshape(-1, 28, 28).astype(int):
        assert image[14, 14] > 200 and image[14, 2] < 40 and image[1, 14] < 40 and image[9, 14] > 128 and image[14, 9] < 60
    assert list(mtgan.load_dataset(f"{tmp_path}:1", "")[1]) == ["b"]
    for odd, size in enumerate([(1, 1), (1, 30000), (300, 200)]):
        Image.new("CMYK", size).save(tmp_path / f"odd{odd}.tif")
    assert len(mtgan.load_dataset(str(tmp_path), "")[1]["(loose)"]) == 3          # too thin to shrink: skipped
    values = stroke.astype(np.float32) / 100 - 1
    values[0, 0], values[0, 1], values[20, 10] = -math.inf, math.nan, math.inf         # as dark and as bright as the others
    Image.fromarray(values).save(tmp_path / "float.tif")
    assert np.array_equal(mtgan.read_image(tmp_path / "float.tif"), mtgan.read_image(tmp_path / "a" / "dark.png"))


def test_skipped_images_are_counted(tmp_path, capsys):
    Image.new("L", (9, 9)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    chunk = b"eXIfMM\0*"                          # too short for what it begins, which is none of Pillow's own errors
    good = (tmp_path / "good.png").read_bytes()
    (tmp_path / "short.png").write_bytes(good[:33] + b"\0\0\0\4" + chunk + zlib.crc32(chunk).to_bytes(4, "big") + good[33:])
    with pytest.raises(struct.error):
        mtgan.read_image(tmp_path / "short.png")
    assert len(mtgan.load_dataset(str(tmp_path), "")[1]["(loose)"]) == 1
    assert "skipped 2 unreadable image" in capsys.readouterr().err


def test_two_classes_of_one_name(tmp_path, monkeypatch):
    """A folder may be called like a built-in, as long as its classes are not."""
    monkeypatch.chdir(tmp_path)
    for label in "0abc":
        (tmp_path / "digits" / label).mkdir(parents=True)
        for i in range(9):
            Image.fromarray(np.random.default_rng(ord(label) + i).integers(0, 99, (28, 28), np.uint8)).save(tmp_path / "digits" / label / f"{i}.png")
    with pytest.raises(mtgan.UserError, match="'digits 0' would be the name of two different classes"):
        mtgan.load_domains(["digits"], ["./digits"], 5, "", torch.device("cpu"))
    assert len(mtgan.load_domains(["digits:1-9"], ["./digits"], 5, "", torch.device("cpu")).names) == 13


def test_without_network_the_stand_in_says_so(tmp_path, monkeypatch, capsys):
    def unreachable(root, train, download=False):
        raise OSError("timed out") if download else RuntimeError("Dataset not found. You can use download=True to download it")

    monkeypatch.setattr(mtgan.torchvision.datasets, "MNIST", unreachable)
    name, classes = mtgan.load_dataset("mnist:0-3", tmp_path)
    assert name == "digits (stand-in for mnist)" and len(classes) == 4
    domains = mtgan.load_domains(["mnist:0-5"], ["digits"], 5, tmp_path, torch.device("cpu"))       # the same drawings: the same classes
    assert len(domains.names) == 10 and not set(sum(domains.roles["train"], [])) & set(sum(domains.roles["test"], []))
    assert "WARNING" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# The whole program
# ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished dry run."""
    out = tmp_path_factory.mktemp("finished")
    assert mtgan.main([*TINY, "--out", str(out)]) == 0
    return out


def test_dry_run_writes_everything(finished):
    assert sorted(p.name for p in finished.iterdir()) == ["adaptation.png", "checkpoint.pt", "log.csv", "report.json", "samples.png"]
    report = json.loads((finished / "report.json").read_text())
    assert report["settings"]["shots"] == 10 and report["domains"] == "digits and garments" and 0.5 < report["classifier_accuracy"] <= 1
    assert report["held_out_pairs"] == [["digits 4", "garments pullover"], ["digits 5", "garments pullover"]]
    methods = {result["method"] for result in report["results"]}
    assert methods == {"real images", "mean image", "support repeated", "pairwise mix", "Gaussian on 8 components", "MT-GAN", "from scratch", "transfer"}
    for method in ("MT-GAN", "from scratch", "transfer"):
        rows = [r for r in report["results"] if r["method"] == method]
        assert sorted(r["steps"] for r in rows) == [0, 0, 1, 1, 2, 2, 5, 5]
    assert set(report["results"][0]) == {"method", "seed", "source", "target", "steps", "frechet", "nearest", "recognised"}
    assert all(math.isfinite(r["frechet"]) and 0 <= r["recognised"] <= 1 for r in report["results"])
    assert set(report["learning_rates"]) == {"MT-GAN", "from scratch", "transfer"}
    lines = (finished / "log.csv").read_text().splitlines()
    assert lines[0].startswith("step,loss,mean_rate_G0") and lines[1].startswith("3,") and lines[1].endswith("digits and garments")
    for name in ("adaptation.png", "samples.png"):
        pixels = np.asarray(Image.open(finished / name))
        assert min(pixels.shape) >= 100 and pixels.std() > 20


def test_outer_learning_rates_fall_in_the_second_half(finished):
    optimizers = torch.load(finished / "checkpoint.pt", weights_only=True)["phases"]["meta-training"]["optimizers"]
    rates = [group["lr"].item() for optimizer in optimizers for group in optimizer["param_groups"]]
    assert rates == pytest.approx([5e-4 * 2 / 3, 5e-4 * 2 / 3, 6.25e-3 * 2 / 3])           # the third of 3 steps


def test_tables_of_several_runs(finished, tmp_path, capsys):
    """Twice the numbers give the same means and narrower intervals; what was tested differently is not mixed."""
    other = tmp_path / "other"
    other.mkdir()
    report = json.loads((finished / "report.json").read_text())
    (other / "report.json").write_text(json.dumps(report))
    assert mtgan.main(["--tables", str(finished), str(other)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("digits and garments, 10 shots, held out garments") and table[0].endswith(f"n = {2 * len(report['held_out_pairs'])}")
    [row] = [line for line in table[:12] if line.startswith("mean image")]
    values = [r["frechet"] for r in report["results"] if r["method"] == "mean image"]
    assert row.split()[2:] == "{:.0f} ± {:.0f}".format(*mtgan.interval(2 * values)).split()
    report["settings"]["test_steps"] = [0, 7]
    (other / "report.json").write_text(json.dumps(report))
    assert "tested differently" in refused(capsys, "--tables", finished, other)
    report["settings"] = {**json.loads((finished / "report.json").read_text())["settings"], "seed": 9, "algorithm": "reptile"}
    (other / "report.json").write_text(json.dumps(report))
    assert "differ in algorithm (both, reptile)" in refused(capsys, "--tables", finished, other)
    for damaged in ("[1, 2", json.dumps({**report, "results": [3]}), json.dumps({**report, "settings": 3}), json.dumps({**report, "results": [{"method": "MT-GAN", "steps": 0}]})):
        (other / "report.json").write_text(damaged)
        assert "no readable report.json" in refused(capsys, "--tables", other)


def test_a_report_is_written_before_it_is_printed(finished, tmp_path, capsys, monkeypatch):
    (tmp_path / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes())
    monkeypatch.setattr(mtgan, "print_tables", lambda *_: os.write(os.open(os.devnull, os.O_RDONLY), b"a closed pipe"))
    assert "Bad file descriptor" in refused(capsys, *TINY, "--out", tmp_path, "--resume")
    assert json.loads((tmp_path / "report.json").read_text())["results"] and (tmp_path / "samples.png").exists()


def test_a_seed_determines_everything(finished, tmp_path):
    assert mtgan.main([*TINY, "--out", str(tmp_path)]) == 0
    one, two = (json.loads((folder / "report.json").read_text())["results"] for folder in (finished, tmp_path))
    assert one == two
    assert mtgan.main([*TINY, "--out", str(tmp_path), "--overwrite", "--seed", "1"]) == 0
    assert one != json.loads((tmp_path / "report.json").read_text())["results"]


def parameters(folder):
    run = torch.load(folder / "checkpoint.pt", weights_only=True)
    return [t for phase in run["phases"].values() for t in phase["leaves"] + phase["average"]]


TRAIN_ONLY = "import sys, mtgan; mtgan.meta_test = lambda *a: sys.exit(7); sys.exit(mtgan.main(sys.argv[1:]))"


def start(folder, *more):
    command = [sys.executable, "-c", TRAIN_ONLY, *TINY, "--save-seconds", "0", "--out", str(folder), *more]
    return subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_and_resumed_is_bit_identical(finished, tmp_path):
    """Interrupt once, kill three times at whatever moment; what comes out has the bits of the run that nobody touched."""
    for attempt, (signal_sent, wait) in enumerate(((signal.SIGINT, 0.2), (signal.SIGKILL, 0.7), (signal.SIGKILL, 0.4), (signal.SIGKILL, 1.1))):
        before = (tmp_path / "checkpoint.pt").stat().st_mtime_ns if attempt else 0
        process = start(tmp_path, *["--resume"] * (attempt > 0))
        while process.poll() is None and not ((tmp_path / "checkpoint.pt").exists() and (tmp_path / "checkpoint.pt").stat().st_mtime_ns > before):
            time.sleep(0.02)
        time.sleep(wait)
        process.send_signal(signal_sent)
        _, err = process.communicate()
        if signal_sent == signal.SIGINT:
            assert process.returncode == 130 and "--resume" in err, err
        torch.load(tmp_path / "checkpoint.pt", weights_only=True)                   # whole at any moment
    process = start(tmp_path, "--resume")
    _, err = process.communicate()
    assert process.returncode == 7, err
    assert all(torch.equal(a, b) for a, b in zip(parameters(tmp_path), parameters(finished), strict=True))
    assert [line.split(",")[0] for line in (tmp_path / "log.csv").read_text().splitlines()] == ["step", "3"]


def test_deploying_to_a_folder(finished, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    for i, image in enumerate(np.concatenate(list(mtgan.draw_built_in("garments", 1).values()))):
        Image.fromarray(image.reshape(28, 28)).save(tmp_path / "mine" / f"{i}.png")
    command = ["--adapt", str(finished), "--target", str(tmp_path / "mine"), "--shots", "4", "--samples", "5", "--steps", "3"]
    assert mtgan.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [*[f"sample-{i:03}.png" for i in range(5)], "samples.png"]
    assert Image.open(tmp_path / "out" / "sample-004.png").size == (28, 28) and np.asarray(Image.open(tmp_path / "out" / "samples.png")).std() > 5
    assert mtgan.main([*command, "--out", str(tmp_path / "out")]) == 2 and "--overwrite" in capsys.readouterr().err
    assert mtgan.main([*command, "--out", str(tmp_path / "out"), "--overwrite", "--samples", "2"]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["sample-000.png", "sample-001.png", "samples.png"]
    assert mtgan.main([*command, "--out", str(finished), "--overwrite"]) == 2 and "holds a run" in capsys.readouterr().err
    assert mtgan.main([*command, "--out", str(tmp_path / "new"), "--shots", "11"]) == 2 and "has 10 image(s)" in capsys.readouterr().err
    assert mtgan.main(["--adapt", str(finished / "checkpoint.pt"), "--target", "garments:8", "--samples", "1", "--out", str(tmp_path / "built-in")]) == 0


def test_deployment_draws_from_the_average(finished, tmp_path, monkeypatch):
    """Of G as it is and its average, the latter; after learned steps alone, of G, as there is nothing else."""
    for takes, grey in (([-1.0, 1.0], 255), ([-1.0], 0)):
        monkeypatch.setattr(mtgan, "few_shot", lambda *_: iter([(3, [torch.full((1, 2, 784), value) for value in takes])]))
        assert mtgan.main(["--adapt", str(finished), "--target", "garments:8", "--samples", "2", "--out", str(tmp_path / f"{grey}")]) == 0
        assert (np.asarray(Image.open(tmp_path / f"{grey}" / "sample-001.png")) == grey).all()


def refused(capsys, *arguments):
    """Run, and return the one line that says what was wrong."""
    assert mtgan.main([str(a) for a in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mtgan.py: error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("arguments, message", [
    (["--shots", "0"], "--shots: 0 is not a whole number from 1 to 1000"),
    (["--shots", "2.5"], "--shots: 2.5 is not a whole number"),
    (["--inner-lr", "nan"], "--inner-lr: nan is not a number from"),
    (["--meta-steps", "-3"], "--meta-steps"),
    (["--algorithm", "magic"], "invalid choice: 'magic'"),
    (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    (["--resume", "--overwrite"], "exclude each other"),
    (["--device", "warp-drive"], "device 'warp-drive' cannot be used here"),
    (["--source", "nowhere"], "unknown domain 'nowhere'"),
    (["--source", "digits:x"], "unknown domain 'digits:x'"),
    (["--source", "digits:3-12"], "has the classes 0 to 9"),
    (["--source", "digits:5-3"], "has the classes 0 to 9"),
    (["--source", "digits:0-6,99"], "has the classes 0 to 9"),
    (["--source", "digits:" + 40 * "1" + "x"], "unknown domain"),
    (["--device", "meta"], "device 'meta' cannot be used here"),
    (["--source", "digits:0", "--target", "digits:0"], "no pair of two different classes"),
    (["--shots", "9999"], "--shots"),
    (["--adapt", "nowhere", "--target", "digits"], "there is no checkpoint at nowhere"),
    (["--adapt", "x", "--target", "digits", "garments"], "one --target"),
    (["--out", "x" * 300], "File name too long"),
    (["--adapt", "x" * 300], "File name too long"),
])
def test_bad_settings_are_one_line(arguments, message, tmp_path, capsys):
    assert message in refused(capsys, *TINY, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_triton_that_cannot_be_had_is_one_line(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "mtgan.py", *TINY, "--kernel", "triton", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("mtgan.py: error: --kernel triton: ") and result.stderr.count("\n") == 1


def test_more_shots_than_images(tmp_path, capsys):
    write_mnist(tmp_path)
    line = refused(capsys, "--source", "mnist", "--target", "digits", "--data-dir", tmp_path, "--shots", "21", "--out", tmp_path / "out")
    assert "--shots 21, but 'mnist 0' has 24 image(s), and 4 more than the shots are needed" in line


def test_an_empty_class(tmp_path, capsys):
    write_mnist(tmp_path, classes=6)
    assert "'mnist 6' has 0 image(s)" in refused(capsys, "--source", "mnist", "--target", "digits", "--data-dir", tmp_path, "--shots", "5", "--out", tmp_path / "o")


@pytest.mark.parametrize("damage", [lambda data: data[:5000], lambda data: b"", lambda data: b"\0\0\7" + data[3:], lambda data: data[:4] + b"\0\0\0\1" + data[8:]])
def test_corrupt_idx(damage, tmp_path, capsys):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    assert "the files of 'mnist' in" in refused(capsys, "--source", "mnist", "--target", "digits", "--data-dir", tmp_path, "--out", tmp_path / "o")


def test_a_folder_without_a_readable_image(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "broken.png").write_bytes(b"nothing")
    assert "no readable image in" in refused(capsys, *TINY, "--target", tmp_path / "mine", "--out", tmp_path / "out")


class Trap:
    def __reduce__(self):
        return os.system, ("touch sprung",)


def test_a_checkpoint_that_is_none(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, path = (finished / "checkpoint.pt").read_bytes(), tmp_path / "checkpoint.pt"
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 255

    def altered(*keys, value):
        run = part = torch.load(finished / "checkpoint.pt", weights_only=True)
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        return run

    meta = ("phases", "meta-training")
    everywhere = [b"", b"nonsense", good[:len(good) // 2], bytes(flipped), pickle.dumps(Trap(), 2), {"settings": Trap()}, {"weights": torch.zeros(3)},
                  altered("phases", value=3), altered("source images", value=torch.zeros(3)), altered("source images", value=torch.zeros(2, 10, 784)), altered("classifier", value={}),
                  altered(*meta, "average", value=[]), altered(*meta, "average", 2, value=torch.full((512, 256), math.nan))]
    on_resume = [altered(*meta, "leaves", value=[torch.zeros(2)] * 17), altered(*meta, "step", value="abc"), altered(*meta, "rng", value=torch.zeros(9)),
                 *(altered(*meta, "optimizers", i, "state", 0, name, value=torch.zeros(2)) for i, name in ((0, "momentum"), (1, "exp_avg")))]
    for i, content in enumerate(everywhere + on_resume):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        kept = path.read_bytes()
        for arguments in (["--adapt", path, "--target", "digits"], [*TINY, "--out", tmp_path, "--resume"])[i >= len(everywhere):]:
            assert "is not a checkpoint of this version of MT-GAN, or is damaged" in refused(capsys, *arguments)
        assert path.read_bytes() == kept
    assert not (tmp_path / "sprung").exists()


def test_a_finished_run_is_not_overwritten(finished, capsys):
    kept = {p.name: p.read_bytes() for p in finished.iterdir()}
    assert "holds a run already" in refused(capsys, *TINY, "--out", finished)
    assert "was begun with inner_steps = 10, not 4" in refused(capsys, *TINY, "--out", finished, "--resume", "--inner-steps", "4")
    assert kept == {p.name: p.read_bytes() for p in finished.iterdir()}


def test_resume_without_a_run(tmp_path, capsys):
    assert "there is no checkpoint" in refused(capsys, *TINY, "--out", tmp_path, "--resume")


def test_an_unwritable_out(tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    assert "cannot write" in refused(capsys, *TINY, "--out", tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_full_disk(finished, tmp_path, capsys, monkeypatch):
    (tmp_path / "checkpoint.pt").write_bytes(b"earlier")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    line = refused(capsys, *TINY, "--out", tmp_path, "--overwrite")
    assert "No space left on device" in line
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"] and (tmp_path / "checkpoint.pt").read_bytes() == b"earlier"


def test_non_finite_updates_are_skipped_and_stop_the_run(tmp_path, capsys, monkeypatch):
    calls, right = [], mtgan.meta_gradient

    def sometimes_nan(leaves, *rest):
        loss, gradients = right(leaves, *rest)
        calls.append([t.detach().clone() for t in leaves])
        return loss, [g * math.nan if len(calls) == 2 else g for g in gradients]

    monkeypatch.setattr(mtgan, "meta_gradient", sometimes_nan)
    monkeypatch.setattr(mtgan, "meta_test", lambda *a: (_ for _ in ()).throw(mtgan.UserError("enough")))
    refused(capsys, *TINY, "--out", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(calls[1], calls[2])) and not torch.equal(calls[0][0], calls[1][0])
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["phases"]["meta-training"]["skipped"] == 1
    phase = mtgan.new_phase(calls[0][:16], 0)
    with pytest.raises(mtgan.UserError, match="20 updates in a row were not finite; try a smaller --inner-lr"):
        mtgan.run_phase({"phases": {"meta-training": phase}, "log": [], "title": "", "settings": {"save_seconds": 9}}, "meta-training", 99, lambda phase: (False, {}), print)
    assert phase["skipped"] == 20


def test_importing_does_no_work(tmp_path):
    code = "import mtgan, os, torch; assert os.listdir() == [], os.listdir(); print(torch.initial_seed())"
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment).returncode == 0


# ----------------------------------------------------------------------------------------------------------------------
# kernels.py
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("tasks", [None, "shared", "own"])
def test_fused_linear(slope, tasks):
    x, addend = torch.randn(3, 5, 4).double(), torch.randn(3, 5, 6).double()
    weight, bias = torch.randn(3, 6, 4).double(), torch.randn(3, 6).double()
    if tasks != "own":
        weight, bias = weight[0], bias[0]
    if tasks is None:
        x, addend = x[0], addend[0]
    inputs = [t.requires_grad_() for t in (x, weight, bias, addend)]
    function = lambda x, weight, bias, addend: kernels.fused_linear(x, weight, bias, slope, addend=addend)
    expected = x @ weight.mT + bias.unsqueeze(-2) + addend
    assert torch.allclose(function(*inputs), torch.where(expected > 0, expected, slope * expected))
    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

@pytest.fixture
def poisoned(monkeypatch):
    """Output memory starts as nan, so an unwritten element shows; nan behind it must still be there at the end."""
    behind, original = [], torch.Tensor.new_empty

    def new_empty(tensor, *shape, **options):
        if options or not all(isinstance(side, int) for side in shape):
            return original(tensor, *shape, **options)       # PyTorch's own use of it
        size = torch.Size(shape).numel()
        memory = tensor.new_full((size + 64 * shape[-1] + 64,), float("nan"))    # a tile has at most 64 rows
        behind.append(memory[size:])
        return memory[:size].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    assert all(memory.isnan().all() for memory in behind), "the kernel wrote beyond its output"


def on_triton(test):
    """Marks a test that runs the kernel."""
    skip = pytest.mark.skipif(bool(kernels.why_not_triton(DEVICE)), reason="triton cannot run here")
    return skip(pytest.mark.usefixtures("poisoned")(test))


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def operands(T, B, N, K, addend=True, dtype=torch.float64):
    """x, W, b, addend, g with no pre-activation so close to 0 that rounding decides its sign."""
    while True:
        x, weight, bias = draw(T, B, K, dtype=dtype), draw(T, N, K, dtype=dtype), draw(T, N, dtype=dtype)
        c, g = draw(T, B, N, dtype=dtype) if addend else None, draw(T, B, N, dtype=dtype)
        z = fused_linear(x.double(), weight.double(), bias.double(), 1, addend=c.double() if addend else None)
        if z.abs().min() > 1e-4 / z.numel() ** 0.5:
            return x, weight, bias, c, g


def close(actual, expected, tolerance=1e-5):
    expected = expected.to(actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def leaf(tensor):
    """The same values and strides, requiring a gradient."""
    return None if tensor is None else tensor.detach().requires_grad_()


def all_gradients(inputs, g, slope, backend, seed=0):
    """y, all first gradients, and the gradient of each of them with respect to every input and to g."""
    x, weight, bias, addend = inputs = [leaf(value) for value in inputs]
    g = leaf(g)
    inputs = [value for value in inputs if value is not None]
    y = fused_linear(x, weight, bias, slope, addend=addend, backend=backend)
    first = torch.autograd.grad(y, inputs, g, create_graph=True)
    generator = torch.Generator().manual_seed(seed)
    second = []
    for value in first:
        u = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        second += torch.autograd.grad(value, inputs + [g], u, retain_graph=True, materialize_grads=True)
    return [y, *first, *second]


def compare(inputs, g, slope, tolerance=1e-5):
    double = lambda value: None if value is None else value.double()
    expected = all_gradients([double(value) for value in inputs], double(g), slope, "torch")
    actual = all_gradients(inputs, g, slope, "triton")
    assert len(actual) == len(expected)
    for left, right in zip(actual, expected):
        close(left, right, tolerance)


# T, B, N, K: none but 1 and 784 divides into tiles, and (3, 257, 784, 7) is large enough for the large tile
SIZES = [(1, 1, 784, 7), (3, 7, 33, 100), (1, 33, 100, 257), (3, 100, 1, 33), (1, 7, 257, 784), (3, 1, 7, 1)]


@on_triton
@pytest.mark.parametrize("size, slope, addend", [
    (size, slope, addend) for i, size in enumerate(SIZES)
    for slope, addend in [((0, 0.2, 1)[i % 3], i % 2 == 0), ((0.2, 1, 0)[i % 3], i % 2 == 1)][:1 + (i != 4)]])
def test_all_gradients_match_float64(size, slope, addend):
    torch.manual_seed(0)
    *inputs, g = operands(*size, addend=addend, dtype=torch.float32)
    compare(inputs, g, slope)


@on_triton
def test_large_tile_and_slope_beyond_one():
    torch.manual_seed(1)
    assert kernels.choose_tile(3, 257, 784, torch.float32) == kernels.TILES["ieee"][-1]
    x, weight, bias, c, _ = operands(3, 257, 784, 7, dtype=torch.float32)
    y = fused_linear(x, weight, bias, 1.5, addend=c, backend="triton")
    close(y, fused_linear(*(v.double() for v in (x, weight, bias)), 1.5, addend=c.double(), backend="torch"))
    *inputs, g = operands(2, 5, 9, 4)
    compare(inputs, g, 1.5, 1e-12)


def layouts():
    """Ways to lay out a tensor [T, R, C], with nan in the memory around it."""
    def sliced(tensor):
        around = tensor.new_full((tensor.shape[0] + 2, tensor.shape[1] + 3, 2 * tensor.shape[2] + 40), float("nan"))
        around[1:-1, 1:-2, 1:2 * tensor.shape[2]:2] = tensor
        return around[1:-1, 1:-2, 1:2 * tensor.shape[2]:2]

    return {"sliced": sliced,
            "transposed": lambda tensor: sliced(tensor.mT).mT,
            "tasks last": lambda tensor: sliced(tensor.movedim(0, -1)).movedim(-1, 0),
            "same for all tasks": lambda tensor: tensor[:1].expand_as(tensor),
            "same for all rows": lambda tensor: tensor[:, :1].expand_as(tensor),
            "same for all columns": lambda tensor: tensor[:, :, :1].expand_as(tensor)}


@on_triton
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("slope, addend", [(0.2, True), (0.2, False), (1, True)])
def test_strides_of_inputs_and_incoming_gradients(layout, slope, addend):
    torch.manual_seed(2)
    lay = layouts()[layout]
    x, weight, bias, c, g = operands(3, 7, 11, 35)
    row = lay(bias[:, None])[:, 0]                   # a bias has no rows: stride 0 there, whatever the layout
    compare([lay(x), lay(weight), row, lay(c) if addend else None], lay(g), slope, 1e-10)


@on_triton
def test_double_precision_slope_is_not_rounded():
    torch.manual_seed(3)
    *inputs, g = operands(2, 5, 6, 7)
    compare(inputs, g, 0.2, 1e-13)                   # 0.2 as a float32 would be wrong by 1.5e-8


CASES = {"2-D": ((3, 4), (2, 4), (2,), (3, 2)), "all shared": ((2, 3, 4), (2, 4), (2,), (2, 3, 2)),
         "per task": ((2, 3, 4), (2, 2, 4), (2, 2), (2, 3, 2)),
         "bias per task": ((2, 3, 4), (2, 4), (2, 2), (2, 3, 2)),
         "bias shared": ((2, 3, 4), (2, 2, 4), (2,), (2, 3, 2)), "no bias": ((2, 3, 4), (2, 2, 4), None, (2, 3, 2))}


@on_triton
@pytest.mark.parametrize("case, slope, addend", [
    *itertools.product(("2-D", "all shared", "per task"), (0, 0.2, 1), (False, True)),
    ("no bias", 0.2, True), ("bias per task", 0.2, False), ("bias shared", 0, True)])
def test_gradcheck(case, slope, addend):
    torch.manual_seed(4)
    shapes = CASES[case] if addend else CASES[case][:3] + (None,)
    inputs = [None if shape is None else draw(*shape).requires_grad_() for shape in shapes]

    def layer(x, weight, bias, c):
        return fused_linear(x, weight, bias, slope, addend=c, backend="triton")

    close(layer(*inputs), fused_linear(*inputs[:3], slope, addend=inputs[3], backend="torch"), 1e-12)
    torch.autograd.gradcheck(layer, inputs, fast_mode=True)
    torch.autograd.gradgradcheck(layer, inputs, fast_mode=True)


@on_triton
def test_full_gradgradcheck():
    torch.manual_seed(5)
    inputs = [draw(*shape).requires_grad_() for shape in ((1, 1, 2), (1, 2, 2), (1, 2), (1, 1, 2))]
    layer = lambda x, weight, bias, c: fused_linear(x, weight, bias, 0.2, addend=c, backend="triton")
    torch.autograd.gradcheck(layer, inputs)
    torch.autograd.gradgradcheck(layer, inputs)


@on_triton
@pytest.mark.parametrize("addend", [True, False])
def test_third_derivative(addend):
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(6)
        x, weight, bias, c, _ = inputs = [leaf(value) for value in operands(2, 3, 4, 5, addend)]
        value = fused_linear(x, weight, bias, 0.2, addend=c, backend=backend).sin().sum()
        for _ in range(3):
            gradients = torch.autograd.grad(value, [v for v in inputs[:4] if v is not None], create_graph=True)
            value = sum(gradient.square().sum() for gradient in gradients)
        results.append(gradients)
    for left, right in zip(*results):
        close(right, left, 1e-11)


def test_bmm_gradients_have_the_layout_of_their_matrix():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 4, generator=rng).double(), torch.randn(2, 4, 5, generator=rng).double()
    for left in (a, a.mT.contiguous().mT):
        for right in (b, b.mT.contiguous().mT):
            left, right = left.detach().requires_grad_(), right.detach().requires_grad_()
            assert torch.equal(kernels.bmm(left, right), a @ b)
            gradients = torch.autograd.grad(kernels.bmm(left, right).sin().sum(), [left, right])
            assert [g.stride() for g in gradients] == [left.stride(), right.stride()]
            assert torch.autograd.gradcheck(kernels.bmm, (left, right)) and torch.autograd.gradgradcheck(kernels.bmm, (left, right))
    assert torch.equal(torch.func.vmap(kernels.bmm)(a.expand(3, 2, 3, 4), b.expand(3, 2, 4, 5))[1], a @ b)


@on_triton
def test_probe_gradient_is_the_preactivation_gradient():
    torch.manual_seed(7)
    x, weight, bias, _, g = operands(2, 3, 4, 5, addend=False)
    probe = torch.zeros(2, 3, 4, dtype=x.dtype, device=DEVICE, requires_grad=True)
    y = fused_linear(x, weight, bias, 0.2, addend=probe, backend="triton")
    delta, = torch.autograd.grad(y, probe, g)
    close(delta, torch.where(x @ weight.mT + bias[:, None] > 0, g, 0.2 * g), 1e-12)


@on_triton
def test_no_launch_is_wasted(monkeypatch):
    calls = []
    launch = kernels.product

    def counted(a, *rest, **options):
        calls.append(tuple(a.shape))
        return launch(a, *rest, **options)

    monkeypatch.setattr(kernels, "product", counted)
    inputs = kernels.draw_operands(2, 3, 4, 5, DEVICE)
    layer = lambda x, weight, bias: fused_linear(x, weight, bias, backend="triton")
    for products in (1, 3, 7):
        calls.clear()
        kernels.run_level(layer, inputs, products)
        assert len(calls) == products
    calls.clear()                                    # shared weights: two tasks are one batch, throughout
    x, weight, bias = leaf(draw(2, 3, 5)), leaf(draw(4, 5)), leaf(draw(4))
    torch.autograd.grad(layer(x, weight, bias).sum(), (x, weight, bias))
    assert calls == [(1, 6, 5), (1, 6, 4), (1, 4, 6)]
    calls.clear()
    torch.autograd.grad(layer(x, weight.detach(), bias.detach()).sum(), x)
    assert len(calls) == 2                           # no gradient of W or b


class Net(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        self.first, self.second = torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)

    def forward(self, x):
        h = fused_linear(x, self.first.weight, self.first.bias, 0.2, backend=self.backend)
        return fused_linear(h, self.second.weight, self.second.bias, 1, addend=h[..., :3], backend=self.backend)


def func_results(backend):
    """What torch.func makes of a small network: a dictionary of trees of tensors."""
    from torch.func import functional_call, grad, jacrev, vmap
    torch.manual_seed(8)
    net = Net(backend).double().to(DEVICE)
    parameters = {name: value.detach() for name, value in net.named_parameters()}
    x = draw(3, 2, 5)                                                                     # [T, B, K]
    loss = lambda parameters, x: functional_call(net, parameters, (x,)).sin().mean()

    def stepped(parameters, x):                      # the loss after one gradient step: a grad of a grad
        gradient = grad(loss)(parameters, x)
        return loss({name: value - 0.5 * gradient[name] for name, value in parameters.items()}, x)

    per_task = {name: value + 0.1 * draw(3, *value.shape) for name, value in parameters.items()}
    total = lambda function: lambda parameters: vmap(function, in_dims=(None, 0))(parameters, x).sum()
    return {"functional_call": functional_call(net, parameters, (x,)),
            "grad": grad(loss)(parameters, x),
            "grad of grad": grad(stepped)(parameters, x),
            "vmap": vmap(lambda p, x: functional_call(net, p, (x,)), in_dims=(None, 0))(parameters, x),
            "vmap, axis 1": vmap(lambda p, x: functional_call(net, p, (x,)), in_dims=(None, 1))(parameters, x),
            "vmap of grad": vmap(grad(loss), in_dims=(None, 0))(parameters, x),
            "vmap of grad of grad, per task": vmap(grad(stepped))(per_task, x),
            "vmap of vmap": vmap(vmap(loss, in_dims=(None, 0)))(per_task, x[:, :, None]),
            "grad of vmap": grad(total(loss))(parameters),
            "grad of vmap of grad": grad(total(stepped))(parameters),
            "vmap, tasks inside": vmap(grad(loss), in_dims=(None, 0))(parameters, torch.stack((x, -x))),
            "jacrev of jacrev": jacrev(jacrev(lambda bias: loss({**parameters, "first.bias": bias}, x)))(
                parameters["first.bias"])}


@on_triton
def test_torch_func():
    expected, actual = func_results("torch"), func_results("triton")
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-12, msg=lambda m: f"{name}: {m}")


@on_triton
def test_vmap_over_a_later_axis():
    torch.manual_seed(10)
    g, weight, y = draw(1, 2, 3), draw(1, 3, 4), draw(1, 2, 3)
    both = torch.func.vmap(lambda g: kernels.X.apply(g, weight, y, 0.2), in_dims=2)(torch.stack((g, -2 * g), 2))
    for actual, g in zip(both, (g, -2 * g)):
        close(actual, torch.where(y > 0, g, 0.2 * g) @ weight, 1e-12)


def episode_on(backend, dtype, explicit):
    """The gradient of an episode: two inner steps on three layers, then the loss of the stepped weights."""
    torch.manual_seed(9)
    sizes, T, B = (6, 9, 7, 3), 2, 5
    initial = [leaf((draw(N, K) / K ** 0.5).to(dtype)) for K, N in zip(sizes, sizes[1:])]
    initial += [leaf(draw(N).to(dtype)) for N in sizes[1:]]
    x, target = draw(T, B, sizes[0]).to(dtype), draw(T, B, sizes[-1]).to(dtype)

    def loss(parameters):
        h = x
        for i, slope in enumerate((0, 0.2, 1)):
            h = fused_linear(h, parameters[i], parameters[i + 3], slope, backend=backend)
        return (h - target).square().mean((1, 2)).sum()

    parameters = [value.expand(T, *value.shape) for value in initial] if explicit else initial
    for _ in range(2):
        gradients = torch.autograd.grad(loss(parameters), parameters, create_graph=True)
        parameters = [value - 0.1 * gradient for value, gradient in zip(parameters, gradients)]
    return torch.autograd.grad(loss(parameters), initial)


@on_triton
@pytest.mark.parametrize("explicit", [False, True], ids=["shared", "per task"])
def test_meta_gradient_through_the_kernel(explicit):
    for expected, exact, single in zip(episode_on("torch", torch.float64, explicit),
                                       episode_on("triton", torch.float64, explicit),
                                       episode_on("triton", torch.float32, explicit)):
        close(exact, expected, 1e-12)
        close(single, expected, 1e-5)


@on_triton
def test_empty_batch():
    x, weight, bias = leaf(draw(2, 0, 3)), leaf(draw(2, 4, 3)), leaf(draw(2, 4))
    y = fused_linear(x, weight, bias, backend="triton")
    assert y.shape == (2, 0, 4)
    for gradient in torch.autograd.grad(y.sum(), (weight, bias)):
        assert (gradient == 0).all()


def in_subprocess(code, **environment):
    """Runs code with triton not interpreted unless asked; returns what it prints."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], env=clean | environment, cwd=HERE,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
def test_cross_compiled_kernels_do_not_spill():
    rows = json.loads(in_subprocess("import json, kernels; print(json.dumps(list(kernels.resources((80, 90)))))"))
    assert {row[0] for row in rows} == {80, 90} and {row[3] for row in rows} == {"L", "L, y given", "X", "D"}
    for *_, registers, shared, spilled in rows:
        assert 16 < registers <= 255 and 0 < shared <= 99 * 1024 and spilled == 0


TRY_BOTH_BACKENDS = """
import torch, kernels
x, w, b = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
print(kernels.fused_linear(x, w, b).shape, kernels.choose(device))
try:
    kernels.fused_linear(x, w, b, backend="triton")
except RuntimeError as error:
    print(error)
"""


def test_without_triton():
    missing = "import sys; sys.modules['triton'] = None; device = 'cuda'"      # import triton now raises ImportError
    out = in_subprocess(missing + TRY_BOTH_BACKENDS + "kernels.main()", TRITON_INTERPRET="1")
    shape, *lines = out.splitlines()
    assert shape == "torch.Size([2, 4]) torch"
    assert len(lines) == 2 and all("triton is not installed" in line and "backend='torch'" in line for line in lines)


@pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
def test_cpu_without_interpreter_is_refused():
    out = in_subprocess("device = 'cpu'" + TRY_BOTH_BACKENDS)
    assert "torch.Size([2, 4]) torch" in out and "TRITON_INTERPRET=1" in out


def test_refusals():
    x, weight, bias = torch.randn(2, 3, 5), torch.randn(4, 5), torch.randn(4)
    for slope in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="slope"):
            fused_linear(x, weight, bias, slope)
    with pytest.raises(ValueError, match="backend"):
        fused_linear(x, weight, bias, backend="cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.int64):
        with pytest.raises(TypeError, match="float32"):
            fused_linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    with pytest.raises(TypeError):
        fused_linear(x, weight.double(), bias)
    with pytest.raises(TypeError):
        fused_linear(x, weight, bias, addend=torch.zeros(2, 3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="device"):
        fused_linear(x, weight.to("meta"), bias)
    wrong = [dict(x=x[0, 0]), dict(x=x[None]), dict(weight=weight[0]), dict(weight=weight.mT), dict(bias=bias[:3]),
             dict(weight=weight.expand(3, 4, 5)), dict(bias=bias.expand(3, 4)), dict(bias=bias.expand(1, 2, 4)),
             dict(addend=torch.zeros(3, 4)), dict(addend=torch.zeros(2, 3, 5)), dict(addend=torch.zeros(1, 3, 4)),
             dict(x=x[0], weight=weight.expand(2, 4, 5)), dict(x=x[0], bias=bias.expand(2, 4)),
             dict(x=x[0], addend=torch.zeros(2, 3, 4)), dict(weight=weight[0], bias=None),
             dict(x=x[..., :0], weight=weight[:, :0])]
    for change in wrong:
        with pytest.raises(ValueError, match="goes with"):
            fused_linear(**{"x": x, "weight": weight, "bias": bias} | change)


def test_auto_is_torch_until_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kernels.choose("cpu") == kernels.choose("cuda") == "torch"
    if kernels.triton is not None:
        monkeypatch.setitem(kernels.FASTER_UP_TO, (9, 0), 1000)
        assert kernels.choose("cuda") == kernels.choose("cuda:1", 1000) == "triton"
        assert kernels.choose("cuda", 1001) == "torch" and kernels.choose("cpu") == "torch"


def test_precision_follows_pytorch(monkeypatch):
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "ieee"
        assert kernels.precision_of(torch.float32) == "ieee"
        settings.fp32_precision = "tf32"
        assert kernels.precision_of(torch.float32) == "tf32" and kernels.precision_of(torch.float64) == "ieee"
    finally:
        settings.fp32_precision = before


@on_triton
def test_benchmark_prints_every_row(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda layer, **options: layer)
    monkeypatch.setattr(kernels, "median_seconds", functools.partial(kernels.median_seconds, rounds=1, repeats=1))
    kernels.benchmark(DEVICE, layers={"tiny": (5, 3)}, tasks=(1, 2), B=2, big=16)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 3 and all(line.split()[0] == "tiny" for line in lines[2:])
    assert all(float(line.split()[-1]) < 1e-5 for line in lines[2:])
