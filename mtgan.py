"""MT-GAN: a Meta-Transfer Generative Adversarial Network.

A GAN trained from scratch needs many images and steps. MT-GAN meta-trains the initialisation of a
generator G and a discriminator D, so that on a new domain a few images and steps are enough.

    python mtgan.py --adapt --target my_images/         # draw more of them
    python mtgan.py --source mnist --target fashion     # meta-train a start, test it
    python mtgan.py --test --target my_classes/         # test the start in assets

A *domain* is a class of images, as 'mnist 7'. A *task* is to generate a domain of which only a few
*shots* are given, its *support*. An *episode* has a pair of domains, a source and a target, treated
alike: copies of the initialisation take k *inner* steps of the GAN's game on the support of each; a
score tells how far images of this G are from other real ones, the *query*; then one *outer* step
changes the initialisation. *MAML* follows the gradient of the score through all inner steps.
*Reptile* goes where they have led, and differentiates through none. By default both are added.
Most domains are made up (section 5): the few real ones would be learned by heart.

Three equations (theta: G, phi: D, z: noise, R: real images, a: rates, learned as log a; c = 0.1):

    (1) the game      L_D = mean softplus(-D(R)) + mean softplus(D(G(z)))
                      L_G = mean softplus(-D(G(z))) + c e(G(z), R)    e: `energy_distance`
    (2) inner step    phi'   = phi   - a_phi   u(dL_D/dphi)     theta held constant
                      theta' = theta - a_theta u(dL_G/dtheta)   the same z, phi' held constant
                      u(v) = v / rms(v), rms over each tensor
    (3) outer step    (start, log a) -= optimiser(unit(g/|g| + r/|r|))
                      g = d (mean score of the tasks) / d (start, log a)      MAML
                      r = start - mean over the tasks of (theta_k, phi_k), 0  Reptile
"""
import argparse, io, itertools, json, math, os, random, re, socket, sys, time, zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: idle threads spin less
import filelock
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageStat, PngImagePlugin
from torch.autograd import grad

from kernels import fused_linear, keep_memory, replay, why_not_triton

def option(default, text, **how):
    """A setting that is an option; how: for argparse."""
    if type(default) in (int, float):
        how, text = {"type": type(default), "metavar": "N"}, f"{text} ({default})"
    return field(default=default, metadata={"help": text, **how})

SHIPPED = str(Path(__file__).parent / "assets" / "mtgan.pt")  # of the default run
START = {"nargs": "?", "const": SHIPPED, "metavar": "RUN"}

@dataclass
class Settings:
    """All that decides a run, `args` from here on."""
    source: tuple = option(("mnist",), "source domains (mnist)", nargs="+", metavar="SPEC")
    target: tuple = option(("fashion",), "target domains (fashion)", nargs="+", metavar="SPEC")
    data_dir: str = option("data", "where data sets are, or go to (data)", metavar="DIR")
    out: str = option(None, "folder for the results (runs/SOURCE-TARGET)", metavar="DIR")
    seed: int = option(0, "decides all that is random")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu",
                         "cpu, cuda, cuda:1 ... (cuda, if there is one)", metavar="NAME")
    kernel: str = option("auto", "of the linear layers", choices=("auto", "torch", "triton"))
    dry_run: bool = option(False, "everything once, tiny, in a minute", action="store_true")
    algorithm: str = option("both", "meta-learner", choices=("maml", "fomaml", "reptile", "both"))
    shots: int = option(25, "support images of a task; --adapt: all, if fewer")
    inner_steps: int = option(5, "inner steps on the support")
    inner_lr: float = option(2e-3, "G's inner rate to begin with, twice D's")
    warm_steps: int = option(5000, "steps of ordinary GAN training to start from")
    meta_steps: int = option(500, "episodes")
    meta_batch: int = option(1, "pairs of an episode, two tasks each")
    meta_lr: float = option(4e-4, "outer learning rate")
    test_seeds: int = option(5, "draws of the support in meta-testing")
    tables: tuple = option(None, "print the tables of finished runs", nargs="+", metavar="RUN")
    test: str = option(None, "test on all classes of --target (the start in assets)", **START)
    adapt: str = option(None, "adapt to --target, and generate (the start in assets)", **START)
    steps: int = option(100, "steps of --adapt")
    samples: int = option(64, "images that --adapt generates")
    test_steps: tuple = (0, 1, 2, 5, 10, 20, 50, 100, 200)  # no option
    judge_steps: int = 500

class UserError(Exception):
    """Something that the user can put right."""

def require(fine, message):
    if not fine:
        raise UserError(message)

# 1  Networks as functions. "# [T, B]" is a shape: T tasks, B images, K inputs, N outputs ---
PIXELS, NOISE = 28 * 28, 100
GENERATOR_SIZES = (NOISE, 256, 512, 1024, PIXELS)
DISCRIMINATOR_SIZES = (PIXELS, 1024, 512, 256, 1)
KERNEL = "auto"  # backend of all linear layers, set by --kernel

def new_parameters():
    """[*theta, *phi], 8 tensors each: weights [T, N, K], biases [T, N]; T = 1, tasks share them."""
    sizes = [*itertools.pairwise(GENERATOR_SIZES), *itertools.pairwise(DISCRIMINATOR_SIZES)]
    layers = [torch.nn.Linear(inputs, outputs) for inputs, outputs in sizes]
    return [p.detach().unsqueeze(0) for layer in layers for p in layer.parameters()]

def network(parameters, x, slope):
    """Linear layers with LeakyReLU between them: x [T, B, K] -> [T, B, N]"""
    *hidden, last = zip(parameters[::2], parameters[1::2])
    for weight, bias in hidden:
        x = fused_linear(x, weight, bias, slope, backend=KERNEL)
    return fused_linear(x, *last, slope=1.0, backend=KERNEL)

