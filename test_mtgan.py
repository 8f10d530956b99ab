"""pytest test_mtgan.py tests every gradient against a plain loop and float64 finite differences,
every file against a kill; python test_mtgan.py prints what a meta-step costs beside that loop."""
import os

import torch

if not torch.cuda.is_available():
    # Before anything imports triton, as torchvision does.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import contextlib, functools, itertools, json, math, multiprocessing, pickle, re
import shlex, shutil, signal, statistics, subprocess, sys, time, urllib.error
from pathlib import Path
from unittest.mock import Mock, patch

import pytest

resource = pytest.importorskip("resource", reason="the tests need Linux or macOS")
import filelock
import numpy as np
import torch.nn.functional as F
import torchvision
from PIL import Image, PngImagePlugin
from torch.autograd import grad, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import mtgan
from kernels import fused_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = pytest.mark.skipif(bool(kernels.why_not_triton(DEVICE)), reason="triton cannot run here")

# The plain loop over tasks: what the core must equal ----------------------------------------------
def mlp(parameters, x, slope):      # a network of one task in plain PyTorch
    for i in range(0, len(parameters), 2):
        x = F.linear(x, parameters[i], parameters[i + 1])
        x = F.leaky_relu(x, slope) if i + 2 < len(parameters) else x
    return x

def start_of(leaves):                # [*theta, *phi, log_rates] as a Start
    return mtgan.Start(leaves[:8], leaves[8:16], leaves[16])

def new_parameters():
    players = mtgan.new_players()
    return [*players.theta, *players.phi]

def loss_g(phi, fake, real):
    return mtgan.loss_g(mlp(phi, fake, 0.2)[:, 0], fake[None], real[None]).sum()

def loop_tasks(leaves, episode, second_order=True):
    """Task after task of an episode: yields its loss and its adapted parameters."""
    support, query = episode
    sizes = len(leaves[-1]) * [mtgan.FAKES] + [query.shape[1]]      # of the steps, and the score
    noises = [mtgan.noise(len(query), n) for n in sizes]
    def descend(parameters, rates, loss_of):
        mine = [p.clone() for p in parameters]      # earlier steps do not depend on these
        gradients = grad(loss_of(mine), mine, create_graph=second_order, retain_graph=True)
        gradients = [g * (g.numel() / g.square().sum()) ** 0.5 for g in gradients]
        return [p - a * g for p, a, g in zip(parameters, rates, gradients)]
    for t in range(len(query)):
        parameters = [p[0] for p in leaves[:-1]]
        theta, phi = parameters[:8], parameters[8:]
        rates = leaves[-1].exp().repeat_interleave(2, 2)    # [steps, 2, 8]
        own = iter([noise[t] for noise in noises])
        for rates_g, rates_d in rates:
            z = next(own)
            fake = mlp(theta, z, 0).tanh()
            phi = descend(phi, rates_d, lambda phi: mtgan.loss_d(
                mlp(phi, support[t], 0.2)[:, 0], mlp(phi, fake, 0.2)[:, 0]))
            theta = descend(theta, rates_g, lambda theta: loss_g(
                phi, mlp(theta, z, 0).tanh(), support[t]))
        fake = mlp(theta, next(own), 0).tanh()
        yield mtgan.energy_distance(fake[None], query[t][None])[0], [*theta, *phi]

def loop_gradient(leaves, episode):      # what `mtgan.meta_gradient` does for maml
    gradients, total = [torch.zeros_like(leaf) for leaf in leaves], 0
    for loss, _ in loop_tasks(leaves, episode):
        torch._foreach_add_(gradients, grad(loss / len(episode[1]), leaves))
        total += loss.item() / len(episode[1])
    return total, gradients

# Gradients ----------------------------------------------------------------------------------------
@pytest.fixture
def small(monkeypatch, request):
    """Networks of a few units in float64, and an episode of two tasks."""
    for name, value in {"NOISE": 3, "FAKES": 4, "GENERATOR_SIZES": (3, 10, 9, 8, 7),
                        "DISCRIMINATOR_SIZES": (7, 9, 8, 10, 1)}.items():
        monkeypatch.setattr(mtgan, name, value)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    start = new_parameters()
    rates = torch.log(0.03 + 0.05 * torch.rand(getattr(request, "param", 4), 2, 4))
    leaves = [(1.5 * p).requires_grad_() for p in start] + [rates.requires_grad_()]
    support, query = [torch.rand(2, n, 7) * 2 - 1 for n in (5, 6)]
    yield leaves, (support, query)
    torch.set_default_dtype(torch.float32)

def meta_gradient(leaves, episode, algorithm="maml"):
    torch.manual_seed(5)
    return mtgan.meta_gradient(start_of(leaves), *episode, algorithm)

def by_loop(leaves, episode, **options):
    torch.manual_seed(5)
    losses, ends = zip(*loop_tasks(leaves, episode, **options))
    return sum(losses) / len(losses), ends

def distance(a, b):
    """|a - b| / |b| of two lists of tensors."""
    difference = torch.cat([(x - y).flatten() for x, y in zip(a, b, strict=True)])
    return (difference.norm() / torch.cat([y.flatten() for y in b]).norm()).item()

@pytest.mark.parametrize("small", [1, 2, 3, 4], indirect=True)
def test_meta_gradient_is_the_plain_loops(small):
    leaves, episode = small
    loss, gradient = meta_gradient(leaves, episode)
    expected, _ = by_loop(leaves, episode)
    assert abs(loss - expected) < 1e-12 * expected
    assert distance(gradient, grad(expected, leaves)) < 1e-12

def test_meta_gradient_is_that_of_finite_differences(small):
    """Central differences of the whole episode, along a direction of G's, D's and the rates."""
    leaves, episode = small
    _, gradient = meta_gradient(leaves, episode)
    for part in (slice(0, 8), slice(8, 16), slice(16, 17)):
        torch.manual_seed(1)
        direction = [torch.randn_like(leaf) for leaf in leaves[part]]
        def loss(size):
            moved = list(leaves)
            moved[part] = [leaf + size * d for leaf, d in zip(leaves[part], direction)]
            return meta_gradient(moved, episode, "reptile")[0].item()
        along = sum((g * d).sum().item() for g, d in zip(gradient[part], direction))
        assert abs((loss(1e-6) - loss(-1e-6)) / 2e-6 - along) < 1e-6 * abs(along)

def test_second_order_is_not_first_order(small):
    leaves, episode = small
    _, second = meta_gradient(leaves, episode)
    _, first = meta_gradient(leaves, episode, "fomaml")
    for part in (slice(0, 8), slice(16, 17)):
        assert distance(first[part], second[part]) > 0.03
    assert all(g.abs().max() == 0 for g in first[8:16])     # phi_0 is not reached
    assert all(g.abs().max() > 0 for g in second[8:16])

def test_first_order_is_the_loops_first_order(small):
    leaves, episode = small
    expected, _ = by_loop(leaves, episode, second_order=False)
    _, first = meta_gradient(leaves, episode, "fomaml")
    assert distance(first, grad(expected, leaves, materialize_grads=True)) < 1e-12

def test_reptile_goes_where_the_steps_lead(small):
    leaves, episode = small
    _, ends = by_loop(leaves, episode, second_order=False)
    means = [torch.stack(tasks).mean(0) for tasks in zip(*ends)]
    _, back = meta_gradient(leaves, episode, "reptile")
    assert distance(back[:-1], [leaf - mean for leaf, mean in zip(leaves, means)]) < 1e-12
    assert back[-1].abs().max() == 0

def test_both_adds_two_directions_of_length_one(small):
    leaves, episode = small
    gradient, back = (meta_gradient(leaves, episode, name)[1] for name in ("maml", "reptile"))
    norms = [torch.cat([t.flatten() for t in parts]).norm() for parts in (gradient, back)]
    expected = [g / norms[0] + r / norms[1] for g, r in zip(gradient, back)]
    assert distance(meta_gradient(leaves, episode, "both")[1], expected) < 1e-12

@TRITON
@pytest.mark.parametrize("small", [2], indirect=True)
@pytest.mark.parametrize("algorithm", ["fomaml", "both"])
def test_meta_gradient_through_triton(algorithm, small, monkeypatch):
    leaves, episode = [[v.to(DEVICE) for v in tensors] for tensors in small]
    with torch.device(DEVICE):
        _, expected = meta_gradient(leaves, episode, algorithm)
        monkeypatch.setattr(kernels, "default_backend", "triton")
        assert distance(meta_gradient(leaves, episode, algorithm)[1], expected) < 1e-10

@pytest.fixture
def graphs(monkeypatch):
    """On a CPU, a stand-in for CUDA graphs: to replay is to call the function once more."""
    def record(recorded, inputs):
        recorded.inputs = [torch.full_like(v, math.nan) for v in inputs]
        with torch.random.fork_rng([]):
            recorded.function(*recorded.inputs)
        recorded.graph = Mock(replay=lambda: recorded.function(*recorded.inputs))
        recorded.results = None
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels.Recorded, "record", record)
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)

def test_recorded_steps_are_the_same(small, graphs):
    """A step in place, of both kinds: what it is recorded with, nan, changes nothing."""
    leaves, (support, query) = [[v.detach().to(DEVICE) for v in x] for x in small]
    def meta(start, optimizer, support, query):
        direction = mtgan.meta_gradient(start, support, query, "both")[1]
        mtgan.apply_gradients(optimizer, mtgan.unit(direction)[:-1])
    def gan(start, optimizer, support, z):
        mtgan.gan_step(mtgan.Players(start.theta, start.phi), optimizer, support, z)
    with torch.device(DEVICE):
        z = torch.randn(1, 4, 3)
        for step, real, other in ((meta, support, query), (gan, support[:1], z)):
            ends = []
            for wrap in (lambda function: function, kernels.Recorded):
                start = start_of([v.clone() for v in leaves])
                lr = torch.tensor(0.01, dtype=torch.float32)
                optimizer = (mtgan.adam([*start.theta, *start.phi], lr) if step is meta else
                             [mtgan.adam(start.theta, lr), mtgan.adam(start.phi, lr)])
                function = wrap(functools.partial(step, start, optimizer))
                for number in range(3):
                    torch.manual_seed(number)
                    function(real * (1 - number / 5), other)
                ends.append([*start.theta, *start.phi])
            assert distance(*ends) == 0 < distance(ends[0], leaves[:-1])
            with pytest.raises(ValueError, match="shapes"):
                function(real[:, :2], other)

