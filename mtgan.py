"""MT-GAN: a Meta-Transfer Generative Adversarial Network, to be read from top to bottom; its linear layer is in kernels.py.

A GAN trained from scratch wants many images and many steps. MT-GAN meta-trains the *initialisation* of a generator
and a discriminator over many (source domain, target domain) pairs, most of the targets made up (`made_up_domain`), so
that on a new pair a few images and a few steps are enough. The source domain enters by the warm start and the features that
score (`train`), and by inner steps of its own with --source-steps.

    python mtgan.py --source mnist --target fashion                 # meta-train, meta-test, pictures, checkpoint
    python mtgan.py --source digits --target garments --dry-run     # everything once, tiny, nothing to download
    python mtgan.py --adapt runs/mnist-fashion --target my_images/ --shots 10 --samples 64     # deploy
    python mtgan.py --benchmark                                     # what a meta-step costs

A *task* is to generate a target domain (a class of images) of which only a few *shots* are given, the *support*. In an
*episode*, copies of the shared initialisation theta_0, phi_0 take k *inner* steps of the game on the support of each of
some tasks; the score is how far the images of an adapted G are from others of its target, the *query*. The *outer* step then
changes what all tasks start from, so that the next ones score better after k steps of their own. The four equations (a:
inner learning rates, learned as well, R: real images, z: noise, theta: generator, phi: discriminator):

    (1) the game        L_D = mean softplus(-D(R)) + mean softplus(D(G(z)))         L_G = mean softplus(-D(G(z)))
    (2) inner step      phi'   = phi   - a_phi   dL_D/dphi        of R and G(theta, z), theta held constant
                        theta' = theta - a_theta dL_G/dtheta      of G(theta, z), the same z, against a constant D(phi')
    (3) outer step      (theta_0, phi_0, log a) <- `Muon` (matrices) or Adam (the rest) on g/|g| + r/|r|, clipped:
                        g, second-order MAML's: the gradient of that score, after half of the steps on the support and at
                        their end, through all inner steps; r, Reptile's: theta_0 - theta_k and phi_0 - phi_k, the way back, on
                        the average of the tasks
    (4) dual form       W' = W + Δᵀ X,  b' = b + Σ Δ   =>   x W'ᵀ + b' = (x Wᵀ + b) + (x Xᵀ + 1) Δ
                        X: what a layer saw in its inner steps; Δ: -a times the gradients of its pre-activations. An
                        adapted layer is the shared layer plus attention over what it was adapted on.
"""
import argparse, contextlib, csv, io, json, math, os, re, signal, socket, sys, time, zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "3000")         # before torch: threads that wait spin for microseconds, not for milliseconds
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.autograd import grad
from torch.utils.flop_counter import FlopCounterMode

from kernels import allow_onednn, bmm, choose, fused_linear, keep_memory, release_memory, why_not_triton

PIXELS, NOISE = 28 * 28, 100
GENERATOR_SIZES = (NOISE, 256, 512, 1024, PIXELS)
DISCRIMINATOR_SIZES = (PIXELS, 1024, 512, 256, 1)
HELD_OUT = 3                # classes of every dataset that meta-training never sees
QUERIES = 64                # target images that score an adapted generator
FAKES = 25                  # generated images in an inner step
DRAWN = 0.7                 # share of the made-up domains that are drawn, not old ones changed
SHAPES = 5                  # at most so many shapes make up a drawn domain
FEATURE_WEIGHT = 3.0        # of distances between features in the outer loss, next to those between pixels and edges
GAN_BATCH = 64              # real images in a step of ordinary GAN training
MAX_RATE = 0.5              # inner learning rates are learned, up to here
AVERAGE = 0.98              # decay of the moving averages: of everything meta-learned, and of G in ordinary fine-tuning
CLIP = 1.0                  # largest norm of an outer gradient: no episode weighs too much in the optimisers' moving averages
PATIENCE = 20               # this many non-finite updates in a row stop the run
TEST_STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200)
TEST_PAIRS = 6              # at most so many held-out pairs are tested
GO_ON_RATE = 1e-4           # Adam's learning rate where a deployed adaptation goes on after the learned steps
GAN_RATES = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3)        # the grid from which it is chosen in meta-testing
MAY_DIFFER = {"out", "resume", "overwrite", "data_dir", "kernel", "save_seconds", "test_seeds", "samples", "steps"}     # in one experiment
ARTEFACTS = ("checkpoint.pt", "log.csv", "report.json", "adaptation.png", "samples.png")
KERNEL = "auto"             # backend of `fused_linear`, set by --kernel
INTERRUPTED = []            # not empty once Ctrl-C was pressed

class UserError(Exception):
    """Something that the user can put right: shown as one line, exit code 2."""

# 1  Domains: a spec string becomes images; a domain is one class of them -----------------------------------------------

TORCHVISION = {             # spec: (class in torchvision.datasets, the built-in that stands in for it)
    "mnist": ("MNIST", "digits"), "fashion": ("FashionMNIST", "garments"), "kmnist": ("KMNIST", "digits"),
    "emnist": ("EMNIST", "digits"), "qmnist": ("QMNIST", "digits"), "usps": ("USPS", "digits")}
BUILT_IN = ("digits", "garments")

def load_dataset(spec, data_dir):
    """A dataset, a built-in or a folder, and perhaps classes of it, as in `mnist:0-6,9`.

    Returns its name and {class name: uint8 [n, 784]}, bright strokes on 0. A dataset that is neither in data_dir nor to
    be downloaded is replaced by a built-in, and the name says so. Raises UserError where a domain is unknown or corrupt.
    """
    listed = None if os.path.isdir(spec) else re.fullmatch(r"(.*):([\d,-]+)", spec)
    name, chosen = listed.groups() if listed else (spec, "")
    if name in TORCHVISION:
        name, classes = load_torchvision(name, data_dir)
    elif name in BUILT_IN:
        classes = draw_built_in(name)
    elif os.path.isdir(name):
        classes = load_folder(name)
        name = os.path.relpath(os.path.realpath(name))      # one folder has one name, however it is spelled
    else:
        raise UserError(f"unknown domain '{spec}': neither a folder nor one of {', '.join([*TORCHVISION, *BUILT_IN])}; "
                        "a list of classes looks like mnist:0-6,9")
    ranges = [(int(low), int(high or low)) for low, high in re.findall(r"(\d+)(?:-(\d+))?", chosen)]
    if chosen and not (ranges and all(low <= high < len(classes) for low, high in ranges)):
        raise UserError(f"'{spec}': {name} has the classes 0 to {len(classes) - 1}")
    return name, {label: images for c, (label, images) in enumerate(classes.items())
                  if not chosen or any(low <= c <= high for low, high in ranges)}

def load_torchvision(name, data_dir):
    """All parts of a torchvision dataset, from data_dir or the network, else the built-in that stands in for it."""
    kind, stand_in = TORCHVISION[name]
    options = {"split": "balanced"} if name == "emnist" else {}
    load = lambda **more: [getattr(torchvision.datasets, kind)(data_dir, train=part, **options, **more) for part in (True, False)]
    try:
        loaded = load()
    except Exception as error:
        if not isinstance(error, FileNotFoundError) and "not found" not in str(error):     # torchvision's word for 'not there'
            raise UserError(f"the files of '{name}' in {data_dir} are corrupt ({error!r}); delete them to download anew") from error
        socket.setdefaulttimeout(20)
        try:
            loaded = load(download=True)
        except Exception as reason:
            print(f"WARNING: '{name}' is not in {data_dir} and cannot be downloaded ({' '.join(str(reason).split()) or type(reason).__name__:.160}).\n"
                  f"WARNING: the built-in '{stand_in}' stands in for it, and every result says so.", file=sys.stderr)
            return f"{stand_in} (stand-in for {name})", draw_built_in(stand_in)
        finally:
            socket.setdefaulttimeout(None)
    images, labels = (np.concatenate([np.asarray(getattr(part, what)) for part in loaded]) for what in ("data", "targets"))
    if len(images) != len(labels):
        raise UserError(f"the files of '{name}' in {data_dir} are corrupt ({len(images)} images, {len(labels)} labels)")
    if name == "qmnist":
        labels = labels[:, 0]                   # the other columns are about the writer
    if name == "emnist":
        images = images.transpose(0, 2, 1)      # stored on its side
    if name == "usps":                          # stored as 16 × 16
        images = np.stack([Image.fromarray(image).resize((28, 28), Image.BICUBIC) for image in images])
    names = [str(c).split(" - ")[0] for c in getattr(loaded[0], "classes", range(10))]
    return name, {label: images[labels == c].reshape(-1, PIXELS) for c, label in enumerate(names)}

def load_folder(folder):
    """Every image below a folder, its sub-folders being the classes; unreadable image files are skipped and counted."""
    suffixes, classes, skipped = set(Image.registered_extensions()), {}, 0
    try:
        groups = {path.name: path.rglob("*") for path in sorted(Path(folder).iterdir()) if path.is_dir()}
        groups["(loose)"] = Path(folder).glob("*")
        files = [(group, path) for group, paths in groups.items() for path in sorted(paths) if path.suffix.lower() in suffixes and path.is_file()]
    except OSError as error:
        raise UserError(f"cannot read '{folder}': {error.strerror}") from error
    for group, path in files:
        try:
            classes.setdefault(group, []).append(read_image(path))
        except Exception:                       # Pillow's decoders raise whatever a damaged file makes them raise
            skipped += 1
    classes = {group: np.stack(images) for group, images in classes.items() if images}
    if skipped:
        print(f"{folder}: skipped {skipped} unreadable image file(s)", file=sys.stderr)
    if not classes:
        raise UserError(f"there is no readable image in '{folder}'")
    return classes

