"""MT-GAN: a Meta-Transfer Generative Adversarial Network, in one file.

A GAN that is trained from scratch needs many images and many steps. MT-GAN learns the weights
from which a GAN starts, so that a few images of something new and a few steps are enough.

    python mtgan.py --source mnist --target fashion   # learn such a start, and test it
    python mtgan.py --test --target my_classes/       # test it on classes of your own
    python mtgan.py --adapt --target my_images/       # draw images like your own

The words of this file:

    G, theta     the generator and its weights: it draws images from noise z
    D, phi       the discriminator and its weights: it tells real images from drawn ones
    domain       one kind of image, a class of a data set such as 'mnist 7'
    task         to draw a domain of which only a few images are given
    shots        how many images are given
    support      these images
    query        other images of the domain, which only score what was learned
    pair         a source domain and a target domain: each is a task of its own
    episode      what one outer step learns from: one pair (or --meta-batch), so T = 2 tasks
    inner step   a step of D and a step of G on the support of a task
    start        what every task starts from: theta, phi and the inner steps' learning rates
    outer step   a step of the start, after an episode

MAML asks how the start should change so that the score *after* the inner steps gets better. Each
inner step contains a gradient, so this takes gradients of gradients. Reptile takes none: it moves
the start towards the weights at which the inner steps arrived. MT-GAN adds both directions, each
scaled to length one, because one is a slope and the other a distance. The whole algorithm, in the
names of the functions below:

    theta, phi = train_gan(...)                     # warm start: an ordinary GAN
    for each episode:
        images = sample_images(sample_classes(...)) # most replaced by random shapes (section 5)
        support, query = split(images)
        theta_k, phi_k = theta, phi                 # a copy for every task
        for each inner step:                        # inner_step
            phi_k   -= rate * g / rms(g)            # g: gradient of loss_d on the support
            theta_k -= rate * g / rms(g)            # g: of loss_g, against the new phi_k
        score = energy_distance(generator(theta_k, z), query)
        maml = d score / d (theta, phi, log rates)  # through all inner steps
        reptile = (theta, phi) - mean of the tasks' (theta_k, phi_k)
        direction = maml/|maml| + reptile/|reptile|
        (theta, phi, log rates) take a step of Adam, with direction/|direction| for gradient

Then the start is tested on domains of --target that training never saw.
"""
import argparse, ast, contextlib, datetime, hashlib, io, itertools, json, math, os, random, re
import socket, sys, time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Threads that wait should soon leave the CPU to others. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
import filelock
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageStat, PngImagePlugin
from torch.func import grad, vjp

import kernels
from kernels import Recorded, fused_linear

class Settings:
    """The hyper-parameters. 'By search' means the best in trials on classes that are neither
    trained nor tested on (findings/EXPERIMENTS.md)."""
    algorithm = "both"    # by search: better than MAML alone and Reptile alone
    shots = 25            # an effort that a user can make
    inner_steps = 5       # an episode's memory and time grow with each
    inner_lr = 2e-3       # initial rate of G; D's is half. Both are learned
    warm_steps = 5000     # ordinary GAN steps; by search: without them all is worse
    meta_steps = 500      # episodes; by search: twice as many gain nothing
    meta_batch = 1        # pairs of an episode
    meta_lr = 4e-4        # outer rate, by search
    made_up = 0.7         # share of tasks that get a made-up domain, by search

# 1  Networks --------------------------------------------------------------------------
# A comment such as "# [T, B, 784]" is the shape of a tensor:
# T tasks, B images, K inputs of a layer, N outputs.
PIXELS, NOISE = 28 * 28, 100
GENERATOR_SIZES = (NOISE, 256, 512, 1024, PIXELS)
DISCRIMINATOR_SIZES = (PIXELS, 1024, 512, 256, 1)

class Players(NamedTuple):
    """The weights of G and D: lists of a weight [T, N, K] and a bias [T, N] for each layer.
    Every task has weights of its own, so a layer is one batched product over the tasks."""
    theta: list
    phi: list

class Start(NamedTuple):
    """What meta-training learns, and what mtgan.pt holds. All tasks share the weights, so T = 1."""
    theta: list
    phi: list
    log_rates: torch.Tensor  # [inner steps, 2 (G, D), layers]; as logs, so that rates stay > 0

def new_players():
    """Random `Players` with T = 1."""
    def layers(sizes):
        modules = [torch.nn.Linear(k, n) for k, n in itertools.pairwise(sizes)]
        return [p.detach().unsqueeze(0) for module in modules for p in module.parameters()]
    return Players(layers(GENERATOR_SIZES), layers(DISCRIMINATOR_SIZES))

def each(function, players):
    """`Players` with a function applied to each tensor. A `Start`'s rates are left out."""
    return Players(list(map(function, players.theta)), list(map(function, players.phi)))

def flat(weights):
    """All tensors of `Players` or of a `Start`, in a list."""
    theta, phi, *log_rates = weights  # which only a `Start` has
    return [*theta, *phi, *log_rates]

def network(parameters, x, slope):
    """Linear layers with LeakyReLU between them: x [T, B, K] -> [T, B, N].
    fused_linear is leaky_relu(x @ weight.mT + bias, slope), on a GPU as one kernel if asked for."""
    *hidden, last = zip(parameters[::2], parameters[1::2])
    for weight, bias in hidden:
        x = fused_linear(x, weight, bias, slope)
    return fused_linear(x, *last, slope=1.0)  # a slope of 1 is no LeakyReLU

def generator(theta, z):
    """Noise z [T, B, 100] -> images in [-1, 1] [T, B, 784]."""
    return network(theta, z, slope=0.0).tanh()  # a slope of 0 is ReLU

def discriminator(phi, x):
    """Images x [T, B, 784] -> logits [T, B], positive where D takes them for real."""
    return network(phi, x, slope=0.2).squeeze(-1)

def noise(tasks, n):
    return torch.randn(tasks, n, NOISE)

# 2  The game and the score ------------------------------------------------------------
ENERGY = 0.1  # weight of the distance in G's loss, found by search

def loss_d(real_logits, fake_logits):
    """D's loss of logits [T, B] and [T, n], high where D is wrong  # [T]
    softplus(-x) is -log(sigmoid(x)), and finite for every x."""
    return F.softplus(-real_logits).mean(-1) + F.softplus(fake_logits).mean(-1)

def loss_g(fake_logits, fake, real):
    """G's loss of drawn images [T, n, 784], their logits, and real images [T, B, 784]  # [T]

    It is high where D is right (non-saturating: Goodfellow et al. 2014, arXiv 1406.2661). D
    judges images one by one, so it cannot notice that they are all the same. The distance can: it
    compares the set of drawn images with the set of real ones."""
    return F.softplus(-fake_logits).mean(-1) + ENERGY * energy_distance(fake, real)