@pytest.mark.parametrize("small", [2], indirect=True)
def test_every_layer_asks_for_the_chosen_backend(small, monkeypatch):
    leaves, episode = small
    asked, linear = [], kernels.MaskedLinear.apply
    monkeypatch.setattr(kernels.MaskedLinear, "apply", lambda *a: asked.append(a[-1]) or linear(*a))
    monkeypatch.setattr(kernels, "default_backend", "torch")
    mtgan.generator(leaves[:8], episode[0][:1, :, :3])
    assert asked == ["torch"] * 4

# Networks, game, score, optimisers ----------------------------------------------------------------
def test_losses():
    real, fake = torch.tensor([[2.0, -1.0]]), torch.tensor([[-3.0, 0.5]])
    expected = np.logaddexp(0, [-2, 1, -3, 0.5]).sum() / 2
    assert abs(mtgan.loss_d(real, fake).item() - expected) < 1e-6
    images = torch.eye(3)[None, :2], torch.ones(1, 1, 3)   # distance: 2 * 2 ** 0.5 - 2 ** 0.5
    expected = np.logaddexp(0, [3, -0.5]).mean() + mtgan.ENERGY * 2 ** 0.5
    assert abs(mtgan.loss_g(fake, *images).item() - expected) < 1e-6
    extreme = torch.tensor([-1e4, 1e4])
    assert (mtgan.loss_d(extreme, extreme) + mtgan.loss_g(extreme, *images)).isfinite()

def test_energy_distance():
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 3).double(), torch.randn(2, 4, 3).double()
    def mean(a, b, same):
        pairs = [(p - q).norm() for i, p in enumerate(a) for j, q in enumerate(b)
                 if not same or i != j]
        return sum(pairs) / len(pairs)
    expected = [2 * mean(a, b, False) - mean(a, a, True) - mean(b, b, True) for a, b in zip(x, y)]
    assert torch.allclose(mtgan.energy_distance(x, y), torch.stack(expected))

@patch.multiple(mtgan, GENERATOR_SIZES=(3, 6, 5, 6, 7), DISCRIMINATOR_SIZES=(7, 6, 5, 6, 1))
def test_gan_step_is_two_plain_adam_steps():
    torch.manual_seed(0)
    start = [torch.cat([p, 2 * p]) for p in new_parameters()]
    leaves = [p.clone() for p in start]
    real, z = torch.rand(2, 4, 7), torch.randn(2, 5, 3)
    players = mtgan.Players(leaves[:8], leaves[8:])
    optimizers = [mtgan.adam(weights, 0.01) for weights in players]
    mtgan.gan_step(players, optimizers, real, z, shown=lambda images: images.flip(-1))   # to D
    for t in range(2):
        own = [p[t].clone().requires_grad_() for p in start]
        theta, phi = own[:8], own[8:]
        fake = mlp(theta, z[t], 0).tanh()
        x = real[t].flip(-1).requires_grad_()
        logits, other = mlp(phi, x, 0.2)[:, 0], mlp(phi, fake.detach().flip(-1), 0.2)[:, 0]
        slope, = grad(logits.sum(), x, create_graph=True)
        loss_d = mtgan.loss_d(logits, other) + mtgan.R1 / 2 * slope.square().sum() / 4
        def of_g():
            logits = mlp(phi, fake.flip(-1), 0.2).T
            return mtgan.loss_g(logits, fake[None], real[t:t + 1]).sum()
        for player, loss in ((phi, lambda: loss_d), (theta, of_g)):
            adam = torch.optim.Adam(player, 0.01, betas=(0.5, 0.999))
            for p, g in zip(player, grad(loss(), player)):
                p.grad = g
            adam.step()
        assert distance([p[t] for p in leaves], own) < 1e-5

def test_apply_gradients():
    leaf, other = torch.zeros(1, 2, 3), torch.zeros(2, 3)
    adam = mtgan.adam([leaf], 1.0)
    gradient = torch.tensor([1.0, -1, 1, 1, -1, -1]).view(1, 3, 2).mT
    assert mtgan.apply_gradients(adam, [gradient / 0]) == 1 and leaf.abs().max() == 0
    assert mtgan.apply_gradients(adam, [gradient]) == 0 and torch.allclose(leaf, -gradient)
    mtgan.apply_gradients(adam, [0 * gradient])     # the second step depends on the first beta
    assert torch.allclose(leaf, -gradient * (1 + 0.5 * 0.5 / 0.75 / (0.999 / 1.999) ** 0.5))
    adam = mtgan.adam([other], 1.0)                 # one task's nan does not stop the other
    gradient = torch.tensor([[math.nan, 1, 1], [1, 1, 1]])
    assert mtgan.apply_gradients(adam, [gradient]) == 0
    assert torch.allclose(other[1], -torch.ones(3)) and other[0].isnan().any()

@patch.multiple(mtgan, GENERATOR_SIZES=(3, 6, 7), DISCRIMINATOR_SIZES=(7, 6, 1))
def test_a_skipped_step_of_either_player_is_counted(monkeypatch):
    for constant in ("R1", "ENERGY"):           # in D's loss alone, in G's loss alone
        monkeypatch.setattr(mtgan, constant, math.inf)
        players = mtgan.new_players()
        optimizers = [mtgan.adam(weights, 0.01) for weights in players]
        numbers = mtgan.gan_step(players, optimizers, torch.rand(1, 4, 7), torch.randn(1, 5, 3))
        assert numbers["skipped"] == 1
        monkeypatch.undo()

def test_a_step_of_no_gradient_is_finite():
    p = torch.ones(2, 3, 4)
    moved, = mtgan.descend([p], torch.ones(4), [torch.zeros_like(p)], True)
    assert torch.equal(moved, p)

def parsed(*words):     # a command line, and no progress shown
    args = mtgan.parse([str(word) for word in words])
    args.progress = Mock()
    return args

# Tasks --------------------------------------------------------------------------------------------
def numbered(classes=8, each=40):   # domains in which every image carries its own number
    images = torch.zeros(classes, each, 784, dtype=torch.uint8)
    images[..., 0] = torch.arange(classes).view(-1, 1)
    images[..., 1] = torch.arange(each)
    names = [f"d {c}" for c in range(classes)]
    pairs = [(s, t) for s in names[:3] for t in names[3:6]]
    return mtgan.Domains(dict(zip(names, images)), pairs, ["d 6", "d 7"], each, "d")

def test_support_and_query_are_disjoint_and_of_their_classes():
    support, query = mtgan.split(mtgan.sample_images(numbered(), ["d 0", "d 5"], 40), 10)
    assert support.shape == (2, 10, 784) and query.shape == (2, 30, 784)
    for t, number in enumerate((0, 5)):
        images = ((torch.cat([support[t], query[t]]) + 1) * 127.5).round().int()
        assert set(images[:, 0].tolist()) == {number}
        assert sorted(images[:, 1].tolist()) == list(range(40))     # each once

def test_a_small_class_is_filled_up():
    """Support and query are never of the same image, and a copy is a slightly altered image."""
    torch.manual_seed(0)
    images = torch.zeros(9, 28, 28, dtype=torch.uint8)
    for i in range(9):                          # a bright bar, as bright as its number says
        images[i, 6:22, 12:16] = 90 + 18 * i
    assert (mtgan.altered(torch.full((2, 3, 784), -1.0)) == -1).all()      # black stays black
    drawn = (mtgan.sample(images.view(9, 784), 6, 20) + 1) * 127.5
    assert drawn.shape == (26, 784)
    numbers = ((drawn.amax(1) - 90) / 18).round().int().tolist()
    support, query = set(numbers[:6]), set(numbers[6:])
    assert support | query == set(range(9)) and not support & query
    assert len(drawn.unique(dim=0)) == 26       # no two are the same
    for x, number in zip(drawn.view(26, 28, 28), numbers):
        assert (x - images[number]).abs().mean() < 20 and x.min() > -1e-3

def test_tasks_are_made_up_and_mixed():
    torch.manual_seed(0)
    known = torch.tensor([2.0, 3.0] * 100).view(200, 1, 1).expand(-1, 20, 784)  # not in [-1, 1]
    made_up = functools.partial(mtgan.with_made_up, share=0.7)
    kept, own = ((function(known) == known).all(-1).double().mean(1)       # [200]
                 for function in (made_up, mtgan.with_mixtures))
    assert set(kept.tolist()) == {0, 1} and abs(1 - kept.mean() - 0.7) < 0.1
    assert abs((own < 1).double().mean() - mtgan.MIXED) < 0.1 > abs(own[own < 1].mean() - 0.5)

def test_pairs_are_drawn_from_all():
    domains = numbered()
    pairs = [tuple(mtgan.sample_classes(domains, 1)) for _ in range(200)]
    assert set(pairs) == set(domains.train)

def test_made_up_domains():
    torch.manual_seed(0)
    drawn = mtgan.level_sets(torch.arange(400) < 200, 2).view(2, 200, 2, 28, 28)
    frame = torch.ones(28, 28, dtype=torch.bool)
    frame[2:-2, 2:-2] = False
    pen, filled = drawn
    assert drawn.min() >= -1 and drawn.max() <= 1 and pen.mean() < -0.3
    assert pen[..., :2, :2].mean() < -0.8 and pen[..., 7:21, 7:21].mean() > pen[..., frame].mean()
    assert filled[..., 7:21, 7:21].mean() > filled[..., frame].mean() + 0.3      # islands are high
    inner = (drawn[:, :, 0] - drawn[:, :, 1]).abs().mean()      # of one domain, and of two
    assert inner < 0.7 * (drawn[:, 1:, 0] - drawn[:, :-1, 0]).abs().mean()

@pytest.mark.parametrize("source, target, pairs, test", [
    ("strokes:0,1", "shapes:0,1", [("strokes 0", "shapes 0")], ["shapes 1"]),
    ("strokes:0-3", "strokes:0-3", [("strokes 0", "strokes 1"), ("strokes 0", "strokes 2")],
     ["strokes 3"])])
def test_pairs_of_domains(source, target, pairs, test, offline):
    domains = mtgan.load_domains(parsed("--source", source, "--target", target, "--shots", 3))
    assert domains.train[:2] == pairs and domains.test == test
    assert all(one != other for one, other in domains.train)