def read_image(path):
    """An image file of any size and mode as uint8 [784]: upright, grey, square, bright on dark as MNIST is."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":               # 16 and 32 bits a pixel: the range in use becomes 0 to 255
            values = np.asarray(image, float)
            low, high = (limit(values[np.isfinite(values)]) for limit in (np.min, np.max))
            image = Image.fromarray(np.uint8(255 * np.nan_to_num((values.clip(low, high) - low) / max(high - low, 1e-9))))
        if 56 * min(image.size) < max(image.size):
            raise ValueError("too thin to shrink")
        grey, alpha = (np.asarray(band, float) for band in image.convert("RGBA").convert("LA").split())
    behind = 255 * ((grey * alpha).sum() < 127.5 * alpha.sum())      # what is drawn must stand out where it is transparent
    grey = grey * alpha / 255 + behind * (1 - alpha / 255)
    border = np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]))
    if border > 127:
        grey, border = 255 - grey, 255 - border
    square = ImageOps.pad(Image.fromarray(np.uint8(grey)), (28, 28), Image.LANCZOS, int(border))       # antialiased
    return np.asarray(square).reshape(PIXELS)

GARMENTS = {                # an outline's points: x right of the middle, y down, in image widths; mirrored where x starts at 0
    "t-shirt": [(0, .14), (.12, .1), (.44, .24), (.37, .42), (.27, .36), (.27, .9)],
    "trousers": [(0, .06), (.22, .06), (.3, .95), (.1, .95), (0, .32)],
    "pullover": [(0, .14), (.12, .1), (.33, .17), (.47, .8), (.36, .84), (.27, .42), (.27, .9)],
    "dress": [(0, .14), (.12, .05), (.18, .22), (.1, .42), (.3, .95)],
    "coat": [(0, .3), (.1, .05), (.34, .13), (.45, .88), (.35, .9), (.3, .4), (.33, .97), (.03, .97)],
    "sandal": [(-.46, .72), (-.1, .5), (.02, .6), (.2, .35), (.26, .38), (.12, .66), (.44, .5), (.46, .74), (.3, .68), (-.46, .8)],
    "shirt": [(0, .22), (.1, .04), (.4, .3), (.34, .4), (.24, .3), (.22, .96)],
    "sneaker": [(-.47, .72), (-.44, .58), (-.12, .46), (.14, .32), (.4, .34), (.46, .5), (.47, .74)],
    "bag": [(0, .38), (.2, .38), (.16, .14), (0, .1), (0, .04), (.22, .08), (.26, .38), (.44, .4), (.42, .9), (0, .9)],
    "boot": [(-.42, .92), (-.4, .76), (-.04, .64), (0, .06), (.34, .06), (.36, .62), (.42, .92)],
}

def draw_built_in(name, each=400):
    """Ten digits in Pillow's own font, or ten silhouettes, each image with its own stroke or outline, slant, size, place
    and light: {class name: uint8 [each, 784]}."""
    rng, font, classes = np.random.default_rng(0), ImageFont.load_default(84), {}
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    for label in GARMENTS if name == "garments" else "0123456789":
        outline = GARMENTS.get(label, [(0, 0)])
        points, images = np.array(outline if outline[0][0] else outline + [(-right, down) for right, down in reversed(outline)]), []
        for _ in range(each):
            canvas, light = Image.new("L", (112, 112)), 1
            if name == "digits":
                ImageDraw.Draw(canvas).text((56, 56), label, 255, font, anchor="mm", stroke_width=rng.integers(7))
            else:
                ImageDraw.Draw(canvas).polygon([*map(tuple, (points + rng.normal(0, .018, points.shape)) * 112 + (56, 0))], 255)
                stripes = rng.uniform(0, .12) * np.cos(rng.uniform(3, 20) * (x if rng.random() < .5 else y))
                light = (rng.uniform(.4, 1) + rng.uniform(-.25, .25) * x + rng.uniform(-.25, .25) * y + stripes).clip(.15, 1)
            matrix = np.diag(rng.uniform(.95, 1.4, 2)) + rng.uniform(-.15, .15, (2, 2))
            shift = 56 - matrix @ (56 + rng.uniform(-8, 8, 2))
            canvas = canvas.transform(canvas.size, Image.AFFINE, [*matrix[0], shift[0], *matrix[1], shift[1]], Image.BILINEAR)
            images.append(np.uint8(np.asarray(canvas.reduce(4)) * light))
        classes[label] = np.stack(images).reshape(-1, PIXELS)
    return classes

class Domains(NamedTuple):
    """All images of a run, on the device, sorted by class, and which classes are for what."""
    images: torch.Tensor    # uint8 [n, 784]
    first: torch.Tensor     # int64 [C], where a class begins
    count: torch.Tensor     # int64 [C], how many images it has
    names: list             # 'mnist 7'
    title: str              # 'mnist and fashion'
    roles: dict             # 'train' or 'test' -> (source classes, target classes)
    pairs: torch.Tensor     # int64 [P, 2], every pair (source class, target class) to train on
    most: int               # images in the largest class

def load_domains(source_specs, target_specs, shots, data_dir, device):
    """Load every spec once; the last classes of each are held out, from whatever other spec they are in as well.

    Raises UserError where a class has too few images, and where no pair is left to train or to test on.
    """
    specs, images, known, titles = {}, {}, {}, []       # spec -> its class names; class name -> its images; content -> name
    for spec in dict.fromkeys([*source_specs, *target_specs]):
        title, classes = load_dataset(spec, data_dir)
        for label, content in classes.items():
            if len(content) < shots + 4:                # an episode is scored on 2 other images, a test on 2 and 2
                raise UserError(f"--shots {shots}, but '{title} {label}' has {len(content)} image(s), and 4 more than the shots are "
                                "needed; take fewer shots or leave the class out, as in mnist:0-6,9")
            name = known.setdefault(hash(content.tobytes()), f"{title} {label}")        # the same images are one class
            if not np.array_equal(images.setdefault(name, content), content):
                raise UserError(f"'{name}' would be the name of two different classes; rename the folder {title}")
            specs.setdefault(spec, []).append(name)
        titles += [title]
    names = list(images)
    held_out = {spec: own[-min(HELD_OUT, max(1, len(own) // 3)):] for spec, own in specs.items()}
    kept = {spec: [name for name in own if not any(name in h for h in held_out.values())] for spec, own in specs.items()}
    roles = {}
    for role, classes in (("train", kept), ("test", held_out)):
        roles[role] = [list(dict.fromkeys(names.index(name) for spec in side for name in classes[spec])) for side in (source_specs, target_specs)]
        if not any(s != t for s in roles[role][0] for t in roles[role][1]):
            raise UserError(f"no pair of two different classes is left to {role} on: of every domain a third of the classes, {HELD_OUT} at most, is held out, so name more")
    count = torch.tensor([len(content) for content in images.values()], device=device)
    everything = torch.from_numpy(np.concatenate(list(images.values()))).to(device)
    pairs = torch.tensor([(s, t) for s in roles["train"][0] for t in roles["train"][1] if s != t], device=device)
    return Domains(everything, count.cumsum(0) - count, count, names, " and ".join(dict.fromkeys(titles)), roles, pairs, int(count.max()))

def sample_images(domains, classes, n, rng):
    """n images of each of the classes [T], different ones if it has as many, as floats in [-1, 1]  # [T, n, 784]"""
    count = domains.count[classes].unsqueeze(1)
    lots = torch.rand(len(classes), max(n, domains.most), generator=rng, device=rng.device)
    beyond = torch.arange(lots.shape[1], device=rng.device) >= count        # no images of the class: drawn last, if at all
    index = lots.masked_fill(beyond, 2).topk(n, largest=False).indices % count
    return domains.images[domains.first[classes].unsqueeze(1) + index] / 127.5 - 1

def sample_pairs(domains, n, rng):
    """n random pairs of a source class and another class, the target, for meta-training  # int64 [n, 2]"""
    return domains.pairs[torch.randint(len(domains.pairs), (n,), generator=rng, device=rng.device)]

def new_domain(images, other, rng):
    """Make a new domain of an old one: the same random changes, or none, for all images of a task  # [T, n, 784] -> the same

    Turns, mirroring, slant, size, place, contrast, and images of an `other` class mixed in: a few classes are
    learned by heart, where many variations of them teach to adapt.
    """
    tasks, n, _ = images.shape
    mix, mirror, move, bend, quarter, turn, size_x, size_y, slant, x, y, contrast = torch.rand(12, tasks, generator=rng, device=rng.device)
    per_task = lambda t: t.view(-1, 1, 1, 1)
    swapped = torch.rand(tasks, n, 1, generator=rng, device=rng.device) < 0.5 * (mix < 0.3).view(-1, 1, 1)
    images = (torch.where(swapped, other, images).view(tasks, n, 28, 28) + 1) / 2
    angle = (4 * quarter).floor() * math.pi / 2 + 0.7 * (turn - 0.5)
    cos, sin, size_x, size_y, slant = angle.cos(), angle.sin(), (size_x / 2 - 0.25).exp(), (size_y / 2 - 0.25).exp(), 0.6 * slant - 0.3
    # from a place in the result to one in the image, which is turned first: [[cos, -sin], [sin, cos]] [[size_x, slant], [0, size_y]]
    matrix = [cos * size_x, cos * slant - sin * size_y, 0.3 * x - 0.15, sin * size_x, sin * slant + cos * size_y, 0.3 * y - 0.15]
    grid = F.affine_grid(torch.stack(matrix, 1).view(-1, 2, 3), images.shape, align_corners=False)
    warped = F.grid_sample(images, grid, align_corners=False)               # the n images of a task are channels of one
    warped = torch.where(per_task(mirror < 0.5), warped.flip(-1), warped)
    images = torch.where(per_task(move < 0.75), warped, images).clamp(0, 1)
    gamma = torch.where(bend < 0.3, torch.exp(1.5 * contrast - 0.75), 1)
    return images.pow(per_task(gamma)).view(tasks, n, PIXELS) * 2 - 1

def thin(images):
    """Whether images are strokes and not areas: erosion by two pixels leaves less than 5 % of their light  # [..., 784] -> [...]"""
    light = (images.reshape(-1, 1, 28, 28) + 1) / 2
    left = -F.max_pool2d(-light, 5, 1, padding=2)               # every pixel as dark as the darkest within two of it
    return (left.sum((1, 2, 3)) < 0.05 * light.sum((1, 2, 3))).view(images.shape[:-1])

def drawn_domain(pen, n, rng):
    """Images of something without a name: one design for all of a task's, carried out a little differently in each  # [T, n, 784]

    A design is up to SHAPES soft-edged superellipses, from diamonds to boxes, painted one over the other, as garments might be, or,
    where the task's `pen` [T] is true, arcs of their outlines, drawn with one pen, as characters are; half of the designs are
    symmetric. Real classes are few, and can be recognised; a design never returns, and has to be learned from the support.
    """
    # rand(1, …) is one number for a task, rand(n, …) one for each of its images
    tasks, pen = len(pen), pen.view(-1, 1, 1, 1, 1)
    rand = lambda *shape: torch.rand(tasks, *shape, generator=rng, device=rng.device)
    randn = lambda *shape: torch.randn(tasks, *shape, generator=rng, device=rng.device)
    first = torch.arange(SHAPES, device=rng.device).view(SHAPES, 1, 1) == 0
    spread, shade = 0.02 + 0.15 * rand(1, 1, 1, 1).square(), rand(1, 1, 1, 1) / 4       # how much a task's images differ in form and in light

    def numbers(low, high, deviation, of_first=1.0):
        """One for every shape: the design's, times of_first for the first shape, and an image's deviation from it."""
        design = low + (high - low) * rand(1, SHAPES, 1, 1)
        return torch.where(first, of_first * design, design) + deviation * randn(n, SHAPES, 1, 1)

    x, y = numbers(-0.6, 0.6, spread, 0.3), numbers(-0.7, 0.7, spread, 0.3)             # the first shape is large and in the middle
    width, height = (numbers(-2.5, -0.1, 1.5 * spread, 0.35).exp() for _ in range(2))
    angle, power = numbers(-1.1, 1.1, spread) ** 3, numbers(1.2, 6.0, 0.0)              # cubed: most stand nearly upright
    light = torch.where(pen, 1, numbers(-0.3, 1.0, shade).clamp(0, 1))                  # what is dark makes a hole
    stroke = ((0.04 + 0.07 * rand(1, 1, 1, 1)) * (1 + shade * randn(n, 1, 1, 1))).clamp(min=0.03)      # half the pen's width
    middle, opening = numbers(-math.pi, math.pi, 2 * spread), numbers(-2.0, 0.7, 2 * spread)            # of an arc; below -1 it is closed
    there = first | (rand(n, SHAPES, 1, 1) < 4 * rand(1, SHAPES, 1, 1) - 1)             # in all, some or none of a task's images
    line = torch.linspace(-1, 1, 28, device=rng.device)
    down, across = line.view(28, 1), torch.where(rand(1, 1, 1, 1) < 0.5, line.abs(), line)
    right, below = across - x, down - y
    u, v = (angle.cos() * right + angle.sin() * below) / width, (angle.cos() * below - angle.sin() * right) / height
    radius = (u.abs() ** power + v.abs() ** power) ** (1 / power)                       # [T, n, SHAPES, 28, 28], 1 on the outline
    slope = torch.hypot((u.abs() / radius) ** (power - 1) / width, (v.abs() / radius) ** (power - 1) / height)     # |d radius / d (x, y)|
    inside = (1 - radius) / slope                                                       # about the distance to the outline
    along = (u * middle.cos() + v * middle.sin()) / torch.hypot(u, v)                   # the cosine of the angle from an arc's middle
    inside = torch.where(pen, torch.minimum(stroke - inside.abs(), 0.3 * (along - opening)), inside)
    cover = there * (inside / 0.03).sigmoid()                                           # soft edges
    canvas = cover[:, :, 0] * light[:, :, 0].clamp(min=0.3)                             # the first is never a hole
    for shape in range(1, SHAPES):
        canvas = canvas + cover[:, :, shape] * (light[:, :, shape] - canvas)
    way, striped, phase = 2 * math.pi * rand(1, 1, 1), rand(1, 1, 1) < 0.5, 2 * math.pi * rand(n, 1, 1)
    stripes = striped * rand(n, 1, 1) * ((3 + 17 * rand(n, 1, 1)) * (way.cos() * line + way.sin() * down) + phase).cos()
    cloud = F.interpolate(randn(n, 7, 7), size=(28, 28), mode="bilinear") / 2           # the n images of a task are channels of one
    relief = 1 + shade[:, 0] * (randn(n, 1, 1) * line + randn(n, 1, 1) * down + stripes + cloud)
    return (canvas * relief.clamp(min=0.15)).clamp(0, 1).view(tasks, n, PIXELS) * 2 - 1