def generator(theta, z):
    """Noise z [T, B, 100] -> images in [-1, 1]  # [T, B, 784]"""
    return network(theta, z, slope=0.0).tanh()

def discriminator(phi, x):
    """Images [T, B, 784] -> logits, positive where D takes them for real  # [T, B]"""
    return network(phi, x, slope=0.2).squeeze(-1)

def noise(tasks, n):
    return torch.randn(tasks, n, NOISE)

# 2  The game, and a score that no player can cheat ---
ENERGY = 0.1  # c in G's loss

def loss_d(real_logits, fake_logits):
    """D's loss, equation (1): softplus stays finite where log(sigmoid) does not  # [T]"""
    return F.softplus(-real_logits).mean(-1) + F.softplus(fake_logits).mean(-1)

def energy_distance(x, y):
    """e, the score: 2 E|x - y| - E|x - x'| - E|y - y'| of images x [T, n, d] and y [T, m, d]  # [T]

    Its expectation is least, and 0, where both have one distribution (for GANs Bellemare et al.
    2017, arXiv 1705.10743). If D scored, G could lower the score by spoiling D. No D takes part, so
    the outer gradient may run through both players: phi_0 learns to be a D that teaches G fast.
    """
    def distance(a, b):  # |a|^2 + |b|^2 - 2 a b, and no slope at 0  # [T, n, m]
        squares = a.square().sum(-1, keepdim=True) + b.square().sum(-1).unsqueeze(1)
        return torch.baddbmm(squares, a, b.mT, alpha=-2).clamp(min=1e-3).sqrt()
    def within(images):  # every pair once, none of an image with itself
        n = images.shape[1]
        return distance(images, images).triu(1).sum((1, 2)) * 2 / max(1, n * (n - 1))
    return 2 * distance(x, y).mean((1, 2)) - within(x) - within(y)

def loss_g(fake_logits, fake, real):
    """G's loss, equation (1): non-saturating (Goodfellow et al. 2014, arXiv 1406.2661) and the
    distance. D sees one image at a time; the distance sees that all are too alike.  # [T]"""
    return F.softplus(-fake_logits).mean(-1) + ENERGY * energy_distance(fake, real)

# 3  Inner loop: the players adapt to a task ---
FAKES = 64  # generated images in a step; more than the shots, for they cost only time

def inner_step(theta, phi, rates, real, second_order=True):
    """A step of D, then one of G, equation (2), on real images [T, B, 784]. Returns theta', phi'.

    theta, phi: [T, ...]; rates [2, 4]: for each player and layer, new in each step
    (Antoniou et al. 2019, arXiv 1810.09502). second_order: gradients keep their graph.

    The gradients are *partial*. L_D depends on phi by a second path, phi -> theta -> fake -> L_D,
    for theta was last stepped against this phi. `grad` would follow it, but theta must be held
    constant. So we ask for the gradient of an alias (view_as), which theta has never met. To
    detach the fakes instead would cut the outer gradient, too. Neither mistake raises an error.
    """
    rates_g, rates_d = rates
    phi = [p.view_as(p) for p in phi]
    fake = generator(theta, noise(len(real), FAKES))  # [T, FAKES, 784]
    logits = discriminator(phi, torch.cat([real, fake], 1))  # [T, B + FAKES]
    loss = loss_d(logits[:, :real.shape[1]], logits[:, real.shape[1]:]).sum()
    phi = descend(phi, rates_d, grad(loss, phi, create_graph=second_order))
    shown = fake.view_as(fake)  # an alias: phi' was made from fake, and must be held constant
    loss = loss_g(discriminator(phi, shown), shown, real).sum()
    of_fake, = grad(loss, shown, create_graph=second_order)  # dL_G / dG(z)
    theta = descend(theta, rates_g, grad(fake, theta, of_fake, create_graph=second_order))
    return theta, phi

def descend(parameters, rates, gradients):
    """p - a u(g), equation (2), for weights and biases, with a rate a for every layer: rates [4].
    A step of u is as long in every task; one of g is short where gradients are small."""
    def u(g):  # [T, ...]
        return g / g.square().mean(tuple(range(1, g.dim())), keepdim=True).add(1e-20).sqrt()
    rates = rates.repeat_interleave(2)
    return [p - a * u(g) for p, a, g in zip(parameters, rates, gradients)]

# 4  Outer loop: the initialisation learns ---
class Episode(NamedTuple):
    """The images of T tasks, in [-1, 1]."""
    support: torch.Tensor  # [T, shots, 784]
    query: torch.Tensor  # [T, queries, 784], none of them in the support

def meta_gradient(leaves, episode, algorithm):
    """Score of an episode, and what to descend along for leaves = [*theta, *phi, log_rates].

    maml     through all inner steps (Finn et al. 2017, arXiv 1703.03400)
    fomaml   first order: the steps' gradients are constants (the same paper); D's is then 0
    reptile  the start minus the mean of the adapted (Nichol et al. 2018, arXiv 1803.02999)
    both     g/|g| + r/|r|, equation (3)
    """
    support, query = episode
    tasks, queries, _ = query.shape
    shared = [p.expand(tasks, *p.shape[1:]) for p in leaves[:-1]]  # [T, ...], without a copy
    theta, phi, rates = shared[:8], shared[8:], leaves[-1].exp()
    second_order = algorithm in ("maml", "both")
    for step_rates in rates:
        theta, phi = inner_step(theta, phi, step_rates, support, second_order)
    fake = generator(theta, noise(tasks, queries))  # [T, queries, 784]
    score = energy_distance(fake, query).mean()
    ends = [end.detach().mean(0, keepdim=True) for end in (*theta, *phi)]
    reptile = [p.detach() - end for p, end in zip(leaves[:-1], ends)] + [torch.zeros_like(rates)]
    if algorithm == "reptile":
        return score.detach(), reptile
    gradient = grad(score, leaves, materialize_grads=True)
    if algorithm == "both":
        gradient = [g + r for g, r in zip(unit(gradient), unit(reptile))]
    return score.detach(), gradient