def test_ordinary_training_has_made_up_domains_and_leaves_its_start_alone(tmp_path, monkeypatch):
    seen, made_up = [], mtgan.with_made_up
    monkeypatch.setattr(mtgan, "with_made_up", lambda *a: seen.append((a[0].shape, a[1]))
                        or made_up(*a))
    monkeypatch.setattr(mtgan, "draw_progress", lambda *_: None)
    with patch.multiple(mtgan, **{k: v for k, v in SMALL.items() if k.endswith("SIZES")}):
        start = mtgan.new_players()
        before = mtgan.each(torch.clone, start)
        trained = mtgan.train_gan("a", start, 2, numbered(), parsed("--out", tmp_path))
    assert seen == [((4, 16, 784), 0.7)] * 2 and distance(start.theta, before.theta) == 0
    assert all(distance(*pair) > 0 for pair in zip(trained, start))

def test_held_out_classes_reach_no_training(tmp_path, monkeypatch):
    seen, original = set(), mtgan.sample_images
    monkeypatch.setattr(mtgan, "sample_images", lambda domains, classes, *n: seen.update(classes)
                        or original(domains, classes, *n))
    settings = parsed("--source", "strokes", "--target", "shapes:0-5", "--dry-run",
                      "--meta-batch", 2, "--out", tmp_path)
    domains = mtgan.load_domains(settings)
    monkeypatch.setattr(mtgan, "draw_progress", lambda *_: None)    # shows them, trains on none
    with patch.multiple(mtgan, **SMALL):
        mtgan.train_all(domains, settings)
    assert domains.test == ["shapes 4", "shapes 5"]
    assert mtgan.load(tmp_path / "state" / "transfer.pt")[0] == 2 * 2 * 3       # as long
    held_out = {"strokes 7", "strokes 8", "strokes 9", "shapes 4", "shapes 5"}
    assert seen and not seen & held_out

@patch.multiple(mtgan, GENERATOR_SIZES=(3, 4, 1), DISCRIMINATOR_SIZES=(2, 4, 1), QUERIES=35)
def test_the_outer_loops_schedule(tmp_path, monkeypatch):
    """The outer rate falls; an episode has the source and target of a pair, and no image twice."""
    lrs, moves, original = [], [], mtgan.apply_gradients
    def gradient(start, support, query, algorithm):
        assert lrs or torch.allclose(start.log_rates[0].exp().T, torch.tensor([2e-3, 1e-3]))
        assert query.shape[1] == 35
        numbers = ((torch.cat([support, query], 1) + 1) * 127.5).round().int()
        target, source = numbers[:, 0, 0]       # mixed
        assert source in (0, 1, 2) and target in (3, 4, 5)
        assert all(len(set(each[:, 1].tolist())) == 40 for each in numbers)
        leaves = [*start.theta, *start.phi, start.log_rates]
        return torch.zeros(()), [torch.full_like(leaf, 1e3) for leaf in leaves]
    def apply_gradients(optimizer, gradients):
        lrs.append(optimizer.param_groups[0]["lr"].item())
        moves.append(torch.cat([g.flatten() for g in gradients]))
        return original(optimizer, gradients)
    monkeypatch.setattr(mtgan, "meta_gradient", gradient)
    monkeypatch.setattr(mtgan, "apply_gradients", apply_gradients)
    monkeypatch.setattr(mtgan, "with_mixtures", lambda images: images.flip(0))
    monkeypatch.setattr(mtgan, "draw_progress", lambda *_: None)
    args = parsed("--shots", 5, "--meta-steps", 4, "--meta-lr", 0.1, "--out", tmp_path,
                  "--made-up", 0)
    mtgan.meta_train(mtgan.new_players(), numbered(), args)
    assert np.allclose(lrs, np.outer([0.1, 0.1, 0.1, 0.05], [1, 15]).ravel())
    for weights, rates in zip(moves[::2], moves[1::2]):
        assert abs(torch.cat([weights, rates]).norm() - 1) < 1e-3

@patch.multiple(mtgan, GENERATOR_SIZES=(3, 4, 1), DISCRIMINATOR_SIZES=(2, 4, 1))
def test_an_episode_with_one_inf_changes_nothing(tmp_path, monkeypatch):
    def gradient(start, *_):
        leaves = [*start.theta, *start.phi, start.log_rates]
        direction = [torch.ones_like(leaf) for leaf in leaves]
        direction[-1][2, 1, 0] = math.inf           # of one rate of one inner step
        return torch.ones(()), direction
    monkeypatch.setattr(mtgan, "meta_gradient", gradient)
    monkeypatch.setattr(mtgan, "draw_progress", lambda *_: None)
    args, before = parsed("--shots", 5, "--meta-steps", 2, "--out", tmp_path), mtgan.new_players()
    start = mtgan.meta_train(before, numbered(), args)
    assert distance([*start.theta, *start.phi], [*before.theta, *before.phi]) == 0
    assert start.log_rates.isfinite().all()
    assert args.progress.show.call_args.args[-1]["skipped"] == 2

# Meta-testing -------------------------------------------------------------------------------------
def test_adaptation_takes_the_learned_steps_then_adam(monkeypatch):
    torch.manual_seed(0)
    players, original, seen = mtgan.new_players(), mtgan.gan_step, []
    rates, support = torch.full((3, 2, 4), 1e-3).log(), torch.rand(1, 5, 784)
    monkeypatch.setattr(mtgan, "gan_step", lambda *a, shown: seen.append((*a, shown))
                        or original(*a, shown=shown))
    def adapted(start, steps):
        torch.manual_seed(1)
        thetas = itertools.islice(mtgan.few_shot(support, start, 1e-3), steps + 1)
        return [[p.clone() for p in theta] for theta in thetas]
    before = [p.clone() for p in players.theta]
    found = adapted(mtgan.Start(*players, rates), 5)
    assert len(seen) == 2 and distance(found[5], seen[1][0].theta) == 0
    shown = seen[0][-1](support)                # D sees altered copies
    assert shown.shape == support.shape and 0 < (shown - support).abs().mean() < 1
    assert [adam.param_groups[0]["lr"] for adam in seen[0][1]] == [1e-3, 1e-3]
    torch.manual_seed(1)
    theta, phi = players
    for k in range(3):
        assert distance(found[k], theta) == 0
        theta, phi = mtgan.inner_step(theta, phi, rates[k].exp(), support)
    assert distance(found[3], theta) == 0
    assert distance(found[4], found[3]) > 0 and distance(found[5], found[4]) > 0
    seen.clear()
    assert distance(adapted(players, 3)[0], before) == 0        # the start is left as it was
    assert [call[2] is support for call in seen] == [True, True, True]

def test_one_tasks_nan_leaves_the_tasks_beside_it_alone():
    torch.manual_seed(0)
    support = torch.rand(2, 5, 784)
    support[0] = math.nan
    players = mtgan.new_players()
    start = mtgan.Start(*players, torch.full((2, 2, 4), 1e-3).log())
    thetas = [[p.clone() for p in theta] for theta in itertools.islice(
        mtgan.few_shot(support, start), 5)]
    assert all(p[0].isnan().any() and p[1].isfinite().all() for p in thetas[4])
    assert distance([p[1] for p in thetas[4]], [p[1] for p in thetas[3]]) > 0

def whitened(n, d):                 # n points of mean 0 and covariance 1
    x = torch.randn(n, d).double()
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T

def test_frechet_distance():
    torch.manual_seed(0)
    a, b = whitened(50, 4), whitened(60, 4)
    scale, shift = torch.tensor([[1.0, 2, 3, 0.5], [1, 0, 0, 2]]).double()
    mixing = torch.randn(4, 4).double()                     # covariances that do not commute
    A, B = torch.diag(scale ** 2), mixing @ mixing.T
    root = torch.linalg.eigvals(A @ B).sqrt().real.sum()
    expected = shift.square().sum() + A.trace() + B.trace() - 2 * root
    assert abs(mtgan.frechet_distance(a * scale, b @ mixing.T + shift) - expected) < 1e-9
    assert mtgan.frechet_distance(torch.full((3, 2), math.nan), a) == math.inf

def row_of(method, steps, frechet):
    return {"method": method, "steps": steps, "frechet": frechet}

def test_intervals():
    values = [1.0, 2.0, 4.0, 7.0, 11.0, 3.0, 2.0, 5.0, 6.0, 9.0]
    rows = [*(row_of("a", 1, value) for value in values), row_of("a", 2, 10.4)]
    found = mtgan.intervals([*rows, row_of("b", 0, math.inf), row_of("b", 0, 1.0)], "frechet")
    mean, two = found["a", 1]
    assert mean == 5 and abs(two - 2 * np.std(values, ddof=1) / 10 ** 0.5) < 1e-9
    assert mtgan.cell(*found["a", 2]) == "10 ± 0" and mtgan.cell(mean, 2.0) == "5.00 ± 2.00"
    assert mtgan.cell(*found["b", 0]) == mtgan.cell(math.nan, math.nan) == "-"

def test_a_plot():
    """A power law is a straight line, in its colour; what needs no GAN is a level."""
    rows = [row_of("MT-GAN", steps, 1000 / steps) for steps in (1, 3, 10, 100)]
    rows += [row_of("MT-GAN", 0, 5e3), row_of("diverged", 1, math.inf)]
    found = mtgan.intervals([*rows, row_of("Gaussian", 0, 100.0)], "frechet")
    pixels = np.asarray(mtgan.plot(found, "a title")).astype(int)
    blue = np.abs(pixels - [0, 0x72, 0xB2]).max(-1) < 10
    blue[:75] = False                           # the legend
    y, x = np.nonzero(blue)
    assert pixels.shape == (500, 800, 3) and np.corrcoef(x, y)[0, 1] > 0.999
    assert x.min() < 65 and x.max() > 775
    at_10 = y[abs(x - 420) < 2].mean()          # halfway from 1 to 100, where the level is, too
    assert abs((np.abs(pixels[:, 700] - 0x60).max(-1) < 10).argmax() - at_10) < 3
    for values in ([], [math.inf], [0.0, 0.0], [1e20, 1.0]):
        mtgan.plot(mtgan.intervals([row_of("a", *at) for at in enumerate(values, 1)] + rows[-1:],
                                   "frechet"), "")

