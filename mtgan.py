"""MT-GAN: a Meta-Transfer Generative Adversarial Network, whole, in one file.

A GAN trained from scratch wants many images and many steps. MT-GAN meta-trains the *initialisation* of a generator
and a discriminator over many (source domain, target domain) pairs, so that on a new pair a few images and a few
steps are enough.

    python mtgan.py --source mnist --target fashion                 # meta-train, meta-test, pictures, checkpoint
    python mtgan.py --source digits --target garments --dry-run     # everything once, tiny, nothing to download
    python mtgan.py --adapt runs/mnist-fashion --target my_images/ --shots 10 --samples 64     # deploy

The four equations (a: inner learning rates, R: real images, z: noise, theta: generator, phi: discriminator)

    (1) the game        L_D = mean softplus(-D(R)) + mean softplus(D(G(z)))         L_G = mean softplus(-D(G(z)))
    (2) inner step      phi'   = phi   - a_phi   dL_D/dphi   (phi;   R, G(theta, z))
                        theta' = theta - a_theta dL_G/dtheta (theta; phi', z')      `adapt`
    (3) outer step      (theta_0, phi_0, a) <- Adam on d/d(theta_0, phi_0, a) of score(G(theta_K), query images)
    (4) dual form       W' = W + Δᵀ X, b' = b + Σ Δ   =>   x W'ᵀ + b' = (x Wᵀ + b) + (x Xᵀ + 1) Δ
                        X: what the layer saw during a step, Δ: -a times the gradient of its pre-activation.
                        An adapted layer is the shared layer plus attention over what it was adapted on.
"""
import argparse
import csv
import io
import json
import math
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.autograd import grad

from kernels import fused_linear

PIXELS, NOISE = 28 * 28, 100
GENERATOR_SIZES = (NOISE, 256, 512, 1024, PIXELS)
DISCRIMINATOR_SIZES = (PIXELS, 1024, 512, 256, 1)
HELD_OUT = 3                # classes of every dataset that meta-training never sees
QUERIES = 64                # target images that score an adapted generator
FAKES = 25                  # generated images in an inner step
GAN_BATCH = 64              # real images in a step of ordinary GAN training
MAX_RATE = 0.5              # inner learning rates are learned, up to here
AVERAGE = 0.98              # decay of the moving average of everything meta-learned
CLIP = 1.0                  # largest norm of an outer gradient
PATIENCE = 20               # this many non-finite updates in a row stop the run
TEST_STEPS = (0, 1, 2, 5, 10, 20, 50)
TEST_PAIRS = 12             # at most so many held-out pairs are tested
GAN_RATES = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)     # the grid from which the baselines' learning rate is chosen
KERNEL = "auto"             # backend of `fused_linear`, set by --kernel


class UserError(Exception):
    """Something that the user can put right; shown as one line, exit code 2."""


# ------------------------------------------------------------------------------------------------------------------
# 1  Domains: a spec string becomes images; a domain is one class of them
# ------------------------------------------------------------------------------------------------------------------

DOWNLOADABLE = {            # spec: (torchvision class, its arguments for each part, built-in that stands in for it)
    "mnist": (torchvision.datasets.MNIST, ({"train": True}, {"train": False}), "digits"),
    "fashion": (torchvision.datasets.FashionMNIST, ({"train": True}, {"train": False}), "garments"),
    "kmnist": (torchvision.datasets.KMNIST, ({"train": True}, {"train": False}), "digits"),
    "emnist": (torchvision.datasets.EMNIST, ({"split": "balanced", "train": True}, {"split": "balanced", "train": False}), "digits"),
    "qmnist": (torchvision.datasets.QMNIST, ({"what": "train"}, {"what": "test"}), "digits"),
    "usps": (torchvision.datasets.USPS, ({"train": True}, {"train": False}), "digits"),
}


class Dataset(NamedTuple):
    name: str
    images: np.ndarray      # uint8 [n, 784], bright strokes on 0
    labels: np.ndarray      # int [n]
    classes: list           # what label c is called


def load_dataset(spec, data_dir):
    """The images of a spec such as `mnist`, `mnist:0-6,9` or `my_images/`, with labels in the classes' order.

    A dataset that is neither in data_dir nor downloadable is replaced by a built-in, which its name then says.
    Raises UserError for an unknown, empty or corrupt domain.
    """
    name, chosen = re.fullmatch(r"(.*?)(?::([\d,-]+))?", spec).groups()
    if name in BUILT_IN:
        dataset = BUILT_IN[name]()
    elif name in DOWNLOADABLE:
        dataset = load_torchvision(name, data_dir)
    elif os.path.isdir(name):
        dataset = load_folder(name)
    else:
        raise UserError(f"unknown domain '{spec}': neither a folder nor one of {', '.join([*DOWNLOADABLE, *BUILT_IN])} "
                        "(a class list looks like mnist:0-6,9)")
    return choose_classes(dataset, chosen, spec) if chosen else dataset


def choose_classes(dataset, chosen, spec):
    """The classes that a list such as '0-6,9' names, relabelled 0, 1, 2 ..."""
    wanted = []
    for part in chosen.split(","):
        ends = part.split("-")
        if len(ends) > 2 or not all(end.isdigit() for end in ends):
            raise UserError(f"'{part}' in '{spec}' is not a class or a range of classes")
        wanted += range(int(ends[0]), int(ends[-1]) + 1)
    missing = [c for c in wanted if c >= len(dataset.classes)]
    if missing or not wanted:
        raise UserError(f"'{spec}' asks for class {missing[:1] or chosen}; {dataset.name} has classes 0 to {len(dataset.classes) - 1}")
    wanted = sorted(set(wanted))
    keep = np.isin(dataset.labels, wanted)
    return Dataset(dataset.name, dataset.images[keep], np.searchsorted(wanted, dataset.labels[keep]), [dataset.classes[c] for c in wanted])


def load_torchvision(name, data_dir):
    """All parts of a torchvision dataset, from data_dir or the network, else the built-in that stands in for it."""
    kind, parts, stand_in = DOWNLOADABLE[name]
    timeout = socket.getdefaulttimeout()
    try:
        try:
            loaded = [kind(data_dir, **part) for part in parts]
        except FileNotFoundError:
            loaded = None
        except RuntimeError as error:               # torchvision's word for 'not there', and nothing else's
            if "not found" not in str(error):
                raise
            loaded = None
        if loaded is None:
            socket.setdefaulttimeout(20)
            try:
                loaded = [kind(data_dir, **part, download=True) for part in parts]
            except (OSError, RuntimeError) as error:
                print(f"WARNING: '{name}' is not in {data_dir} and could not be downloaded ({str(error).splitlines()[0]}).\n"
                      f"WARNING: the built-in '{stand_in}' stands in for it; every result says so.", file=sys.stderr)
                dataset = BUILT_IN[stand_in]()
                return dataset._replace(name=f"{stand_in} (stand-in for {name})")
            finally:
                socket.setdefaulttimeout(timeout)
        images = np.concatenate([np.asarray(part.data) for part in loaded])
        labels = np.concatenate([np.asarray(part.targets) for part in loaded])
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images, {len(labels)} labels")
    except Exception as error:                      # whatever a damaged file makes torchvision raise
        raise UserError(f"the files of '{name}' in {data_dir} are corrupt ({type(error).__name__}: {error}); delete them to download anew") from error
    if name == "qmnist":
        labels = labels[:, 0]                       # the other columns are about the writer
    if name == "emnist":
        images = images.transpose(0, 2, 1)          # stored on its side
    if name == "usps":                              # 16 × 16
        images = np.stack([np.asarray(Image.fromarray(image).resize((28, 28), Image.BICUBIC)) for image in images])
    classes = [str(c) for c in getattr(loaded[0], "classes", range(10))][:int(labels.max()) + 1]
    return Dataset(name, images.reshape(-1, PIXELS), labels.astype(int), [c.split(" - ")[0] for c in classes])