def made_up_domain(images, other, rng):
    """For every task of [T, n, 784] a new domain: made of its own images or, in DRAWN of the tasks, of drawn ones, with a pen
    where the first of its own is a drawing."""
    drawn = torch.rand(len(images), 1, 1, generator=rng, device=rng.device) < DRAWN
    return new_domain(torch.where(drawn, drawn_domain(thin(images[:, 0]), images.shape[1], rng), images), other, rng)

def sample_episode(domains, pairs, shots, queries, source_steps, rng, change=None):
    """The images of T tasks, given as (source class, target class) pairs [T, 2]; `change`: what becomes of the targets,
    `new_domain` or `made_up_domain`, if anything.

    Returns source_steps batches of the source and the support  # each [T, shots, 784]
    and query images of the target, none of them in the support  # [T, queries, 784]
    """
    source, target = pairs.T
    sources = [sample_images(domains, source, shots, rng) for _ in range(source_steps)]
    images = sample_images(domains, target, shots + queries, rng)
    if change:
        other = sample_pairs(domains, len(pairs), rng)[:, 1]
        images = change(images, sample_images(domains, other, shots + queries, rng), rng)
    return sources, images[:, :shots].contiguous(), images[:, shots:]

# 2  Networks: pure functions of their parameters -----------------------------------------------------------------------

class Layer(NamedTuple):
    """A linear layer and what it remembers of its inner steps, equation (4): W' = W + deltasᵀ inputs, b' = b + Σ deltas."""
    weight: torch.Tensor            # [N, K], shared by all tasks, or [T, N, K]
    bias: torch.Tensor              # [N] or [T, N]
    inputs: torch.Tensor = None     # X [T, r, K]: r rows, one for each image of each step since the last fold (see `remember`)
    deltas: torch.Tensor = None     # Δ [T, r, N]

def init_network(sizes, rng):
    """Layers with weights and biases uniform in ±1/sqrt(inputs), PyTorch's own default for a linear layer."""
    draw = lambda k, *shape: (torch.rand(shape, generator=rng, device=rng.device) * 2 - 1) / math.sqrt(k)
    return [Layer(draw(k, n, k), draw(k, n)) for k, n in zip(sizes, sizes[1:])]

def linear(layer, x, slope=1.0):
    """A layer, equation (4), and its LeakyReLU: x [T, B, K] -> [T, B, N]"""
    recalled = None if layer.inputs is None else bmm(bmm(x, layer.inputs.mT) + 1, layer.deltas)
    return fused_linear(x, layer.weight, layer.bias, slope, addend=recalled, backend=KERNEL)

def network(layers, x, slope, seen=None, first_out=None, dropout=0.0, rng=None):
    """Linear layers with LeakyReLU between them: x [T, B, K] -> [T, B, N].

    The list `seen` gets every layer's input; `first_out`: the first layer's pre-activations of x, where they are known already.
    """
    for i, layer in enumerate(layers):
        if seen is not None:
            seen.append(x)
        last = i == len(layers) - 1
        x = F.leaky_relu(first_out, slope) if i == 0 and first_out is not None else linear(layer, x, 1.0 if last else slope)
        if dropout and not last:
            x = x * (torch.rand(x.shape, generator=rng, device=x.device) >= dropout) / (1 - dropout)
    return x

def backpropagate(layers, seen, g, slope):
    """Gradients of all pre-activations of `network`, in order, from that of the last, g [T, B, N], and what the layers have seen.

    A layer's input is the activation of the one before, and has the sign of its pre-activation.
    """
    gradients = [g]
    for layer, x in zip(layers[:0:-1], seen[:0:-1]):
        gradients.insert(0, input_gradient(layer, gradients[0]) * x.detach().sign().clamp(min=slope))
    return gradients

def input_gradient(layer, g):
    """The gradient of a layer's input from that of its pre-activation: g W', with W' as in equation (4)  # [T, B, K]"""
    recalled = None if layer.inputs is None else bmm(bmm(g, layer.deltas.mT), layer.inputs)
    return fused_linear(g, layer.weight.mT, None, 1.0, addend=recalled, backend=KERNEL)

def generator(theta, z, seen=None):
    """Noise z [T, B, 100] -> images in [-1, 1]  # [T, B, 784]"""
    return network(theta, z, 0.0, seen).tanh()          # slope 0 is ReLU

def discriminator(phi, x, seen=None, first_out=None, dropout=0.0, rng=None):
    """Images [T, B, 784] -> logits, positive where D thinks them real  # [T, B]"""
    return network(phi, x, 0.2, seen, first_out, dropout, rng).squeeze(-1)

def remember(layers, rates, seen, gradients, known=0):
    """The layers after a gradient step: memory grows by the step's rows, until plain weights are cheaper.

    The gradient of a weight is gᵀ x, with x the layer's input and g the gradient of its pre-activation: to remember x and
    -a g is to take the step. For a row of x, r remembered rows cost r (N + K) multiplications on top of the product that
    all tasks share, a weight of the task's own costs N K. From then on nothing is shared, and memory is kept for a quarter as
    long. A new batch's rows go to the front. `known`: so many first rows the first layer has seen in the last step as well;
    they are at the front of its memory, and only their deltas add up.
    """
    adapted = []
    for i, (layer, rate, x, g) in enumerate(zip(layers, rates, seen, gradients)):
        delta = -rate * g
        if layer.inputs is not None and known and i == 0:
            there, others = layer.deltas.split([known, layer.deltas.shape[1] - known], 1)
            x, delta = torch.cat([layer.inputs, x[:, known:]], 1), torch.cat([there + delta[:, :known], others, delta[:, known:]], 1)
        elif layer.inputs is not None:
            x, delta = torch.cat([x, layer.inputs], 1), torch.cat([delta, layer.deltas], 1)
        layer = Layer(layer.weight, layer.bias, x, delta)
        n, k = layer.weight.shape[-2:]
        worth = n * k if layer.weight.dim() == 2 else n * k / 4
        adapted.append(fold(layer) if x.shape[1] * (n + k) > worth else layer)
    return adapted

def fold(layer):
    """Write a layer's memory into weights of the task's own: W + Δᵀ X  # [T, N, K]"""
    if layer.inputs is None:
        return layer
    return Layer(layer.weight + bmm(layer.deltas.mT, layer.inputs), layer.bias + layer.deltas.sum(1))

def own_weights(*networks):
    """The weights and biases that adapted layers amount to, in order  # each [T, ...]"""
    return tensors(*([fold(layer) for layer in layers] for layers in networks))

def random_start(seed, device):
    """The parameters of a new generator and discriminator, as a flat list."""
    rng = torch.Generator(device).manual_seed(seed)
    return tensors(init_network(GENERATOR_SIZES, rng), init_network(DISCRIMINATOR_SIZES, rng))

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

# 3  The game (Goodfellow et al. 2014), and a score that cannot be talked out of anything -------------------------------

def loss_d(real_logits, fake_logits):
    """The discriminator's loss, equation (1), per task: softplus keeps it finite where log(sigmoid) is not  # [T]"""
    return F.softplus(-real_logits).mean(-1) + F.softplus(fake_logits).mean(-1)

def loss_g(fake_logits):
    """The generator's non-saturating loss, equation (1), per task  # [T]"""
    return F.softplus(-fake_logits).mean(-1)