def test_judging_samples():
    torch.manual_seed(0)
    support, fresh, reference = torch.rand(3, 20, 784)
    judge = torch.nn.Sequential(torch.nn.Linear(784, 5), torch.nn.Linear(5, 3))
    def judged(samples):
        return mtgan.judge_samples(samples, support, fresh, judge[0](reference), 0, judge)
    assert judged(support[:3].repeat(7, 1))["nearest"] == 0     # three copies, not all images
    assert judged(support)["nearest"] < 1e-3 and abs(judged(fresh)["nearest"] - 1) < 1e-5
    assert judged(reference)["frechet"] < 1e-6 < judged(torch.zeros(20, 784))["frechet"]
    share = (judge(fresh).argmax(-1) == 0).double().mean()
    assert abs(judged(fresh)["recognised"] - share) < 1e-9
    assert judged(fresh * math.nan)["recognised"] == 0      # of no class, not of the first

def test_all_methods_are_judged_on_the_same_images(tmp_path, monkeypatch):
    """The judge gets the right class, and no image of the support."""
    seen, domains = {}, numbered(each=13)
    def judge_samples(x, support, real, reference, label, judge):
        number = lambda images: tuple(((images[:, 1] + 1) * 127.5).round().int().tolist())
        target = ((support[0, 0] + 1) * 127.5).round().int().item()
        assert list(domains.images)[label] == f"d {target}"
        images = number(support), number(real), number(reference)
        assert len(set(sum(images, ()))) == 5 + 4 + 4
        seen.setdefault((target, images[0]), []).append(images)
        return dict.fromkeys(mtgan.METRICS, 0.0)
    monkeypatch.setattr(mtgan, "judge_samples", judge_samples)
    args = parsed("--shots", 5, "--test-seeds", 2, "--out", tmp_path)
    args.test_steps = 0, 1, 3
    players = mtgan.new_players()
    judge = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    rows, film = mtgan.meta_test({"a": (players, 1e-3), "b": (players, 1.0)}, judge, domains, args)
    assert len(seen) == 4 and len(rows) == 4 * (3 + 2 * 3)
    assert all(len(same) == 9 and len(set(same)) == 1 for same in seen.values())
    for target, (one, other) in itertools.product(("d 6", "d 7"), [(1, 0), (3, 1)]):
        assert not torch.equal(film[target, "a"][one], film[target, "a"][other])
        assert not torch.equal(film[target, "a"][one], film[target, "b"][one])

def test_what_needs_no_gan():
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(784, 3))[0].T
    support = 0.1 * torch.randn(1, 9, 3) @ (torch.tensor([[3.0], [2], [1]]) * directions)
    real, repeated, gaussian = mtgan.without_a_gan(support, support[:, :4], 2000).values()
    assert torch.equal(real, support[:, :4]) and len(torch.unique(repeated[0], dim=0)) == 9
    found, expected = ((x @ directions.T).std(1) for x in (gaussian, support))
    assert torch.allclose(found, expected, rtol=0.1)
    assert torch.allclose(gaussian.mean(1), support.mean(1), atol=0.05)

def test_a_filmstrip():
    """The support, then the steps, in the order of their numbers; its film is left as it was."""
    film = {("t", "m"): {steps: torch.full((4, 784), steps / 100) for steps in (0, 1, 10)},
            ("t", "support repeated"): {0: torch.full((4, 784), 0.9)},
            ("t", "Gaussian"): {0: torch.full((4, 784), -0.5)}}
    labels, kept = [], dict(film)
    def text(ink, at, label, *_):
        labels.append(label)
    with patch.object(mtgan.ImageDraw.ImageDraw, "text", text):
        strip = mtgan.filmstrip(film)
    assert labels == ["Gaussian, t", "support", "samples", "m, t", "support", "step 1", "step 10"]
    grey = [strip.getpixel((120 * i + 20, y)) for y in (60, 220) for i in range(3)]
    assert grey[0] == grey[3] > grey[5] > grey[4] > grey[1] and grey[2] == 255 and film == kept

# What a meta-step costs: python test_mtgan.py ----------------------------------------------------
class Counted(TorchDispatchMode):       # counts the torch operators called
    calls = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))

def benchmark(repetitions=5):
    """Print the gradient of an episode and a whole meta-step, each beside the plain loop's."""
    settings = mtgan.parse("--source strokes --target shapes".split())
    domains = mtgan.load_domains(settings)
    leaves = [*new_parameters(), torch.full((settings.inner_steps, 2, 4), 1e-3).log()]
    optimizer = mtgan.adam(leaves[:-1], torch.tensor(1e-4))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    def draw():
        images = mtgan.sample_images(domains, domains.train[0], settings.shots + mtgan.QUERIES)
        return mtgan.split(mtgan.with_made_up(images, settings.made_up), settings.shots)
    def meta_step(gradient, support, query):
        mtgan.apply_gradients(optimizer, mtgan.unit(gradient(support, query)[1])[:-1])
    episode = draw()
    def loop(*episode):     # at PyTorch's own precision, as other libraries run it
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        result = loop_gradient(leaves, episode)
        torch.set_float32_matmul_precision(before)
        return result
    ours = functools.partial(mtgan.meta_gradient, start_of(leaves), algorithm="maml")
    gradient = kernels.Recorded(ours)
    whole = kernels.Recorded(functools.partial(meta_step, ours))
    steps = {"gradient, plain loop": lambda: loop(*episode), "gradient": lambda: gradient(*episode),
             "meta-step, plain loop": lambda: meta_step(loop, *draw()),
             "meta-step": lambda: whole(*draw())}
    seconds = {name: [] for name in steps}
    for _, name in itertools.product(range(repetitions), steps):        # they take turns
        began = time.perf_counter()
        steps[name]()
        torch.ones(1).item()                                            # waits for a GPU
        seconds[name].append(time.perf_counter() - began)
    print(f"{kernels.default_backend}, {torch.get_num_threads()} threads, 2 tasks, "
          f"{settings.inner_steps} "
          f"inner steps\n{'':24}seconds  loop = 1  operators")
    for name, step in steps.items():
        with Counted() as counted:
            step()
        median = statistics.median(seconds[name])
        ratio = median / statistics.median(seconds[name.split(",")[0] + ", plain loop"])
        print(f"{name:24}{median:7.3f}{ratio:10.2f}{counted.calls:11}")

def test_benchmark(small, capsys, monkeypatch):
    torch.set_default_dtype(torch.float32)
    episode = torch.rand(4, 5, 7), torch.rand(4, 6, 7)
    monkeypatch.setattr(mtgan, "split", lambda *_: episode)
    benchmark(repetitions=1)
    loop, ours, _, _ = [row.split()[-1] for row in capsys.readouterr().out.splitlines()[2:]]
    assert int(ours) < 0.5 * int(loop)          # operators

# kernels.py --------------------------------------------------------------------------------------
def operands_of(T, B, K, N, device, dtype=torch.float32):
    shapes = (T, B, K), (T, N, K), (T, N), (T, B, N)        # x, W, b, and an arriving gradient
    return [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]

def run(order, backend, operands, y=None):
    """The layer's result; from order 1 on also its gradients, of order 2 also those of these."""
    x, weight, bias, g = operands
    results = [kernels.MaskedLinear.apply(x, weight, bias, y, 0.2, backend)]
    if order > 0:
        results += torch.autograd.grad(results, [x, weight, bias], g, create_graph=order > 1)
    if order > 1:
        results += torch.autograd.grad(results[1:], [x, weight, g], [x, weight, bias])
    return results

def measure(device, tasks, orders):
    """Print the kernel's largest error as a share of the largest value and, on a GPU, times."""
    from triton.testing import do_bench_cudagraph  # the GPU's time, without Python's
    sizes = 100, 256, 512, 1024, 784, 1024, 512, 256, 1  # G's layers, then D's
    for (K, N), T, order in itertools.product(itertools.pairwise(sizes), tasks, orders):
        operands = operands_of(T, 64, K, N, device)
        results = run(order, "triton", operands)
        # Rounding may flip the sign of a y near 0, so float64 takes over the signs found here.
        exact = run(order, "torch", [v.double() for v in operands], results[0].detach().double())
        error = max((a - b).abs().max() / b.abs().max() for a, b in zip(results, exact))
        row = f"{K} to {N}, {T} tasks, order {order}: error {error:.1e}"
        if device == "cuda":
            ours, theirs = (1e3 * do_bench_cudagraph(lambda: run(order, backend, operands))
                            for backend in ("triton", "torch"))
            row += f"; {ours:.1f} us, PyTorch {theirs:.1f} us, ratio {theirs / ours:.2f}"
        print(row, flush=True)

def resources(capabilities=(80, 90, 100)):
    """Compiles what a second derivative launches, for GPUs that need not be here. Yields the most
    registers a thread, bytes of shared memory and bytes spilled, after what they are for."""
    triton, compiled = kernels.triton, []
    def compile_only(*values, warmup, **options):
        launch = triton.JITFunction.run
        compiled.append(launch(kernels.product_kernel, *values, warmup=True, **options))
    kernels.product_kernel.run = compile_only
    torch.cuda.is_tf32_supported = lambda: True
    for capability, T in itertools.product(capabilities, [1, 16]):
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        triton.runtime.driver.set_active(Mock(get_current_target=lambda: target))
        compiled.clear()
        run(2, "triton", operands_of(T, 64, 512, 512, "meta"))
        used = []
        for kernel in set(compiled):
            cache = triton.runtime.cache.get_cache_manager(kernel.hash)
            text = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-res-usage",
                                            cache.get_file("product_kernel.cubin")], text=True)
            registers, stack, local = map(int, re.findall(r"(?:REG|STACK|LOCAL):(\d+)", text))
            used.append((registers, kernel.metadata.shared, stack + local))
        yield capability, T, *map(max, zip(*used))