def unit(tensors):
    """The same direction, of length one."""
    length = torch.nn.utils.get_total_norm(tensors)
    return [t / length for t in tensors]

def adam(leaves, lr):
    """Adam with the short momentum that suits a game."""
    return torch.optim.Adam(leaves, lr, betas=(0.5, 0.999), fused=True)

# 5  Domains, known or made up, and their pairs ---
QUERIES = 64  # images that score a generator
MADE_UP, MIXED = 0.7, 0.3  # shares of tasks whose domain is made up, or of two kinds
PEN, FILLED = 0.3, 0.57  # shares: outlines among those; of the rest, what covers the frame

class Domains(NamedTuple):
    """All images of a run, and its pairs (source class, target class)."""
    images: dict  # 'mnist 7' -> uint8 [n, 784], bright on dark
    train: list  # pairs to meta-train on
    test: list  # held-out targets
    fewest: int  # images of the smallest class
    title: str  # 'mnist and fashion'

def some(images, n):
    """n random ones, different if there are so many: uint8 [m, 784] -> [-1, 1], [n, 784]"""
    chosen = torch.randperm(len(images))[torch.arange(n) % len(images)]
    return images[chosen] / 127.5 - 1

def sample_images(domains, classes, n):
    """n images of each of the classes  # [T, n, 784]"""
    return torch.stack([some(domains.images[name], n) for name in classes])

def sample_pairs(domains, n):
    """n random pairs: a list of 2 n classes, source and target in turn."""
    return [name for pair in random.choices(domains.train, k=n) for name in pair]

def split(images, shots):
    """Images [T, n, 784] as an `Episode`: the first ones are the support."""
    return Episode(images[:, :shots], images[:, shots:])

def made_up(images):
    """Known domains [T, n, 784], of which most are replaced by `level_sets`. None of those ever
    returns: its support alone tells of it."""
    tasks, n, _ = images.shape
    new = level_sets(torch.rand(tasks) < PEN, n)
    return torch.where(torch.rand(tasks, 1, 1) < MADE_UP, new, images)

def mixed(images):
    """Half of the images of some tasks [T, n, 784] from another: a user's are not all alike."""
    tasks, n, _ = images.shape
    others = (torch.rand(tasks, 1, 1) < MIXED) & (torch.rand(tasks, n, 1) < 0.5)
    return torch.where(others, images.flip(0), images)

def level_sets(pen, n):
    """Images of nameless things: a smooth random field for a task, varied in each image. Bright
    is where it is positive or, with a pen, its zero line.  # pen: bool [T] -> [T, n, 784]"""
    tasks, pen = len(pen), pen.view(-1, 1, 1, 1)
    def uniform(low, high):  # [T, 1, 1, 1]
        return low + (high - low) * torch.rand(tasks, 1, 1, 1)
    def smooth(many, cells):  # [T, many, 28, 28]
        grid = torch.randn(tasks, many, cells, cells)
        return F.interpolate(grid, (28, 28), mode="bicubic", align_corners=True)
    height = smooth(1, 6) + 0.5 * smooth(1, 4) + uniform(0.1, 0.5) * smooth(n, 5)
    line = torch.linspace(-1, 1, 28)
    island = uniform(1, 1.6) - 2.2 * (line ** 2 + line.view(28, 1) ** 2)  # high in the middle
    filled = (uniform(0, 1) < FILLED) & ~pen
    height = torch.where(filled, height, height + island)  # [T, n, 28, 28]
    steepness = torch.hypot(*torch.gradient(height, dim=(-2, -1)))
    inside = height / (steepness + 0.05)  # about the pixels to the outline
    cover = torch.where(pen, uniform(0.8, 2) - inside.abs(), inside).mul(2).sigmoid()
    light = torch.where(pen | filled, 1, uniform(0.4, 1) * (1 + 0.35 * smooth(n, 4)))
    return (cover * light).clamp(0, 1).flatten(2) * 2 - 1

# 6  Training; `training`, in section 8, is a range that saves, goes on, and prints numbers ---
GAN_BATCH = 64  # real images in an ordinary GAN step
R1 = 10  # weight of a penalty on D's slope: the players circle less

def update(optimizers, leaves, gradients):
    """The optimisers' step with these gradients; none unless all of them are finite."""
    finite = torch.nn.utils.get_total_norm(gradients).isfinite().item()
    if finite:
        for leaf, gradient in zip(leaves, gradients):
            leaf.grad = gradient.contiguous()  # fused Adam misreads a transposed one, silently
        for optimizer in optimizers:
            optimizer.step()
    return finite

def gan_step(leaves, optimizers, real):
    """A step of D, then of G against it, by optimisers, on real images [T, B, 784]."""
    batch = [real, noise(len(real), FAKES)]
    d, gradient = replay(gradient_d, leaves, batch)
    finite_d = update(optimizers[1:], leaves[8:], gradient)
    g, gradient = replay(gradient_g, leaves, batch)
    finite_g = update(optimizers[:1], leaves[:8], gradient)
    return {"finite": finite_d and finite_g, "D": d.item(), "G": g.item()}