def energy_distance(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'| of images x [T, n, 784] and y [T, m, 784]  # [T]

    On average it is 0 if x and y come from the same distribution, and positive otherwise (for
    GANs: Bellemare et al. 2017, arXiv 1705.10743). It is the score, too. D's loss cannot be the
    score, because the outer step could then win by making D worse."""
    def distances(a, b):  # from |a - b|^2 = |a|^2 + |b|^2 - 2 a b  # [T, n, m]
        squares = a.square().sum(-1, keepdim=True) + b.square().sum(-1).unsqueeze(1)
        squares = torch.baddbmm(squares, a, b.mT, alpha=-2)
        return squares.clamp(min=1e-3).sqrt()  # at 0 the slope of a root is infinite
    def within(images):  # the mean over pairs of different images
        n = images.shape[1]
        return distances(images, images).triu(1).sum((1, 2)) * 2 / max(1, n * (n - 1))
    return 2 * distances(x, y).mean((1, 2)) - within(x) - within(y)

# 3  Inner loop: G and D adapt to a task -----------------------------------------------
FAKES = 64  # drawn images in a step: more than the shots, as drawing costs only time

def inner_step(theta, phi, rates, real, second_order=True):
    """A step of D, then one of G against the new D. Returns the new theta and phi.

    theta, phi: weights [T, ...]. rates [2, layers]: of G and D; every step and layer has its own
    (Antoniou et al. 2019, arXiv 1810.09502). real: images [T, B, 784]. Without second_order the
    gradients become constants.

    An inner gradient is *partial*: a player takes all but its own weights as given. Consider the
    second step. theta came from a gradient through phi, so `fake` depends on phi. D's gradient must
    ignore this, as if `fake` were data. The outer gradient, computed later, must follow it.
        torch.func.grad(f)(phi)   is right: it differentiates by f's argument alone, and leaves
                                  all else in the graph of the outer gradient
        torch.autograd.grad       is wrong: it would follow `fake` back to phi
        fake.detach()             is wrong: the outer gradient would lose this path, too
    The two that are wrong raise no error.
    """
    rates_g, rates_d = rates
    z = noise(len(real), FAKES)
    # G draws once, for both players. pull_back will turn d loss / d fake into d loss / d theta.
    fake, pull_back = vjp(lambda theta: generator(theta, z), theta)  # [T, FAKES, 784]

    def game_d(phi):
        logits = discriminator(phi, torch.cat([real, fake], 1))  # faster than one by one
        real_logits, fake_logits = logits.split([real.shape[1], FAKES], 1)
        return loss_d(real_logits, fake_logits).sum()

    new_phi = descend(phi, rates_d, grad(game_d)(phi), second_order)

    def game_g(fake):  # new_phi is a constant here, though it was made from fake
        return loss_g(discriminator(new_phi, fake), fake, real).sum()

    of_theta, = pull_back(grad(game_g)(fake))
    return descend(theta, rates_g, of_theta, second_order), new_phi

def descend(parameters, rates, gradients, second_order):
    """p - rate * g / rms(g), with the rms over one tensor of one task. So each weight moves by
    about its rate, however small the gradient. rates [layers]: of a weight and its bias."""
    moved = []
    for p, rate, g in zip(parameters, rates.repeat_interleave(2), gradients):
        g = g if second_order else g.detach()
        rms = g.square().mean(tuple(range(1, g.dim())), keepdim=True).add(1e-20).sqrt()
        moved.append(torch.addcmul(p, rate / rms, g, value=-1))
    return moved

# 4  Outer loop: the start learns ------------------------------------------------------
ALGORITHMS = "maml", "fomaml", "reptile", "both"

def meta_gradient(start, support, query, algorithm):
    """Score of an episode, and the direction to subtract, like [*theta, *phi, log_rates].
    The images of T tasks: support [T, shots, 784], query [T, queries, 784].

    maml     the score's gradient through all inner steps (Finn et al. 2017, arXiv 1703.03400)
    fomaml   the same without gradients of gradients: first order (same paper). Then phi learns
             nothing, because the score uses G alone
    reptile  start - mean of the adapted weights (Nichol et al. 2018, arXiv 1803.02999)
    both     maml/|maml| + reptile/|reptile|
    """
    tasks, queries, _ = query.shape
    shared = each(differentiable, start)
    log_rates = differentiable(start.log_rates)
    second_order = algorithm in ("maml", "both")
    # A copy for every task. Autograd sums the gradients of these copies.
    theta, phi = each(lambda p: p.expand(tasks, *p.shape[1:]), shared)
    for rates in log_rates.exp():
        theta, phi = inner_step(theta, phi, rates, support, second_order)
    fake = generator(theta, noise(tasks, queries))  # [T, queries, 784]
    score = energy_distance(fake, query).mean()

    if algorithm != "reptile":
        maml = torch.autograd.grad(score, [*flat(shared), log_rates], materialize_grads=True)
    if algorithm in ("maml", "fomaml"):
        return score.detach(), maml
    reptile = [p.detach() - adapted.detach().mean(0, keepdim=True)
               for p, adapted in zip(flat(shared), [*theta, *phi])]
    reptile.append(torch.zeros_like(log_rates))  # Reptile has nothing to say of rates
    if algorithm == "reptile":
        return score.detach(), reptile
    return score.detach(), [m + r for m, r in zip(unit(maml), unit(reptile))]

def differentiable(tensor):
    return tensor.detach().requires_grad_()

def unit(tensors):
    """The same direction, of length one."""
    length = torch.nn.utils.get_total_norm(tensors)
    return [t / length for t in tensors]

# 5  Domains, known and made up --------------------------------------------------------
QUERIES = 64  # images that score a generator
# The few known classes would soon be learned by heart. A made-up domain never returns, so only
# its support can tell what it looks like. These shares were found by search, too:
MIXED = 0.3  # of tasks, half of whose images come from another domain, as in a user's folder
PEN = 0.3  # of made-up domains: they are outlines, as if drawn with a pen
FILLED = 0.57  # of made-up domains without a pen: they fill the frame, as a pullover does

class Domains(NamedTuple):
    """All images of a run, and what to train and to test on."""
    images: dict  # 'mnist 7' -> uint8 [n, 784], bright on dark
    train: list  # pairs (source class, target class)
    test: list  # held-out target classes
    fewest: int  # images of the smallest held-out target
    title: str  # 'mnist and fashion'

def sample(images, *counts):
    """Random images of a class: uint8 [m, 784] -> [-1, 1] [sum of counts, 784].

    No image is in two of the counts, as in support and query. Where a class has too few, each
    count gets an equal part of them, and as many `altered` copies as it lacks (section 7)."""
    order, n = torch.randperm(len(images)), sum(counts)
    if n <= len(images):
        return images[order[:n]] / 127.5 - 1
    sampled = []
    for part, count in zip(order.tensor_split(len(counts)), counts):
        own = images[part] / 127.5 - 1
        copies, = altered(own[None, torch.arange(count) % len(own)])
        sampled += [own[:count], copies[len(own):]]  # the first ones are not needed
    return torch.cat(sampled)

def sample_images(domains, classes, *counts):
    """Images of each class  # [T, sum of counts, 784]"""
    return torch.stack([sample(domains.images[name], *counts) for name in classes])

def sample_classes(domains, pairs):
    """The classes of so many random pairs, in a list."""
    return [name for pair in random.choices(domains.train, k=pairs) for name in pair]

def split(images, shots):
    """Images [T, n, 784] as support [T, shots, 784] and query [T, n - shots, 784]."""
    return images[:, :shots], images[:, shots:]

def with_made_up(images, share):
    """Images of known domains [T, n, 784], of which a share is replaced by made-up domains."""
    tasks, n, _ = images.shape
    made_up = level_sets(torch.rand(tasks) < PEN, n)
    return torch.where(torch.rand(tasks, 1, 1) < share, made_up, images)

def with_mixtures(images):
    """Images [T, n, 784]. In some tasks half of them, in support and query alike, are replaced by
    those at the same places in task T - 1 - t: with one pair, in the other domain."""
    tasks, n, _ = images.shape
    replaced = (torch.rand(tasks, 1, 1) < MIXED) & (torch.rand(tasks, n, 1) < 0.5)
    return torch.where(replaced, images.flip(0), images)

def level_sets(pen, n):
    """n images of each made-up domain; pen: bool [T]  # [T, n, 784]

    A domain is a random height map, to which each of its images adds a small random change.
    Pixels above zero are bright or, with a pen, only those near zero, which gives an outline.
    There are three kinds: outlines, shapes that fill the frame, and grey islands. The numbers were
    chosen by eye: two domains should differ more than two images of one.
    """
    tasks, pen = len(pen), pen.view(-1, 1, 1, 1)

    def uniform(low, high):  # a number for each domain  # [T, 1, 1, 1]
        return low + (high - low) * torch.rand(tasks, 1, 1, 1)

    def smooth(many, cells):  # heights from a coarse grid  # [T, many, 28, 28]
        grid = torch.randn(tasks, many, cells, cells)
        return F.interpolate(grid, (28, 28), mode="bicubic", align_corners=True)

    domain = smooth(1, 6) + 0.5 * smooth(1, 4)
    height = domain + uniform(0.1, 0.5) * smooth(n, 5)  # [T, n, 28, 28]

    # Those that do not fill the frame are islands: high in the middle, below zero at the frame.
    line = torch.linspace(-1, 1, 28)
    island = uniform(1, 1.6) - 2.2 * (line ** 2 + line.view(28, 1) ** 2)
    filled = (uniform(0, 1) < FILLED) & ~pen
    height = torch.where(filled, height, height + island)

    # Height divided by steepness is about the distance to the zero line, in pixels.
    steepness = torch.hypot(*torch.gradient(height, dim=(-2, -1)))
    to_line = height / (steepness + 0.05)
    inside = torch.where(pen, uniform(0.8, 2) - to_line.abs(), to_line)
    cover = (2 * inside).sigmoid()  # soft edges

    # Islands that are not drawn with a pen have grey, uneven surfaces.
    light = torch.where(pen | filled, 1, uniform(0.4, 1) * (1 + 0.35 * smooth(n, 4)))
    return (cover * light).clamp(0, 1).flatten(2) * 2 - 1

# 6  Training --------------------------------------------------------------------------
GAN_BATCH, GAN_LR = 64, 2e-4  # real images, and Adam's rate: usual ones for a GAN
R1 = 10  # weight of a penalty on D's steepness (Mescheder et al. 2018, arXiv 1801.04406)
RATES_LR = 15  # log rates learn at so many times the outer rate of weights, by search
TRANSFER_STEPS = 20  # of transfer for each pair: they take as long as its episode (on 2 cores)
SAVE_SECONDS = 30
# torchrun starts several processes, and tells each its number and how many there are.
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def reseed(*key):
    """All random numbers from here on follow from the key."""
    random.seed(repr(key))
    torch.manual_seed(random.getrandbits(32))

def run_stage(stage, steps, do_step, tensors, optimizers, args, preview=None):
    """Call do_step(0), ..., do_step(steps - 1), saving every 30 s and at the end. (Bookkeeping;
    the three users below are the training.)

    do_step changes the tensors in place and returns numbers to print, as {name: value}. One may
    be "skipped": how many updates it left out, because a gradient was not finite.

    What was stopped, even by kill -9, goes on from the last save, and ends with the same bits:
    state/STAGE.pt has the steps done, the tensors and the optimizers' states, and the random
    numbers of a step follow from seed, stage and step (and in all processes but the first, from
    its number). preview, if given, is called after each save.
    """
    path, first, skipped = Path(args.out, "state", f"{stage}.pt"), 0, 0
    if path.exists():
        first, skipped, values, states = load(path)
        torch._foreach_copy_(tensors, values)
        for optimizer, state in zip(optimizers, states):
            optimizer.load_state_dict(state)
    saved = -math.inf
    for step in range(first, steps):
        # The first process draws what a single one would.
        reseed(args.seed, stage, step, *([RANK] if RANK else []))
        numbers = dict(do_step(step))  # a copy: a recorded step returns the same dict again
        skipped = skipped + numbers.pop("skipped", 0)
        done = step + 1
        args.progress.show(stage, done, steps, numbers, {"skipped": skipped})
        if RANK == 0 and (done == steps or time.monotonic() - saved > SAVE_SECONDS):
            states = [optimizer.state_dict() for optimizer in optimizers]
            save(path, (done, int(skipped), tensors, states))
            if preview:
                preview()
            saved = time.monotonic()
    if skipped > steps / 10:
        say(f"warning: {stage} left out {int(skipped)} updates of {steps} steps, whose gradients "
            "were not finite. Do not trust this run", sys.stderr)

def adam(tensors, lr):
    """Adam with a short memory of gradients, 0.5 and not 0.9: in a game they keep turning."""
    return torch.optim.Adam(tensors, lr, betas=(0.5, 0.999), fused=True, capturable=True)

def apply_gradients(optimizer, gradients):
    """A step of the optimizer with gradients [T, ...]. It is skipped if no task has finite ones:
    in training, where T is 1, if there is an inf or nan; in tests, a task that diverged is left to
    itself, and the others go on. Returns 1 if it was skipped, else 0  # []"""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients])  # [tensors, T]
    some_task_is_fine = norms.isfinite().all(0).any()
    optimizer.found_inf = 1 - some_task_is_fine.float()  # 1: Adam skips
    for p, g in zip(optimizer.param_groups[0]["params"], gradients):
        p.grad = g.contiguous()  # fused Adam misreads a transposed gradient, silently
    optimizer.step()
    return optimizer.found_inf