def variants():
    """How many kernels a default run compiles: one for each key that Triton's cache is asked for,
    in an ordinary step, a meta-gradient and a test, on tensors without memory."""
    jit, keys = kernels.triton.runtime.jit, set()
    target = kernels.triton.backends.compiler.GPUTarget("cuda", 90, 32)
    driver = Mock(get_current_target=lambda: target, get_current_device=lambda: 0)
    kernels.triton.runtime.driver.set_active(driver)
    def only_key(*values, grid, warmup, **options):
        _, known, _, _, binder = kernels.product_kernel.device_caches[0]
        _, specialization, options = binder(*values, **options)
        keys.add(jit.compute_cache_key(known, specialization, options))
    meta = functools.partial(torch.empty, device="meta")
    adam = lambda weights, _: Mock(param_groups=[{"params": weights}])
    with patch.object(kernels.product_kernel, "run", only_key), torch.device("meta"), \
            patch.multiple(kernels, why_not_triton=lambda _: None, default_backend="triton"), \
            patch.object(torch.cuda, "is_tf32_supported", lambda: True), \
            patch.object(mtgan, "adam", adam):
        players = mtgan.new_players()
        start = mtgan.Start(*players, meta(5, 2, 4))
        optimizers = [mtgan.adam(weights, 0) for weights in players]
        mtgan.gan_step(players, optimizers, meta(1, 64, 784), meta(1, 64, 100))
        mtgan.meta_gradient(start, meta(2, 25, 784), meta(2, 64, 784), "both")
        for theta in itertools.islice(mtgan.few_shot(meta(3, 25, 784), start), 8):
            mtgan.generator(theta, meta(3, 387, 100))
    return len(keys)

BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=TRITON)])

@pytest.fixture
def poisoned(monkeypatch):
    """Output memory starts as nan, so an unwritten element shows; nan behind it must survive."""
    behind = []
    def new_empty(tensor, *shape, **options):
        size = torch.Size(shape).numel()
        memory = tensor.new_full((size + 64 * shape[-1] + 64,), float("nan"), **options)
        behind.append(memory[size:])
        return memory[:size].view(shape)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    assert all(memory.isnan().all() for memory in behind), "the kernel wrote beyond its output"

def plain(x, weight, bias, slope):          # what fused_linear should compute
    z = x @ weight.mT + bias[:, None]
    return torch.where(z > 0, z, slope * z)

def draw(T, B, N, K, dtype=torch.float64):
    """x, weight, bias and g. From the CPU: with this seed no sign hangs on how a GPU rounds."""
    torch.manual_seed(0)
    return [v.detach().to(DEVICE) for v in operands_of(T, B, K, N, "cpu", dtype)]

def leaves(operands):                            # with the same strides
    return [v.detach().requires_grad_() for v in operands]

def all_gradients(layer, operands):
    """y, its gradients, and the gradients of each of those for x, weight, bias and g."""
    *inputs, g = leaves(operands)
    y = layer(*inputs)
    first = grad(y, inputs, g, create_graph=True)
    results = [y, *first]
    for value, v in zip(first, inputs):
        results += grad(value, [*inputs, g], v.detach().cos(), True, materialize_grads=True)
    return results

def close(actual, expected, tolerance):
    for left, right in zip(actual, expected, strict=True):
        margin = tolerance * right.norm().item() / max(right.numel(), 1) ** 0.5
        torch.testing.assert_close(left.double(), right, rtol=tolerance, atol=margin)

def compare(operands, slope, backend, tolerance):
    layer = functools.partial(fused_linear, slope=slope, backend=backend)
    exact = functools.partial(plain, slope=slope)
    actual = all_gradients(layer, operands)
    close(actual, all_gradients(exact, [v.double() for v in operands]), tolerance)
    # A fused optimiser would take a transposed gradient of a weight for a contiguous one.
    assert actual[2].is_contiguous() and actual[5].is_contiguous()

@BACKENDS
@pytest.mark.parametrize("slope, size", [                    # T, B, N, K; the last is empty
    (0, (3, 7, 33, 100)), (0.2, (3, 7, 33, 100)), (1, (3, 7, 33, 100)), (0.2, (1, 1, 784, 7)),
    (0, (1, 33, 100, 97)), (1, (3, 100, 1, 33)), (1.5, (3, 1, 7, 1)), (0.2, (2, 0, 3, 4))])
def test_all_gradients(poisoned, backend, slope, size):
    compare(draw(*size, dtype=torch.float32), slope, backend, 1e-5)

@TRITON
def test_all_gradients_by_large_tiles(poisoned, monkeypatch):
    monkeypatch.setattr(kernels, "MANY_TILES", 1)
    compare(draw(2, 70, 3, 40, dtype=torch.float32), 0.2, "triton", 1e-5)

def sliced(tensor):                              # the same values with nan between them
    T, R, C = tensor.shape
    around = tensor.new_full((T + 2, R + 3, 2 * C + 40), float("nan"))
    around[1:-1, 1:-2, 1:2 * C:2] = tensor
    return around[1:-1, 1:-2, 1:2 * C:2]

LAYOUTS = {"contiguous": lambda v: v, "sliced": sliced, "transposed": lambda v: sliced(v.mT).mT,
           "tasks last": lambda v: sliced(v.movedim(0, -1)).movedim(-1, 0),
           "one for all tasks": lambda v: v[:1].expand_as(v),
           "one for all rows": lambda v: v[:, :1].expand_as(v),
           "one for all columns": lambda v: v[:, :, :1].expand_as(v)}

@BACKENDS
@pytest.mark.parametrize("slope", [0.2, 1])      # 0.2 as a float32 is wrong by 3e-9
@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_in_double_precision(poisoned, backend, lay, slope):
    x, weight, bias, g = draw(3, 7, 11, 35)
    compare([lay(x), lay(weight), lay(bias[:, None])[:, 0], lay(g)], slope, backend, 1e-12)

@BACKENDS
def test_third_derivatives(poisoned, backend):
    def gradients(*inputs):
        y = fused_linear(*inputs, backend=backend)
        return grad(y.square().sum(), inputs, create_graph=True)
    assert gradgradcheck(gradients, leaves(draw(2, 2, 2, 3)[:3]), fast_mode=True)

@TRITON
def test_compiled_kernels_do_not_spill_and_cannot_run_on_a_cpu():
    code = ("import test_mtgan, kernels; print(kernels.why_not_triton('cpu')); "
            "print(test_mtgan.variants()); [print(*row) for row in test_mtgan.resources([90])]")
    refusal, count, *rows = subprocess.check_output(
        [sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "0"},
        cwd=os.path.dirname(kernels.__file__), text=True).splitlines()
    assert "cpu" in refusal and "TRITON_INTERPRET=1" in refusal and len(rows) == 2
    assert int(count) <= 30
    for row in rows:
        registers, shared, spilled = map(int, row.split()[-3:])
        assert 16 < registers <= 255 and 0 < shared <= 99 * 1024 and spilled == 0

def test_a_gradient_of_one_operand_alone():
    x, weight, bias, g = draw(2, 3, 5, 4)
    for wanted in range(3):
        inputs = [v.detach().requires_grad_(i == wanted) for i, v in enumerate((x, weight, bias))]
        found, = grad(fused_linear(*inputs), inputs[wanted], g)
        close([found], grad(plain(*inputs, 0.2), inputs[wanted], g), 1e-12)

def test_whole_cpu_falls_back_where_products_are_rounded(monkeypatch):
    before, mm = torch.get_float32_matmul_precision(), torch.mm
    try:
        kernels.use_whole_cpu()
        assert torch.get_float32_matmul_precision() == "medium"
        monkeypatch.setattr(torch, "mm", lambda a, b: mm(a.bfloat16(), b.bfloat16()).float())
        kernels.use_whole_cpu()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)

def test_refusals(monkeypatch):
    x, weight, bias, _ = operands_of(2, 3, 5, 4, "cpu")
    for change in ({"slope": -0.1}, {"slope": float("nan")}, {"slope": float("inf")},
                   {"backend": "cuda"}, {"bias": bias.to("meta")}, {"x": x[0]}, {"x": x[None]},
                   {"x": x[:1]}, {"x": x[..., :4]}, {"weight": weight[0]}, {"weight": weight.mT},
                   {"weight": weight[:, :3]}, {"bias": bias[0]}, {"bias": bias[:, None]}):
        with pytest.raises(ValueError, match=next(iter(change))):
            fused_linear(**{"x": x, "weight": weight, "bias": bias} | change)
    for dtypes in ([torch.bfloat16] * 3, [torch.int64] * 3, [torch.float32, torch.float64] * 2):
        with pytest.raises(TypeError, match="float32 or all float64"):
            fused_linear(*[v.to(dtype) for v, dtype in zip((x, weight, bias), dtypes)])
    monkeypatch.setattr(kernels, "why_not_triton", lambda device: f"not on {device}")
    with pytest.raises(RuntimeError, match="not on cpu"):
        fused_linear(x, weight, bias, backend="triton")

# Files --------------------------------------------------------------------------------------------
BUILT_IN = "--source strokes:0-3 --target shapes:0-3".split()
TINY = "--dry-run --device cpu --shots 3 --inner-steps 2".split()
SMALL = {"GENERATOR_SIZES": (100, 24, 16, 12, 784), "DISCRIMINATOR_SIZES": (784, 12, 16, 8, 1),
         "SAVE_SECONDS": 0, "TRANSFER_STEPS": 2,
         "DRY_RUN": {**mtgan.DRY_RUN, "warm_steps": 4, "judge_steps": 4}}
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["torch", "torchvision"])

def program(*arguments):
    """`mtgan.main` with small networks, few steps, and the state saved after every one."""
    with patch.multiple(mtgan, **SMALL):
        code = mtgan.main([str(argument) for argument in arguments])
    torch.set_default_device(None)
    return code

def refused(capsys, *arguments):
    capsys.readouterr()
    assert program(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "error:" in line] == lines[-1:]
    return lines[-1]

def in_a_process(arguments, death=None, seconds=0):
    """The exit code of a run that is killed half-way through its death-th file."""
    process = FORK.Process(target=until_death, args=(arguments, death, seconds))
    process.start()
    process.join()
    return process.exitcode

def until_death(arguments, death, seconds):
    replace, files = os.replace, itertools.count(1)
    def replace_or_die(temporary, path):
        if next(files) == death:
            os.truncate(temporary, os.path.getsize(temporary) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(temporary, path)
    os.replace = replace_or_die
    SMALL["SAVE_SECONDS"] = seconds
    sys.exit(program(*arguments))

def contents(folder):
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in paths}

def report_of(folder):
    return json.loads((folder / "report.json").read_text())

def put_picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28), np.uint8)).save(path)

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / ("long" * 15)
    for label, i in itertools.product("ant bee cat dog eel fox".split(), range(8)):
        put_picture(folder / label / f"{i}.png", seed=8 * ord(label[0]) + i)
    return folder

def command(pictures, out, *more):
    return ["--source", pictures, "--target", pictures, *TINY, "--out", out, *more]

@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures):
    out = tmp_path_factory.mktemp("finished")
    assert in_a_process(command(pictures, out)) == 0
    return out