def gradient_d(leaves, batch):
    """D's loss, with the penalty R1 (Mescheder et al. 2018, arXiv 1801.04406), and its gradient."""
    theta, phi, real = leaves[:8], leaves[8:], batch[0].detach().requires_grad_()
    logits = discriminator(phi, real)
    slope, = grad(logits.sum(), real, create_graph=True)  # [T, B, 784]
    penalty = R1 / 2 * slope.square().sum(-1).mean(-1)  # [T]
    fake = generator(theta, batch[1]).detach()
    loss = (loss_d(logits, discriminator(phi, fake)) + penalty).sum()
    return loss.detach(), grad(loss, phi)

def gradient_g(leaves, batch):
    """G's loss and its gradient."""
    theta, phi, (real, z) = leaves[:8], leaves[8:], batch
    fake = generator(theta, z)
    loss = loss_g(discriminator(phi, fake), fake, real).sum()
    return loss.detach(), grad(loss, theta)

def train_gan(stage, start, steps, domains, args):
    """Ordinary GAN training, four domains a step, most of them made up. Returns the parameters."""
    leaves = [p.detach().clone().requires_grad_() for p in start]
    optimizers = [adam(leaves[:8], 2e-4), adam(leaves[8:], 2e-4)]
    for _, numbers in training(stage, steps, leaves, optimizers, args):
        real = made_up(sample_images(domains, sample_pairs(domains, 2), GAN_BATCH // 4))
        numbers.update(gan_step(leaves, optimizers, real.reshape(1, GAN_BATCH, PIXELS)))
    return leaves

def meta_train(warm, domains, args):
    """Outer steps from the parameters `warm`. Returns [*theta, *phi, log_rates]."""
    rates = args.inner_lr * torch.tensor([[1.0], [0.5]])
    log_rates = rates.log().repeat(args.inner_steps, 1, 4)  # [steps, G or D, layer]
    leaves = [p.detach().clone().requires_grad_() for p in (*warm, log_rates)]
    optimizers, steps = [adam(leaves[:-1], 0.0), adam(leaves[-1:], 0.0)], args.meta_steps
    n = min(args.shots + QUERIES, domains.fewest)
    gradient_of = partial(meta_gradient, algorithm=args.algorithm)
    for step, numbers in training("meta-training", steps, leaves, optimizers, args):
        lr = args.meta_lr * min(1, 2 - 2 * step / steps)  # falls to 0 in the second half
        for optimizer, factor in zip(optimizers, (1, 15)):  # a logarithm must move faster
            optimizer.param_groups[0]["lr"] = factor * lr
        images = sample_images(domains, sample_pairs(domains, args.meta_batch), n)  # [T, n, 784]
        episode = split(mixed(made_up(images)), args.shots)
        score, gradient = replay(gradient_of, leaves, episode)
        finite = update(optimizers, leaves, unit(gradient))  # no episode outweighs the others
        numbers.update(finite=finite, score=score.item())
    return leaves

def train_all(domains, args):
    """Warm start, baseline, episodes. Returns the initialisation. The baseline, transfer, is
    in state/: for every pair of an episode 20 more ordinary steps, which take about as long."""
    reseed(args.seed, "start")
    warm = train_gan("warm start", new_parameters(), args.warm_steps, domains, args)
    train_gan("transfer", warm, 20 * args.meta_batch * args.meta_steps, domains, args)
    return meta_train(warm, domains, args)

# 7  Meta-testing: few steps on held-out domains, baselines, measures, pictures ---
GO_ON_LR = 1e-3  # Adam's rate after the learned steps
TRANSFER_LRS = 1e-3, 2e-3  # without learned steps
METRICS = {"frechet": "Fréchet distance on the judge's features, lower is better",
           "recognised": "share that the judge takes for the target, higher is better",
           "nearest": "distance to the nearest support image, of real images 1"}

def few_shot(support, start, lr=GO_ON_LR):
    """Adapt to a support [T, shots, 784]. Yields theta before and after every step, without end.
    start: [*theta, *phi, log_rates] for the learned inner steps, then Adam at the rate lr,
    in place; or [*theta, *phi] for Adam alone."""
    shared = [p.detach().requires_grad_().expand(len(support), *p.shape[1:]) for p in start[:16]]
    theta, phi = shared[:8], shared[8:]
    learned = start[16].detach().exp() if len(start) > 16 else []
    yield theta
    for rates in learned:
        theta, phi = inner_step(theta, phi, rates, support, second_order=False)
        yield theta
    leaves = [p.detach().clone().requires_grad_() for p in (*theta, *phi)]
    optimizers = [adam(leaves[:8], lr), adam(leaves[8:], lr)]
    while True:
        gan_step(leaves, optimizers, support)
        yield leaves[:8]

def translate(theta, images):
    """One noise in two domains: z for which the first G of theta [2, ...] draws images [1, n, 784].
    Returns the images and what both draw from z  # [3, n, 784]"""
    z = noise(1, images.shape[1]).requires_grad_()
    optimizer = torch.optim.Adam([z], 0.05)
    for _ in range(300):
        drawn = generator([p[:1] for p in theta], z)  # [1, n, 784]
        z.grad, = grad((drawn - images).square().sum(), z)
        optimizer.step()
    return torch.cat([images, generator(theta, z.expand(2, -1, -1)).detach()])

def without_a_gan(episode, n):
    """What a sceptic tries first with the support: {name: [T, n, 784]}"""
    support = episode.support
    tasks, shots, _ = support.shape
    mean, components = support.mean(1, keepdim=True), min(8, shots - 1)
    _, scale, directions = torch.linalg.svd(support - mean, full_matrices=False)
    weights = torch.randn(tasks, n, components) * scale[:, None, :components]
    gaussian = mean + weights @ directions[:, :components] / max(1, shots - 1) ** 0.5
    return {"real images": episode.query[:, :n],
            "support repeated": support[:, torch.arange(n) % shots],
            f"Gaussian on {components} components": gaussian.clamp(-1, 1)}

def train_judge(domains, args):
    """A CNN, [n, 784] -> features [n, 64] -> logits. It knows all classes, and trains no GAN."""
    reseed(args.seed, "judge")
    names, nn = list(domains.images), torch.nn
    features = nn.Sequential(  # no strides: they would let speckle pass
        nn.Unflatten(-1, (1, 28, 28)), nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(1568, 64), nn.ReLU())
    judge = nn.Sequential(features, nn.Linear(64, len(names)))
    leaves = list(judge.parameters())
    optimizers = [adam(leaves, 1e-3)]
    for _, numbers in training("judge", args.judge_steps, leaves, optimizers, args):
        labels = torch.randint(len(names), (128,))
        x = sample_images(domains, [names[label] for label in labels], 1).squeeze(1)  # [128, 784]
        loss = F.cross_entropy(judge(x), labels)
        numbers.update(finite=update(optimizers, leaves, grad(loss, leaves)), loss=loss.item())
    return judge.requires_grad_(False)

def frechet_distance(a, b):
    """Of Gaussians fitted to a [n, d] and b [m, d]: |mean - mean|^2 + tr(A + B - 2 (A B)^1/2)"""
    a, b = a.double(), b.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.inf
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
    return distance.clamp(min=0).item()

def judge_samples(x, support, query, label, judge):
    """The METRICS of samples x [n, 784] of a task. Of the query [2 n, 784] one half scales
    "nearest", the other is the Fréchet distance's reference. label: a class index."""
    fresh, reference = query.chunk(2)
    features, mine = judge[0](x), torch.cdist(x, support).amin(1).mean()
    logits = judge[1](features)  # [n, classes]
    usual = torch.cdist(fresh, support).amin(1).mean().clamp(min=1e-9)
    return {"frechet": frechet_distance(features, judge[0](reference)),
            "recognised": (logits.amax(-1) == logits[:, label]).double().mean().item(),
            "nearest": (mine / usual).item()}

def meta_test(starts, judge, domains, args):
    """Test {method: (start, Adam's rate)} on the same images of the held-out targets. Returns
    rows, a dict for every method, draw, number of steps and target."""
    n = min(500, (domains.fewest - args.shots) // 2)
    path, names = Path(args.out, "state", "test.pt"), list(domains.images)
    first, rows = load(path) if path.exists() else (0, [])
    tests = list(itertools.product(range(args.test_seeds), ("no GAN", *starts)))
    for number, (seed, method) in enumerate(tests[first:], first + 1):
        say(f"test {number}/{len(tests)}: {method}", sys.stderr)
        reseed(args.seed, "test", seed)
        episode = split(sample_images(domains, domains.test, args.shots + 2 * n), args.shots)
        if method == "no GAN":
            samples = [(name, 0, x) for name, x in without_a_gan(episode, n).items()]
        else:
            thetas = enumerate(few_shot(episode.support, *starts[method]))
            samples = [(method, steps, generator(theta, noise(len(domains.test), n)).detach())
                       for steps, theta in itertools.islice(thetas, args.test_steps[-1] + 1)
                       if steps in args.test_steps]
        for name, steps, x in samples:
            for i, target in enumerate(domains.test):
                inputs = x[i], episode.support[i], episode.query[i], names.index(target)
                rows.append({"method": name, "seed": seed, "steps": steps, "target": target,
                             "images": x[i, :9].clone(), **judge_samples(*inputs, judge)})
        save(path, (number, rows))
    return rows

def print_tables(folders):
    """The METRICS of runs that differ in --seed alone."""
    paths = dict.fromkeys(Path(folder, "report.json").resolve() for folder in folders)
    reports = [load(path, "settings", "domains", "rows") for path in paths]
    for path, report in zip(paths, reports):
        refuse_differences(path.parent, report, reports[0], "seed")
    rows = [row for report in reports for row in report["rows"]]
    columns = reports[0]["settings"]["test_steps"]
    say(f"{reports[0]['domains']}, n = {sum(row['method'] == 'real images' for row in rows)}")
    cells = {}
    for row in rows:
        cells.setdefault(row["method"], {}).setdefault(row["steps"], []).append(row)
    for metric, title in METRICS.items():
        say(f"\n{title}\n{'steps':24}" + "".join(f"{steps:>14}" for steps in columns))
        for method, by_steps in cells.items():
            shown = [interval([row[metric] for row in same]) for same in by_steps.values()]
            say(f"{method:24}" + "".join(f"{each:>14}" for each in shown))

def interval(values):
    """'mean ± half the 95 % interval', as if all were independent; Student's t, from n = 4 on."""
    mean, free = np.mean(values), len(values) - 1 or math.nan
    half = (1.96 + 2.37 / free + 2.82 / free ** 2) * np.std(values) / free ** 0.5
    return f"{mean:.0f} ± {half:.0f}" if mean >= 10 else f"{mean:.2f} ± {half:.2f}"

def picture(images, columns, zoom):
    """Images [n, 784] in [-1, 1] as one enlarged picture."""
    squares = images.cpu().view(-1, 1, 28, 28)
    grid = torchvision.utils.make_grid(squares, columns, 1, True, (-1, 1))
    small = torchvision.transforms.functional.to_pil_image(grid[0])
    return small.resize((small.width * zoom, small.height * zoom), Image.NEAREST)

def filmstrip(rows, args):
    """Every target, step by step. Takes the images out of the rows."""
    film = {(row["target"], row["method"], row["steps"]): row.pop("images") for row in rows}
    strips = sorted({(row["target"], row["method"]) for row in rows if row["steps"]})
    side, above = 184, 44
    canvas = Image.new("L", (side * (1 + len(args.test_steps)), (side + above) * len(strips)), 255)
    ink, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for i, (target, method) in enumerate(strips):
        y = (side + above) * i
        ink.text((4, y), f"{target}, {method}", 0, font)
        sheets = [("support repeated", 0), *((method, steps) for steps in args.test_steps)]
        for j, (of, steps) in enumerate(sheets):
            ink.text((side * j + 4, y + 20), f"step {steps}" if j else "support", 0, font)
            canvas.paste(picture(film[target, of, steps], 3, 2), (side * j, y + above))
    return canvas

# 8  Data and files ---
HELD_OUT = 3  # classes of a data set, or a third of them, that no GAN's training sees
SAVE_SECONDS = 30
FREE = "source", "target", "data_dir", "out", "device"  # may change: a checksum guards them
TORCHVISION = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST"}
SIGNATURE = PngImagePlugin.PngInfo()  # to know its own pictures by
SIGNATURE.add_text("Software", "mtgan.py")
SPECS = ("SPEC: mnist, fashion, kmnist, the built-in strokes or shapes, or a folder, a class in "
         "each sub-folder; mnist:0-6,9 is some classes")

def load_domains(args):
    """The `Domains` of --source and --target; the last classes of a data set are held out."""
    images, sides, titles, held_out = {}, ([], []), [], set()
    specs = [(spec, sides[0]) for spec in args.source] + [(spec, sides[1]) for spec in args.target]
    for spec, side in specs:
        title, classes = load_dataset(spec, args.data_dir)
        names = [f"{title} {label}" for label in classes]
        titles.append(title)
        side.extend(names)
        few = len(names) if args.test is not None else min(HELD_OUT, max(1, len(names) // 3))
        held_out.update(names[-few:])
        for name, content in zip(names, classes.values()):
            require(len(content) >= args.shots + 4,  # a test compares 2 with 2
                    f"'{name}' has too few images for --shots {args.shots}")
            require(torch.equal(images.setdefault(name, content), content),
                    f"two classes are called '{name}'")
    sources, targets = ([name for name in side if name not in held_out] for side in sides)
    train = [(s, t) for s, t in dict.fromkeys(itertools.product(sources, targets)) if s != t]
    test = [name for name in dict.fromkeys(sides[1]) if name in held_out]
    require(len(images) > 1 and (train or args.test is not None),
            "too few classes: 2 to test, and to train, a third of each data set is held out")
    fewest = min(len(content) for content in images.values())
    return Domains(images, train, test, fewest, " and ".join(dict.fromkeys(titles)))

def load_dataset(spec, data_dir):
    """A data set, or some classes as in mnist:0-6,9: its name, {class: uint8 [n, 784]}"""
    listed = re.fullmatch(r"(.+?):(\d+(-\d+)?(,\d+(-\d+)?)*)", spec)
    name, chosen = listed.group(1, 2) if listed and not os.path.isdir(spec) else (spec, "")
    if name in TORCHVISION:
        title, classes = name, load_torchvision(name, data_dir)
    elif name in ("strokes", "shapes"):
        torch.manual_seed(len(name))
        images = level_sets(torch.full((10,), name == "strokes"), 400)
        title, classes = name, {str(i): ((x + 1) * 127.5).byte() for i, x in enumerate(images)}
    else:
        require(os.path.isdir(name), f"unknown domain '{spec}'. {SPECS}")
        title, classes = Path(name).resolve().name, load_folder(name)
    labels = []
    for low, high in re.findall(r"(\d+)-?(\d*)", chosen):
        require(int(low) <= int(high or low) < len(classes),
                f"'{spec}': {title} has the classes 0 to {len(classes) - 1}")
        labels += list(classes)[int(low):int(high or low) + 1]
    return title, {label: classes[label] for label in labels or classes}

def load_torchvision(name, data_dir):
    """MNIST or its kind, in data_dir or downloaded: {class: uint8 [n, 784]}"""
    kind = getattr(torchvision.datasets, TORCHVISION[name])
    socket.setdefaulttimeout(20)
    try:
        parts = [kind(data_dir, train, download=True) for train in (True, False)]
        for part in parts:
            require(part.data.shape == (len(part.targets), 28, 28), "not 28 x 28, a label each")
    except Exception as error:
        raise UserError(f"no network, or damaged files of '{name}' in {data_dir} ({error}). "
                        "strokes and shapes need none, and prove nothing") from None
    images = torch.cat([part.data for part in parts]).flatten(1).to(torch.get_default_device())
    labels = torch.cat([part.targets for part in parts])
    names = [label.split(" - ")[0] for label in parts[0].classes]
    return {label: images[labels == number] for number, label in enumerate(names)}

def load_folder(folder):
    """All pictures below a folder, a class in each sub-folder: {class: uint8 [n, 784]}.
    What a system makes for itself is passed over; what else is left out is named."""
    classes, left_out = {}, Counter()
    order = partial(re.sub, r"\d+", lambda n: n[0].zfill(20))  # 2 before 10
    for path in map(Path, sorted(map(str, Path(folder).rglob("*")), key=order)):
        parts = path.relative_to(folder).parts
        if any(part.startswith((".", "__", "@", "$")) for part in parts):
            continue
        try:
            if path.is_dir():
                require(not path.is_symlink(), "linked folder")
                os.scandir(path).close()  # raises if it is locked: rglob passes over it
            else:
                image = read_image(path)
                classes.setdefault(parts[0] if parts[1:] else "(loose)", []).append(image)
        except UserError as error:
            left_out[str(error)] += 1
        except Exception:  # whatever Pillow raises
            left_out[f"unreadable {path.suffix or 'folder or file'}"] += 1
    if left_out:
        kinds = ", ".join(f"{n} {kind}" for kind, n in left_out.items())
        say(f"{folder}: left out {kinds}", sys.stderr)
    require(classes, f"no readable picture in '{folder}'")
    return {label: torch.tensor(np.stack(images)) for label, images in classes.items()}

def read_image(path):
    """A picture of any size and mode as uint8 [784]: upright, grey, square, bright on dark."""
    with Image.open(path) as image:
        require(image.info.get("Software") != "mtgan.py", "drawn by mtgan.py")
        require(max(image.size) <= 56 * min(image.size), "too thin")
        image.thumbnail((1024, 1024), Image.BOX)  # kilobytes can hold gigabytes
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            values = np.nan_to_num(np.asarray(image, float))
            low, high = np.percentile(values, [0.5, 99.5])  # one hot pixel decides nothing
            values = 255 * (values - low) / max(high - low, 1e-9)
            image = Image.fromarray(np.uint8(values.clip(0, 255)))
        grey, alpha = image.convert("RGBA").convert("LA").split()
    behind = 255 if ImageStat.Stat(grey, alpha).mean[0] < 127 else 0  # where it is transparent
    grey = Image.composite(grey, Image.new("L", grey.size, behind), alpha)
    light = np.asarray(grey)
    border = int(np.median(np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]])))
    if border > 127:
        grey, border = ImageOps.invert(grey), 255 - border
    return np.asarray(ImageOps.pad(grey, (28, 28), Image.LANCZOS, border)).reshape(PIXELS)

def reseed(*key):
    """All that is random from here on follows from these."""
    random.seed(repr(key))
    torch.manual_seed(random.getrandbits(32))

def training(stage, steps, tensors, optimizers, args):
    """Yields (step, numbers); a step puts into numbers what it has to say, and whether it was
    "finite". Tensors and optimizers are saved: after `kill -9` the same bits follow.
    """
    path, first, skipped = Path(args.out, "state", f"{stage}.pt"), 0, 0
    if path.exists():
        first, skipped, values, states = load(path)
        torch._foreach_copy_([tensor.data for tensor in tensors], values)
        for optimizer, state in zip(optimizers, states):
            optimizer.load_state_dict(state)
    began, saved = time.monotonic(), -math.inf
    for step in range(first, steps):
        reseed(args.seed, stage, step)
        numbers = {}
        yield step, numbers
        skipped += 0 if numbers.pop("finite") else 1
        done, now = step + 1, time.monotonic()
        if done == steps or now - saved > SAVE_SECONDS:
            left = (now - began) / (done - first) * (steps - done)
            shown = "".join(f", {name} {value:.3g}" for name, value in numbers.items())
            say(f"{stage} {done}/{steps}, {left:.0f} s left, {skipped} skipped{shown}", sys.stderr)
            save(path, (done, skipped, tensors, [each.state_dict() for each in optimizers]))
            saved = now

def load_start(path):
    """What a run has saved in mtgan.pt."""
    path = Path(path, "mtgan.pt") if Path(path).is_dir() else Path(path)
    saved = load(path, "start", "domains")
    shapes = [getattr(p, "shape", None) for p in saved["start"][:-1]]
    ours = [p.shape for p in new_parameters()]
    require(shapes == ours, f"{path} is a start of other networks")
    return {**saved, "start": [p.float() for p in saved["start"]]}

def load(path, *keys):
    """What `save` wrote; UserError where it is not there, damaged, or without the keys."""
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text())
        else:
            content = torch.load(path, torch.get_default_device(), weights_only=True)
        return content if not keys else {key: content[key] for key in keys}
    except Exception as error:
        raise UserError(f"{path} is not there, damaged or unfinished ({error!r:.80})") from None

def save(path, content):
    """Under another name first: always a whole file, old or new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    if path.suffix == ".json":
        temporary.write_text(json.dumps(content, indent=1))
    elif path.suffix == ".png":
        content.save(temporary, "PNG", pnginfo=SIGNATURE)
    else:
        buffer = io.BytesIO()  # torch hides a full disk
        torch.save(content, buffer)
        temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)

def claim(out, mark=""):
    """Lock a folder. It must be empty, or hold the file `mark`."""
    require((out / mark).is_file() or not any(out.glob("[!.]*")),
            f"{out} is not empty: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(out / ".lock", timeout=0).acquire()
    except filelock.Timeout:
        raise UserError(f"another process is at work in {out}") from None

def refuse_differences(folder, old, new, *free):
    """Two reports must share images and settings; free: what may differ."""
    for name in sorted(new["settings"].keys() - {*FREE, *free}):
        before, value = (report["settings"].get(name) for report in (old, new))
        require(before == value, f"{folder} has {name} {before}, not {value}")

# 9  Command line ---
DRY_RUN = {"shots": 10, "warm_steps": 20, "meta_steps": 3, "test_seeds": 1,
           "judge_steps": 60, "test_steps": (0, 1, 2, 6)}
GENERAL = {"target", "data_dir", "out", "seed", "device", "kernel", "shots"}
MODES = {"tables": {"tables"}, "test": {"test", "test_seeds", "dry_run", *GENERAL},
         "adapt": {"adapt", "source", "steps", "samples", *GENERAL}}
MAY_BE_0 = "seed", "warm_steps"

def say(line, file=None):
    """Print. A reader who has left ends no run."""
    try:
        print(line, file=file, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())

def parse(argv):
    """The command line as Settings; UserError for what is wrong, missing or ignored."""
    parser = argparse.ArgumentParser("mtgan.py", "mtgan.py [options]", epilog=SPECS,
                                     argument_default=argparse.SUPPRESS)
    parser.error = partial(require, False)
    options = {each.name: each.metadata for each in fields(Settings) if each.metadata}
    for name, how in options.items():
        parser.add_argument("--" + name.replace("_", "-"), **how)
    given = vars(parser.parse_args(argv))
    mode = next((mode for mode in MODES if mode in given), "train")
    used = MODES.get(mode, options.keys() - {"steps", "samples"})
    for name, value in given.items():
        flag, number = "--" + name.replace("_", "-"), isinstance(value, (int, float))
        require(name in used, f"{flag} is of no use here")
        require(not number or value > 0 or value == 0 and name in MAY_BE_0, f"{flag} is too small")
    args = Settings(**{**(DRY_RUN if "dry_run" in given else {}), **given})
    if mode in ("test", "adapt"):
        require("target" in given, f"--{mode} needs a --target, such as a folder of pictures")
        args.source = given.get("source", ())
    if mode == "adapt":
        args.shots = given.get("shots")  # None: all, up to the default
        require(len(args.target) == 1 >= len(args.source), "--adapt: one --target, one --source")
    words = [word for word in ("dry_run", "test", "adapt") if word in given]
    name = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join([*words, *args.source, *args.target]))
    args.out = args.out or f"runs/{name.strip('-.')[-99:]}"
    return args

def run(args):
    """Meta-train, unless --test names a start; meta-test; write everything to args.out."""
    began, out, domains = time.monotonic(), Path(args.out), load_domains(args)
    title, start = domains.title, None
    crc = zlib.crc32(repr((domains.train, domains.test)).encode())
    crc = zlib.crc32(torch.cat(list(domains.images.values())).cpu().numpy(), crc)
    if args.test is not None:
        saved = load_start(args.test)
        start, title = saved["start"], f"{title}; the start was trained on {saved['domains']}"
        args.inner_steps = len(start[-1])
        crc = zlib.crc32(torch.cat([p.flatten() for p in start]).cpu().numpy(), crc)
    report = {"settings": {**asdict(args), "checksum": crc}, "domains": title}
    report, path = json.loads(json.dumps(report)), out / "report.json"  # tuples: lists
    with claim(out, "report.json"):
        if path.exists():
            refuse_differences(out, load(path, "settings"), report)
        else:
            save(path, report)
        if start is None:
            half = [p.detach().half() for p in train_all(domains, args)]
            save(out / "mtgan.pt", {"start": half, "domains": title})
            start = [p.float() for p in half]  # tested as it is saved
        starts = {"MT-GAN": (start, GO_ON_LR)}
        transfer = Path(args.test or out, "state", "transfer.pt")
        if transfer.exists():
            _, _, leaves, _ = load(transfer)
            starts |= {f"transfer, Adam {lr:g}": (leaves, lr) for lr in TRANSFER_LRS}
        rows = meta_test(starts, train_judge(domains, args), domains, args)
        save(out / "adaptation.png", filmstrip(rows, args))
        save(path, {**report, "rows": rows})
    print_tables([out])
    say(f"\n{out}: report.json, adaptation.png; {time.monotonic() - began:.0f} s")

def deploy(args):
    """Adapt a start to a user's pictures, and write what it draws."""
    saved, out, sets = load_start(args.adapt), Path(args.out), []
    for spec in (*args.source, *args.target):
        title, classes = load_dataset(spec, args.data_dir)
        sets.append(torch.cat(list(classes.values())))
        n = len(sets[-1])
        require(2 <= (args.shots or 2) <= n,
                f"'{spec}' has {n} images, and needs {args.shots or 2}; --shots is from 2 on")
    require(len(sets) == 1 or not torch.equal(*sets), "--source and --target are the same images")
    shots = args.shots or min(Settings.shots, *map(len, sets))
    reseed(args.seed, "adapt")
    support = torch.stack([some(images, shots) for images in sets])  # [1 or 2, shots, 784]
    theta = next(itertools.islice(few_shot(support, saved["start"]), args.steps, None))
    samples = generator([p[-1:] for p in theta], noise(1, args.samples))[0].detach()
    require(all(p.isfinite().all() for p in theta), "the adaptation diverged: take fewer --steps")
    with claim(out):
        for number, image in enumerate(samples):
            save(out / f"sample-{number:03}.png", picture(image, 1, 1))
        save(out / "samples.png", picture(samples, 8, 3))
        if args.source:
            rows = translate(theta, support[:1]).flatten(0, 1)  # [3 shots, 784]
            save(out / "translation.png", picture(rows, shots, 3))
    say(f"{out}: {len(samples)} samples of {title}, by a start trained on {saved['domains']}")

def main(argv=None):
    """Returns the exit code, 2 for what a user can put right."""
    global KERNEL
    for stream in (sys.stdout, sys.stderr):  # a notebook's cannot
        getattr(stream, "reconfigure", dict)(errors="replace")  # for letters a console lacks
    try:
        args = parse(argv)
        if args.tables:
            print_tables(args.tables)
            return 0
        KERNEL = args.kernel
        try:
            torch.set_default_device(args.device)
            torch.ones(1).double().item()
        except Exception:
            raise UserError(f"--device {args.device} cannot be used here; try cpu") from None
        if KERNEL == "triton":
            require(not why_not_triton(args.device), why_not_triton(args.device))
        keep_memory()
        torch.autograd.set_multithreading_enabled(False)  # faster on a GPU
        if args.adapt is None:
            run(args)
        else:
            deploy(args)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        say(f"mtgan.py: error: {' '.join(str(error).split())}", sys.stderr)
        return 2
    except KeyboardInterrupt:  # the same command goes on
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