def same(x):
    """What gan_step does to gradients and images, unless told otherwise: nothing."""
    return x

def gan_step(players, optimizers, real, z, average=same, shown=same):
    """An ordinary step of D, then one of G, in place. Returns numbers to print.
    real [T, B, 784], z [T, n, 100], optimizers of theta and of phi, average: what is done to
    gradients before they are used, shown: what D sees of images, real or drawn."""
    optimizer_g, optimizer_d = optimizers
    # These share memory with the players: apply_gradients changes both.
    theta, phi = each(differentiable, players)
    fake = generator(theta, z)  # [T, n, 784]
    seen, seen_real = shown(fake), differentiable(shown(real))
    real_logits = discriminator(phi, seen_real)
    steepness, = torch.autograd.grad(real_logits.sum(), seen_real, create_graph=True)  # like real
    penalty = R1 / 2 * steepness.square().sum(-1).mean(-1)  # keeps D and G from circling
    d = (loss_d(real_logits, discriminator(phi, seen.detach())) + penalty).sum()
    skipped_d = apply_gradients(optimizer_d, average(torch.autograd.grad(d, phi)))

    # players.phi is the new D, and a constant, so that no time goes into its gradient.
    g = loss_g(discriminator(players.phi, seen), fake, real).sum()
    skipped_g = apply_gradients(optimizer_g, average(torch.autograd.grad(g, theta)))
    return {"skipped": torch.maximum(skipped_d, skipped_g), "D": d.detach(), "G": g.detach()}

def train_gan(stage, players, steps, domains, args):
    """Ordinary GAN training on four domains a step, most of them made up. Returns `Players`."""
    players = each(torch.clone, players)
    optimizers = [adam(weights, GAN_LR) for weights in players]
    step_on = Recorded(partial(gan_step, players, optimizers, average=average_of_processes))

    def do_step(_):
        real = sample_images(domains, sample_classes(domains, 2), GAN_BATCH // 4)  # [4, 16, 784]
        real = with_made_up(real, args.made_up).reshape(1, GAN_BATCH, PIXELS)
        return step_on(real, noise(1, FAKES))

    run_stage(stage, steps, do_step, flat(players), optimizers, args,
              lambda: draw_progress(stage, players, domains, args))
    return players

def meta_train(warm, domains, args):
    """Episodes, from the weights `warm`. Returns a `Start`."""
    rates = args.inner_lr * torch.tensor([[1.0], [0.5]])  # of G and D
    layers = len(warm.theta) // 2
    log_rates = rates.log().repeat(args.inner_steps, 1, layers)  # [inner steps, 2, layers]
    start = Start(*each(torch.clone, warm), log_rates)
    weights = [*start.theta, *start.phi]
    # Each rate is a tensor, because a CUDA graph freezes plain numbers.
    optimizers = [adam(tensors, torch.tensor(0.0)) for tensors in (weights, [log_rates])]

    @Recorded
    def outer_step(support, query):
        score, direction = meta_gradient(start, support, query, args.algorithm)
        direction = average_of_processes(direction)
        direction = unit(direction)  # so that every episode counts the same
        direction = unit(direction)  # if it had an inf, all is nan now, and both optimizers skip
        skipped = apply_gradients(optimizers[0], direction[:-1])
        apply_gradients(optimizers[1], direction[-1:])
        return {"skipped": skipped, "score": score}

    def do_step(step):
        lr = args.meta_lr * min(1, 2 - 2 * step / args.meta_steps)  # falls in the second half
        for optimizer, factor in zip(optimizers, (1, RATES_LR)):
            optimizer.param_groups[0]["lr"].fill_(factor * lr)
        classes = sample_classes(domains, args.meta_batch)  # T of them
        images = sample_images(domains, classes, args.shots, QUERIES)  # [T, shots + QUERIES, 784]
        images = with_mixtures(with_made_up(images, args.made_up))
        return outer_step(*split(images, args.shots))

    run_stage("meta-training", args.meta_steps, do_step, flat(start), optimizers, args,
              lambda: draw_progress("meta-training", start, domains, args))
    return start

def train_all(domains, args):
    """Returns the `Start` as it is in mtgan.pt, and the `Players` of the baseline. That is
    transfer: the warm start's training goes on, for as long as the episodes took."""
    reseed(args.seed, "start")
    warm = train_gan("warm start", new_players(), args.warm_steps, domains, args)
    start = save_start(meta_train(warm, domains, args), domains, args)
    steps = TRANSFER_STEPS * args.meta_batch * args.meta_steps
    return start, train_gan("transfer", warm, steps, domains, args)

# That was the method. From here on we measure it and serve it.
# 7  Meta-testing ----------------------------------------------------------------------
ADAM_LR = 1e-3  # after the learned steps, chosen on validation classes
TRANSFER_LRS = 1e-3, 2e-3  # Adam's rates for transfer: a row of the table for each
SCRATCH_LR = 1e-3  # for a new GAN
COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7"  # the colour-blind tell them apart
METRICS = {"frechet": "Fréchet distance on the judge's features, lower is better",
           "recognised": "share that the judge takes for the target, higher is better",
           "variety": "spread of the features, of real images 1",
           "nearest": "distance to the nearest support image, of real images 1"}

def few_shot(support, start, lr=ADAM_LR):
    """Adapt a `Start` or `Players` to a support [T, shots, 784]. Yields theta before the first
    step and after each, without end. Use one before you ask for the next: Adam changes it in place.

    A `Start` first takes its learned inner steps. Then, and for `Players` from the beginning,
    come ordinary GAN steps by Adam at the rate lr. In these, D sees altered copies of all images,
    so that it does not learn the few real ones by heart (Zhao et al. 2020, arXiv 2006.10738).
    """
    players = each(lambda p: p.expand(len(support), *p.shape[1:]), start)
    yield players.theta
    if isinstance(start, Start):
        for rates in start.log_rates.exp():
            players = Players(*inner_step(*players, rates, support, second_order=False))
            yield players.theta
    players = each(torch.clone, players)
    optimizers = [adam(weights, lr) for weights in players]
    shown = partial(altered, strength=0.5)
    step_on = Recorded(partial(gan_step, players, optimizers, shown=shown))
    while True:
        step_on(support, noise(len(support), FAKES))
        yield players.theta

def altered(images, strength=1.0):
    """Copies of images [T, n, 784], each turned, scaled and moved a little. Gradients pass."""
    shape, n = images.shape, images.shape[0] * images.shape[1]

    def uniform(most):
        return most * strength * (2 * torch.rand(n) - 1)

    angle, scale = uniform(0.2), 1 + uniform(0.15)  # 0.2 is 12 degrees
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, -sin, uniform(0.12), sin, cos, uniform(0.12)], 1)  # frame: 2 wide
    grid = F.affine_grid(affine.view(n, 2, 3), (n, 1, 28, 28), align_corners=False)
    light = images.reshape(n, 1, 28, 28) + 1  # so that 0, which lies outside of it, is black
    return F.grid_sample(light, grid, align_corners=False).view(shape) - 1