@contextlib.contextmanager
def limit(what, most):
    before = resource.getrlimit(what)
    resource.setrlimit(what, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)

# Data ---------------------------------------------------------------------------------------------
@pytest.fixture
def offline(monkeypatch):
    """No network, and drawn domains of nine images at most, which are drawn at once."""
    level_sets = mtgan.level_sets
    monkeypatch.setattr(mtgan, "level_sets", lambda pen, n: level_sets(pen, 9 if n == 400 else n))
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive",
                        Mock(side_effect=urllib.error.URLError("no route to host")))

def test_class_lists(offline, tmp_path):
    title, classes = mtgan.load_dataset("strokes:0-3,9", "")
    assert title == "strokes" and list(classes) == [f"strokes {label}" for label in "01239"]
    for label in [*range(12), "cats", "cat-big", "cat 2", "cat"]:
        put_picture(tmp_path / str(label) / "picture.png")
    names = [*map(str, range(12)), "cat", "cat 2", "cat-big", "cats"]
    assert list(mtgan.load_folder(tmp_path)) == names
    assert list(mtgan.load_dataset(f"{tmp_path}:2", "")[1]) == [f"{tmp_path.name} 2"]

def put_mnist(folder, changed):
    """Files in MNIST's format: three images of each class in either part."""
    labels = np.arange(10, dtype=np.uint8).repeat(3)
    images = np.zeros((30, 28, 28), np.uint8) + labels[:, None, None]
    right = {"images-idx3-ubyte": images, "labels-idx1-ubyte": labels}
    for part, kind in itertools.product(("train", "t10k"), right):
        content = changed.get(f"{part}-{kind}", right[kind])
        if isinstance(content, np.ndarray):
            sizes = b"".join(size.to_bytes(4, "big") for size in content.shape)
            content = bytes([0, 0, 8, content.ndim]) + sizes + content.tobytes()
        (folder / "MNIST" / "raw").mkdir(parents=True, exist_ok=True)
        (folder / "MNIST" / "raw" / f"{part}-{kind}").write_bytes(content)

def test_mnist_files(tmp_path):
    put_mnist(tmp_path, {})
    title, classes = mtgan.load_dataset("mnist:0-6,9", tmp_path)
    assert title == "mnist" and list(classes) == [f"mnist {label}" for label in "01234569"]
    for label, images in classes.items():
        assert images.shape == (6, 784) and (images == int(label[-1])).all()

@pytest.mark.parametrize("name, changed", [
    ("train-images-idx3-ubyte", np.zeros((30, 56, 28), np.uint8)),
    ("t10k-images-idx3-ubyte", np.zeros((30, 32, 32), np.uint8)),           # the parts differ
    ("t10k-labels-idx1-ubyte", np.zeros(20, np.uint8)), ("train-images-idx3-ubyte", b""),
    ("train-labels-idx1-ubyte", b"<html>" + bytes(32)),
    ("train-images-idx3-ubyte", bytes([0, 0, 8, 3, *3 * [0, 0, 0, 28], 1, 2]))])
def test_damaged_mnist_files(name, changed, tmp_path, offline, capsys):
    put_mnist(tmp_path, {name: changed})
    kept = contents(tmp_path)
    where = ["--data-dir", tmp_path, "--out", tmp_path / "out"]
    line = refused(capsys, "--source", "mnist", *TINY, *where)
    assert f"'mnist' in {tmp_path}" in line and "damaged" in line and contents(tmp_path) == kept

def test_without_a_network(tmp_path, offline, capsys):
    line = refused(capsys, "--source", "mnist", *TINY, "--data-dir", tmp_path / "none")
    assert "'mnist'" in line and "no network" in line and "strokes" in line
    assert program(*BUILT_IN, *TINY, "--out", tmp_path / "out") == 0
    report = report_of(tmp_path / "out")
    saved = torch.load(tmp_path / "out" / "mtgan.pt", weights_only=True)
    for title in (capsys.readouterr().out, report["domains"], saved["domains"]):
        assert title.startswith("strokes and shapes")
    assert {row["target"] for row in report["rows"]} == {"shapes 3"}

def test_what_is_left_out_of_a_folder(tmp_path, monkeypatch, capsys):
    cat, scandir = tmp_path / "cat", os.scandir
    put_picture(cat / "good.png")
    put_picture(cat / "locked" / "x.png")
    for place, name in itertools.product((".", "cat", "cat/deep"), (
            "._x.png", ".ipynb_checkpoints/x.png", "__MACOSX/sub/x.png", "@eaDir/x.png")):
        put_picture(tmp_path / place / name)
    for path in (cat / "a.heic", cat / "b.heic", cat / "damaged.png", tmp_path / "notes.txt"):
        path.write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    Image.new("L", (3000, 1)).save(cat / "line.png")
    (cat / "link").symlink_to(tmp_path)
    def locked(path="."):               # as chmod 0 does, but not for root
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", locked)
    os.mkfifo(cat / "pipe.png")                     # never to be waited for
    (cat / "x.\x1b[1m").write_bytes(b"")
    for name in ("__girl.png", "@ben.png", "$5.png"):
        put_picture(cat / name)
    assert {label: len(x) for label, x in mtgan.load_folder(tmp_path).items()} == {"cat": 4}
    [line] = capsys.readouterr().err.splitlines()
    for kind in (str(tmp_path), "2 unreadable .heic", "1 unreadable .txt", "1 unreadable .png",
                 "1 too thin", "1 linked folder", "1 locked folder", "1 no file",
                 r"1 unreadable '.\x1b"):
        assert kind in line