def energy_distance(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'| of samples x [T, n, d] and y [T, m, d]  # [T]

    A proper score: in expectation least, and zero, where both have one distribution (Székely and Rizzo 2013; for GANs
    Bellemare et al. 2017, arXiv 1705.10743). The means over pairs leave out a sample's distance to itself.
    """
    n, m = x.shape[1], y.shape[1]
    images = torch.cat([x, y], 1)                                           # [T, n + m, d]
    square, itself = images.square().sum(-1), torch.eye(n + m, dtype=torch.bool, device=x.device)
    # |a - b|² = |a|² + |b|² - 2 ab, one product for all; rounding can make it negative where images are the same
    squared = torch.baddbmm(square.unsqueeze(1) + square.unsqueeze(2), images, images.mT, alpha=-2)
    distance = squared.clamp(min=1e-12).sqrt().masked_fill(itself, 0)
    within = lambda block: block.sum((1, 2)) / (block.shape[1] * (block.shape[1] - 1))
    return 2 * distance[:, :n, n:].mean((1, 2)) - within(distance[:, :n, :n]) - within(distance[:, n:, n:])

# 4  Inner loop: an initialisation is adapted by learned rates ----------------------------------------------------------

# The gradients of a step are *partial*. A fake batch depends on theta_k, and theta_k on phi_k: asked for the gradient of D's
# loss with respect to phi_k, autograd would follow that path, too. To detach the fakes would cut it for the outer gradient as
# well, which needs it. So the inner gradient is written out, as plain operations on values: it has no such path, and
# autograd, which differentiates these operations for the outer gradient, still sees every one.

def adapt(theta, phi, rates, batches, rng, second_order=True, own_paths=False):
    """One adversarial inner step of D and of G, equation (2), on every batch of real images.

    theta, phi: layers; rates: inner learning rates [steps, 2, 4], G's and D's, for every layer (a rate for every step:
    Antoniou et al. 2019, arXiv 1810.09502); batches: of [T, shots, 784], not more than there are rates, remembered once
    as long as it is the same tensor. second_order: keep the graph, so that a loss of the result can be differentiated
    through all steps; without it the steps' gradients are constants, first-order MAML (`meta_gradient`). own_paths:
    each player's steps see the other as a constant, so that no player lowers its loss by an initialisation that makes
    the *other* learn badly. Yields theta and phi as they are, and after every step.
    """
    yield theta, phi
    for step, real in enumerate(batches):
        (rates_g, rates_d), shots = rates[step], real.shape[1]
        known = step > 0 and real is batches[step - 1]                      # then first_out is the last step's, moved by it
        with torch.set_grad_enabled(second_order):
            seen = []
            fake = generator(theta, noise(len(real), FAKES, rng), seen)
            shown = fake.detach() if own_paths else fake
            images = torch.cat([real, shown], 1)                            # [T, shots + FAKES, 784]
            # D's first layer is its largest, and sees the support at every step, the fakes twice in a step. What it makes
            # of an image is computed once; from then on, a step only adds its own (x Xᵀ + 1) Δ to that, equation (4).
            first_out = torch.cat([first_out[:, :shots] if known else linear(phi[0], real), linear(phi[0], shown)], 1)
            seen_by_d, gradients = discriminator_gradients(phi, images, first_out, shots)
            first_out = first_out + bmm(bmm(images, images.mT) + 1, -rates_d[0] * gradients[0])
        # To remember is outside: in first order g is a constant, but theta - a g still has derivatives by theta and by a.
        phi = remember(phi, rates_d, seen_by_d, gradients, known=shots if known else 0)
        with torch.set_grad_enabled(second_order):
            # With own_paths, D's first layer is computed anew: first_out depends on phi, where it should on theta alone.
            judge, out = (detach(phi), None) if own_paths else (phi, first_out[:, shots:])
            gradients = generator_gradients(theta, judge, fake, out, seen)
        theta = remember(theta, rates_g, seen, gradients)
        yield theta, phi

def discriminator_gradients(phi, images, first_out, shots):
    """What D's layers see of an inner step, and the gradients of loss_d with respect to their pre-activations.

    images: `shots` real ones and the fakes; first_out: the first layer's pre-activations of them.
    """
    seen = []
    logits = discriminator(phi, images, seen, first_out)
    # softplus' = sigmoid
    g = torch.cat([-(-logits[:, :shots]).sigmoid() / shots, logits[:, shots:].sigmoid() / FAKES], 1)
    return seen, backpropagate(phi, seen, g.unsqueeze(-1), 0.2)

def generator_gradients(theta, phi, fake, first_out, seen):
    """Those of loss_g with respect to G's pre-activations, back through D, tanh and G: `fake` is what theta made, `seen` what
    its layers have seen on the way, `first_out` D's first pre-activations of it, if known."""
    seen_by_d = []
    g = -(-discriminator(phi, fake, seen_by_d, first_out)).sigmoid() / FAKES
    g = input_gradient(phi[0], backpropagate(phi, seen_by_d, g.unsqueeze(-1), 0.2)[0])
    return backpropagate(theta, seen, g * (1 - fake.square()), 0.0)         # tanh' = 1 - tanh²

# 5  Meta-training ------------------------------------------------------------------------------------------------------

def outer_loss(theta, phi, query, views, rng):
    """How good adapted players are, on images that they have not seen  # [T]

    The energy distance in every one of the `views`, functions of images [T, n, 784] -> [T, n, d]. If D gave this score, theta_0
    could lower it by spoiling D's adaptation. No D takes part in it, so the gradient may go through both players: theta_0
    learns to adapt, and phi_0 to be a D that teaches G fast. Without views the game's own losses, each player against a
    constant opponent; `adapt` needs own_paths then.
    """
    fake = generator(theta, noise(len(query), query.shape[1], rng))
    if views:
        return sum(energy_distance(view(fake), view(query)) for view in views)
    d = loss_d(discriminator(phi, query), discriminator(phi, fake.detach()))
    return d + loss_g(discriminator(detach(phi), fake))

def scored(batches):
    """After how many steps an episode is scored: at its end, and after half of the steps on the support.

    The support is the last batch, and every batch that is the same tensor. Scored early, few steps are worth something already (a loss at more
    than the last step: Antoniou et al. 2019, arXiv 1810.09502).
    """
    return sorted({len(batches) - sum(batch is batches[-1] for batch in batches) // 2, len(batches)})

def meta_gradient(leaves, batches, query, algorithm, views, rng):
    """Loss of an episode and its gradient with respect to leaves = [*theta, *phi, log_rates], equation (3).

    The last leaf holds logarithms, so that a rate stays positive. algorithm:
    maml     differentiates through all inner steps (Finn et al. 2017, arXiv 1703.03400)
    fomaml   the inner gradients are constants (the same paper): phi_0, which reaches the energy distance only through
             them, then gets no gradient, nor do D's rates
    reptile  no derivative (Nichol et al. 2018, arXiv 1803.02999): the start minus the mean of the adapted weights takes the
             gradient's place, before clipping and the optimisers, which heed its direction alone; the loss is only shown,
             the rates stay
    both     the gradient of maml and the direction of reptile, each of length one, added: the one asks for a low score soon, the
             other draws the start to where the game's own steps lead
    """
    rates, losses = leaves[-1].exp(), []
    for steps, (theta, phi) in enumerate(adapt(*players(leaves), rates, batches, rng, second_order=algorithm in ("maml", "both"), own_paths=not views)):
        if steps in scored(batches):
            losses.append(outer_loss(theta, phi, query, views, rng).mean())
    loss = sum(losses) / len(losses)
    if algorithm in ("reptile", "both"):
        with torch.no_grad():
            back = [*[start - end.mean(0) for start, end in zip(leaves, own_weights(theta, phi))], torch.zeros_like(rates)]
    if algorithm == "reptile":
        return loss.detach(), back
    gradient = grad(loss, leaves, materialize_grads=True)
    if algorithm == "both":
        of_length_one = lambda parts: torch._foreach_div(parts, torch.nn.utils.get_total_norm(parts))
        gradient = torch._foreach_add(of_length_one(gradient), of_length_one(back))
    return loss.detach(), gradient

def orthogonal(matrix, steps=5):
    """About U Vᵀ, where U S Vᵀ is the singular value decomposition of the matrix [N, K], by products alone.

    An iteration of Newton and Schulz, x <- 3.4445 x - 4.775 (x xᵀ) x + 2.0315 (x xᵀ)² x, applies that polynomial to every singular
    value and keeps U and V. Values from 0.2 % of the matrix's norm on come to between 0.7 and 1.2, smaller ones stay smaller.
    The coefficients are those of Jordan et al. 2024. In bfloat16 on a GPU, and on a processor with AVX-512 for it.
    """
    short = matrix.dtype == torch.float32 and (matrix.is_cuda or getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"))
    x = matrix / matrix.norm().clamp(min=1e-7)
    x = (x.mT if len(x) > x.shape[1] else x).to(torch.bfloat16 if short else matrix.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x if x.shape == matrix.shape else x.mT).to(matrix.dtype)

class Muon(torch.optim.Optimizer):
    """Steps along the gradients' moving average with its singular values made alike (`orthogonal`): all directions of a weight learn
    equally fast, not the steepest alone (Jordan et al. 2024, kellerjordan.github.io/posts/muon). In root mean square, a step's
    entries are the learning rate, as Adam's are about; less where the average has few strong directions.

    torch.optim.Muon needs the learning rate on the host and cannot leave out a step that is not finite without asking the device,
    which a CUDA graph must not (`update`, which sets `found_inf`); and it computes in bfloat16, slowly where a processor has no units for it.
    """

    def __init__(self, groups, momentum=0.8):
        super().__init__(groups, {"momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for leaf in group["params"]:
                if leaf not in self.state:
                    self.state[leaf]["momentum"] = torch.zeros_like(leaf)
                buffer = self.state[leaf]["momentum"]
                momentum = buffer.lerp(leaf.grad, 1 - group["momentum"])
                step = orthogonal(leaf.grad.lerp(momentum, group["momentum"])) * max(leaf.shape) ** 0.5     # Nesterov: looks ahead
                buffer.copy_(torch.where(self.found_inf > 0, buffer, momentum))
                leaf.copy_(torch.where(self.found_inf > 0, leaf, leaf - group["lr"] * step))

def new_phase(flat, seed, settings=None):
    """A phase of training that starts from copies of the parameters `flat`, as all that a checkpoint must hold of it.

    Ordinary GAN training, or with `settings` meta-training, which learns the inner learning rates as well. Keys: the steps
    done, and how many updates were skipped, in all and in a row; what is learned, `leaves`, and its moving average, which only
    meta-training has; the optimisers; the random numbers.
    """
    leaves = [t.detach().clone().requires_grad_() for t in flat]
    adam = partial(torch.optim.Adam, betas=(0.5, 0.999), fused=True, capturable=flat[0].is_cuda)
    if settings:
        rates = settings.inner_lr * torch.tensor([[1.0], [0.2]], device=flat[0].device)      # D is the quicker one to diverge
        steps = settings.source_steps + settings.inner_steps
        leaves.append(rates.log().repeat(steps, 1, len(GENERATOR_SIZES) - 1).requires_grad_())              # [steps, 2, 4]
        # A logarithm must move faster than a weight. Learning rates are tensors, so that a CUDA graph sees them fall.
        group = lambda part, lr: {"params": part, "lr": torch.tensor(lr, device=flat[0].device), "initial_lr": lr}
        is_vector = lambda leaf: leaf.dim() == 1 or len(leaf) == 1              # the biases, and D's last weight
        vectors, matrices = ([leaf for leaf in leaves[:-1] if is_vector(leaf) == wanted] for wanted in (True, False))
        optimizers = [Muon([group(matrices, settings.meta_lr)]), adam([group(vectors, settings.meta_lr), group(leaves[-1:], 12.5 * settings.meta_lr)])]
    else:
        optimizers = [adam([{"params": tensors(layers), "lr": 2e-4}]) for layers in players(leaves)]
    return {"step": 0, "skipped": 0, "in_a_row": 0, "leaves": leaves, "average": [t.detach().clone() for t in leaves if settings],
            "optimizers": optimizers, "rng": torch.Generator(flat[0].device).manual_seed(seed)}

def update(optimizers, leaves, gradients, clip=math.inf):
    """The optimisers' step with gradients of at most this norm; nothing happens where not all is finite; returns whether all was.

    All of it, that decision too, stays on the device: fused Adam looks for `found_inf`, as it does for a GradScaler, and so does Muon.
    """
    for leaf, gradient in zip(leaves, gradients):
        leaf.grad = gradient.contiguous()       # fused Adam on a CPU takes a transposed gradient for a plain one, without a word
    finite = torch.nn.utils.clip_grad_norm_(leaves, clip).isfinite()
    for optimizer in optimizers:
        optimizer.found_inf = 1 - finite.float()
        optimizer.step()
    return finite

def gan_step(phase, real, fakes):
    """A step of D and one of G on real images [T, B, 784], `fakes` generated ones; returns whether all was finite, and the losses."""
    (theta, phi), (adam_g, adam_d), rng = players(phase["leaves"]), phase["optimizers"], phase["rng"]
    judge = lambda images: discriminator(phi, images, dropout=0.3, rng=rng)
    fake = generator(theta, noise(len(real), fakes, rng))
    d = loss_d(judge(real), judge(fake.detach())).sum()
    finite = update([adam_d], tensors(phi), grad(d, tensors(phi)))
    g = loss_g(judge(fake)).sum()
    finite &= update([adam_g], tensors(theta), grad(g, tensors(theta)))
    return finite, {"D": d.detach(), "G": g.detach()}

def pretraining_step(phase, domains, augment):
    """Ordinary GAN training on the meta-training classes of both sides together, as they are or as made-up domains."""
    rng = phase["rng"]
    classes = domains.pairs.unique()
    tasks = 4 if augment else GAN_BATCH         # made-up: 4 domains of 16 images each; else each of a random class
    batch = lambda: sample_images(domains, classes[torch.randint(len(classes), (tasks,), generator=rng, device=rng.device)], GAN_BATCH // tasks, rng)
    images = made_up_domain(batch(), batch(), rng) if augment else batch()
    return gan_step(phase, images.view(1, GAN_BATCH, PIXELS), GAN_BATCH)

def meta_step(phase, domains, settings, views, gradient=None):
    """One episode, equation (3): sample pairs, adapt, update the initialisation, the rates and their moving average.

    Nothing in it waits for the device. gradient: what takes the place of `meta_gradient`, if anything. Returns, on the device:
    whether all was finite, the loss, the means of the rates over the steps  # [1 + 1 + 8]
    """
    leaves, rng = phase["leaves"], phase["rng"]
    pairs = sample_pairs(domains, settings.meta_batch, rng)
    sources, support, query = sample_episode(domains, pairs, settings.shots, settings.queries, settings.source_steps, rng, made_up_domain)
    batches = [*sources, *[support] * settings.inner_steps]
    loss, gradients = (gradient or meta_gradient)(leaves, batches, query, settings.algorithm, views, rng)
    finite = update(phase["optimizers"], leaves, gradients, CLIP)
    with torch.no_grad():
        leaves[-1].clamp_(max=math.log(MAX_RATE))
        torch._foreach_lerp_(phase["average"], leaves, 1 - AVERAGE)
    return torch.cat([torch.stack([finite, loss]), leaves[-1].detach().exp().mean(0).flatten()])

def pixels(images):
    """The plainest view of images."""
    return images

def edges(images):
    """The differences of neighbouring pixels: the view in which speckle shows  # [T, n, 784] -> [T, n, 2 * 27 * 28]"""
    square = images.unflatten(-1, (28, 28))
    return torch.cat([square.diff(dim=-1).flatten(2), square.diff(dim=-2).flatten(2)], 2)

def learned_view(features):
    """The view of a classifier's features, in which distances count FEATURE_WEIGHT times  # [T, n, 784] -> [T, n, 64]"""
    return lambda images: FEATURE_WEIGHT * features(images.flatten(0, 1)).unflatten(0, images.shape[:2])

def captured(step):
    """step(phase) -> tensor, from its fourth call on as a CUDA graph: Python needs longer to start an episode's thousands
    of kernels one by one than the GPU to run them, a graph starts them all at once.

    A replay writes to the tensors of its capture: leaves, averages and the optimiser's state change in place, random
    numbers come from the phase's own generator, and the result is read before the next replay. Where a step cannot be
    captured, steps go on as they are.
    """
    graph, side, result, calls = torch.cuda.CUDAGraph(), torch.cuda.Stream(), None, 0

    def run(phase):
        nonlocal graph, result, calls
        calls += 1
        if graph and calls == 4:
            state = phase["rng"].get_state()
            try:
                graph.register_generator_state(phase["rng"])
                with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):         # records, runs nothing
                    result = step(phase)
            except RuntimeError as error:
                show(f"going on without a CUDA graph ({' '.join(str(error).split()):.100})", last=True)
                graph, phase["rng"] = None, torch.Generator(phase["rng"].device)
                phase["rng"].set_state(state)
        if graph and calls > 3:
            graph.replay()
            return result
        side.wait_stream(torch.cuda.current_stream())   # what libraries set up at first use, they set up before the capture
        with torch.cuda.stream(side):
            first = step(phase)
        torch.cuda.current_stream().wait_stream(side)
        return first
    return run

def run_phase(run, name, total, step, save):
    """Call step(phase) until `total` steps are done: show, log, save, and stop where the user or the numbers say so."""
    phase, began, shown = run["phases"][name], time.perf_counter(), 0.0
    saved, first = began, phase["step"]
    while phase["step"] < total:
        finite, numbers = step(phase)
        phase["step"] += 1
        phase["skipped"] += not finite
        phase["in_a_row"] = 0 if finite else phase["in_a_row"] + 1
        if phase["in_a_row"] == PATIENCE:
            raise UserError(f"{name}: {PATIENCE} updates in a row were not finite; try a smaller --inner-lr or --meta-lr, or fewer --inner-steps")
        last, now = phase["step"] == total, time.perf_counter()
        if name == "meta-training" and (phase["step"] % 10 == 0 or last):
            run["log"].append({"step": phase["step"], **numbers, "skipped": phase["skipped"], "domains": run["title"]})
        if last or now - shown > (0.2 if sys.stderr.isatty() else 10):
            speed, shown = (phase["step"] - first) / (now - began), now
            values = " ".join(f"{key} {value:.3g}" for key, value in numbers.items())
            show(f"{name} {phase['step']}/{total} {speed:.1f}/s {(total - phase['step']) / speed:.0f} s left, skipped {phase['skipped']}, {values}", last)
        if last or INTERRUPTED or now - saved > run["settings"]["save_seconds"]:
            save()
            saved = time.perf_counter()
        if INTERRUPTED:
            raise KeyboardInterrupt

def show(line, last=False):
    """Progress on stderr: one line written over and over on a terminal, plain lines elsewhere."""
    terminal = sys.stderr.isatty()
    line = "\r\x1b[K" + line[:(os.get_terminal_size(2).columns or 80) - 1] if terminal else line
    print(line, end="" if terminal and not last else "\n", file=sys.stderr, flush=True)

def train(run, domains, settings, save):
    """All training, each phase from where it stands: the warm start, then the transfer baseline and meta-training from there.

    The warm start is on the meta-training classes of both sides, its last third on domains made up from them. Transfer goes on
    with these, for as many images as meta-training sees. Meta-training's own made-up domains replace the target's classes alone.

    run, all that a checkpoint holds: the "settings"; "names", "count" and "title" of the `Domains`; the "log", a dict for every
    tenth episode; the "phases" begun, by name (`new_phase`); the "seconds" it took; "source images" for deployment; and the
    weights of two classifiers, "features" for the score and "classifier" for the judge, with its "accuracy".
    """
    device, seen = domains.images.device, settings.meta_batch * (settings.shots * (settings.source_steps + 1) + settings.queries)
    warm_up = lambda phase: pretraining_step(phase, domains, augment=phase["step"] >= settings.warm_steps * 2 // 3)
    go_on = lambda phase: pretraining_step(phase, domains, augment=True)
    views = {"features": [pixels, edges], "pixels": [pixels], "adversarial": []}[settings.score]
    if settings.score == "features":
        if "features" not in run:
            show("training the features that score adapted generators")
            run["features"] = train_classifier(domains, domains.pairs.unique(), settings.feature_steps, settings.seed + 3, augment=True)[0].state_dict()
        classifier = new_classifier(len(domains.names)).to(device).requires_grad_(False)
        classifier.load_state_dict(run["features"])
        views.append(learned_view(classifier[0]))
    one_episode = lambda phase: meta_step(phase, domains, settings, views)
    one_episode = captured(one_episode) if device.type == "cuda" else one_episode

    def episode(phase):
        for optimizer in phase["optimizers"]:
            for group in optimizer.param_groups:                # outer learning rates fall to 0 in the second half
                group["lr"].fill_(group["initial_lr"] * min(1, 2 - 2 * phase["step"] / settings.meta_steps))
        finite, loss, *rates = one_episode(phase).tolist()
        return finite, {"loss": loss, **{f"mean_rate_{'GD'[i // 4]}{i % 4}": rate for i, rate in enumerate(rates)}}

    for i, (name, steps, step) in enumerate((("warm start", settings.warm_steps, warm_up), ("transfer", settings.meta_steps * seen // GAN_BATCH, go_on),
                                             ("meta-training", settings.meta_steps, episode))):
        if name not in run["phases"]:
            start = run["phases"]["warm start"]["leaves"] if i else random_start(settings.seed, device)
            run["phases"][name] = new_phase(start, settings.seed + i, settings if step is episode else None)
        run_phase(run, name, steps, step, save)

# 6  Meta-testing: few-shot adaptation on pairs that no training has seen, and what else could have been done -----------

def few_shot(leaves, lr, sources, support, n, rng, test_steps, inner_steps):
    """Adapt our initialisation to T tasks at once; yields (steps on the support so far, a list of n samples [T, n, 784])
    for the test_steps, which ascend.

    The inner steps that were learned come first; where more are asked for than were learned, `fine_tune` goes on, with
    Adam at the learning rate lr, and the list has two entries.
    """
    leaves = [t.detach() for t in leaves]
    batches = [*sources, *[support] * min(inner_steps, test_steps[-1])]         # steps on the sources count from below 0
    for steps, (theta, phi) in enumerate(adapt(*players(leaves), leaves[-1].exp(), batches, rng, second_order=False), -len(sources)):
        if steps in test_steps:
            yield steps, [generator(theta, noise(len(support), n, rng))]
    if test_steps[-1] > inner_steps:
        more = [steps - inner_steps for steps in test_steps if steps > inner_steps]
        for steps, takes in fine_tune(own_weights(theta, phi), lr, [], support, n, rng, more):
            yield inner_steps + steps, takes

def fine_tune(leaves, lr, sources, support, n, rng, test_steps):
    """As `few_shot`, for any GAN: training with Adam on the same images, all tasks side by side, each with weights of its own.

    Yields the samples of G as it is, and after a step those of the average of its weights so far, an exponential one once they
    are many: the two players circle around where they are going, and the average does not (Yazıcı et al. 2019, arXiv
    1806.04498). A step that is not finite for one task is skipped for all. leaves: [T, ...] each, or shared by the tasks,
    to start with.
    """
    shared = leaves[1].dim() == 1               # G's first bias
    phase = {**new_phase([t.expand(len(support), *t.shape) if shared else t for t in leaves], 0), "rng": rng}
    for adam in phase["optimizers"]:
        adam.param_groups[0]["lr"] = lr
    for real in sources:
        gan_step(phase, real, FAKES)
    theta, average = (players(leaves)[0] for leaves in (phase["leaves"], [t.detach().clone() for t in phase["leaves"]]))
    for before, steps in zip((0, *test_steps), test_steps):
        for step in range(before, steps):
            gan_step(phase, support, FAKES)
            with torch.no_grad():
                torch._foreach_lerp_(tensors(average), tensors(theta), max(1 - AVERAGE, 1 / (step + 2)))
        z = noise(len(support), n, rng)
        yield steps, [generator(layers, z).detach() for layers in ((theta, average) if steps else (theta,))]

def without_a_gan(support, n, rng):
    """What a sceptic tries first with the support [T, shots, 784]; yields (name, n 'samples' [T, n, 784])."""
    tasks, shots, _ = support.shape
    mean, components = support.mean(1, keepdim=True), min(8, shots - 1)
    pick = lambda: torch.stack([images[torch.randint(shots, (n,), generator=rng, device=rng.device)] for images in support])
    share = torch.rand(tasks, n, 1, generator=rng, device=rng.device)
    _, scale, directions = torch.linalg.svd(support - mean, full_matrices=False)
    weights = torch.randn(tasks, n, components, generator=rng, device=rng.device) * scale[:, None, :components] / max(1, shots - 1) ** 0.5
    yield "mean image", mean.expand(-1, n, -1)
    yield "support repeated", pick()
    yield "pairwise mix", share * pick() + (1 - share) * pick()
    yield f"Gaussian on {components} components", (mean + weights @ directions[:, :components]).clamp(-1, 1)

def new_classifier(classes):
    """A small CNN: images [n, 784] -> features [n, 64] -> logits [n, classes]. No stride: it would let speckle pass unseen."""
    nn = torch.nn
    features = nn.Sequential(nn.Unflatten(-1, (1, 28, 28)), nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2),
                             nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(1568, 64), nn.ReLU())
    return nn.Sequential(features, nn.Linear(64, classes))

def train_classifier(domains, classes, steps, seed, augment=False):
    """A classifier that tells these classes apart; returns it with its accuracy on a tenth of the images, kept from its training.

    Two are needed. The judge of generated images knows all classes, held-out ones as well; it measures, and chooses Adam's
    learning rates, and no GAN is trained on it. The features of the outer loss know the meta-training classes
    alone, from images each warped in its own way.
    """
    torch.manual_seed(seed)
    device = domains.images.device
    labels = torch.arange(len(domains.names), device=device).repeat_interleave(domains.count)
    order, rng = torch.isin(labels, classes).nonzero()[:, 0], torch.Generator(device).manual_seed(seed)
    order = order[torch.randperm(len(order)).to(device)]
    classifier, tenth = new_classifier(len(domains.names)).to(device), len(order) // 10 + 1
    adam = torch.optim.Adam(classifier.parameters(), 1e-3)
    for step in range(steps):
        batch = order[tenth + (torch.arange(128, device=device) + 128 * step) % (len(order) - tenth)]
        images = domains.images[batch].unsqueeze(1) / 127.5 - 1                 # [128, 1, 784]
        images = new_domain(images, images, rng) if augment else images
        adam.zero_grad()
        F.cross_entropy(classifier(images[:, 0]), labels[batch]).backward()
        adam.step()
    with torch.no_grad():
        right = classifier(domains.images[order[:tenth]] / 127.5 - 1).argmax(-1) == labels[order[:tenth]]
    return classifier, right.double().mean().item()

def frechet_distance(a, b):
    """Fréchet distance of the Gaussians fitted to features a [n, d] and b [m, d]: |μa - μb|² + tr(A + B - 2 (A B)^½).

    In float64; (A B)^½ has the trace of (A^½ B A^½)^½, which is symmetric. Biased upwards where n or m is small.
    """
    a, b = a.double(), b.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.inf
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace).clamp(min=0).item()

@torch.no_grad()
def judge_samples(samples, test, targets, classifier):
    """Three numbers for the samples [n, 784] of each task, as dicts.

    frechet: to reference images, on the classifier's features. recognised: the share that it takes for the target class.
    nearest: mean distance of a sample to its nearest support image, over that of fresh real images; well under 1, the
    support was learned by heart.
    """
    _, support, fresh, reference = test
    results = []
    for x, shots, real, truth, target in zip(samples, support, fresh, reference, targets):
        seen = classifier[0](x)
        nearest = torch.cdist(x, shots).amin(1).mean() / torch.cdist(real, shots).amin(1).mean().clamp(min=1e-9)
        results.append({"frechet": frechet_distance(seen, classifier[0](truth)), "nearest": nearest.item(),
                        "recognised": (classifier[1](seen).argmax(-1) == target).double().mean().item()})
    return results

def held_out_pairs(domains, seed):
    """Every pair of held-out classes, or TEST_PAIRS of them, drawn so that every target has its turn  # int64 [T, 2]"""
    sources, targets = domains.roles["test"]
    rng = np.random.default_rng(seed)
    orders = [[(s, t) for s in rng.permutation(sources) if s != t] for t in rng.permutation(targets)]
    turns = [order[i] for i in range(len(sources)) for order in orders if i < len(order)]
    return torch.tensor(sorted(turns[:TEST_PAIRS], key=lambda pair: pair[::-1]), device=domains.images.device)

def draw_test(domains, pairs, settings, rng, change=None):
    """Source batches and support of T tasks, and two equally large sets of other target images, fresh and reference."""
    n = min(500, (min(int(domains.count[c]) for c in domains.roles["train" if change else "test"][1]) - settings.shots) // 2)
    sources, support, rest = sample_episode(domains, pairs, settings.shots, 2 * n, settings.source_steps, rng, change)
    return sources, support, rest[:, :n], rest[:, n:]

def choose_rates(method, domains, settings, classifier):
    """Adam's best learning rate for every number of steps, and whether to average G, on the *meta-training* classes, changed
    (`new_domain`), but not on drawn domains: those ask for larger rates than real images do.

    method: `few_shot` or `fine_tune`, as a function of (lr, sources, support, n, rng, test_steps). All rates get the same random
    numbers, and the smallest is taken where they do equally well, as after steps that do not use it. A rate that comes to twice
    the distance of a smaller one, averaged or not, is not followed further. Returns {steps: (rate, average?)}.
    """
    rng = torch.Generator(domains.images.device).manual_seed(settings.seed)
    pairs, distance = sample_pairs(domains, settings.tune_tasks, rng), {steps: {} for steps in settings.test_steps}
    test = draw_test(domains, pairs, settings, rng, new_domain)
    state = rng.get_state()
    for lr in settings.gan_rates:
        rng.set_state(state)
        for steps, takes in method(lr, *test[:2], test[2].shape[1], rng, settings.test_steps):
            new = {(lr, averaged): np.mean([judged["frechet"] for judged in judge_samples(samples, test, pairs[:, 1], classifier)])
                   for averaged, samples in zip((False, True), takes)}
            distance[steps] |= new
            if min(new.values()) > 2 * min(distance[steps].values()):
                break
    return {steps: min(by_choice, key=by_choice.get) for steps, by_choice in distance.items()}

def meta_test(run, domains, settings, classifier):
    """Every method on every held-out pair and test seed, on the same images.

    Returns the results, a dict for each; the first images of everything, (method, steps) -> [T, 16, 784]; and the
    learning rates chosen.
    """
    pairs, results, film, chosen = held_out_pairs(domains, settings.seed), [], {}, {}
    rng = torch.Generator(domains.images.device).manual_seed(settings.seed + 1)
    methods = {"MT-GAN": partial(few_shot, run["phases"]["meta-training"]["average"], inner_steps=settings.inner_steps),
               "from scratch": partial(fine_tune, random_start(settings.seed + 1, rng.device)),
               "transfer": partial(fine_tune, run["phases"]["transfer"]["leaves"])}
    for name, method in methods.items():
        show(f"choosing learning rates for '{name}'")
        chosen[name] = choose_rates(method, domains, settings, classifier)
    for seed in range(settings.test_seeds):
        show(f"meta-testing on {len(pairs)} held-out pairs, support {seed + 1} of {settings.test_seeds}")
        test = sources, support, fresh, _ = draw_test(domains, pairs, settings, rng)
        n = fresh.shape[1]

        def record(method, steps, samples):
            film.setdefault((method, steps), samples[:, :16].cpu())
            for (s, t), numbers in zip(pairs.tolist(), judge_samples(samples, test, pairs[:, 1], classifier)):
                results.append({"method": method, "seed": seed, "source": domains.names[s], "target": domains.names[t], "steps": steps, **numbers})

        film.setdefault(("support", None), support[:, :16].cpu())
        record("real images", None, fresh)
        for name, samples in without_a_gan(support, n, rng):
            record(name, None, samples)
        for name, method in methods.items():
            for lr in sorted({rate for rate, _ in chosen[name].values()}):
                last = max(steps for steps, (rate, _) in chosen[name].items() if rate == lr)    # nobody looks at this rate after it
                for steps, takes in method(lr, sources, support, n, rng, [steps for steps in settings.test_steps if steps <= last]):
                    rate, averaged = chosen[name][steps]
                    if rate == lr:
                        record(name, steps, takes[averaged])
    return pairs, results, film, chosen

def interval(values):
    """'mean ± half the 95 % interval' of n values, as numbers: Student's t by its Cornish-Fisher expansion, good from n = 4 on."""
    n = len(values)
    t = 1.96 + 2.37 / (n - 1) + 2.82 / (n - 1) ** 2 if n > 1 else math.nan
    finite = all(map(math.isfinite, values))
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / math.sqrt(n)) if finite and n > 1 else math.nan

def print_tables(results, test_steps):
    """The three metrics: a row for each method, a column for each number of steps (one number where a method takes none),
    mean ± half the 95 % interval."""
    for metric, title, digits in (("frechet", "Fréchet distance on the classifier's features: lower is better", 0),
                                  ("recognised", "share recognised as the target class: higher is better", 2),
                                  ("nearest", "distance to the nearest support image over that of real images: well under 1 is memorised", 2)):
        print(f"\n{title}\n{'steps':24}" + "".join(f"{steps:>14}" for steps in test_steps))
        for method in dict.fromkeys(result["method"] for result in results):
            columns = [[r[metric] for r in results if (r["method"], r["steps"]) == (method, steps)] for steps in (None, *test_steps)]
            cells = ["{:.{d}f} ± {:.{d}f}".format(*interval(values), d=digits) for values in columns if values]
            print(f"{method:24}" + "".join(f"{cell:>14}" for cell in cells))

def pooled_tables(folders):
    """Print the tables of several finished runs, of different --seed, as one."""
    results, titles, kinds = [], set(), {}
    for folder in dict.fromkeys(map(os.path.realpath, folders)):
        try:
            report = json.loads((Path(folder) / "report.json").read_text())
            results += [{"method": result["method"], "steps": result["steps"], **{metric: math.inf if result[metric] is None else float(result[metric])
                         for metric in ("frechet", "recognised", "nearest")}} for result in report["results"]]
            for key in set(report["settings"]) - MAY_DIFFER - {"seed", "device"}:
                kinds.setdefault(key, set()).add(str(report["settings"][key]))
            targets = ", ".join(sorted({target for _, target in report["held_out_pairs"]}))
            titles.add(f"{report['domains']}, {report['settings']['shots']} shots, held out {targets}; steps {report['settings']['test_steps']}")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"there is no readable report.json in {folder}; name folders of finished runs") from error
    if len(titles) > 1:
        raise UserError(f"these runs were tested differently: {' / '.join(titles)}")
    for key, values in kinds.items():
        if len(values) > 1:
            raise UserError(f"these runs differ in {key} ({', '.join(sorted(values))}), and are no repetitions of each other")
    print(f"{titles.pop()}; mean ± half the 95 % interval of n = {sum(r['method'] == 'MT-GAN' and r['steps'] == 0 for r in results)}")
    print_tables(results, report["settings"]["test_steps"])

def grid_picture(images, columns, zoom):
    """Images [n, 784] in [-1, 1], enlarged, as one picture."""
    grid = torchvision.utils.make_grid((images.view(-1, 1, 28, 28) + 1) / 2, columns, padding=1, pad_value=0.25)
    picture = torchvision.transforms.functional.to_pil_image(grid.clamp(0, 1)).convert("L")
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.NEAREST)

def table_picture(rows, headers):
    """Rows of (label, pictures), a header over every column, on white."""
    width, height, left, top = rows[0][1][-1].width + 8, rows[0][1][-1].height + 8, 220, 32
    canvas = Image.new("L", (left + width * len(headers), top + height * len(rows)), 255)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(18)
    for j, header in enumerate(headers):
        draw.text((left + width * (j + 0.5), top / 2), header, 0, font, anchor="mm")
    for i, (label, pictures) in enumerate(rows):
        draw.text((8, top + height * (i + 0.5)), re.sub(r" (?=\()|(?<=\)) ", "\n", label), 0, font, anchor="lm")     # "(stand-in for …)" has its own line
        for j, picture in enumerate(pictures):
            canvas.paste(picture, (left + width * j, top + height * i))
    return canvas

def draw_results(pairs, film, names, test_steps, out):
    """adaptation.png: every held-out domain (six at most) adapted to step by step, with transfer below; and samples.png."""
    place = {target: i for i, (_, target) in reversed(list(enumerate(pairs.tolist())))}
    strip = [(f"{names[target]}\n{method}", [grid_picture(images[i, :9], 3, 2) for images in
              [film["support", None], *[film[method, steps] for steps in test_steps]]])
             for target, i in sorted(place.items())[:6] for method in ("MT-GAN", "transfer")]
    write_picture(out / "adaptation.png", table_picture(strip, ["support", *[f"{steps} step{'s' * (steps != 1)}" for steps in test_steps]]))
    rows = [(names[target], [grid_picture(film["MT-GAN", test_steps[-1]][i], 16, 2)]) for target, i in sorted(place.items())]
    write_picture(out / "samples.png", table_picture(rows, [f"MT-GAN, {test_steps[-1]} steps"]))

# 7  Files, and deployment: adapt to a user's images, generate ----------------------------------------------------------

def write_whole(path, data):
    """Write bytes under a temporary name, then rename: whoever reads `path` finds the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}; make room or choose another --out") from error

def write_picture(path, picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_whole(path, buffer.getvalue())

def claim_folder(out, overwrite):
    """Be sure that the output folder can be written to and that nobody's results are in it; returns what is in the way."""
    taken = [path for path in (*(out / name for name in ARTEFACTS), *out.glob("sample-*.png")) if path.is_file()]
    if taken and not overwrite:
        raise UserError(f"{out} holds a run already ({taken[0].name}): continue it with --resume, replace it with --overwrite, or choose another --out")
    write_whole(out / ".writable", b"")
    (out / ".writable").unlink()
    return taken

def pack_phase(phase):
    """A phase as tensors and primitives."""
    return {**phase, "leaves": [t.detach() for t in phase["leaves"]], "rng": phase["rng"].get_state(),
            "optimizers": [optimizer.state_dict() for optimizer in phase["optimizers"]]}

def save_run(run, out):
    """checkpoint.pt, of tensors and primitives only, and log.csv."""
    buffer, text = io.BytesIO(), io.StringIO(newline="")
    torch.save({**run, "phases": {name: pack_phase(phase) for name, phase in run["phases"].items()}}, buffer)
    write_whole(out / "checkpoint.pt", buffer.getvalue())
    table = csv.DictWriter(text, run["log"][0] if run["log"] else ["step"])
    table.writeheader()
    table.writerows(run["log"])
    write_whole(out / "log.csv", text.getvalue().encode())

def same_form(a, b):
    """Whether a has the types, keys, shapes and finite numbers that b has. An optimiser's empty state is that of a new one."""
    if torch.is_tensor(b):
        return torch.is_tensor(a) and (a.shape, a.dtype) == (b.shape, b.dtype) and bool(a.isfinite().all())
    if isinstance(b, dict):
        return isinstance(a, dict) and (a == {} and 0 in b or a.keys() == b.keys() and all(same_form(a[key], b[key]) for key in b))
    if isinstance(b, (list, tuple)):
        return isinstance(a, (list, tuple)) and len(a) == len(b) and all(map(same_form, a, b))
    return type(a) is type(b)

def load_phase(saved, settings, device):
    """The inverse of pack_phase. Raises ValueError unless all that is saved has the form that it must have."""
    start = random_start(0, device)
    phase = new_phase(start, 0, settings if saved["average"] else None)
    update(phase["optimizers"], phase["leaves"], [torch.zeros_like(leaf) for leaf in phase["leaves"]])      # now they have the state that saved ones have
    if not same_form(saved, pack_phase(phase)):
        raise ValueError("a phase of another form, or begun on another kind of device")
    with torch.no_grad():
        for leaf, value in zip(phase["leaves"], saved["leaves"]):
            leaf.copy_(value)
    for optimizer, state in zip(phase["optimizers"], saved["optimizers"]):
        optimizer.load_state_dict(state)
    phase["rng"].set_state(saved["rng"].cpu())
    return {**saved, **{key: phase[key] for key in ("leaves", "optimizers", "rng")}}

def load_run(path, device, resume):
    """The run in a checkpoint, to `resume` with its phases ready to go on, or to deploy, with the average as all that is
    checked of them.

    Raises UserError for anything that is not one.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}")
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        run = torch.load(path, map_location=device, weights_only=True)      # a stranger's file cannot run code
        settings = argparse.Namespace(**run["settings"])
        if resume:
            run["phases"] = {name: load_phase(saved, settings, device) for name, saved in run["phases"].items()}
        form = {"settings": {}, "names": [], "count": [], "title": "", "log": [], "phases": {}, "seconds": 0.0}
        if (not all(type(run[key]) is type(value) for key, value in form.items()) or settings.inner_steps < 1
                or run["source images"].shape != (settings.source_steps, settings.shots, PIXELS)):
            raise ValueError("something is missing")
        learned = [*random_start(0, device), torch.zeros(settings.source_steps + settings.inner_steps, 2, 4)]
        if "meta-training" in run["phases"] and not same_form(run["phases"]["meta-training"]["average"], learned):
            raise ValueError("other networks than MT-GAN's")
        for network in {"classifier", "features"} & run.keys():
            new_classifier(len(run["names"])).load_state_dict(run[network])
    except Exception as error:              # whatever a damaged or foreign file makes torch.load and these lines raise
        raise UserError(f"{path} is not a checkpoint of this version of MT-GAN, or is damaged ({type(error).__name__}: {str(error):.80})") from error
    return run

def deploy(settings, device):
    """Adapt a trained initialisation to --shots images of a user's domain; write samples.png and every sample as a PNG."""
    folder, spec = Path(settings.adapt), settings.target[0]
    folder, path = (folder, folder / "checkpoint.pt") if folder.is_dir() else (folder.parent, folder)
    run = load_run(path, device, resume=False)
    if "meta-training" not in run["phases"]:
        raise UserError(f"{path} has not come to meta-training yet; finish it with --resume")
    name, classes = load_dataset(spec, settings.data_dir)
    images, rng = torch.from_numpy(np.concatenate(list(classes.values()))), torch.Generator(device).manual_seed(settings.seed)
    shots = settings.shots or min(25, len(images))
    if shots > len(images):
        raise UserError(f"--shots {shots}, but '{spec}' has {len(images)} image(s)")
    out = Path(settings.out or folder / f"adapted-{slug(spec)}")
    if (out / "checkpoint.pt").exists():
        raise UserError(f"{out} holds a run; choose another --out for the samples")
    in_the_way = claim_folder(out, settings.overwrite)
    to_float = lambda images: images.to(device).unsqueeze(0) / 127.5 - 1
    support = to_float(images[torch.randperm(len(images), generator=rng, device=device)[:shots].cpu()])
    sources = [to_float(batch) for batch in run["source images"]]
    *_, (_, [*_, samples]) = few_shot(run["phases"]["meta-training"]["average"], GO_ON_RATE, sources, support, settings.samples, rng, [settings.steps], run["settings"]["inner_steps"])
    samples = samples[0].cpu()
    if not samples.isfinite().all():
        raise UserError(f"the adaptation diverged within {settings.steps} steps; take fewer --steps, or more --shots")
    for path in in_the_way:
        path.unlink()
    for i, image in enumerate(samples):
        write_picture(out / f"sample-{i:03}.png", torchvision.transforms.functional.to_pil_image((image.view(1, 28, 28) + 1) / 2))
    write_picture(out / "samples.png", grid_picture(samples, math.ceil(math.sqrt(settings.samples)), 3))
    print(f"{settings.steps} steps on {shots} images of {name}; {settings.samples} samples are in {out}")

def slug(text):
    """A spec as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text)[-60:].strip("-.") or "domain"

# 8  Measurement: --benchmark -------------------------------------------------------------------------------------------

def explicit_step(layers, rates, loss):
    """What `remember` replaces: weights of the task's own. The gradient is taken at aliases, so it is partial, too."""
    aliases = [Layer(layer.weight.view_as(layer.weight), layer.bias.view_as(layer.bias)) for layer in layers]
    gradients = grad(loss(aliases).sum(), tensors(aliases), create_graph=True)
    return [Layer(layer.weight - rate * w, layer.bias - rate * b) for layer, rate, w, b in zip(layers, rates, gradients[::2], gradients[1::2])]

def explicit_gradient(leaves, batches, query, algorithm, views, rng):
    """What `meta_gradient` replaces, for 'maml' and at least one view: the plain loop over tasks, with the same result."""
    tasks = len(query)
    draws = [noise(tasks, n, rng) for step in range(1, len(batches) + 1) for n in [FAKES] + [query.shape[1]] * (step in scored(batches))]
    loss, gradients = 0, [torch.zeros_like(leaf) for leaf in leaves]
    for t in range(tasks):
        (theta, phi), rates, z, own = players(leaves), leaves[-1].exp(), (draw[t:t + 1] for draw in draws), 0
        for step, real in enumerate(batches, 1):
            seed = next(z)
            fake = generator(theta, seed)
            phi = explicit_step(phi, rates[step - 1, 1], lambda phi: loss_d(discriminator(phi, real[t:t + 1]), discriminator(phi, fake)))
            theta = explicit_step(theta, rates[step - 1, 0], lambda theta: loss_g(discriminator(phi, generator(theta, seed))))
            if step in scored(batches):
                fake = generator(theta, next(z))
                own += sum(energy_distance(view(fake), view(query[t:t + 1])) for view in views).mean() / tasks / len(scored(batches))
        torch._foreach_add_(gradients, grad(own, leaves))
        loss += own.detach()
    return loss, gradients

def timed(functions, device, repetitions=7):
    """Seconds of every function: medians of repetitions that take turns, so that what else the machine does meets all."""
    wait, seconds = torch.cuda.synchronize if device.type == "cuda" else lambda: None, {name: [] for name in functions}
    for repetition in range(-1, repetitions):
        for name, function in functions.items():
            wait()
            began = time.perf_counter()
            function()
            wait()
            if repetition >= 0:                             # the first is for warming up
                seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(values)) for name, values in seconds.items()}

def peak_memory(function, device):
    """Bytes that a function needs on top of what is there before it; NaN where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    resident = lambda name: int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    try:
        release_memory()
        Path("/proc/self/clear_refs").write_text("5")       # Linux: begin to look for the peak anew
        before = resident("VmRSS")
        function()
        return resident("VmHWM") - before
    except OSError:
        return math.nan

def benchmark(settings, device):
    """Print what a meta-step costs: ours, the plain loop and first order; then how it grows."""
    domains, precision = load_domains(["digits"], ["garments"], 100, settings.data_dir, device), torch.backends.mkldnn.matmul
    fast, start = precision.fp32_precision, random_start(0, device)

    def a_step(gradient=None, products=fast, around=lambda step: step, **change):
        """A function that does one whole meta-step: sampling, adaptation, gradient, optimiser, moving average."""
        changed = argparse.Namespace(**{**vars(settings), "inner_steps": 5, "queries": QUERIES, **change})
        phase, meta = new_phase(start, 0, changed), around(lambda phase: meta_step(phase, domains, changed, [pixels], gradient))

        def step():
            precision.fp32_precision = products
            meta(phase)
            precision.fp32_precision = fast
        return step

    steps = {"MT-GAN": a_step(), "second order alone": a_step(algorithm="maml"), "first order": a_step(algorithm="fomaml"),
             "plain loop over the tasks": a_step(explicit_gradient, "none")}
    if fast != "none":
        steps["plain loop, products by oneDNN"] = a_step(explicit_gradient)
    optimizing = new_phase(start, 0, settings)
    gradients = [torch.randn_like(leaf) for leaf in optimizing["leaves"]]
    steps["optimisers alone"] = lambda: update(optimizing["optimizers"], optimizing["leaves"], gradients)
    if device.type == "cuda":
        steps["MT-GAN as a CUDA graph"] = replay = a_step(around=captured)
        for _ in range(4):
            replay()                                        # the fourth is captured
    a, b = torch.randn(2, 2048, 2048, device=device)
    steps["product"] = lambda: a @ b
    seconds = timed(steps, device)
    peak = 2 * 2048 ** 3 / seconds.pop("product") / 1e9
    print(f"{torch.get_num_threads()} thread(s); {settings.meta_batch} tasks, 5 inner steps, {settings.shots} shots, "
          f"{QUERIES} query images, scored in pixels; a product of 2048 × 2048 matrices runs at {peak:.0f} GFLOP/s\n")
    print(f"{'one meta-step':34}{'seconds':>10}{'loop = 1':>10}{'GFLOP':>8}{'GFLOP/s':>9}{'MB on top':>11}")
    for name, took in seconds.items():
        with FlopCounterMode(display=False) as counter:
            steps[name]()
        work = counter.get_total_flops() / 1e9 or math.nan      # a graph's replay calls nothing that could be counted
        print(f"{name:34}{took:10.3f}{took / seconds['plain loop over the tasks']:10.2f}{work:8.1f}{work / took:9.0f}{peak_memory(steps[name], device) / 1e6:11.0f}")
    for name, option, values in (("tasks", "meta_batch", (1, 4, 16, 64)), ("inner steps", "inner_steps", (1, 5, 10, 20)), ("shots", "shots", (5, 25, 100))):
        seconds = {}
        for value in values:
            release_memory()                                # what a larger step leaves behind slows a smaller one
            seconds |= timed({value: a_step(**{option: value})}, device)
        print(f"\n{name:24}" + "".join(f"{value:>9}" for value in values))
        print(f"{'seconds':24}" + "".join(f"{took:9.3f}" for took in seconds.values()))
        print(f"{'milliseconds for each':24}" + "".join(f"{1000 * took / value:9.1f}" for value, took in seconds.items()))

# 9  Command line -------------------------------------------------------------------------------------------------------

def number(kind, low, high):
    """An argparse type: a number from low to high."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not a {'whole ' * (kind is int)}number from {low:g} to {high:g}")
    return parse

def parse_arguments(argv):
    parser = argparse.ArgumentParser("mtgan.py", description="Meta-train a GAN over pairs of image domains, test it on held-out pairs, deploy it.",
                                     epilog="SPEC: mnist, fashion, kmnist, emnist, qmnist, usps, the built-in digits and garments, or a folder of "
                                            "images; mnist:0-6,9 is some classes of it.")

    def refuse(message):
        raise UserError(f"{message} (--help lists all options)")

    parser.error, option = refuse, parser.add_argument
    option("--source", nargs="+", default=["mnist"], metavar="SPEC", help="source domains (default: mnist)")
    option("--target", nargs="+", default=["fashion"], metavar="SPEC", help="target domains (default: fashion)")
    option("--data-dir", default="data", help="where torchvision's datasets are, or are downloaded to (default: data)")
    option("--out", help="where results go (default: runs/<source>-<target>, runs/dry-run, or with --adapt RUN/adapted-<target>)")
    option("--resume", action="store_true", help="continue the run in --out")
    option("--overwrite", action="store_true", help="replace what is in --out")
    option("--tables", nargs="+", metavar="RUN", help="print the tables of finished runs as one, and write nothing")
    option("--benchmark", action="store_true", help="time a meta-step, and write nothing")
    option("--dry-run", action="store_true", help="everything once, tiny, in under a minute; replaces runs/dry-run")
    option("--seed", type=number(int, 0, 2**31), default=0, help="determines all that is random (default: 0)")
    option("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    option("--kernel", choices=("auto", "torch", "triton"), default="auto", help="what computes the linear layers (default: auto)")
    option("--save-seconds", type=number(float, 0, math.inf), default=30, help="time from one checkpoint to the next (default: 30)")
    # the episode
    option("--shots", type=number(int, 1, 1000), help="support images of a task (default: 25, with --adapt all if there are fewer)")
    option("--inner-steps", type=number(int, 1, 100), default=10, help="inner steps on the support (default: 10)")
    option("--source-steps", type=number(int, 0, 100), default=0, help="inner steps on the source domain, before those (default: 0)")
    option("--inner-lr", type=number(float, 1e-6, MAX_RATE), default=0.1, help="G's inner learning rates before they are learned, D's are a fifth (default: 0.1)")
    # training
    option("--algorithm", choices=("maml", "fomaml", "reptile", "both"), default="both", help="the meta-learner; both: maml and reptile (default: both)")
    option("--score", choices=("features", "pixels", "adversarial"), default="features",
           help="the outer loss: the energy distance in pixels, edges and features, or in pixels, or the game's losses (default: features)")
    option("--warm-steps", type=number(int, 0, 10**7), default=9000, help="steps of ordinary GAN training to start from (default: 9000)")
    option("--meta-steps", type=number(int, 1, 10**7), default=1300, help="episodes of meta-training (default: 1300)")
    option("--meta-batch", type=number(int, 1, 64), default=4, help="tasks of an episode (default: 4)")
    option("--meta-lr", type=number(float, 1e-8, 1), default=5e-4, help="outer learning rate (default: 5e-4)")
    option("--test-seeds", type=number(int, 1, 100), default=3, help="draws of the support images in meta-testing (default: 3)")
    # deployment
    option("--adapt", metavar="RUN", help="adapt the run in this folder to --target and generate")
    option("--samples", type=number(int, 1, 999), default=64, help="how many images to generate (default: 64)")
    option("--steps", type=number(int, 1, 10000), default=100, help="how many steps on the user's images, the learned ones first, then Adam's (default: 100)")
    settings = parser.parse_args(argv)
    if settings.resume and settings.overwrite:
        refuse("--resume and --overwrite exclude each other")
    if settings.adapt:
        return settings if len(settings.target) == 1 else refuse("--adapt takes one --target")
    settings.shots, settings.test_steps = settings.shots or 25, list(TEST_STEPS)
    settings.tune_tasks, settings.classifier_steps, settings.feature_steps, settings.gan_rates = 6, 500, 1500, list(GAN_RATES)
    if settings.dry_run:
        settings.overwrite |= settings.out is None and not settings.resume
        settings.out, settings.test_steps, settings.gan_rates = settings.out or "runs/dry-run", [0, 1, 2, 5], [5e-4, 2e-3]
        for name, most in {"shots": 10, "warm_steps": 20, "meta_steps": 3, "meta_batch": 2, "test_seeds": 1, "tune_tasks": 2, "classifier_steps": 60, "feature_steps": 60}.items():
            setattr(settings, name, min(getattr(settings, name), most))
    settings.out = settings.out or "runs/" + "-".join(slug(spec) for spec in settings.source + settings.target)
    return settings

def prepare_run(settings, device):
    """Load the domains and begin a run, or load the one in --out to go on with."""
    out = Path(settings.out)
    in_the_way = [] if settings.resume else claim_folder(out, settings.overwrite)
    run = load_run(out / "checkpoint.pt", device, resume=True) if settings.resume else None
    domains = load_domains(settings.source, settings.target, settings.shots, settings.data_dir, device)
    settings.queries = min([QUERIES, *(int(domains.count[c]) - settings.shots for c in domains.roles["train"][1])])
    images = {"names": domains.names, "count": domains.count.tolist(), "title": domains.title}
    if run:
        for key in vars(settings).keys() - MAY_DIFFER:
            if run["settings"].get(key) != getattr(settings, key):
                raise UserError(f"{out} was begun with {key} = {run['settings'].get(key)}, not {getattr(settings, key)}; --resume takes the same settings")
        if any(run[key] != value for key, value in images.items()):
            raise UserError(f"{out} was begun with other images, of {run['title']}")
        return {**run, "settings": vars(settings)}, domains
    rng = torch.Generator(device).manual_seed(settings.seed)
    source = sample_pairs(domains, 1, rng)[:, 0].expand(settings.source_steps)      # one class, as in an episode
    run = {"settings": vars(settings), **images, "log": [], "phases": {}, "seconds": 0.0,
           "source images": ((sample_images(domains, source, settings.shots, rng) + 1) * 127.5).round().byte()}
    save_run(run, out)
    for path in in_the_way:
        if path.name not in ("checkpoint.pt", "log.csv"):
            path.unlink()
    return run, domains

def whole_story(settings, device):
    """Prepare the domains, meta-train, meta-test, and write everything to settings.out."""
    run, domains = prepare_run(settings, device)
    out, began = Path(settings.out), time.perf_counter() - run["seconds"]

    def save():
        run["seconds"] = time.perf_counter() - began
        save_run(run, out)

    signal.signal(signal.SIGINT, lambda *_: (INTERRUPTED.append(1), signal.signal(signal.SIGINT, signal.default_int_handler)))
    train(run, domains, settings, save)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "classifier" not in run:
        show("training the classifier that judges the images")
        classifier, run["accuracy"] = train_classifier(domains, torch.arange(len(domains.names), device=device), settings.classifier_steps, settings.seed)
        run["classifier"] = classifier.state_dict()
        save()
    classifier = new_classifier(len(domains.names)).to(device)
    classifier.load_state_dict(run["classifier"])
    pairs, results, film, chosen = meta_test(run, domains, settings, classifier)
    run["seconds"] = time.perf_counter() - began
    report = {"settings": vars(settings), "domains": domains.title, "held_out_pairs": [[domains.names[c] for c in pair] for pair in pairs.tolist()],
              "classifier_accuracy": run["accuracy"], "learning_rates": chosen, "seconds": run["seconds"],
              "results": [{key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in result.items()} for result in results]}
    write_whole(out / "report.json", json.dumps(report, indent=1).encode())
    draw_results(pairs, film, domains.names, settings.test_steps, out)
    print(f"\n{domains.title}: {len(pairs)} held-out pairs × {settings.test_seeds} supports of {settings.shots} images; mean ± half the 95 % interval")
    print_tables(results, settings.test_steps)
    print(f"\n{out}: {', '.join(ARTEFACTS)}, in {run['seconds']:.0f} s")

def main(argv=None):
    """Run the command line; returns the exit code: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    global KERNEL
    settings = None
    INTERRUPTED.clear()
    try:
        settings = parse_arguments(argv)
        if settings.tables:
            pooled_tables(settings.tables)
            return 0
        KERNEL, device = settings.kernel, pick_device(settings.device)
        if KERNEL == "triton" and why_not_triton(device):
            raise UserError(f"--kernel triton: {why_not_triton(device)}")
        if device.type == "cpu":
            keep_memory()
            allow_onednn([sizes[i:i + 2] for sizes in (GENERATOR_SIZES, DISCRIMINATOR_SIZES) for i in range(4)])
        show(f"on {device}, linear layers by {choose(device) if KERNEL == 'auto' else KERNEL}", last=True)
        (deploy if settings.adapt else benchmark if settings.benchmark else whole_story)(settings, device)
    except (UserError, OSError) as error:       # of the system's own errors, those left are of paths that must not be looked into
        print(f"mtgan.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        saved = settings and not settings.adapt and (Path(settings.out) / "checkpoint.pt").exists()
        print("\ninterrupted" + f"; continue {settings.out} with --resume and the same settings, without --overwrite" * bool(saved), file=sys.stderr)
        return 130
    return 0

def pick_device(name):
    """The device of that name, 'auto' being a GPU where there is one. Raises UserError where it cannot be used."""
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)        # streams and graphs are the current GPU's
        torch.rand(1, generator=torch.Generator(device), device=device).double().item()
    except Exception as error:
        raise UserError(f"device '{name}' cannot be used here; try --device cpu") from error
    return device

if __name__ == "__main__":
    sys.exit(main())