def load_folder(folder):
    """Every image below a folder, its sub-folders being the classes; files that are not images are skipped and counted."""
    known, images, labels, classes, skipped = set(Image.registered_extensions()), [], [], [], 0
    groups = [p for p in sorted(Path(folder).iterdir()) if p.is_dir() and not p.name.startswith(".")]
    for group in [*groups, Path(folder)]:
        files = group.rglob("*") if group in groups else group.glob("*")    # loose files are a class of their own
        arrays = []
        for path in sorted(p for p in files if p.suffix.lower() in known and p.is_file()):
            try:
                arrays.append(read_image(path))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                skipped += 1
        if arrays:
            images += arrays
            labels += [len(classes)] * len(arrays)
            classes.append(group.name)
    if skipped:
        print(f"{folder}: skipped {skipped} unreadable image file{'s' * (skipped > 1)}", file=sys.stderr)
    if not images:
        raise UserError(f"no readable image in '{folder}'")
    return Dataset(str(folder), np.stack(images), np.array(labels), classes)


def read_image(path):
    """One image file as uint8 [784]: upright, grey, square, bright on dark as MNIST is, whatever it was before."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":                   # 16 and 32 bits: the range in use becomes 0 to 255
            values = np.asarray(image, dtype=float)
            image = Image.fromarray(np.uint8(255 * (values - values.min()) / max(values.max() - values.min(), 1e-9)))
        if "A" in image.getbands() or "transparency" in image.info:
            grey, alpha = (np.asarray(band, dtype=float) for band in image.convert("RGBA").convert("LA").split())
            ground = 255 * ((grey * alpha).sum() < 127.5 * alpha.sum())     # a drawing must stand out from what lies behind it
            image = Image.fromarray(np.uint8(grey * alpha / 255 + ground * (1 - alpha / 255)))
        grey = np.asarray(image.convert("L"))
    border = np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]))
    if border > 127:
        grey, border = 255 - grey, 255 - border
    square = Image.new("L", (max(grey.shape),) * 2, int(border))
    square.paste(Image.fromarray(grey), ((square.width - grey.shape[1]) // 2, (square.height - grey.shape[0]) // 2))
    return np.asarray(square.resize((28, 28), Image.LANCZOS)).reshape(PIXELS)      # Pillow antialiases when it shrinks


def draw_digits(each=400):
    """Built-in domain: ten digits in Pillow's own font, every image with its own stroke width, slant, size and place."""
    rng = torch.Generator().manual_seed(0)
    glyphs = torch.zeros(10, 4, 56, 56)             # [digit, stroke width, y, x]
    for digit in range(10):
        for stroke in range(4):
            canvas = Image.new("L", (56, 56))
            ImageDraw.Draw(canvas).text((28, 28), str(digit), 255, ImageFont.load_default(44), anchor="mm", stroke_width=stroke)
            glyphs[digit, stroke] = torch.from_numpy(np.array(canvas)) / 255
    labels = torch.arange(10).repeat_interleave(each)
    strokes = torch.randint(4, labels.shape, generator=rng)
    u = torch.rand(7, len(labels), generator=rng) * 2 - 1
    images = warp(glyphs[labels, strokes].unsqueeze(1), 0.35 * u[0], 0.25 * u[1:3], 0.35 * u[3], 0.2 * u[4:6])
    images = images.clamp(0, 1) ** torch.exp(0.5 * u[6]).view(-1, 1, 1, 1)
    return Dataset("digits", (images * 255).byte().numpy().reshape(-1, PIXELS), labels.numpy(), [str(d) for d in range(10)])


GARMENTS = {                # right half of an outline around the middle, (x from the middle, y down), mirrored; or a whole outline
    "t-shirt": [(.0, .14), (.12, .1), (.44, .24), (.37, .42), (.27, .36), (.27, .9)],
    "trousers": [(.0, .06), (.22, .06), (.3, .95), (.1, .95), (.0, .32)],
    "pullover": [(.0, .14), (.12, .1), (.33, .17), (.47, .8), (.36, .84), (.27, .42), (.27, .9)],
    "dress": [(.0, .14), (.12, .05), (.18, .22), (.1, .42), (.3, .95)],
    "coat": [(.0, .3), (.1, .05), (.34, .13), (.45, .88), (.35, .9), (.3, .4), (.33, .97), (.03, .97)],
    "sandal": [(-.46, .72), (-.1, .5), (.02, .6), (.2, .35), (.26, .38), (.12, .66), (.44, .5), (.46, .74), (.3, .68), (-.46, .8)],
    "shirt": [(.0, .22), (.1, .04), (.4, .3), (.34, .4), (.24, .3), (.22, .96)],
    "sneaker": [(-.47, .72), (-.44, .58), (-.12, .46), (.14, .32), (.4, .34), (.46, .5), (.47, .74)],
    "bag": [(.0, .38), (.2, .38), (.16, .14), (.0, .1), (.0, .04), (.22, .08), (.26, .38), (.44, .4), (.42, .9), (.0, .9)],
    "boot": [(-.42, .92), (-.4, .76), (-.04, .64), (.0, .06), (.34, .06), (.36, .62), (.42, .92)],
}
WHOLE = {"sandal", "sneaker", "boot"}


def draw_garments(each=400):
    """Built-in domain: ten silhouettes, every image with its own proportions, outline, place and shading."""
    rng, images = np.random.default_rng(0), []
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    for name, outline in GARMENTS.items():
        points = np.array(outline if name in WHOLE else outline + [(-x, y) for x, y in reversed(outline)])
        for _ in range(each):
            stretch, shift = rng.uniform(.72, 1.05, 2), rng.uniform(-.06, .06, 2)
            corners = (points + rng.normal(0, .018, points.shape) - (0, .5)) * stretch + .5 + shift
            canvas = Image.new("L", (112, 112))
            ImageDraw.Draw(canvas).polygon([tuple(c) for c in corners * 112], 255)
            light = rng.uniform(.4, 1) + rng.uniform(-.25, .25) * x + rng.uniform(-.25, .25) * y + rng.uniform(0, .12) * np.cos(rng.uniform(3, 20) * (x if rng.random() < .5 else y))
            images.append(np.uint8(np.asarray(canvas.reduce(4)) * light.clip(.15, 1)))
    return Dataset("garments", np.stack(images).reshape(-1, PIXELS), np.arange(10).repeat(each), list(GARMENTS))


BUILT_IN = {"digits": draw_digits, "garments": draw_garments}