def test_pictures_of_all_kinds(tmp_path):
    pixels = np.zeros((40, 20), np.uint8)
    pixels[6:20, 8:12] = 255
    dark, light, white = (Image.fromarray(x) for x in (pixels, 255 - pixels, pixels | 255))
    palette = Image.fromarray(pixels // 255)
    palette.putpalette([255, 255, 255, 0, 0, 0])
    hot = pixels.astype(np.uint16) * 4
    hot[0, 0] = 65535
    long = PngImagePlugin.PngInfo()
    long.add_text("story", "x" * 3_000_000)
    soft = Image.fromarray(np.maximum(pixels, 2))       # alpha 2 of 255 around what is cut out
    turned = Image.Exif()
    turned[0x112] = 6
    for name, picture, options in [
            ("dark.png", dark, {}), ("light.jpg", light.convert("RGB"), {"quality": 95}),
            ("bit.png", light.convert("1"), {}), ("palette.png", palette, {"transparency": 0}),
            ("black-on-clear.png", Image.merge("LA", (Image.new("L", (20, 40)), dark)), {}),
            ("white-on-clear.png", Image.merge("RGBA", (white, white, white, dark)), {}),
            ("sixteen.png", Image.fromarray((255 - pixels) * np.uint16(257)), {}),
            ("hot.png", Image.fromarray(hot), {}),
            ("broken.webp", light.convert("RGB"), {"exif": b"Exif\0\0MM", "lossless": True}),
            ("broken.png", light, {"exif": b"MM nothing"}), ("long.png", light, {"pnginfo": long}),
            ("edge.png", Image.merge("LA", (Image.fromarray(220 - 0 * pixels), soft)), {}),
            ("faint.png", Image.fromarray(pixels // 8), {}),
            ("turned.jpg", dark.rotate(90, expand=True), {"exif": turned, "quality": 95})]:
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        picture.save(folder / name, **options)
        image = mtgan.load_folder(folder)["(loose)"].numpy().reshape(28, 28).copy()
        ground = image.copy()
        ground[2:16, 11:17] = 0                 # the stroke, blurred
        ground[0, 7:9] = 0                      # the hot pixel
        assert image[6:12, 13:15].min() > 200 and ground.max() < 40, name

def test_a_folders_ground_is_judged_once(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(20):                 # squares on a ground of medium grey
        square = np.full((28, 28), rng.integers(117, 140), np.uint8)
        square[8:20, 8:20] = 215
        Image.fromarray(square).save(tmp_path / f"{i}.png")
    images = mtgan.load_folder(tmp_path)["(loose)"].view(-1, 28, 28).int()
    assert len({(x[14, 14] > x[0, 0]).item() for x in images}) == 1
    for side in ("train", "test"):
        put_picture(tmp_path / "both" / side / "a" / "x.png")
    with pytest.raises(mtgan.UserError, match="train"):
        mtgan.load_folder(tmp_path / "both")

@pytest.mark.filterwarnings("ignore:.*decompression bomb")
@pytest.mark.parametrize("mode, width, height, megabytes", [
    ("1", 13370, 13370, 400), ("P", 13370, 13370, 400), ("RGB", 4000, 3000, 120)])
def test_large_pictures_take_little(mode, width, height, megabytes, tmp_path):
    Image.new(mode, (width, height)).save(tmp_path / "large.png", compress_level=1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    began = time.monotonic()
    with limit(resource.RLIMIT_AS, used + megabytes * 2 ** 20):
        mtgan.read_image(tmp_path / "large.png")
    assert time.monotonic() - began < 3

# The command line ---------------------------------------------------------------------------------
@pytest.mark.parametrize("message, line", [
    ("--target", "--adapt="), ("--target", "--adapt run"), ("mtgan.pt", "--adapt= --target shapes"),
    ("one --target", "--adapt run --target shapes strokes"), ("run", "--adapt run --target shapes"),
    ("--meta-lr", "--adapt run --target shapes --meta-lr 1"), ("run", "--tables run"),
    ("--seed", "--tables run --seed 1"), ("--steps", "--steps 3"), ("--samples", "--samples 3"),
    *((f"'{spec}'", f"--source {spec}") for spec in (
        "nowhere", "strokes:3-", "strokes:-3", "strokes:5-3", "strokes:0-10", "strokes:0,99")),
    ("--samples must be", "--adapt run --target shapes --samples 99999999999999999999"),
    ("--shots 5 or less", "--shots 6"), ("is a file", "--source /dev/../proc/self/status"),
    ("--shots", "--shots 0"), ("--inner-lr", "--inner-lr nan"),
    ("warp", "--device warp"), ("too few classes", "--source strokes:0 --target strokes:0"),
    ("too long", f"--out {300 * 'x'}"), ("/dev/null", "--out /dev/null/out")])
def test_a_wrong_command_is_one_line(message, line, tmp_path, offline, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trains = not re.search("--adapt|--tables", line)
    assert message in refused(capsys, *([*BUILT_IN, *TINY] if trains else []), *line.split())
    assert not list(tmp_path.iterdir())

def test_a_reader_who_leaves_ends_no_run(tmp_path):
    few = ["--warm-steps", "1", "--meta-steps", "1", "--out", str(tmp_path)]
    line = shlex.join([sys.executable, mtgan.__file__, *BUILT_IN, *TINY, *few]) + " 2>&1 | head -1"
    shell = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True,
                           env={**os.environ, "PYTHONIOENCODING": "cp932"})
    assert shell.returncode == 0 and shell.stdout.count("\n") == 1 and not shell.stderr
    assert report_of(tmp_path)["rows"]

# Runs ---------------------------------------------------------------------------------------------
def test_killed_at_any_moment_the_same_command_goes_on(finished, pictures, tmp_path):
    def times():
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("state/*.pt")
                if path.name != "progress.pt"}
    for death, seconds in [(1, 0), (3, 1e9), *12 * [(8, 0)]]:
        before = times()
        code = in_a_process(command(pictures, tmp_path), death, seconds)
        changed = [path.name for path, when in before.items() if times()[path] != when]
        assert len(changed) <= 1
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 and "test.pt" in [path.name for path in before]
    assert (tmp_path / "mtgan.pt").read_bytes() == (finished / "mtgan.pt").read_bytes()
    assert report_of(tmp_path)["rows"] == report_of(finished)["rows"]

def test_results_of_two_seeds(finished, pictures, tmp_path):
    assert program(*command(pictures, tmp_path, "--seed", 1)) == 0
    one, two = (report_of(out)["rows"] for out in (finished, tmp_path))
    assert not {row["frechet"] for row in one} & {row["frechet"] for row in two}
    assert len({row["frechet"] for row in one if row["steps"]}) == 4 * 2 * 3    # each rate its own
    with Image.open(tmp_path / "progress.png") as rows:     # support and three stages, two targets
        assert rows.size == (2 * (16 * 29 + 1), 2 * (4 * 29 + 1))
    with Image.open(tmp_path / "adaptation.png") as strip:
        eel, *_, fox, _, _, _, _ = (row[:40] for row in np.split(np.asarray(strip), 10))
    assert not np.array_equal(eel, fox)         # the longest label ends with the class

def test_a_run_goes_on_as_what_it_is(finished, pictures, tmp_path, monkeypatch, capsys):
    out, same = tmp_path / "out", tmp_path / "elsewhere" / pictures.name
    shutil.copytree(finished, out)
    shutil.copytree(pictures, same)
    line = refused(capsys, *command(pictures, out), "--inner-steps", 5)
    assert re.search("inner.steps.*2.*5", line) and len(contents(out)) == len(contents(finished))
    monkeypatch.chdir(same.parent)
    assert program(*command(pictures.name, "../out")) == 0                # the same pictures
    source = Path(kernels.__file__).read_text()
    for changed, code in ((source + "# a remark\n", 0), (source + "a = 1\n", 2)):
        (tmp_path / "kernels.py").write_text(changed)
        with patch.object(kernels, "__file__", str(tmp_path / "kernels.py")):
            assert program(*command(pictures.name, "../out")) == code
    assert "has other code" in capsys.readouterr().err
    kept = contents(out)
    put_picture(same / "bee" / "3.png")
    assert "has other images:" in refused(capsys, *command(pictures.name, "../out"))
    assert contents(out) == kept
    assert "bee'" in refused(capsys, *command(pictures, tmp_path / "new"), "--target", same)

def test_two_runs_in_one_folder(pictures, tmp_path, monkeypatch, capsys):
    with filelock.FileLock(tmp_path / ".lock"):
        assert "another process" in refused(capsys, *command(pictures, tmp_path))
    monkeypatch.setattr(filelock.FileLock, "acquire", Mock(side_effect=NotImplementedError))
    assert "no locks" in refused(capsys, *command(pictures, tmp_path))

@pytest.mark.parametrize("name, text", [
    ("notes.txt", "precious"), *(("report.json", text) for text in ("precious", "{}", "[1]"))])
def test_a_folder_of_others_is_left_alone(name, text, finished, pictures, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert str(tmp_path) in refused(capsys, *command(pictures, tmp_path))
    adapt = ["--adapt", finished, "--target", pictures, "--out", tmp_path]
    assert str(tmp_path) in refused(capsys, *adapt)
    assert contents(tmp_path) == {tmp_path / name: text.encode()}

@pytest.mark.parametrize("room", [100, 30_000])         # none for the report, none for a state
def test_a_full_disk(room, pictures, tmp_path, capsys):
    for _ in range(2):
        kept = contents(tmp_path)
        with limit(resource.RLIMIT_FSIZE, room):
            refused(capsys, *command(pictures, tmp_path))
        assert kept.items() <= contents(tmp_path).items()
        assert program(*command(pictures, tmp_path)) == 0

class Waits(TorchDispatchMode):     # counts where Python asks for the value of a tensor
    calls = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))

def test_nothing_waits_for_the_device_between_two_prints(tmp_path, offline, monkeypatch):
    """What is counted does not grow with the number of steps."""
    monkeypatch.setattr(mtgan, "draw_progress", lambda *_: None)
    def waits(steps):
        args = parsed(*BUILT_IN, "--dry-run", "--meta-steps", steps, "--shots", 3, "--inner-steps",
                      2, "--out", tmp_path / str(steps))
        with patch.multiple(mtgan, **SMALL | {"SAVE_SECONDS": 1e9}):
            domains, players = mtgan.load_domains(args), mtgan.new_players()
            with Waits() as counted:
                mtgan.train_gan("a", players, steps, domains, args)
                mtgan.meta_train(players, domains, args)
        return counted.calls
    assert 0 < waits(3) == waits(9)

def test_two_processes(tmp_path, pictures, capsys):
    """torchrun: the mean of both gradients, the same weights in both; goes on after a kill."""
    code = """
import sys, torch, mtgan, test_mtgan
from unittest.mock import patch
save, average, states = mtgan.save, mtgan.average_of_processes, []
def average_and_check(gradients):
    mean = average([g.clone() for g in gradients])
    both = [[torch.empty_like(g) for _ in range(2)] for g in mean]
    for g, own in zip(gradients, both):
        torch.distributed.all_gather(own, g.contiguous())
    assert all(torch.allclose((a + b) / 2, m) for (a, b), m in zip(both, mean))
    assert any((a != b).any() for a, b in both)
    return mean
def apply_and_check(optimizer, gradients, apply=mtgan.apply_gradients):
    skipped = apply(optimizer, gradients)
    if gradients[0].shape[0] == 1 and not states:
        for p in optimizer.param_groups[0]["params"]:
            own = p.clone()
            torch.distributed.broadcast(own, 0)
            assert torch.equal(own, p)
    return skipped
def save_or_die(path, content):
    save(path, content)
    if path.name == "transfer.pt" and content[0] == 3 and "die" in sys.argv:
        import os; os._exit(1)
    states.append(path) if path.name == "judge.pt" else None
with patch.multiple(mtgan, **test_mtgan.SMALL, save=save_or_die, draw_progress=lambda *_: None,
                    average_of_processes=average_and_check, apply_gradients=apply_and_check):
    sys.exit(mtgan.main([word for word in sys.argv[1:] if word != "die"]))
"""
    script = tmp_path / "run.py"
    script.write_text(code)
    def torchrun(processes, *more):
        line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes,
                "--standalone", script, *command(pictures, tmp_path / "out"), *more]
        paths = {"PYTHONPATH": str(Path(mtgan.__file__).parent), "TRITON_INTERPRET": "0"}
        return subprocess.run([str(word) for word in line], env=os.environ | paths,
                              capture_output=True, text=True)
    died = torchrun(2, "die")
    assert died.returncode != 0 and (tmp_path / "out" / "mtgan.pt").exists(), died.stderr
    assert "gloo" not in died.stderr                # the other one ends without a traceback
    assert "processes (2, not 1)" in refused(capsys, *command(pictures, tmp_path / "out"))
    finished = torchrun(2)
    assert finished.returncode == 0, finished.stderr
    assert report_of(tmp_path / "out")["rows"] and finished.stdout.count("report.json") == 1

def test_classes_of_copies(finished, tmp_path, capsys):
    for label, i in itertools.product("ab", range(12)):
        put_picture(tmp_path / "copies" / label / f"{i}.png", seed=ord(label))
    test = ["--test", finished, "--dry-run", "--shots", 3, "--target", tmp_path / "copies"]
    assert program(*test, "--out", tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert "Only 4 images" in text and "copies of one picture" in text and "nan" not in text

def test_non_finite_updates_are_skipped_and_counted(tmp_path, capsys):
    leaf, drawn, values = torch.zeros(1, 1), set(), [1.0, math.nan, 1.0, math.inf, 1.0]
    optimizer = mtgan.adam([leaf], 1.0)
    def do_step(step):
        drawn.add(torch.rand(1).item())
        return {"skipped": mtgan.apply_gradients(optimizer, [torch.full((1, 1), values[step])])}
    args = parsed("--out", tmp_path)
    args.progress = mtgan.Progress({"stage": 1, "another": 1}, tmp_path)
    for stage in ("stage", "stage", "another"):         # the second time nothing is left to do
        mtgan.run_stage(stage, 5, do_step, [leaf], [optimizer], args)
    lines = capsys.readouterr().err.splitlines()
    assert abs(leaf.item() + 6) < 1e-4 and len(drawn) == 10     # every step has its own numbers
    assert "stage 5/5" in lines[1] and "skipped 2" in lines[1] and "warning: stage" in lines[2]

def test_progress(tmp_path, monkeypatch, capsys):
    """What is left of the stage and of the run; a nan does not stay in a mean."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = mtgan.Progress({"a": 10, "b": 30}, tmp_path)
    for clock[0], done, score in [(10, 5, 2.0), (11, 6, math.nan), (41, 10, 4.0)]:
        progress.show("a", done, 10, {"score": torch.tensor(score)}, {"skipped": 3})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == ("a 5/10, 50 s left, of the run 350 s, score 2, mean score 2, skipped 3")
    assert lines[1].startswith("expected minutes: a 1.1, b 3.4") and "mean score 2.04" in lines[2]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["score"]) for row in rows] == [(5, 2.0), (10, 4.0)]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for clock[0] in (42.0, 42.1, 43.0):         # a few times a second at most, in one line
        progress.show("b", 1, 30)
    assert capsys.readouterr().err.count("\r") == 2

def test_tables_of_several_runs(finished, tmp_path, capsys):
    def table(*folders):
        assert program("--tables", *folders) == 0
        text = capsys.readouterr().out
        means, halves = zip(*re.findall(r"(\S+) ± (\S+)", text))
        return text.splitlines()[0], means, sum(map(float, halves))
    path, report, one = tmp_path / "report.json", report_of(finished), table(finished)
    assert table(finished, f"{finished}/") == one               # one run, named twice
    path.write_text(json.dumps({**report, "settings": {**report["settings"], "seed": 7}}))
    two = table(finished, tmp_path)
    shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("copy"))
    assert "same --seed" in refused(capsys, "--tables", finished, tmp_path, tmp_path / "copy")
    assert all((finished / f"results{kind}.png").exists() for kind in ("", "-of-2"))
    assert one[0] == f"{report['domains']}, n = 2 classes x 1 draws"
    assert two[0] == f"{one[0]} x 2 runs"
    assert one[1] == two[1] and two[2] < one[2] / 1.6
    path.write_text(json.dumps({**report, "settings": {**report["settings"], "shots": 7}}))
    assert "has other shots (7, not 3)" in refused(capsys, "--tables", finished, tmp_path)
    path.write_text(json.dumps({"settings": report["settings"]}))           # unfinished
    assert str(tmp_path) in refused(capsys, "--tables", tmp_path)

def test_deployment(finished, pictures, tmp_path, monkeypatch, capsys):
    mine, alone = tmp_path / "mine", tmp_path / "renamed.pt"
    shutil.copytree(pictures / "cat", mine / "cat")
    shutil.copy(finished / "mtgan.pt", alone)                   # all that is needed
    adapt, out = ["--adapt", alone, "--target", mine, "--steps", 3], mine / "cat" / "out"
    steps, gan_step = [], mtgan.gan_step
    monkeypatch.setattr(mtgan, "gan_step", lambda *a, **k: steps.append(1) or gan_step(*a, **k))
    for place in (out, tmp_path / "again", tmp_path / "again"):     # the same bits, three times
        assert program(*adapt, "--samples", 5, "--out", place) == 0
    assert len(steps) == 3 * (3 - 2)                            # after the learned ones
    line = capsys.readouterr().out.split("\n\n")[-1]
    made = {path.name: content for path, content in contents(out).items()}
    again = {path.name: content for path, content in contents(tmp_path / "again").items()}
    samples = [f"sample-{number:03}.png" for number in range(5)]
    drawn = [*samples, "samples.png", "nearest.png", "interpolation.gif", "adapted.pt"]
    assert {*made} == {*drawn, "report.json", "log.jsonl"}
    assert all(made[name] == again[name] for name in drawn)
    assert "8 of 8 pictures" in line and all(name in line for name in drawn[5:])
    theta = torch.load(out / "adapted.pt", weights_only=True)
    with patch.multiple(mtgan, **SMALL):
        assert mtgan.generator(theta, mtgan.noise(1, 2)).shape == (1, 2, 784)
    with Image.open(out / "samples.png") as sheet:              # eight of the user's, then five
        sheet = np.asarray(sheet)
    assert sheet.shape == (3 * (2 * 29 + 1), 3 * (8 * 29 + 1)) and sheet[:88].std() > 20
    capsys.readouterr()
    assert len(torch.cat(list(mtgan.load_folder(mine).values()))) == 8
    assert "8 drawn by mtgan.py" in capsys.readouterr().err
    assert "other steps (3, not 4)" in refused(capsys, *adapt[:-1], 4, "--samples", 5, "--out", out)
    assert "8 images, and needs 9" in refused(capsys, *adapt, "--shots", 9)
    assert {path.name: content for path, content in contents(out).items()} == made

def test_the_second_g_draws_the_samples(tmp_path, pictures, finished, monkeypatch):
    def few_shot(support, start):
        while True:
            yield [torch.stack([-9 + 0 * p, 9 + 0 * p]) for p in map(torch.squeeze, start.theta)]
    monkeypatch.setattr(mtgan, "few_shot", few_shot)
    monkeypatch.setattr(mtgan, "translate", lambda theta, images: images)
    sides = ["--source", pictures / "ant", "--target", pictures / "bee"]
    assert program("--adapt", finished, *sides, "--steps", 2, "--out", tmp_path) == 0
    with Image.open(tmp_path / "sample-000.png") as image:
        assert np.asarray(image)[1:-1, 1:-1].min() == 255

def test_an_mtgan_pt_that_is_none(finished, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, adapt = tmp_path / "mtgan.pt", ["--target", pictures, "--out", "out", "--adapt"]
    assert "mtgan.pt" in refused(capsys, *adapt, tmp_path)
    good, saved = (finished / "mtgan.pt").read_bytes(), mtgan.load(finished / "mtgan.pt")
    tensors = *saved["theta"], *saved["phi"], saved["log_rates"]
    assert {p.dtype for p in tensors} == {torch.half}       # which halves the file
    other = [parameter[..., :7] for parameter in saved["theta"]]
    nan = [parameter * math.nan for parameter in saved["theta"]]
    trap = type("Trap", (), {"__reduce__": lambda self: (os.system, ("touch sprung",))})()
    for content in (b"", good[:len(good) // 2], pickle.dumps(trap, 2), {**saved, "theta": trap},
                    {"weights": 3}, [1, 2], torch.zeros(3), 3, {**saved, "theta": nan},
                    {**saved, "log_rates": 3}, {**saved, "phi": [3] * 8}, {**saved, "theta": 3},
                    {**saved, "log_rates": saved["log_rates"][:, :1]}, {**saved, "theta": other}):
        torch.save(content, path)
        if isinstance(content, bytes):
            path.write_bytes(content)
        line = refused(capsys, *adapt, path)
        assert list(tmp_path.iterdir()) == [path]
    assert "other networks" in line

def test_a_pair_of_ones_own(finished, pictures, tmp_path, capsys):
    adapt = ["--adapt", finished, "--steps", 2, "--shots", 4, "--out", tmp_path / "out"]
    assert program(*adapt, "--source", pictures / "ant", "--target", pictures / "bee") == 0
    ants = mtgan.load_folder(pictures / "ant")["(loose)"].view(-1, 28, 28).int()
    with Image.open(tmp_path / "out" / "translation.png") as sheet:
        first = torch.tensor(np.asarray(sheet)[3:87:3, 3:87:3])     # an image of the source
        assert sheet.size == (351, 264) and (first - ants).abs().amax((1, 2)).min() <= 1
    put_picture(tmp_path / "one" / "a.png")
    for message, options in (
            ("same images", ["--source", pictures / "ant", "--target", pictures / "." / "ant"]),
            ("has 1 images", ["--target", tmp_path / "one"]), ("--target", ["--source", pictures]),
            ("one --source", ["--source", pictures, tmp_path, "--target", pictures])):
        assert message in refused(capsys, *adapt[:-1], tmp_path / "new", *options)
    assert not (tmp_path / "new").exists()

def test_translation_keeps_the_noise():
    torch.manual_seed(0)
    theta = [torch.cat([p, p, -p]) for p in mtgan.new_players().theta]
    images = mtgan.generator([p[:1] for p in theta], mtgan.noise(1, 5)).detach()
    for first in (0, 1):                # the second G is the same as the first, or not
        given, found, other = mtgan.translate([p[first:first + 2] for p in theta], images)
        assert torch.equal(given, images[0]) and torch.allclose(found, other) == (first == 0)
        assert (found - images).norm() < 0.5 * images.std(1).norm() * 5 ** 0.5

def test_a_start_on_ones_own_classes(finished, pictures, tmp_path, capsys):
    alone, test = tmp_path / "alone.pt", ["--dry-run", "--shots", 3, "--target", pictures]
    shutil.copy(finished / "mtgan.pt", alone)
    for start in (finished, alone, alone):              # the last time it is done already
        out = tmp_path / f"test-{start.name}"
        assert program("--test", start, *test, "--out", out) == 0
        rows = report_of(out)["rows"]
        assert len({row["target"] for row in rows}) == 6
        assert any("transfer" in row["method"] for row in rows) == (start == finished)
        line = "trained on .*, and so on these classes: (.*), n"
        trained_on = re.search(line, capsys.readouterr().out)
        assert len(trained_on[1].split(", ")) == 4      # of six, two were held out
    saved = mtgan.load(alone)
    torch.save({**saved, "theta": [p + 1 for p in saved["theta"]]}, alone)      # of another run
    assert "has other start" in refused(capsys, "--test", alone, *test, "--out", out)

def test_the_start_that_comes_along(tmp_path):
    start, hearts = Path(mtgan.SHIPPED), Path(mtgan.SHIPPED).parent / "hearts"
    assert start.stat().st_size <= 7e6 and sum(map(len, contents(hearts).values())) <= 30e3
    line = f"--adapt --target {hearts} --steps 30 --samples 32 --out {tmp_path} --device cpu"
    assert mtgan.main(line.split()) == 0
    samples = np.stack([Image.open(path) for path in tmp_path.glob("sample-*.png")])
    real = mtgan.load_folder(hearts)["(loose)"].double().mean(0)
    assert np.corrcoef(samples.mean(0).ravel(), real)[0, 1] > 0.7

def test_the_recipe_for_a_classifier():
    text = Path(mtgan.__file__).with_name("findings") / "EXPERIMENTS.md"
    code = text.read_text().split("for a classifier")[1].split("```python\n")[1].split("```")[0]
    exec(code, names := {"support": torch.rand(2, 5, 784)})
    assert code.count("\n") <= 15 and names["images"].shape == (len(names["labels"]), 784)
    assert set(names["labels"].tolist()) == {0, 1}

if __name__ == "__main__":
    kernels.use_whole_cpu()
    if sys.argv[1:] == ["kernel"] and kernels.triton is None:
        print(kernels.why_not_triton("cpu"))
    elif sys.argv[1:] == ["kernel"]:
        measure(DEVICE, *(([1, 4, 16], [0, 1, 2]) if DEVICE == "cuda" else ([1], [2])))
    else:
        torch.set_default_device(DEVICE)
        for kernels.default_backend in ("torch", "triton") if DEVICE == "cuda" else ("torch",):
            benchmark()