def draw_progress(stage, start, domains, args):
    """Rewrite progress.png: eight images of each held-out target, and what each stage's start
    draws after ten steps on them, always with the same noise. A row for each stage."""
    path = Path(args.out, "state", "progress.pt")
    rows = load(path) if path.exists() else {}
    reseed(args.seed, "progress")
    support = sample_images(domains, domains.test, args.shots)
    theta = next(itertools.islice(few_shot(support, start), 10, None))
    rows |= {"support": support[:, torch.arange(8) % args.shots],
             stage: generator(theta, noise(len(support), 8))}
    save(path, rows)
    images = torch.cat([row.flatten(0, 1) for row in rows.values()])
    save(Path(args.out, "progress.png"), picture(images, 8 * len(support), 2))

def translate(theta, images):
    """theta [2, ...] holds two Gs, of source and target. Find noise from which the first draws
    images [1, n, 784] of the source, and let the second draw from it, too. Returns the images, and
    what either G draws  # [3, n, 784]"""
    first = [p[:1] for p in theta]
    z = noise(1, images.shape[1])
    optimizer = torch.optim.Adam([z], 0.05)
    for _ in range(300):  # it has settled by then
        z.grad = grad(lambda z: (generator(first, z) - images).square().sum())(z)
        optimizer.step()
    return torch.cat([images, generator(theta, z.expand(2, -1, -1))])

def without_a_gan(support, real, n):
    """What needs no GAN: {name: images [T, n, 784]}, the real ones [T, n, 784] among them."""
    tasks, shots, _ = support.shape
    mean, components = support.mean(1, keepdim=True), min(8, shots - 1)
    _, scale, directions = torch.linalg.svd(support - mean, full_matrices=False)
    deviations = scale[:, None, :components] / max(1, shots - 1) ** 0.5
    weights = torch.randn(tasks, n, components) * deviations
    gaussian = mean + weights @ directions[:, :components]
    return {"real images": real,
            "support repeated": support[:, torch.arange(n) % shots],
            f"Gaussian on {components} components": gaussian.clamp(-1, 1)}