def warp(images, angle, log_scale, shear, shift):
    """Rotate, scale, shear and shift images [T, n, h, w], all n of a task alike: every argument is [T] or [2, T].

    Angles in radians, shifts in half image widths, the logarithm of the scale; samples outside are 0. Returns [T, n, 28, 28].
    """
    cos, sin, (sx, sy) = angle.cos(), angle.sin(), log_scale.exp()
    matrix = torch.stack([torch.stack([cos * sx, (shear - sin) * sy, shift[0]], -1), torch.stack([sin * sx, cos * sy, shift[1]], -1)], 1)  # [T, 2, 3]
    grid = F.affine_grid(matrix, (len(images), 1, 28, 28), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class Domains(NamedTuple):
    """All images of a run, sorted by class, on the device, and who may use which class for what."""
    images: torch.Tensor    # uint8 [n, 784]
    first: torch.Tensor     # int64 [C], where a class begins
    count: torch.Tensor     # int64 [C]
    names: list             # 'mnist 7'
    roles: dict             # 'train' or 'test' -> (source classes, target classes)


def load_domains(source_specs, target_specs, data_dir, device):
    """Load every spec once and hold out the last classes of each, for all roles.

    Raises UserError where nothing would be left to train or to test on.
    """
    index, counts, images, names, classes = {}, [], [], [], {}
    for spec in [*source_specs, *target_specs]:
        if spec in classes:
            continue
        dataset = load_dataset(spec, data_dir)
        classes[spec] = []
        for label, label_name in enumerate(dataset.classes):
            key = f"{dataset.name} {label_name}"
            if key not in index:
                index[key] = len(index)
                images.append(dataset.images[dataset.labels == label])
                counts.append(len(images[-1]))
                names.append(key)
            classes[spec].append(index[key])
            if not counts[index[key]]:
                raise UserError(f"class '{key}' of '{spec}' has no image")
        if len(dataset.classes) < 2:
            raise UserError(f"'{spec}' has one class; at least two are needed, one of them held out for testing")
    tests = {spec: c[-min(HELD_OUT, max(1, len(c) // 3)):] for spec, c in classes.items()}
    held_out = {c for test in tests.values() for c in test}
    roles = {role: [list(dict.fromkeys(c for spec in specs for c in pick(spec))) for specs in (source_specs, target_specs)]
             for role, pick in (("train", lambda spec: [c for c in classes[spec] if c not in held_out]), ("test", tests.get))}
    for role, (sources, targets) in roles.items():
        if not any(s != t for s in sources for t in targets):
            raise UserError(f"no (source, target) pair of two different classes is left to {role} on; name more classes")
    count = torch.tensor(counts)
    return Domains(torch.from_numpy(np.concatenate(images)).to(device), (count.cumsum(0) - count).to(device), count.to(device), names, roles)


def sample_images(domains, classes, n, rng):
    """n different images of each of the classes [T], as floats in [-1, 1]  # [T, n, 784]"""
    count = domains.count[classes].unsqueeze(1)
    lots = torch.rand(len(classes), int(domains.count.max()), generator=rng, device=rng.device)
    lots = lots.masked_fill(torch.arange(lots.shape[1], device=rng.device) >= count, 2)         # a class's own images have lots below 1
    index = domains.first[classes].unsqueeze(1) + lots.topk(n, largest=False).indices
    return domains.images[index] / 127.5 - 1


def sample_pairs(domains, n, rng):
    """n random (source class, target class) pairs for meta-training, the two never the same  # int64 [n, 2]"""
    sources, targets = domains.roles["train"]
    pairs = torch.tensor([(s, t) for s in sources for t in targets if s != t])
    return pairs[torch.randint(len(pairs), (n,), generator=rng, device=rng.device).cpu()].to(rng.device)


def new_domain(images, other, rng):
    """Make new domains of old ones: one random change per task, the same for all its images  # [T, n, 784] -> the same

    Quarter turns, mirroring, slant, size, place, contrast, and images of an `other` class mixed in. Few classes with
    many variations generalise where few classes alone are learned by heart.
    """
    tasks, n, _ = images.shape
    u = torch.rand(11, tasks, generator=rng, device=rng.device)
    mixed = (u[0] < 0.3).view(-1, 1, 1) & (torch.rand(tasks, n, 1, generator=rng, device=rng.device) < 0.5)
    images = (torch.where(mixed, other, images).view(tasks, n, 28, 28) + 1) / 2
    v = 2 * u - 1
    angle = (4 * u[1]).floor() * math.pi / 2 + 0.35 * v[2]
    warped = warp(images, angle, 0.25 * v[3:5], 0.3 * v[5], 0.15 * v[6:8])
    warped = torch.where((u[8] < 0.5).view(-1, 1, 1, 1), warped.flip(-1), warped)
    images = torch.where((u[9] < 0.75).view(-1, 1, 1, 1), warped, images)
    gamma = torch.where(u[10] < 0.3, torch.exp(0.75 * v[8]), 1.0).view(-1, 1, 1, 1)
    return images.clamp(0, 1).pow(gamma).view(tasks, n, PIXELS) * 2 - 1


def sample_episode(domains, pairs, shots, queries, source_steps, rng, augment):
    """What T tasks learn from and are scored on: the images of T (source class, target class) pairs [T, 2].

    Returns source_steps batches of the source domain and the support  # each [T, shots, 784]
    and query images, none of which is in the support  # [T, queries, 784]
    """
    source, target = pairs.T
    batches = [sample_images(domains, source, shots, rng) for _ in range(source_steps)]
    images = sample_images(domains, target, shots + queries, rng)
    if augment:
        other = sample_pairs(domains, len(pairs), rng)[:, 1]
        images = new_domain(images, sample_images(domains, other, shots + queries, rng), rng)
    return batches, images[:, :shots], images[:, shots:]


# ------------------------------------------------------------------------------------------------------------------
# 2  Networks: pure functions of their parameters
# ------------------------------------------------------------------------------------------------------------------

class Layer(NamedTuple):
    """A linear layer and what it remembers of its inner steps, equation (4): W' = W + deltasᵀ inputs, b' = b + Σ deltas."""
    weight: torch.Tensor            # [N, K], shared by all tasks, or [T, N, K]
    bias: torch.Tensor              # [N] or [T, N]
    inputs: torch.Tensor = None     # X [T, r, K]: r rows, a row for each image of each step
    deltas: torch.Tensor = None     # Δ [T, r, N]


def init_network(sizes, rng):
    """Layers with weights and biases uniform in ±1/sqrt(inputs), PyTorch's own default for a linear layer."""
    draw = lambda k, *shape: (torch.rand(shape, generator=rng, device=rng.device) * 2 - 1) / math.sqrt(k)
    return [Layer(draw(k, n, k), draw(k, n)) for k, n in zip(sizes, sizes[1:])]


def network(layers, x, slope, probes=None, dropout=0.0, rng=None):
    """Linear layers with LeakyReLU between them.

    x [T, B, K]; probes: a zero tensor per layer, added to its pre-activation so that the gradient with respect to the
    probe is the gradient of the pre-activation. Returns the last layer's output [T, B, N] and every layer's input.
    """
    inputs = []
    for i, layer in enumerate(layers):
        inputs.append(x)
        last = i == len(layers) - 1
        addend = correction(x, layer, probes[i] if probes else None)
        x = fused_linear(x, layer.weight, layer.bias, 1.0 if last else slope, addend=addend, backend=KERNEL)
        if dropout and not last:
            x = x * (torch.rand(x.shape, generator=rng, device=x.device) >= dropout) / (1 - dropout)
    return x, inputs


def correction(x, layer, probe):
    """What the remembered steps add to a layer's pre-activation, equation (4): (x Xᵀ + 1) Δ  # [T, B, N]"""
    if layer.inputs is None:
        return probe
    attention = x @ layer.inputs.mT + 1     # [T, B, r]
    return attention @ layer.deltas if probe is None else torch.baddbmm(probe, attention, layer.deltas)


def generator(theta, z, probes=None):
    """Noise z [T, B, 100] -> images in [-1, 1] [T, B, 784], and every layer's input."""
    x, inputs = network(theta, z, 0.0, probes)
    return x.tanh(), inputs


def discriminator(phi, x, probes=None, dropout=0.0, rng=None):
    """Images [T, B, 784] -> logits [T, B], positive where D thinks them real, and every layer's input."""
    x, inputs = network(phi, x, 0.2, probes, dropout, rng)
    return x.squeeze(-1), inputs


def remember(layers, inputs, deltas):
    """The layers after one more step: memory grows by the step's rows, until plain weights are cheaper.

    A product with r remembered rows costs r (N + K) multiplications a row of x, with a weight of the task's own N K.
    """
    adapted = []
    for layer, x, delta in zip(layers, inputs, deltas):
        if layer.inputs is not None:
            x, delta = torch.cat([layer.inputs, x], 1), torch.cat([layer.deltas, delta], 1)
        layer = Layer(layer.weight, layer.bias, x, delta)
        n, k = layer.weight.shape[-2:]
        adapted.append(fold(layer) if x.shape[1] * (n + k) > n * k else layer)
    return adapted


def fold(layer):
    """Write a layer's memory into weights of the task's own: W + Δᵀ X  # [T, N, K]"""
    if layer.inputs is None:
        return layer
    return Layer(layer.weight + layer.deltas.mT @ layer.inputs, layer.bias + layer.deltas.sum(1))


def detach(layers):
    """The same layers, as constants."""
    return [Layer(*(None if t is None else t.detach() for t in layer)) for layer in layers]


def players(leaves):
    """Theta and phi as layers of the parameters in `leaves`: G's weights and biases in order, then D's."""
    g, d = 2 * len(GENERATOR_SIZES) - 2, 2 * len(DISCRIMINATOR_SIZES) - 2
    layers = [Layer(weight, bias) for weight, bias in zip(leaves[:g + d:2], leaves[1:g + d:2])]
    return layers[:g // 2], layers[g // 2:]


def tensors(*networks):
    """The inverse of `players`: all weights and biases in order."""
    return [t for layers in networks for layer in layers for t in (layer.weight, layer.bias)]


def noise(tasks, n, rng):
    return torch.randn(tasks, n, NOISE, generator=rng, device=rng.device)


# ------------------------------------------------------------------------------------------------------------------
# 3  The game (Goodfellow et al. 2014), and a score that cannot be talked out of anything
# ------------------------------------------------------------------------------------------------------------------

def loss_d(real_logits, fake_logits):
    """The discriminator's loss, equation (1), per task: softplus keeps it finite where log(sigmoid) is not  # [T]"""
    return F.softplus(-real_logits).mean(-1) + F.softplus(fake_logits).mean(-1)


def loss_g(fake_logits):
    """The generator's non-saturating loss, equation (1), per task  # [T]"""
    return F.softplus(-fake_logits).mean(-1)


def energy_distance(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'| of samples x [T, n, 784] and y [T, m, 784]  # [T]

    A proper score: in expectation least, and zero, where both have one distribution (Székely and Rizzo 2013; for GANs
    Bellemare et al. 2017, arXiv 1705.10743). The means over pairs leave out a sample's distance to itself.
    """
    distance = lambda a, b: torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2))
    n, m = x.shape[1], y.shape[1]
    return 2 * distance(x, y) / (n * m) - distance(x, x) / (n * (n - 1)) - distance(y, y) / (m * (m - 1))


# ------------------------------------------------------------------------------------------------------------------
# 4  Inner loop: the one place where an initialisation is adapted
# ------------------------------------------------------------------------------------------------------------------

def adapt(theta, phi, rates, batches, rng, second_order=True, own_paths=False):
    """One adversarial inner step of D and of G, equation (2), on every batch of real images.

    theta, phi: layers; rates: inner learning rates [2, 4], G's and D's, per layer; batches: of [T, K, 784].
    second_order: keep the graph, so that a loss of the result can be differentiated through all steps; without it the
    steps' gradients are constants, as in first-order MAML. own_paths: each player's steps see the other as a constant,
    so that no player learns an initialisation that makes the *other* learn badly. Returns the adapted theta and phi.
    """
    for real in batches:
        tasks, shots, _ = real.shape
        fake, _ = generator(theta, noise(tasks, FAKES, rng))
        images = torch.cat([real, fake.detach() if own_paths else fake], 1)
        phi = inner_step(phi, rates[1], images, second_order, discriminator,
                         lambda logits: loss_d(logits[:, :shots], logits[:, shots:]))
        judge = detach(phi) if own_paths else phi
        theta = inner_step(theta, rates[0], noise(tasks, FAKES, rng), second_order, generator,
                           lambda images: loss_g(discriminator(judge, images)[0]))
    return theta, phi


def inner_step(layers, rates, x, second_order, player, loss):
    """One gradient step of one player on loss(player(x)), in the dual form of equation (4).

    The probes live for this one forward pass, so the gradient with respect to them is *partial* by construction: it
    cannot flow into the other player's parameters, nor into the steps that made these ones.
    """
    probes = [torch.zeros(*x.shape[:2], layer.weight.shape[-2], dtype=x.dtype, device=x.device, requires_grad=True) for layer in layers]
    output, inputs = player(layers, x, probes)
    gradients = grad(loss(output).sum(), probes, create_graph=second_order)
    if not second_order:
        inputs = [t.detach() for t in inputs]
    return remember(layers, inputs, [-rate * g for rate, g in zip(rates, gradients)])


# ------------------------------------------------------------------------------------------------------------------
# 5  Meta-training
# ------------------------------------------------------------------------------------------------------------------

def outer_loss(theta, phi, query, score, rng):
    """How good adapted players are, on images that they have not seen  # [T]

    'energy': one number that the discriminator cannot be talked out of, so its *total* derivative is right: theta_0
    learns to adapt and phi_0 learns to teach. 'adversarial': the game's own losses, each player against a constant
    opponent; `adapt` needs own_paths with it.
    """
    fake, _ = generator(theta, noise(len(query), query.shape[1], rng))
    if score == "energy":
        return energy_distance(fake, query)
    d = loss_d(discriminator(phi, query)[0], discriminator(phi, fake.detach())[0])
    return d + loss_g(discriminator(detach(phi), fake)[0])


def meta_gradient(leaves, batches, query, algorithm, score, rng):
    """Loss of an episode and its gradient with respect to leaves = [*theta, *phi, log_rates], equation (3).

    maml     through all inner steps (Finn et al. 2017, arXiv 1703.03400)
    fomaml   the inner gradients are constants (the same paper); with the energy score phi_0 then gets no gradient
    reptile  no outer loss: towards the adapted weights (Nichol et al. 2018, arXiv 1803.02999); the rates stay as they are
    """
    rates = leaves[-1].exp()
    adapted = adapt(*players(leaves), rates, batches, rng, second_order=algorithm == "maml", own_paths=score == "adversarial")
    loss = outer_loss(*adapted, query, score, rng).mean()
    if algorithm == "reptile":
        ends = tensors(*([fold(layer) for layer in layers] for layers in adapted))      # each [T, ...]
        return loss.detach(), [*[(start - end.mean(0)).detach() for start, end in zip(leaves, ends)], torch.zeros_like(rates)]
    return loss.detach(), grad(loss, leaves, allow_unused=True, materialize_grads=True)


def new_phase(leaves, optimizers, seed, device):
    """The state of a phase of training, all that a checkpoint must hold for it to go on to the same bits."""
    return {"step": 0, "skipped": 0, "in_a_row": 0, "leaves": leaves, "average": [t.detach().clone() for t in leaves],
            "optimizers": optimizers, "rng": torch.Generator(device).manual_seed(seed)}


def trainable(flat):
    return [t.detach().clone().requires_grad_() for t in flat]


def gan_phase(flat, lr, seed, device):
    """Ordinary GAN training of copies of the parameters, with an Adam for each player."""
    leaves = trainable(flat)
    adams = [torch.optim.Adam(tensors(layers), lr, betas=(0.5, 0.999), fused=True) for layers in players(leaves)]
    return new_phase(leaves, adams, seed, device)


def meta_phase(flat, settings, device):
    """Meta-training of copies of the parameters and of their inner learning rates, from settings.inner_lr on."""
    leaves = trainable([*flat, torch.full((2, len(GENERATOR_SIZES) - 1), math.log(settings.inner_lr), device=device)])
    groups = [{"params": leaves[:-1], "lr": settings.meta_lr}, {"params": leaves[-1:], "lr": 100 * settings.meta_lr}]
    return new_phase(leaves, [torch.optim.Adam(groups, betas=(0.5, 0.999), fused=True)], settings.seed + 3, device)


def update(optimizer, leaves, gradients, clip=math.inf):
    """An optimiser's step with gradients of at most this norm; False, and nothing happens, where one is not finite."""
    norm = torch.nn.utils.get_total_norm(gradients)
    if not norm.isfinite():
        return False
    for leaf, gradient in zip(leaves, gradients):
        leaf.grad = gradient * (clip / norm) if norm > clip else gradient
    optimizer.step()
    return True


def gan_step(phase, real):
    """One step of D and one of G, all parameters, on real images [T, B, 784]. Returns whether all was finite, and the losses."""
    (theta, phi), (adam_g, adam_d), rng = players(phase["leaves"]), phase["optimizers"], phase["rng"]
    judge = lambda images: discriminator(phi, images, dropout=0.3, rng=rng)[0]
    fake, _ = generator(theta, noise(*real.shape[:2], rng))
    loss = loss_d(judge(real), judge(fake.detach()))
    finite = update(adam_d, tensors(phi), grad(loss.sum(), tensors(phi)))
    loss_of_g = loss_g(judge(fake))
    finite &= update(adam_g, tensors(theta), grad(loss_of_g.sum(), tensors(theta)))
    return finite, {"D": loss.mean().item(), "G": loss_of_g.mean().item()}


def pretraining_step(phase, domains, settings, augment):
    """Ordinary GAN training on the union of all meta-training classes, as they are or as `new_domain` makes them."""
    rng, tasks = phase["rng"], settings.meta_batch
    classes = torch.tensor(sorted({c for role in domains.roles["train"] for c in role}), device=rng.device)
    if augment:
        real, _ = sample_episode(domains, sample_pairs(domains, tasks, rng), GAN_BATCH // tasks + 1, 0, 0, rng, True)[1:]
        real = real.reshape(1, -1, PIXELS)[:, :GAN_BATCH]
    else:
        picked = classes[torch.randint(len(classes), (GAN_BATCH,), generator=rng, device=rng.device)]
        real = sample_images(domains, picked, 1, rng).view(1, GAN_BATCH, PIXELS)
    return gan_step(phase, real)


def meta_step(phase, domains, settings):
    """One episode of equation (3): sample pairs, adapt, update the initialisation, the rates and their moving average."""
    leaves, rng = phase["leaves"], phase["rng"]
    pairs = sample_pairs(domains, settings.meta_batch, rng)
    sources, support, query = sample_episode(domains, pairs, settings.shots, settings.queries, settings.source_steps, rng, augment=True)
    batches = [*sources, *[support] * settings.inner_steps]
    loss, gradients = meta_gradient(leaves, batches, query, settings.algorithm, settings.score, rng)
    finite = bool(loss.isfinite()) and update(phase["optimizers"][0], leaves, gradients, CLIP)
    with torch.no_grad():
        leaves[-1].clamp_(max=math.log(MAX_RATE))
        for average, leaf in zip(phase["average"], leaves):
            average.lerp_(leaf, 1 - AVERAGE)
    rates = leaves[-1].exp().tolist()
    return finite, {"loss": loss.item(), **{f"{player}{i}": rate for player, row in zip(("rate_G", "rate_D"), rates) for i, rate in enumerate(row)}}


def run_phase(run, name, total, step, save):
    """Call step(phase) until `total` steps are done; show, log and save, and stop where the user or the numbers say so."""
    phase, first, began, shown, saved = run[name], run[name]["step"], time.perf_counter(), 0.0, time.perf_counter()
    while phase["step"] < total:
        finite, numbers = step(phase)
        phase["step"] += 1
        phase["skipped"] += not finite
        phase["in_a_row"] = 0 if finite else phase["in_a_row"] + 1
        done, now = phase["step"] == total, time.perf_counter()
        if name == "meta-training" and (phase["step"] % 10 == 0 or done):
            run["log"].append({"step": phase["step"], **numbers, "skipped": phase["skipped"], "domains": run["domains"]})
        if now - shown > (0.2 if sys.stderr.isatty() else 10) or done:
            speed, shown = (phase["step"] - first) / (now - began), now
            values = "  ".join(f"{k} {v:.3g}" for k, v in numbers.items())
            show(f"{name} {phase['step']}/{total}  {values}  skipped {phase['skipped']}  {speed:.2f} steps/s  {(total - phase['step']) / speed:.0f} s left", done)
        if phase["in_a_row"] == PATIENCE:
            raise UserError(f"{name}: {PATIENCE} updates in a row were not finite; try a smaller --inner-lr or --meta-lr, or fewer --inner-steps")
        if done or INTERRUPTED or now - saved > run["settings"]["save_seconds"]:
            save()
            saved = now
        if INTERRUPTED and not done:
            raise KeyboardInterrupt


def show(line, last=True):
    """Progress on stderr: one line that is written over on a terminal, plain lines elsewhere."""
    if sys.stderr.isatty():
        print("\r\x1b[K" + line[:os.get_terminal_size(2).columns - 1], end="\n" if last else "", file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)


def train(run, domains, settings, save):
    """All training, each phase from where it stands: warm start, the two baselines that go on from there, meta-training.

    Both `transfer` baselines see as many images as meta-training does, the second one the very kind that it sees.
    """
    device = domains.images.device
    seen = settings.meta_steps * settings.meta_batch * (settings.shots * (settings.source_steps + 1) + settings.queries)
    if "warm start" not in run:
        rng = torch.Generator(device).manual_seed(settings.seed)
        run["warm start"] = gan_phase(tensors(init_network(GENERATOR_SIZES, rng), init_network(DISCRIMINATOR_SIZES, rng)), 2e-4, settings.seed, device)
    ordinary = lambda phase: pretraining_step(phase, domains, settings, augment=False)
    augmented = lambda phase: pretraining_step(phase, domains, settings, augment=True)
    run_phase(run, "warm start", settings.warm_steps, ordinary, save)
    warm = run["warm start"]["leaves"]
    for name, step, seed in (("transfer", ordinary, 1), ("transfer augmented", augmented, 2)):
        if name not in run:
            run[name] = gan_phase(warm, 2e-4, settings.seed + seed, device)
        run_phase(run, name, seen // GAN_BATCH, step, save)
    if "meta-training" not in run:
        run["meta-training"] = meta_phase(warm, settings, device)
    run_phase(run, "meta-training", settings.meta_steps, lambda phase: meta_step(phase, domains, settings), save)


# ------------------------------------------------------------------------------------------------------------------
# 6  Meta-testing: few-shot adaptation on pairs that no training has seen, and what else could have been done
# ------------------------------------------------------------------------------------------------------------------

def few_shot(leaves, sources, support, n, rng):
    """Adapt our initialisation to T tasks at once; yields (number of steps on the support, n samples [T, n, 784])."""
    leaves = [t.detach() for t in leaves]
    theta, phi = adapt(*players(leaves), leaves[-1].exp(), sources, rng, second_order=False)
    for done, steps in zip((0, *TEST_STEPS), TEST_STEPS):
        theta, phi = adapt(theta, phi, leaves[-1].exp(), [support] * (steps - done), rng, second_order=False)
        yield steps, generator(theta, noise(len(support), n, rng))[0].detach()


def fine_tune(leaves, lr, sources, support, n, seed):
    """The same of a baseline: GAN training with Adam on the same images, all tasks side by side, each with its own weights."""
    phase = gan_phase([t.expand(len(support), *t.shape) for t in leaves[:16]], lr, seed, support.device)
    for real in sources:
        gan_step(phase, real)
    for done, steps in zip((0, *TEST_STEPS), TEST_STEPS):
        for _ in range(steps - done):
            gan_step(phase, support)
        yield steps, generator(players(phase["leaves"])[0], noise(len(support), n, phase["rng"]))[0].detach()


def without_a_gan(support, n, rng):
    """What a sceptic would try on the support [T, K, 784] first; yields (name, n 'samples' [T, n, 784])."""
    tasks, shots, _ = support.shape
    mean = support.mean(1, keepdim=True)
    pick = lambda: support.gather(1, torch.randint(shots, (tasks, n, 1), generator=rng, device=rng.device).expand(-1, -1, PIXELS))
    yield "mean image", mean.expand(-1, n, -1)
    yield "support repeated", pick()
    share = torch.rand(tasks, n, 1, generator=rng, device=rng.device)
    yield "pairwise mix", share * pick() + (1 - share) * pick()
    if shots > 1:
        components = min(8, shots - 1)
        _, scale, directions = torch.linalg.svd(support - mean, full_matrices=False)
        weights = torch.randn(tasks, n, components, generator=rng, device=rng.device) * scale[:, None, :components] / math.sqrt(shots - 1)
        yield f"Gaussian on {components} components", (mean + weights @ directions[:, :components]).clamp(-1, 1)


def train_classifier(domains, steps, seed):
    """A small CNN that tells all classes apart, held-out ones too: the judge of generated images, which trains nothing.

    Returns (features: images [n, 784] -> [n, 64], head: features -> logits [n, C], accuracy on the tenth left out of training).
    """
    nn = torch.nn
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        features = nn.Sequential(nn.Unflatten(-1, (1, 28, 28)), nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2, 2), nn.ReLU(),
                                 nn.Flatten(), nn.Linear(1568, 64), nn.ReLU())
        head = nn.Linear(64, len(domains.names))
        order = torch.randperm(len(domains.images)).to(domains.images.device)
    net = nn.Sequential(features, head).to(domains.images.device)
    labels = torch.arange(len(domains.names), device=order.device).repeat_interleave(domains.count)
    tenth, rest = order[:len(order) // 10 + 1], order[len(order) // 10:]
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    for step in range(steps):
        batch = rest[torch.arange(step * 128, step * 128 + 128, device=order.device) % len(rest)]
        adam.zero_grad()
        F.cross_entropy(net(domains.images[batch] / 127.5 - 1), labels[batch]).backward()
        adam.step()
    with torch.no_grad():
        accuracy = (net(domains.images[tenth] / 127.5 - 1).argmax(-1) == labels[tenth]).double().mean().item()
    return features, head, accuracy


def frechet_distance(a, b):
    """Fréchet distance of the Gaussians fitted to feature vectors a [n, d] and b [m, d]: |μa - μb|² + tr(A + B - 2 (A B)^½).

    In float64; the trace of the root is that of (A^½ B A^½)^½, which is symmetric. Lower is better; biased upwards for few samples.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace).clamp(min=0).item()


@torch.no_grad()
def judge_samples(samples, support, fresh, reference, targets, classifier):
    """Three numbers for each task's samples [T, n, 784]: one dict a task.

    frechet: to the reference images, on the classifier's features. recognised: share that the classifier takes for the
    target class. nearest: mean distance of a sample to its nearest support image, over that of fresh real images;
    well under 1, the support was learned by heart.
    """
    features, head, _ = classifier
    results = []
    for x, shots, real, truth, target in zip(samples, support, fresh, reference, targets):
        seen = features(x)
        nearest = torch.cdist(x, shots).amin(1).mean() / torch.cdist(real, shots).amin(1).mean().clamp(min=1e-9)
        results.append({"frechet": frechet_distance(seen, features(truth)), "nearest": nearest.item(),
                        "recognised": (head(seen).argmax(-1) == target).double().mean().item()})
    return results


def held_out_pairs(domains, seed):
    """Every (source, target) pair of held-out classes, or a seeded choice of them with every target in turn  # int64 [T, 2]"""
    sources, targets = domains.roles["test"]
    shuffle = lambda items, salt: [items[i] for i in torch.randperm(len(items), generator=torch.Generator().manual_seed(seed + salt))]
    orders = [[(s, t) for s in shuffle(sources, t) if s != t] for t in shuffle(targets, 0)]
    turns = [order[i] for i in range(len(sources)) for order in orders if i < len(order)]
    return torch.tensor(sorted(turns[:TEST_PAIRS], key=lambda pair: pair[::-1]), device=domains.images.device)


def draw_test(domains, pairs, settings, rng, augment=False):
    """Images of T tasks: source batches, support, and two equally large sets of fresh real images of the target."""
    n = min(500, (min(int(domains.count[c]) for c in pairs[:, 1]) - settings.shots) // 2)
    sources, support, rest = sample_episode(domains, pairs, settings.shots, 2 * n, settings.source_steps, rng, augment)
    return sources, support, rest[:, :n], rest[:, n:]


def choose_rates(name, leaves, domains, settings, classifier):
    """A baseline's best learning rate for every number of steps, on augmented tasks from the *meta-training* classes."""
    rng = torch.Generator(domains.images.device).manual_seed(settings.seed + 4)
    pairs = sample_pairs(domains, settings.tune_tasks, rng)
    sources, support, fresh, reference = draw_test(domains, pairs, settings, rng, augment=True)
    table = {}
    for lr in GAN_RATES:
        show(f"choosing the learning rate of '{name}': {lr:g}", False)
        for steps, samples in fine_tune(leaves, lr, sources, support, fresh.shape[1], settings.seed):
            judged = judge_samples(samples, support, fresh, reference, pairs[:, 1], classifier)
            table.setdefault(steps, {})[lr] = float(np.nan_to_num(np.mean([j["frechet"] for j in judged]), nan=np.inf))
    return {steps: min(by_rate, key=by_rate.get) for steps, by_rate in table.items()}


def meta_test(run, domains, settings, classifier):
    """Every method on every held-out pair and test seed, on identical images. Returns the results and what the filmstrip shows."""
    device, pairs = domains.images.device, held_out_pairs(domains, settings.seed)
    scratch_rng = torch.Generator(device).manual_seed(settings.seed + 5)
    baselines = {"from scratch": tensors(init_network(GENERATOR_SIZES, scratch_rng), init_network(DISCRIMINATOR_SIZES, scratch_rng)),
                 **{name: run[name]["leaves"] for name in ("transfer", "transfer augmented")}}
    chosen = {name: choose_rates(name, leaves, domains, settings, classifier) for name, leaves in baselines.items()}
    results, film = [], {}
    for seed in range(settings.test_seeds):
        show(f"meta-testing with support {seed + 1} of {settings.test_seeds}", False)
        rng = torch.Generator(device).manual_seed(1000 * settings.seed + seed + 6)
        sources, support, fresh, reference = draw_test(domains, pairs, settings, rng)
        n = fresh.shape[1]

        def record(method, steps, samples):
            if seed == 0:
                film[method, steps] = samples[:, :16].cpu()
            for (s, t), numbers in zip(pairs.tolist(), judge_samples(samples, support, fresh, reference, pairs[:, 1], classifier)):
                results.append({"method": method, "seed": seed, "source": domains.names[s], "target": domains.names[t], "steps": steps, **numbers})

        record("real images", None, fresh)
        for method, samples in without_a_gan(support, n, rng):
            record(method, None, samples)
        for steps, samples in few_shot(run["meta-training"]["average"], sources, support, n, rng):
            record("MT-GAN", steps, samples)
        for method, leaves in baselines.items():
            for lr in sorted(set(chosen[method].values())):
                for steps, samples in fine_tune(leaves, lr, sources, support, n, seed):
                    if chosen[method][steps] == lr:
                        record(method, steps, samples)
        film["support", None] = support.cpu() if seed == 0 else film["support", None]
    return pairs, results, film, chosen


def interval(values):
    """Mean of n values and half its 95 % confidence interval, with Student's t for n - 1 degrees (Cornish-Fisher expansion)."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return mean, math.nan
    t = 1.96 + 2.37 / (n - 1) + 2.82 / (n - 1) ** 2
    return mean, float(t * np.std(values, ddof=1) / math.sqrt(n))


def print_tables(results):
    """The three metrics, a row for each method, a column for each number of steps: mean ± half the 95 % interval."""
    methods = list(dict.fromkeys(r["method"] for r in results))
    for metric, title, digits in (("frechet", "Fréchet distance on classifier features (lower is better)", 0),
                                  ("recognised", "share recognised as the target class", 2),
                                  ("nearest", "distance to the nearest support image / that of real images (well under 1: memorised)", 2)):
        print(f"\n{title}\n{'steps':24}" + "".join(f"{steps:>13}" for steps in TEST_STEPS))
        for method in methods:
            cells = []
            for steps in (None, *TEST_STEPS):
                values = [r[metric] for r in results if r["method"] == method and r["steps"] == steps]
                mean, half = interval(values) if values else (None, None)
                cells += [f"{mean:.{digits}f} ± {half:.{digits}f}"] if values else []
            print(f"{method:24}" + "".join(f"{cell:>13}" for cell in cells))


def grid_image(images, columns, zoom):
    """Images [n, 784] in [-1, 1] as one enlarged picture, `columns` wide."""
    grid = torchvision.utils.make_grid((images.view(-1, 1, 28, 28) + 1) / 2, columns, padding=1, pad_value=0.25).clamp(0, 1)
    picture = Image.fromarray((grid[0] * 255).byte().numpy())
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.NEAREST)


def table_image(rows, headers):
    """Pictures in a table on white: rows of (label, pictures), a header above every column."""
    width, height, left, top = rows[0][1][-1].width + 8, rows[0][1][-1].height + 8, 190, 32
    canvas = Image.new("L", (left + width * len(headers), top + height * len(rows)), 255)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(18)
    for j, header in enumerate(headers):
        draw.text((left + width * j + width / 2, top / 2), header, 0, font, anchor="mm")
    for i, (label, pictures) in enumerate(rows):
        draw.text((8, top + height * i + height / 2), label, 0, font, anchor="lm")
        for j, picture in enumerate(pictures):
            canvas.paste(picture, (left + width * j, top + height * i))
    return canvas


def filmstrip(pairs, film, domains):
    """Held-out domains adapted to, step by step: the support, our samples, and the best baseline's below them."""
    rows, shown = [], {}
    for i, (_, target) in enumerate(pairs.tolist()):
        shown.setdefault(target, i)
    for target, i in list(shown.items())[:6]:
        for method in ("MT-GAN", "transfer"):
            pictures = [film["support", None][i], *[film[method, steps][i] for steps in TEST_STEPS]]
            label = domains.names[target].replace(" (", "\n(") .replace(") ", ")\n")
            rows.append((f"{label}\n{method}", [grid_image(p[:9], 3, 2) for p in pictures]))
    return table_image(rows, ["support", *[f"{steps} steps" for steps in TEST_STEPS]])


# ------------------------------------------------------------------------------------------------------------------
# 7  Files, and deployment: adapt to a user's images, generate
# ------------------------------------------------------------------------------------------------------------------

def write_whole(path, data):
    """Write bytes under a temporary name, then rename: whoever reads `path` finds the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; free some space or choose another --out, then --resume") from error


def write_picture(path, picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_whole(path, buffer.getvalue())


def save_run(run, out):
    """checkpoint.pt with tensors and primitives only, and log.csv with its rows."""
    flat = lambda v: v.get_state() if isinstance(v, torch.Generator) else [t.detach() if torch.is_tensor(t) else t.state_dict() for t in v] if isinstance(v, list) else v
    buffer = io.BytesIO()
    torch.save({key: {k: flat(v) for k, v in value.items()} if isinstance(value, dict) and "step" in value else value for key, value in run.items()}, buffer)
    write_whole(out / "checkpoint.pt", buffer.getvalue())
    if run["log"]:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, run["log"][0])
        writer.writeheader()
        writer.writerows(run["log"])
        write_whole(out / "log.csv", text.getvalue().encode())


def load_run(path, device):
    """A checkpoint, its phases ready to go on. Raises UserError for anything that is not one."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        saved = torch.load(path, map_location=device, weights_only=True)    # a stranger's file cannot run code
        settings, run = argparse.Namespace(**saved["settings"]), dict(saved)
        for name, phase in saved.items():
            if not (isinstance(phase, dict) and "step" in phase):
                continue
            flat = phase["leaves"]
            shapes = [t.shape for t in tensors(init_network(GENERATOR_SIZES, torch.Generator()), init_network(DISCRIMINATOR_SIZES, torch.Generator()))]
            if [t.shape for t in flat[:16]] != shapes:
                raise ValueError("parameters of other shapes")
            fresh = meta_phase(flat[:16], settings, device) if name == "meta-training" else gan_phase(flat, 2e-4, 0, device)
            with torch.no_grad():
                for mine, theirs in zip([*fresh["leaves"], *fresh["average"]], [*flat, *phase["average"]], strict=True):
                    mine.copy_(theirs)
            for optimizer, state in zip(fresh["optimizers"], phase["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            fresh["rng"].set_state(phase["rng"].cpu())
            run[name] = {**phase, **fresh, **{k: phase[k] for k in ("step", "skipped", "in_a_row")}}
        return run
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint at {path}") from error
    except Exception as error:                  # whatever a damaged or foreign file makes torch.load or the lines above raise
        raise UserError(f"{path} is not a readable MT-GAN checkpoint ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})") from error


def deploy(settings, device):
    """Adapt a trained initialisation to K images of a user's domain and write samples: a grid, and N single PNGs."""
    run = load_run(settings.adapt, device)
    if "meta-training" not in run:
        raise UserError(f"{settings.adapt} holds no meta-trained initialisation yet; finish it with --resume")
    spec = settings.target[0]
    dataset = load_dataset(spec, settings.data_dir)
    shots = settings.shots or min(25, len(dataset.images))
    if shots > len(dataset.images):
        raise UserError(f"--shots {shots}, but '{spec}' has {len(dataset.images)} images")
    out = Path(settings.out or Path(settings.adapt if Path(settings.adapt).is_dir() else Path(settings.adapt).parent) / f"adapted-{slug(spec)}")
    claim_folder(out, settings.overwrite)
    rng = torch.Generator(device).manual_seed(settings.seed)
    chosen = torch.randperm(len(dataset.images), generator=rng, device=device)[:shots].cpu()
    support = torch.from_numpy(dataset.images)[chosen].to(device) / 127.5 - 1
    leaves = run["meta-training"]["average"]
    sources = [t.to(device)[None, :shots] / 127.5 - 1 for t in run["source images"][:run["settings"]["source_steps"]]]
    batches = [*sources, *[support[None]] * settings.steps]
    theta, _ = adapt(*players([t.detach() for t in leaves]), leaves[-1].detach().exp(), batches, rng, second_order=False)
    samples = generator(theta, noise(1, settings.samples, rng))[0].detach()[0].cpu()
    for i, image in enumerate(samples):
        write_picture(out / f"sample-{i:03}.png", Image.fromarray(((image.view(28, 28) + 1) * 127.5).byte().numpy()))
    columns = max(4, math.ceil(math.sqrt(settings.samples)))
    write_picture(out / "samples.png", grid_image(samples, columns, 3))
    print(f"adapted to {shots} images of {dataset.name} in {settings.steps} steps; {settings.samples} samples in {out}")


def slug(text):
    """A spec as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "domain"


def claim_folder(out, overwrite):
    """Make the output folder and be sure that it can be written and that nobody's results are in it."""
    taken = [name for name in ("checkpoint.pt", "report.json", "samples.png") if (out / name).exists()]
    if taken and not overwrite:
        raise UserError(f"{out} already holds a run ({taken[0]}); go on with it by --resume, replace it by --overwrite, or choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}; choose another --out") from error
    write_whole(out / ".writable", b"")
    (out / ".writable").unlink()


# ------------------------------------------------------------------------------------------------------------------
# 8  Command line
# ------------------------------------------------------------------------------------------------------------------

INTERRUPTED = []            # not empty once Ctrl-C was pressed


def number(kind, low, high=math.inf):
    """An argparse type: a number in [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number from {low:g} to {high:g}")
        return value
    return parse


def parse_arguments(argv):
    parser = argparse.ArgumentParser("mtgan.py", description="Meta-train a GAN over pairs of image domains, test it on held-out pairs, deploy it.",
                                     epilog="A domain is mnist, fashion, kmnist, emnist, qmnist, usps, digits, garments or a folder of images; "
                                            "':0-6,9' after it picks classes.", allow_abbrev=False)
    parser.error = lambda message: (_ for _ in ()).throw(UserError(f"{message} (see --help)"))
    whole, real = (lambda *ends: number(int, *ends)), (lambda *ends: number(float, *ends))
    option = parser.add_argument
    # what to learn from, and where to put it
    option("--source", nargs="+", default=["mnist"], metavar="SPEC", help="source domains (default mnist)")
    option("--target", nargs="+", default=["fashion"], metavar="SPEC", help="target domains (default fashion)")
    option("--data-dir", default="data", help="where torchvision datasets are, or are downloaded to (default data)")
    option("--out", help="output folder (default runs/<source>-<target>)")
    option("--resume", action="store_true", help="go on with the run in --out")
    option("--overwrite", action="store_true", help="replace the run in --out")
    option("--dry-run", action="store_true", help="everything once, tiny, under a minute")
    # the episode
    option("--shots", type=whole(1, 1000), help="support images of a task (default 25)")
    option("--inner-steps", type=whole(1, 100), default=5, help="inner steps on the support (default 5)")
    option("--source-steps", type=whole(0, 100), default=1, help="inner steps on the source domain before them (default 1)")
    option("--inner-lr", type=real(1e-6, MAX_RATE), default=0.1, help="inner learning rates to begin with (default 0.1)")
    # meta-training
    option("--algorithm", choices=("maml", "fomaml", "reptile"), default="maml")
    option("--score", choices=("energy", "adversarial"), default="energy", help="what the outer loss is (default energy)")
    option("--warm-steps", type=whole(0, 10**7), default=6000, help="ordinary GAN training before meta-training (default 6000)")
    option("--meta-steps", type=whole(1, 10**7), default=500, help="episodes of meta-training (default 500)")
    option("--meta-batch", type=whole(1, 64), default=4, help="tasks in an episode (default 4)")
    option("--meta-lr", type=real(1e-8, 1), default=2e-4, help="outer learning rate (default 2e-4)")
    # testing, and the machine
    option("--test-seeds", type=whole(1, 100), default=2, help="draws of support images per held-out pair (default 2)")
    option("--seed", type=whole(0, 2**31), default=0)
    option("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default auto)")
    option("--kernel", choices=("auto", "torch", "triton"), default="auto", help="how linear layers are computed (default auto)")
    option("--save-seconds", type=real(0), default=30, help="time between checkpoints (default 30)")
    # deployment
    option("--adapt", metavar="RUN", help="deploy: adapt this run or checkpoint to --target")
    option("--samples", type=whole(1, 999), default=64, help="how many images to generate (default 64)")
    option("--steps", type=whole(1, 10000), default=20, help="inner steps on the user's images (default 20)")
    settings = parser.parse_args(argv)
    if settings.adapt and len(settings.target) != 1:
        raise UserError("--adapt takes one --target")
    if settings.resume and settings.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    settings.queries, settings.tune_tasks, settings.classifier_steps = QUERIES, 6, 500
    if not settings.adapt:
        settings.shots = settings.shots or 25
        if settings.dry_run:
            settings.overwrite |= settings.out is None
            settings.warm_steps, settings.meta_steps, settings.meta_batch, settings.test_seeds = 20, 3, 2, 1
            settings.shots, settings.tune_tasks, settings.classifier_steps = min(settings.shots, 10), 2, 60
        name = "-".join(slug(spec) for spec in [*settings.source, *settings.target])
        settings.out = settings.out or ("runs/dry-run" if settings.dry_run else f"runs/{name}")
    return settings


def pick_device(name):
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device)
        return device
    except Exception as error:
        raise UserError(f"device '{name}' is not available here; try --device cpu") from error


def check_enough_images(domains, settings):
    """Every class must hold the images that its role takes, else say which does not; fewer queries are made do with."""
    for c in domains.roles["train"][1]:
        settings.queries = min(settings.queries, int(domains.count[c]) - settings.shots)
    for role, spare in (("train", 2), ("test", 4)):     # an energy distance needs two query images, a covariance two and two
        for c in {c for classes in domains.roles[role] for c in classes}:
            if domains.count[c] < settings.shots + spare:
                raise UserError(f"--shots {settings.shots}, but '{domains.names[c]}' has {int(domains.count[c])} images; "
                                f"it takes {spare} beside the support, so --shots {max(1, int(domains.count[c]) - spare)} at most")


FREE_ON_RESUME = {"out", "resume", "overwrite", "data_dir", "device", "kernel", "save_seconds", "test_seeds", "adapt", "samples", "steps"}


def whole_story(settings, device):
    """Prepare domains, meta-train, meta-test, and write everything that DESIGN promises to settings.out."""
    out, began = Path(settings.out), time.perf_counter()
    run = load_run(out, device) if settings.resume else None
    if run:
        changed = [k for k, v in vars(settings).items() if k not in FREE_ON_RESUME and run["settings"].get(k) != v]
        changed = [k for k in changed if k != "queries"]
        if changed:
            k = changed[0]
            raise UserError(f"{out} was begun with --{k.replace('_', '-')} {run['settings'].get(k)}, not {getattr(settings, k)}; give the same settings to --resume")
    else:
        claim_folder(out, settings.overwrite)
    domains = load_domains(settings.source, settings.target, settings.data_dir, device)
    check_enough_images(domains, settings)
    if run and run["names"] != domains.names:
        raise UserError(f"{out} was begun with other images ({run['names'][0]} ...), now found {domains.names[0]} ...")
    names = "; ".join(dict.fromkeys(name.rsplit(" ", 1)[0] for name in domains.names))
    if not run:
        rng = torch.Generator(device).manual_seed(settings.seed + 7)
        sources = torch.tensor(domains.roles["train"][0], device=device)
        keep = lambda: sample_images(domains, sources[torch.randint(len(sources), (1,), generator=rng, device=device)], settings.shots, rng)
        run = {"settings": vars(settings), "names": domains.names, "domains": names, "log": [],
               "source images": [((keep()[0] + 1) * 127.5).byte() for _ in range(settings.source_steps)]}
    run["settings"] = vars(settings)
    save = lambda: save_run(run, out)
    handler = signal.signal(signal.SIGINT, lambda *_: (INTERRUPTED.append(1), signal.signal(signal.SIGINT, signal.default_int_handler)))
    try:
        train(run, domains, settings, save)
    finally:
        signal.signal(signal.SIGINT, handler)
    if "classifier" not in run:
        show("training the classifier that judges generated images", False)
    classifier = train_classifier(domains, settings.classifier_steps, settings.seed)
    pairs, results, film, chosen = meta_test(run, domains, settings, classifier)
    print(f"\n{names}: {len(pairs)} held-out pairs × {settings.test_seeds} test seeds, {settings.shots} shots; mean ± half the 95 % interval")
    print_tables(results)
    report = {"settings": vars(settings), "domains": names, "held_out": sorted({domains.names[c] for pair in pairs.tolist() for c in pair}),
              "classifier_accuracy": classifier[2], "chosen_learning_rates": chosen, "seconds": time.perf_counter() - began, "results": results}
    write_whole(out / "report.json", json.dumps(report, indent=1).encode())
    write_picture(out / "adaptation.png", filmstrip(pairs, film, domains))
    rows = [(domains.names[t], [grid_image(film["MT-GAN", TEST_STEPS[-1]][i], 8, 2)]) for i, (_, t) in enumerate(pairs.tolist())]
    write_picture(out / "samples.png", table_image(rows, [f"MT-GAN after {TEST_STEPS[-1]} steps"]))
    print(f"\nwrote checkpoint.pt, log.csv, report.json, adaptation.png and samples.png to {out} in {report['seconds']:.0f} s")


def main(argv=None):
    """Run the command line; returns the exit code: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    global KERNEL
    INTERRUPTED.clear()
    settings = None
    try:
        settings = parse_arguments(argv)
        KERNEL, device = settings.kernel, pick_device(settings.device)
        deploy(settings, device) if settings.adapt else whole_story(settings, device)
        return 0
    except UserError as error:
        print(f"mtgan.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "" if settings is None or settings.adapt else f"; go on with: the same command and --resume (saved in {settings.out})"
        print(f"\ninterrupted{again}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