def train_judge(domains, args):
    """A classifier of all classes, also of held-out ones, since it trains no GAN and only
    measures: [n, 784] -> features [n, 64] -> logits [n, classes]."""
    reseed(args.seed, "judge")
    names, nn = list(domains.images), torch.nn
    features = nn.Sequential(  # no strides, which would miss single pixels
        nn.Unflatten(-1, (1, 28, 28)), nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(1568, 64), nn.ReLU())
    judge = nn.Sequential(features, nn.Linear(64, len(names)))
    optimizer = adam(judge.parameters(), 1e-3)

    def do_step(_):
        labels = torch.randint(len(names), (128,))
        x = sample_images(domains, [names[label] for label in labels], 1).squeeze(1)  # [128, 784]
        loss = F.cross_entropy(judge(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    tensors = [p.detach() for p in judge.parameters()]
    run_stage("judge", args.judge_steps, do_step, tensors, [optimizer], args)
    return judge.requires_grad_(False)

def frechet_distance(a, b):
    """Of Gaussians fitted to a [n, d] and b [m, d]: |mean - mean|^2 + tr(A + B - 2 (A B)^1/2)"""
    a, b = a.double(), b.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.inf
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # A product of covariances has real eigenvalues, and its root's trace is the sum of their roots.
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
    return distance.clamp(min=0).item()

def judge_samples(x, support, real, reference, label, judge):
    """The METRICS of samples x [n, 784] of a class with the index `label`.
    real: other images of the class [n, 784], the scale of "nearest".
    reference: the judge's features of further ones [n, 64], which "frechet" compares."""
    def to_support(images):  # the fast way gives a copy a distance above 0
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cdist(images, support, compute_mode=exact).amin(1).mean()
    def spread(features):
        return features.var(0).sum().sqrt()
    features = judge[0](x)
    logits = judge[1](features)  # [n, classes]
    recognised = logits.amax(-1) == logits[:, label]  # a nan equals nothing
    return {"frechet": frechet_distance(features, reference),
            "recognised": recognised.double().mean().item(),
            "variety": (spread(features) / spread(reference)).item(),
            "nearest": (to_support(x) / to_support(real)).item()}  # not finite if all are copies

def meta_test(methods, judge, domains, args):
    """Test {method: (start, Adam's rate)}, all on the same images of the held-out targets.
    Returns rows, a dict for every draw, method, number of steps and target; and four images of
    each row of the first draw: {(target, method): {steps: [4, 784]}}."""
    n = min(500, (domains.fewest - args.shots) // 2)  # images that are compared
    path, names = Path(args.out, "state", "test.pt"), list(domains.images)
    done, rows, film = load(path) if path.exists() else (0, [], {})
    tests = list(itertools.product(range(args.test_seeds), ("no GAN", *methods)))
    for number, (seed, method) in list(enumerate(tests, 1))[done:]:
        reseed(args.seed, "test", seed)  # the same images for every method
        images = sample_images(domains, domains.test, args.shots + 2 * n)
        support, query = split(images, args.shots)
        real, reference = split(query, n)  # [T, n, 784]
        if method == "no GAN":
            drawn = [(name, 0, x) for name, x in without_a_gan(support, real, n).items()]
        else:
            # The range comes first: at its end, zip asks for no further step.
            thetas = zip(range(args.test_steps[-1] + 1), few_shot(support, *methods[method]))
            drawn = [(method, steps, generator(theta, noise(len(images), n)))
                     for steps, theta in thetas if steps in args.test_steps]
        for i, target in enumerate(domains.test):
            label, features = names.index(target), judge[0](reference[i])
            for name, steps, x in drawn:
                row = {"method": name, "seed": seed, "steps": steps, "target": target, "n": n}
                rows.append(row | judge_samples(x[i], support[i], real[i], features, label, judge))
                film.setdefault((target, name), {}).setdefault(steps, x[i, :4].clone())
        save(path, (number, rows, film))
        args.progress.show("test", number, len(tests))
    return rows, film

def print_tables(folders):
    """The METRICS of runs that differ in --seed alone, and a plot in the first run's folder."""
    paths = dict.fromkeys(Path(folder, "report.json").resolve() for folder in folders)
    reports = [load(path, "settings", "domains", "rows") for path in paths]
    for path, report in zip(paths, reports):
        refuse_differences(path.parent, report, reports[0], "make a table of its own", "seed")
    seeds = {report["settings"]["seed"] for report in reports}
    require(len(seeds) == len(reports), "two of these runs have the same --seed")
    rows = [row for report in reports for row in report["rows"]]
    columns = reports[0]["settings"]["test_steps"]
    classes, draws = (len({row[key] for row in rows}) for key in ("target", "seed"))
    headline = f"{reports[0]['domains']}, n = {classes} classes x {draws} draws"
    headline += f" x {len(reports)} runs" if len(reports) > 1 else ""
    say(headline)
    if rows[0]["n"] < 50:
        say(f"Only {rows[0]['n']} images of a class are compared. Fréchet distances of so few are "
            "noise: see how far real images are from others of their class")
    for metric, title in METRICS.items():
        say(f"\n{title}\n{'steps':24}" + "".join(f"{steps:>14}" for steps in columns))
        found = intervals(rows, metric)
        for method in dict.fromkeys(method for method, _ in found):
            cells = [cell(*found[method, steps]) if (method, steps) in found else ""
                     for steps in columns]
            say(f"{method:24}" + "".join(f"{text:>14}" for text in cells).rstrip())
        if not all(math.isfinite(row[metric]) for row in rows):
            say("-: not finite, as where a GAN diverged or a class has copies of one picture")
    path = Path(folders[0], f"results-of-{len(paths)}.png" if len(paths) > 1 else "results.png")
    try:
        save(path, plot(intervals(rows, "frechet"), headline))
        say(f"\n{path} shows the first of these tables")
    except OSError as error:  # a run of somebody else
        say(f"\nno plot: {error}")

def intervals(rows, metric):
    """{(method, steps): (mean, two standard errors)}: about the 95 % interval of independent
    values. The mean is not finite where a value is not."""
    found = {}
    for row in rows:
        found.setdefault((row["method"], row["steps"]), []).append(row[metric])
    with np.errstate(invalid="ignore"):
        return {key: (np.mean(values), 2 * np.std(values) / max(1, len(values) - 1) ** 0.5)
                for key, values in found.items()}

def cell(mean, two):
    """An interval as it stands in a table."""
    if not math.isfinite(mean):
        return "-"
    return f"{mean:.0f} ± {two:.0f}" if mean >= 10 else f"{mean:.2f} ± {two:.2f}"

def plot(found, title):
    """Fréchet distance against steps, both logarithmic, of {(method, steps): (mean, two)}: for
    each GAN a line within its interval, for what needs no GAN a level."""
    gans = list(dict.fromkeys(method for method, step in found if step))
    points = {(method, step): (mean, two) for (method, step), (mean, two) in found.items()
              if math.isfinite(mean) and (step or method not in gans)}
    means = [mean for mean, _ in points.values()] or [1]
    high = 1.2 * max(means) + 1e-9
    low = max(0.8 * min(means), high / 1e5)
    steps = sorted({step for _, step in found if step})
    canvas = Image.new("RGB", (1600, 1000), "white")  # made small at the end, to be smooth
    pen, font = ImageDraw.Draw(canvas, "RGBA"), ImageFont.load_default(30)

    def place(step, distance):  # in pixels
        across = math.log(step) / math.log(max(2, steps[-1]))
        up = math.log(min(max(distance, low), high) / low) / math.log(high / low)
        return 120 + 1440 * across, 900 - 740 * up

    def level(distance, colour, text, anchor, right, down):
        x, y = place(1, distance)
        pen.line([x, y, 1560, y], colour, 3)
        pen.text((x + right, y + down), text, "black", font, anchor)

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    for distance in (digit * 10.0 ** power for power in decades for digit in (1, 2, 5)):
        if low < distance < high:
            level(distance, "#e0e0e0", f"{distance:g}", "rm", -15, 0)
    lines = {}
    for method in gans:  # a line ends where its GAN diverged
        finite = itertools.takewhile(lambda step: (method, step) in points, steps)
        lines[method] = [(step, *points[method, step]) for step in finite]

    def path(line, side):
        return [place(step, mean + side * two) for step, mean, two in line]

    for line, colour in zip(lines.values(), COLOURS):
        if line:
            pen.polygon(path(line, 1) + path(line, -1)[::-1], f"{colour}40")
    for i, (method, colour) in enumerate(zip(gans, COLOURS)):
        legend = 160 + 700 * (i % 2), 80 + 45 * (i // 2)
        pen.line(path(lines[method], 0), colour, 6)
        for x, y in [*path(lines[method], 0), legend]:
            pen.regular_polygon((x, y, 12), 3 + i, fill=colour)
        pen.text((legend[0] + 30, legend[1]), method, colour, font, "lm")
    for i, method in enumerate([method for method, step in points if not step][::-1]):
        level(points[method, 0][0], "#606060", method, "lb", 10 + 430 * i, -5)
    for step in steps:
        pen.text((place(step, low)[0], 915), str(step), "black", font, "mt")
    pen.text((840, 955), "steps of adaptation", "black", font, "mt")
    # Pillow's font has no accents.
    pen.text((20, 10), f"Frechet distance, and 2 standard errors: {title}", "black", font)
    return canvas.resize((800, 500), Image.LANCZOS)

def picture(images, columns, zoom):
    """Images [n, 784] in [-1, 1] as one enlarged picture, row by row."""
    grid = torchvision.utils.make_grid(images.cpu().view(-1, 1, 28, 28), columns, padding=1,
                                       normalize=True, value_range=(-1, 1))
    small = torchvision.transforms.functional.to_pil_image(grid[0])
    return ImageOps.scale(small, zoom, Image.NEAREST)

def filmstrip(film):
    """What each method draws for each target: {(target, method): {steps: [4, 784]}}"""
    strips = sorted(key for key in film if key[1] not in ("real images", "support repeated"))
    side, above = 120, 40  # pixels of four images, and of the text above
    canvas = Image.new("L", (960, (side + above) * len(strips)), 255)
    ink, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for i, (target, method) in enumerate(strips):
        y = (side + above) * i
        ink.text((4, y), f"{method}, {target}", 0, font)
        drawn = film[target, method]
        sheets = {f"step {steps}": images for steps, images in drawn.items()
                  if steps not in (0, 2)}  # to fit into 960 pixels
        sheets = sheets or {"samples": drawn[0]}  # of a Gaussian
        sheets = {"support": film[target, "support repeated"][0], **sheets}
        for j, (label, images) in enumerate(sheets.items()):
            ink.text((side * j + 4, y + 18), label, 0, font)
            canvas.paste(picture(images, 2, 2), (side * j, y + above))
    return canvas

# 8  Data and files --------------------------------------------------------------------
HELD_OUT = 3  # the last classes of a data set, or a third of them, train no GAN
TORCHVISION = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST"}
SIGNATURE = PngImagePlugin.PngInfo()  # by which we know pictures that we drew
SIGNATURE.add_text("Software", "mtgan.py")
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 26  # long texts are fine
OF_SYSTEMS = {"__MACOSX", "__pycache__", "@eaDir", "@Recycle", "$RECYCLE.BIN", "lost+found",
              "System Volume Information", "Thumbs.db", "desktop.ini"}
SPECS = ("SPEC: mnist, fashion, kmnist, the built-in strokes or shapes, or a folder with a class "
         "in each sub-folder; mnist:0-6,9 is some classes")

class UserError(Exception):
    """What the user can put right."""

def require(condition, message):
    if not condition:
        raise UserError(message)

def load_domains(args):
    """The `Domains` of --source and --target. To train, the last third of the classes of each data
    set is held out, three at most. To test a start, all are."""
    images, held_out, titles, sides = {}, [], [], []
    for specs in (args.source, args.target):
        side = []  # all its classes
        sides.append(side)
        for spec in specs:
            title, classes = load_dataset(spec, args.data_dir)
            titles.append(title)
            for name, content in classes.items():
                require(len(content) > 1, f"'{name}' has only one image")
                require(torch.equal(images.setdefault(name, content), content),
                        f"two classes are called '{name}'")
            names = list(classes)
            side += names
            few = min(HELD_OUT, max(1, len(names) // 3)) if args.test is None else len(names)
            held_out += names[-few:]
    sources, targets = ([name for name in side if name not in held_out] for side in sides)
    train = [(s, t) for s, t in dict.fromkeys(itertools.product(sources, targets)) if s != t]
    test = [name for name in dict.fromkeys(sides[1]) if name in held_out]
    require(len(images) > 1 and (train or args.test is not None),
            "too few classes: a test needs 2. To train, --source and --target need 2 each, because "
            "a third of the classes of each data set is held out")
    fewest, smallest = min((len(images[name]), name) for name in test)
    advice = f"take --shots {fewest - 4} or less" if fewest > 4 else "it needs 5 or more"
    require(fewest >= args.shots + 4,  # a test compares 2 with 2
            f"'{smallest}', a class to test, has {fewest} images: {advice}")
    return Domains(images, train, test, fewest, " and ".join(dict.fromkeys(titles)))

def load_dataset(spec, data_dir):
    """A data set's name, and {'mnist 7': uint8 [n, 784]} of all classes, or some: mnist:0-6,9."""
    listed = re.fullmatch(r"(.+?):(\d+(-\d+)?(,\d+(-\d+)?)*)", spec)
    name, chosen = listed.group(1, 2) if listed and not os.path.isdir(spec) else (spec, "")
    if not os.path.isdir(name):
        name = name.lower()
    if name in TORCHVISION:
        title, classes = name, load_torchvision(name, data_dir)
    elif name in ("strokes", "shapes"):
        reseed(name)  # the same images in every run
        images = level_sets(torch.full((10,), name == "strokes"), 400)
        title, classes = name, {str(i): ((x + 1) * 127.5).byte() for i, x in enumerate(images)}
    else:
        require(not os.path.isfile(spec), f"'{spec}' is a file: name the folder it is in")
        require(os.path.isdir(name),
                f"no data set and, seen from {os.getcwd()}, no folder is called '{spec}'. {SPECS}")
        title, classes = Path(name).resolve().name, load_folder(name)
    labels = []
    for low, high in re.findall(r"(\d+)-?(\d*)", chosen):
        require(int(low) <= int(high or low) < len(classes),
                f"'{spec}': {title} has the classes 0 to {len(classes) - 1}")
        labels += list(classes)[int(low):int(high or low) + 1]
    return title, {f"{title} {label}": classes[label] for label in labels or classes}

def load_torchvision(name, data_dir):
    """MNIST or its kind, from data_dir or downloaded: {class: uint8 [n, 784]}"""
    kind = getattr(torchvision.datasets, TORCHVISION[name])
    downloads = Path(data_dir, "downloads")  # of its own, so that a user's files are left alone
    socket.setdefaulttimeout(20)

    def parts_of(folder, download=False):
        return [kind(folder, train, download=download) for train in (True, False)]

    def find():
        for folder in (data_dir, downloads):
            try:
                return parts_of(folder)
            except RuntimeError as error:
                if "not found" not in str(error):  # but damaged
                    raise
        downloads.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(downloads / ".lock"):  # another run waits, and finds them
            return parts_of(downloads, download=True)

    try:
        parts = find()
        for part in parts:
            require(part.data.shape == (len(part.targets), 28, 28), "not 28 x 28, a label each")
    except Exception as error:
        raise UserError(f"no network, or damaged files of '{name}' in {data_dir} ({error}). Yours "
                        f"belong, unpacked, into {Path(data_dir, kind.__name__, 'raw')}, such as "
                        f"train-images-idx3-ubyte; {downloads} can be deleted. To try the program "
                        "without data, take strokes and shapes") from None
    images = torch.cat([part.data for part in parts]).flatten(1).to(torch.get_default_device())
    labels = torch.cat([part.targets for part in parts])
    names = [label.split(" - ")[0] for label in parts[0].classes]
    return {label: images[labels == number] for number, label in enumerate(names)}

def load_folder(folder):
    """All pictures below a folder, a class in each sub-folder: {class: uint8 [n, 784]}, bright on
    dark. Says what it leaves out, other than what is hidden or what a system makes for itself."""
    paths, left_out, found = [], Counter(), []

    def locked(_):
        left_out["locked folder"] += 1

    def wanted(names):
        return [name for name in names if name[0] != "." and name not in OF_SYSTEMS]

    for root, folders, files in os.walk(folder, onerror=locked):
        folders[:] = wanted(folders)
        left_out["linked folder"] += sum(Path(root, name).is_symlink() for name in folders)
        paths += [Path(root, name) for name in wanted(files)]
    top = {path.relative_to(folder).parts[0].lower() for path in paths}
    require(not {"train", "test"} <= top and not {"train", "val"} <= top,
            f"'{folder}' has train/ and others inside, not classes: name one of them, such as "
            f"{Path(folder, 'train')}")

    def with_long_numbers(path):  # sorts 2 before 10
        return [re.sub(r"\d+", lambda digits: digits[0].zfill(20), part) for part in path.parts]

    for path in sorted(paths, key=with_long_numbers):
        parts = path.relative_to(folder).parts
        try:
            require(path.is_file(), "no file but a device or pipe")  # which would be waited for
            found.append((parts[0] if parts[1:] else "(loose)", *read_image(path)))
        except UserError as error:
            left_out[str(error)] += 1
        except Exception:  # whatever Pillow raises
            ending = path.suffix if path.suffix.isprintable() else ascii(path.suffix)
            left_out[f"unreadable {ending or 'file'}"] += 1
    kinds = ", ".join(f"{n} {kind}" for kind, n in left_out.items() if n)
    if kinds:
        say(f"{folder}: left out {kinds}", sys.stderr)
    require(found, f"no readable picture in '{folder}'")
    labels, images, borders = map(np.array, zip(*found))
    images = torch.tensor(bright_on_dark(images, borders, folder))
    return {str(label): images[labels == label] for label in dict.fromkeys(labels)}

def bright_on_dark(images, borders, folder):
    """The pictures of a folder, uint8 [n, 784], with borders [n] as of `read_image`. Their grounds
    are judged together, as one picture of many on grey paper is easily misjudged."""
    on_paper = borders >= 0
    turn = np.median(borders[on_paper]) > 127 if on_paper.any() else False
    if turn:
        images[on_paper] = 255 - images[on_paper]
    brightest = np.percentile(images.max(1), 90)
    if brightest < 128:  # thin strokes of large pictures fade when they are made small
        images = (images * (255 / max(1, brightest))).clip(0, 255).astype(np.uint8)
        say(f"{folder}: the pictures are dark, their contrast was stretched", sys.stderr)
    if turn:
        say(f"{folder}: {on_paper.sum()} pictures are dark on bright and were inverted", sys.stderr)
    return images

def read_image(path):
    """A picture of any size and mode, upright, grey and square [784], and the median brightness
    of its border. A cut-out is returned bright on black, with -1 for its border."""
    with Image.open(path) as image:
        signs = image.info.get("Software"), image.info.get("comment")
        require(not {"mtgan.py", b"mtgan.py"} & {*signs}, "drawn by mtgan.py")
        require(max(image.size) <= 56 * min(image.size), "too thin")
        image.thumbnail((1024, 1024), Image.BOX)  # kilobytes of a file can hold gigabytes
        with contextlib.suppress(Exception):  # EXIF data may be broken
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # more than 8 bits
            values = np.nan_to_num(np.asarray(image, float))
            low, high = np.percentile(values, [0.5, 99.5])  # one hot pixel decides nothing
            values = 255 * (values - low) / max(high - low, 1e-9)
            image = Image.fromarray(np.uint8(values.clip(0, 255)))
        grey, alpha = image.convert("RGBA").convert("LA").split()
    light, weight = np.asarray(grey, float), np.asarray(alpha, float)
    if weight.min() < 250:  # a cut-out
        if np.average(light, weights=weight + 1e-9) < 127:
            grey = ImageOps.invert(grey)
        grey, border = Image.composite(grey, Image.new("L", grey.size, 0), alpha), -1
    else:
        edges = np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]])
        border = int(np.median(edges))
    square = ImageOps.pad(grey, (28, 28), Image.LANCZOS, color=max(border, 0))
    return np.asarray(square).reshape(PIXELS), border

def save_start(start, domains, args):
    """Write mtgan.pt, in half precision. Returns the start as it can be read from there."""
    half = Start(*each(torch.Tensor.half, start), start.log_rates.half())
    if RANK == 0:
        classes = sorted({name for pair in domains.train for name in pair})
        save(Path(args.out, "mtgan.pt"),
             {**half._asdict(), "domains": domains.title, "classes": classes})
        say(f"{args.out}: mtgan.pt can be used; progress.png shows what it draws", sys.stderr)
    return Start(*each(torch.Tensor.float, half), half.log_rates.float())

def load_start(path):
    """The `Start` in an mtgan.pt or in a run's folder, and a dict of what it was trained on."""
    path = start_file(path)
    require(path.exists(), f"there is no {path}: a RUN is the folder of a training run. Pictures "
                           "are a --target")
    saved = load(path, *Start._fields, "domains", "classes")
    ours = new_players()
    try:
        players = each(torch.Tensor.float, Players(saved["theta"], saved["phi"]))
        start = Start(*players, saved["log_rates"].float())
        shapes = [p.shape for p in (*flat(players), start.log_rates[0])]
    except (TypeError, AttributeError, IndexError):  # no tensors
        shapes = []
    require(shapes == [*(p.shape for p in flat(ours)), (2, len(ours.theta) // 2)],
            f"{path} is a start of other networks")
    require(all(p.isfinite().all() for p in flat(start)),
            f"{path} has numbers that are not finite")
    return start, saved

def start_file(path):
    """A run's folder stands for the mtgan.pt in it."""
    return Path(path, "mtgan.pt") if Path(path).is_dir() else Path(path)

def load(path, *keys):
    """What `save` wrote; UserError where it is not there, damaged, or lacks a key."""
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text())
        else:
            content = torch.load(path, torch.get_default_device(), weights_only=True)
        missing = [key for key in keys if key not in content]
        require(not missing, f"no {missing}")
        return content
    except Exception as error:
        raise UserError(f"{path} is not there, damaged or unfinished ({error!r:.80})") from None

def save(path, content):
    """Write under another name first: the file is always whole, old or new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    if path.suffix == ".json":
        temporary.write_text(json.dumps(content, indent=1))
    elif path.suffix == ".png":
        content.save(temporary, "PNG", pnginfo=SIGNATURE)
    elif path.suffix == ".gif":
        content[0].save(temporary, "GIF", save_all=True, append_images=content[1:],
                        duration=60, loop=0, comment="mtgan.py")
    else:
        buffer = io.BytesIO()  # torch.save to a file says nothing of a full disk
        torch.save(content, buffer)
        temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)

def join_processes(args):
    """Meet the other processes that torchrun has started, if there are any."""
    if PROCESSES > 1:
        cuda = torch.device(args.device).type == "cuda"
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else args.device
        patience = datetime.timedelta(hours=9)  # the others wait while the first one tests
        torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=patience)

def leave_processes():
    """Wait for the others: torchrun ends all where one ends early."""
    if PROCESSES > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

def average_of_processes(gradients):
    """The mean of every gradient over all processes."""
    if PROCESSES == 1:
        return gradients
    gradients = [g.contiguous() for g in gradients]
    try:
        for g in gradients:
            torch.distributed.all_reduce(g)
    except RuntimeError as error:
        raise UserError("another process has ended, or cannot be reached: the same command goes on "
                        f"from here ({error!r:.80})") from None
    return [g / PROCESSES for g in gradients]

class Progress:
    """Says how far a run is: on a terminal in a line that is rewritten, elsewhere in a line every
    30 s. log.jsonl gets the numbers of these lines."""

    def __init__(self, costs, out):
        # Costs, and all positions below, are in units of the time of a GAN step.
        self.costs, self.out = costs, out  # {stage: cost}
        self.ends = dict(zip(costs, itertools.accumulate(costs.values())))
        self.began, self.shown, self.logged = time.monotonic(), -math.inf, -math.inf
        self.first, self.means, self.width, self.planned = None, {}, 0, False

    def show(self, stage, done, steps, numbers={}, counts={}):
        """numbers: {name: scalar tensor}, shown beside their means over about 50 steps. Nothing
        waits for a GPU, unless it is time for a line."""
        for name, value in numbers.items():
            before = self.means.get(f"mean {name}", value)
            mean = torch.lerp(before, value, 0.02)
            self.means[f"mean {name}"] = torch.where(mean.isfinite(), mean, before)
        now, end = time.monotonic(), self.ends[stage]
        position = end - self.costs[stage] * (1 - done / steps)
        if self.first is None:  # where this run begins or goes on
            self.first = position - self.costs[stage] / steps
        log = done == steps or now - self.logged >= SAVE_SECONDS
        terminal = sys.stderr.isatty()
        if RANK or not log and (not terminal or now - self.shown < 0.3):
            return
        pace = (now - self.began) / (position - self.first)
        if not self.planned and now - self.began > SAVE_SECONDS:
            self.planned = True
            minutes = (f"{name} {cost * pace / 60:.1f}" for name, cost in self.costs.items())
            say(f"expected minutes: {', '.join(minutes)}", sys.stderr)
        row = {**numbers, **self.means, **counts}
        row = {name: float(f"{float(value):.3g}") for name, value in row.items()}
        rest = pace * (end - position), pace * (sum(self.costs.values()) - position)
        line = f"{stage} {done}/{steps}, {rest[0]:.0f} s left, of the run {rest[1]:.0f} s"
        line += "".join(f", {name} {value:g}" for name, value in row.items())
        start, stop = ("\r", "\n" if log else "") if terminal else ("", "\n")
        say(start + line.ljust(self.width), sys.stderr, stop)
        self.shown, self.width = now, 0 if log else len(line)
        if log:
            self.logged = now
            with open(Path(self.out, "log.jsonl"), "a") as file:
                file.write(json.dumps({"stage": stage, "step": done, "of": steps, **row}) + "\n")
        if done == steps:
            self.means = {}

def hash_of(parts):
    """A short hash of strings or tensors."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part.cpu().numpy())
    return digest.hexdigest()[:16]

@contextlib.contextmanager
def claim(args, title, images, start):
    """Lock args.out, which must be empty, or be of a run with the same settings. Yields the run's
    report: settings, hashes of all else that decides it, and what it was made with."""
    sources = [Path(file).read_text(encoding="utf-8") for file in (__file__, kernels.__file__)]
    device, cuda = args.device, torch.device(args.device).type == "cuda"
    hashes = {"code": hash_of(ast.dump(ast.parse(source)) for source in sources),  # no comments
              "images": hash_of(images), "processes": PROCESSES,
              "start": start and hash_of(flat(start))}
    report = {"settings": {**vars(args), **hashes}, "domains": title,
              "torch": torch.__version__, "triton": getattr(kernels.triton, "__version__", None),
              "device": torch.cuda.get_device_name(device) if cuda else device}
    report = json.loads(json.dumps(report))  # as it will be read: tuples become lists
    if RANK:
        yield report
        return
    out, path = Path(args.out), Path(args.out, "report.json")
    require(path.is_file() or not any(out.glob("[!.]*")),
            f"{out} is not empty: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / ".lock", timeout=0)
    try:
        held = lock.acquire()
    except filelock.Timeout:
        raise UserError(f"another process is at work in {out}") from None
    except NotImplementedError:
        raise UserError(f"{out}: its file system has no locks. Choose an --out elsewhere") from None
    with held:
        if path.exists():
            refuse_differences(out, load(path, "settings"), report, "choose another --out")
        else:
            save(path, report)
        yield report

def refuse_differences(folder, old, new, advice, *may_differ):
    """The settings of two reports must agree. What only says where images and results lie may
    differ: the hash of the images tells whether they are the same."""
    may_differ = {"source", "target", "data_dir", "out", "device", "test", *may_differ}
    for name in sorted(new["settings"].keys() - may_differ):
        before, value = (report["settings"].get(name) for report in (old, new))
        numbers = "" if name in ("code", "images", "start") else f" ({before}, not {value})"
        require(before == value, f"{folder} has other {name}{numbers}: {advice}")

# 9  Command line ----------------------------------------------------------------------
SHIPPED = str(Path(__file__).parent / "assets" / "mtgan.pt")  # the start that comes along
DRY_RUN = {"shots": 10, "warm_steps": 20, "meta_steps": 3, "test_seeds": 1,
           "judge_steps": 60, "test_steps": (0, 1, 2, 6)}

def say(line, file=None, end="\n"):
    """Print. Where the reader has left, later lines go nowhere, and the run goes on."""
    try:
        if RANK == 0:
            print(line, file=file, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())

def make_parser():
    """The parser, and {option: the modes that use it}."""
    title, _, commands, *_ = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        "mtgan.py", "mtgan.py [options]", title, f"examples:\n{commands}\n\n{SPECS}",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = partial(require, False)
    uses = {}

    def options_of(*modes):
        group = parser.add_argument_group(f"to {' or '.join(modes)}")
        def option(name, text, default=None, **how):
            uses[name] = modes
            default = getattr(Settings, name, default)
            if isinstance(default, (int, float)) and not how:
                how = {"type": type(default), "metavar": "N"}
            if default:
                text += f" ({' '.join(default) if isinstance(default, list) else default})"
            flag = "--" + name.replace("_", "-")
            group.add_argument(flag, default=default, help=text, **how)
        return option

    specs = {"nargs": "+", "metavar": "SPEC", "type": os.path.expanduser}
    run_or_shipped = {"nargs": "?", "const": SHIPPED, "metavar": "RUN"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    option = options_of("train", "test", "adapt")
    option("target", "target domains", ["fashion"], **specs)
    option("data_dir", "folder of the data sets", "data", metavar="DIR")
    option("out", "folder for the results", "runs/...", metavar="DIR")
    option("seed", "all random numbers follow from it (0)", 0)
    option("shots", "images to adapt to; for --adapt the most")
    option("device", "cpu, cuda or cuda:1", device, metavar="NAME")
    option("kernel", "of linear layers: torch, triton, or auto, which is torch", "auto",
           choices=("auto", "torch", "triton"), metavar="NAME")
    option = options_of("train", "adapt")
    option("source", "source domains; for --adapt none, unless told", ["mnist"], **specs)
    option = options_of("train", "test")
    option("test_seeds", "draws of the support in a test", 5)
    option("dry_run", "everything once, tiny, in a minute", False, action="store_true")
    option = options_of("train")
    option("algorithm", ", ".join(ALGORITHMS), choices=ALGORITHMS, metavar="NAME")
    option("inner_steps", "inner steps of an episode")
    option("inner_lr", "initial inner rate of G, twice D's")
    option("warm_steps", "ordinary GAN steps before the episodes")
    option("meta_steps", "episodes")
    option("meta_batch", "pairs of an episode")
    option("meta_lr", "outer learning rate")
    option("made_up", "share of tasks that get random shapes")
    option = options_of("test")
    option("test", "test RUN's start, or the one in assets, on all classes of --target",
           **run_or_shipped)
    option = options_of("adapt")
    option("adapt", "adapt RUN's start, or the one in assets, to --target",
           **run_or_shipped)
    option("steps", "steps to adapt", 200)
    option("samples", "images to draw", 64)
    option = options_of("tables")
    option("tables", "print one table of these runs", (), nargs="+", metavar="RUN")
    parser.set_defaults(judge_steps=500, test_steps=(0, 1, 2, 5, 10, 20, 50, 100, 200))
    return parser, uses

def parse(argv):
    """The command line as a namespace; UserError for what is wrong, missing or ignored."""
    parser, uses = make_parser()
    given = {word[2:].split("=")[0].replace("-", "_") for word in argv if word[:2] == "--"}
    if "dry_run" in given:
        parser.set_defaults(**DRY_RUN)
    args = parser.parse_args(argv)
    mode = next((mode for mode in ("tables", "test", "adapt") if mode in given), "train")
    for name in sorted(given):
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        require(mode in uses[name], f"{flag} is of no use here")
        if isinstance(value, (int, float)):
            zero = name in ("seed", "warm_steps", "made_up")
            least = 0 if zero else 1 if isinstance(value, int) else 1e-9
            most = 1 if name == "made_up" else 2 ** 31 - 1
            require(least <= value <= most, f"{flag} must be from {least} to {most}")
    if mode in ("test", "adapt"):
        require("target" in given, f"--{mode} needs a --target, such as a folder of pictures")
        if "source" not in given:
            args.source = []
    if mode == "adapt":
        if "shots" not in given:
            args.shots = None  # as many as there are, up to 25
        require(len(args.target) == 1 >= len(args.source), "--adapt: one --target, one --source")
    if "out" not in given:
        words = [word for word in ("dry_run", "test", "adapt") if word in given]
        words += [Path(spec).name or "folder" for spec in (*args.source, *args.target)]
        if mode == "adapt":  # other steps or shots go into another folder
            words += [f"{args.steps}-steps"] + ([f"{args.shots}-shots"] if args.shots else [])
        name = re.sub(r"[^\w.]+", "-", "-".join(words)).strip("-.")
        args.out = f"runs/{name[-80:]}"
    return args

def run(args):
    """Meta-train, unless --test names a start; meta-test; write everything to args.out."""
    began, out = time.monotonic(), Path(args.out)
    domains, start, transfer = load_domains(args), None, None
    if args.test is not None:
        start, saved = load_start(args.test)
        args.inner_steps = len(start.log_rates)
        title = f"{domains.title}; the start was trained on {saved['domains']}"
        seen = [name for name in domains.test if name in saved["classes"]]
        title += f", and so on these classes: {', '.join(seen)}" if seen else ""
        domains = domains._replace(title=title)
        trained = start_file(args.test).parent / "state" / "transfer.pt"
        if trained.exists():
            _, _, tensors, _ = load(trained)
            transfer = Players(tensors[:len(start.theta)], tensors[len(start.theta):])
    images = [str(domains[1:]), *domains.images.values()]
    with claim(args, domains.title, images, start) as report:
        episodes = TRANSFER_STEPS * args.meta_batch * args.meta_steps
        training = {"warm start": args.warm_steps, "meta-training": episodes, "transfer": episodes}
        tests = 0.6 * args.test_seeds * args.test_steps[-1] * len(domains.test)
        args.progress = Progress({**(training if start is None else {}),
                                  "judge": args.judge_steps / 2, "test": tests}, out)
        say(f"{report['device']}, {torch.get_num_threads()} threads, {PROCESSES} processes, kernel "
            f"{args.kernel}; held out: {', '.join(domains.test)}", sys.stderr)
        if start is None:
            start, transfer = train_all(domains, args)
        if RANK:
            return
        reseed(args.seed, "scratch")
        methods = {"MT-GAN": (start, ADAM_LR), "from scratch": (new_players(), SCRATCH_LR)}
        if transfer:
            methods |= {f"transfer, Adam {lr:g}": (transfer, lr) for lr in TRANSFER_LRS}
        rows, film = meta_test(methods, train_judge(domains, args), domains, args)
        save(out / "adaptation.png", filmstrip(film))
        save(out / "report.json", {**report, "rows": rows})
    print_tables([out])
    say(f"\n{out}: report.json, adaptation.png; {time.monotonic() - began:.0f} s")

def deploy(args):
    """Adapt a start to a user's pictures, and write what it draws."""
    start, saved = load_start(args.adapt)
    out, sets = Path(args.out), []
    needed = args.shots or 2
    require(needed >= 2, "--shots is too small: 2 is the least")
    for spec in (*args.source, *args.target):
        title, classes = load_dataset(spec, args.data_dir)
        sets.append(torch.cat(list(classes.values())))
        n = len(sets[-1])
        require(n >= needed, f"'{spec}' has {n} images, and needs {needed}")
    require(len(sets) == 1 or not torch.equal(*sets), "--source and --target are the same images")
    shots = args.shots or min(Settings.shots, *map(len, sets))
    with claim(args, title, sets, start):
        args.progress = Progress({"adapting": args.steps}, out)
        reseed(args.seed, "adapt")
        support = torch.stack([sample(images, shots) for images in sets])  # [1 or 2, shots, 784]
        for step, theta in zip(range(args.steps + 1), few_shot(support, start)):
            if step:
                args.progress.show("adapting", step, args.steps)
        theta_t, z = [p[-1:] for p in theta], noise(1, args.samples)
        samples = generator(theta_t, z)[0]  # of the target
        require(samples.isfinite().all(), "the adaptation diverged: take fewer --steps")
        save(out / "adapted.pt", [p.clone().cpu() for p in theta_t])
        save_pictures(out, support[-1], samples, theta_t, z)
        if args.source:
            rows = translate(theta, support[:1]).flatten(0, 1)  # [3 shots, 784]
            save(out / "translation.png", picture(rows, shots, 3))
    say(f"{out}: {shots} of {len(sets[-1])} pictures of {title} were used, by a start trained on "
        f"{saved['domains']}.\nsamples.png has the pictures, then {len(samples)} samples; "
        "nearest.png has each sample above the picture nearest to it;\ninterpolation.gif, "
        f"adapted.pt{', translation.png' if args.source else ''}. "
        f"For cleaner images, which copy the pictures more, add --steps {2 * args.steps}")

def save_pictures(out, support, samples, theta, z):
    """samples.png, nearest.png, interpolation.gif, and a picture of every sample.
    support [shots, 784]; samples [n, 784], which theta drew from z [1, n, 100]."""
    digits = max(3, len(str(len(samples) - 1)))
    for number, image in enumerate(samples):
        save(out / f"sample-{number:0{digits}}.png", picture(image, 1, 1))

    def rows_of(images, columns):  # with black images at the end, where the last row is not full
        missing = -len(images) % columns
        return F.pad(images, (0, 0, 0, missing), value=-1).view(-1, columns, PIXELS)

    sheet = torch.cat([rows_of(support, 8), rows_of(samples, 8)])
    save(out / "samples.png", picture(sheet.flatten(0, 1), 8, 3))

    nearest = support[torch.cdist(samples, support).argmin(1)]  # [n, 784]
    pairs = torch.stack([rows_of(samples, 16), rows_of(nearest, 16)], 1)  # [rows, 2, 16, 784]
    save(out / "nearest.png", picture(pairs.flatten(0, 2), 16, 3))

    corners = z[0, torch.arange(9) % min(8, len(samples))]  # the last is the first again
    path = [torch.lerp(a, b, i / 8) for a, b in itertools.pairwise(corners) for i in range(8)]
    frames = generator(theta, torch.stack(path)[None])[0]  # [64, 784]
    save(out / "interpolation.gif", [picture(frame, 1, 5) for frame in frames])

def main(argv=None):
    """Returns the exit code, 2 for what a user can put right. It leaves the process changed:
    default device, random numbers, backend of the layers, and how memory is kept."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's cannot
            stream.reconfigure(errors="replace")  # for letters that a console lacks
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if args.tables:
            print_tables(args.tables)
            return 0
        join_processes(args)
        try:
            if torch.device(args.device).type == "cpu":
                args.device = "cpu"  # not cpu:0, which torch.load does not know
            else:  # not on a CPU, where a default device makes a step take a tenth longer
                torch.set_default_device(args.device)
            torch.ones(1).double().item()
        except Exception:
            raise UserError(f"--device {args.device} cannot be used here; try cpu") from None
        refusal = args.kernel == "triton" and kernels.why_not_triton(args.device)
        require(not refusal, f"--kernel: {refusal}")
        kernels.default_backend = args.kernel  # set once, so that no network has to pass it on
        if args.device == "cpu":
            kernels.use_whole_cpu()
        torch.autograd.set_multithreading_enabled(False)  # faster on a GPU
        if args.adapt is None:
            run(args)
        elif RANK == 0:  # there is no work for several processes
            deploy(args)
        leave_processes()
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise  # a fault of ours
        say(f"mtgan.py: error: {' '.join(str(error).split()) or 'out of memory'}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("\nstopped: the same command goes on from here", sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
