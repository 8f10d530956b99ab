"""A linear layer and its LeakyReLU in one GPU kernel, with derivatives of every order.

    y = leaky_relu(x Wᵀ + b + c)        x [T, B, K], W [T, N, K], b [T, N], c and y [T, B, N]

T counts tasks, each with its own weights; c, the addend, is optional. Three operations suffice. Let m = 1
where y > 0 and the slope elsewhere: LeakyReLU bends only at 0, so m is constant under differentiation, and
y has the sign of its pre-activation, so m is read off the output and nothing else need be kept.

    L(x, W; y, b) = m * (x Wᵀ + b)        gradients from g:     X(g, W; y) and D(g, x; y)
    X(g, W; y)    = (m * g) W             gradients from u:     L(u, W; y, 0) and D(g, u; y)
    D(g, x; y)    = (m * g)ᵀ x, Σ m * g   gradients from V, v:  L(x, V; y, v) and X(g, V; y)

The gradients of the three are the three again, which gives every order, and each is one masked matrix
product: one kernel serves all. It is written in Triton, a Python dialect for GPUs. Where Triton is missing
(macOS, Windows) or there is no GPU, PyTorch computes the same numbers.

    python kernels.py        measures the kernel on a GPU; without one, inspects what it compiles to
"""
import ctypes
import functools
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# On a CPU Triton has only an interpreter, chosen by TRITON_INTERPRET=1 when triton is first imported: then
# even the functions of its own library are not compiled ones.
INTERPRETED = triton is not None and not isinstance(tl.sum, triton.JITFunction)

# ------------------------------------------------------------------------------------------ 1 The kernel

if triton is not None:
    # A Triton function runs as many 'programs' at once, here one for each tile of the result, and its values
    # are whole tiles. An argument that is a tl.constexpr, None, or a stride of 1 is known when the kernel is
    # compiled: an `if` on it costs nothing later.

    @triton.jit
    def load_tile(pointer, strides, t, rows, columns, height, width):
        """pointer[t, rows, columns] as a tile; what lies outside the [height, width] matrix reads as 0."""
        offsets = t * strides[0] + rows[:, None] * strides[1] + columns[None, :] * strides[2]
        inside = (rows[:, None] < height) & (columns[None, :] < width)
        return tl.load(pointer + offsets, mask=inside, other=0.0)

    @triton.jit
    def times_m(value, y, SLOPE: tl.constexpr):
        """m * value."""
        return tl.where(y > 0, value, value * SLOPE)

    @triton.jit
    def product_kernel(a, b, y, bias, addend, out, sums, a_strides, b_strides, y_strides, bias_strides,
                       addend_strides, M, N, K, SLOPE: tl.constexpr, ACTIVATE: tl.constexpr,
                       MASK_LEFT: tl.constexpr, PRECISION: tl.constexpr, TILE_M: tl.constexpr,
                       TILE_N: tl.constexpr, TILE_K: tl.constexpr):
        """One [TILE_M, TILE_N] tile of out[t] = a[t] b[t] + bias[t] + addend[t]; a [M, K], b [K, N].

        y masks `a` (X and D) or the result (L as a second derivative); ACTIVATE applies the LeakyReLU
        instead. sums[t] receives the row sums of the masked `a`: in D, the gradient of the bias.
        """
        t = tl.program_id(2).to(tl.int64)            # 64 bits, for t * stride and row * stride may pass 2³¹
        rows = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
        columns = tl.program_id(1).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)

        acc = tl.zeros((TILE_M, TILE_N), a.dtype.element_ty)     # float64 needs a float64 accumulator
        if addend is not None:
            acc += load_tile(addend, addend_strides, t, rows, columns, M, N)
        if bias is not None:
            at = bias + t * bias_strides[0] + columns * bias_strides[1]
            acc += tl.load(at, mask=columns < N, other=0.0)[None, :]
        if sums is not None:
            seen = tl.zeros((TILE_M, TILE_K), a.dtype.element_ty)

        for start in range(0, K, TILE_K):            # K need not be a multiple of TILE_K: zeros fill the last
            inner = start + tl.arange(0, TILE_K)
            left = load_tile(a, a_strides, t, rows, inner, M, K)
            if y is not None and MASK_LEFT:
                left = times_m(left, load_tile(y, y_strides, t, rows, inner, M, K), SLOPE)
            right = load_tile(b, b_strides, t, inner, columns, K, N)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
            if sums is not None:
                seen += left                         # the sum along rows, which threads must share, waits

        if ACTIVATE:
            acc = times_m(acc, acc, SLOPE)
        if y is not None and not MASK_LEFT:
            acc = times_m(acc, load_tile(y, y_strides, t, rows, columns, M, N), SLOPE)
        at = out + (t * M + rows[:, None]) * N + columns[None, :]    # out and sums are new, so contiguous
        tl.store(at, acc, mask=(rows[:, None] < M) & (columns[None, :] < N))
        if sums is not None:
            if tl.program_id(1) == 0:                # each tile along N has seen the same rows of `a`
                tl.store(sums + t * M + rows, tl.sum(seen, 1), mask=rows < M)


def precision_of(dtype):
    """How tl.dot multiplies: "tf32" where the user allowed it in PyTorch, otherwise exactly, "ieee"."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and dtype == torch.float32 else "ieee"


# (TILE_M, TILE_N, TILE_K, warps of 32 threads), for few tiles and for many. Large tiles read each operand less
# often; small ones leave none of a GPU's 100 or so multiprocessors idle. A fixed table, because trying tiles
# at run time would launch hundreds of kernels for the shapes of a single training step.
TILES = {"ieee": ((32, 32, 32, 4), (64, 64, 32, 8)),
         "tf32": ((32, 32, 32, 4), (64, 64, 32, 4)),
         "float64": ((32, 32, 16, 4),)}


def choose_tile(T, M, N, dtype):
    """The entry of TILES for a result [T, M, N]."""
    tiles = TILES["float64" if dtype == torch.float64 else precision_of(dtype)]
    tile_m, tile_n, _, _ = tiles[-1]
    return tiles[-1] if T * triton.cdiv(M, tile_m) * triton.cdiv(N, tile_n) >= 128 else tiles[0]


def kernel_call(a, b, y, slope, *, bias=None, addend=None, mask_left=False, row_sums=False):
    """The grid and arguments of product_kernel for a [T, M, K] and b [T, K, N], of any strides."""
    (T, M, K), N = a.shape, b.shape[2]
    activate = y is None and slope != 1
    y = None if slope == 1 else y                    # m = 1 everywhere: there is nothing to mask
    tile_m, tile_n, tile_k, warps = choose_tile(T, M, N, a.dtype)
    strides = lambda tensor: () if tensor is None else tensor.stride()
    arguments = dict(
        a=a, b=b, y=y, bias=bias, addend=addend,
        out=a.new_empty(T, M, N), sums=a.new_empty(T, M) if row_sums else None,
        a_strides=strides(a), b_strides=strides(b), y_strides=strides(y), bias_strides=strides(bias),
        addend_strides=strides(addend), M=M, N=N, K=K, SLOPE=slope, ACTIVATE=activate, MASK_LEFT=mask_left,
        PRECISION=precision_of(a.dtype), TILE_M=tile_m, TILE_N=tile_n, TILE_K=tile_k, num_warps=warps)
    # In what order the tiles come does not matter: matrices of these sizes fit whole into the L2 cache.
    return (triton.cdiv(M, tile_m), triton.cdiv(N, tile_n), T), arguments


def product(a, b, y, slope, **options):
    """Launches the kernel; returns out [T, M, N] and sums [T, M] or None."""
    grid, arguments = kernel_call(a, b, y, slope, **options)
    with torch.cuda.device_of(a):                    # Triton launches on the current GPU, not on the tensor's
        product_kernel[grid](**arguments)
    return arguments["out"], arguments["sums"]


# ------------------------------------------------------------------------------------- 2 The derivatives


class Operation(torch.autograd.Function):
    """What L, X and D share. The backward of each calls the other two, so that autograd can differentiate it
    again; `setup_context` and `vmap` are what torch.func asks for."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        left, right, y, ctx.slope = inputs[:4]
        ctx.save_for_backward(left, right, output if y is None else y)

    @classmethod
    def vmap(cls, info, in_dims, *inputs):
        """The vmapped axis becomes part of the task axis: [V, T, ...] → [V*T, ...], and back."""
        def fold(value, dim):
            if not isinstance(value, torch.Tensor):
                return value
            value = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            return value.flatten(0, 1)

        result = cls.apply(*map(fold, inputs, in_dims))
        unfold = lambda value: value.unflatten(0, (info.batch_size, -1))
        return (tuple(map(unfold, result)), (0, 0)) if isinstance(result, tuple) else (unfold(result), 0)


class L(Operation):
    """m * (x Wᵀ + b + c) [T, B, N], with m from y or, where y is None, from the result itself."""

    @staticmethod
    def forward(x, weight, y, slope, bias, addend):
        return product(x, weight.mT, y, slope, bias=bias, addend=addend)[0]

    @staticmethod
    def backward(ctx, g):
        x, weight, y = ctx.saved_tensors
        # These say what requires a gradient, not what this call asks for: autograd.grad of a probe alone runs D
        # all the same, if W requires a gradient.
        needs_x, needs_weight, _, _, needs_bias, needs_addend = ctx.needs_input_grad
        # y only tells m, a constant. Left attached, a second derivative would follow it back to this layer
        # and run its backward on zeros.
        y, slope = y.detach(), ctx.slope
        if needs_addend and slope != 1:
            # The addend's gradient is m * g itself; with that at hand the two products need no mask.
            g, slope = torch.where(y > 0, g, slope * g), 1.0                             # [T, B, N]
        dx = X.apply(g, weight, y, slope) if needs_x else None
        dweight, dbias = D.apply(g, x, y, slope) if needs_weight or needs_bias else (None, None)
        return dx, dweight, None, None, dbias if needs_bias else None, g if needs_addend else None


class X(Operation):
    """(m * g) W [T, B, K], the gradient of x."""

    @staticmethod
    def forward(g, weight, y, slope):
        return product(g, weight, y, slope, mask_left=True)[0]

    @staticmethod
    def backward(ctx, u):
        g, weight, y = ctx.saved_tensors
        dg = L.apply(u, weight, y, ctx.slope, None, None) if ctx.needs_input_grad[0] else None
        dweight = D.apply(g, u, y, ctx.slope)[0] if ctx.needs_input_grad[1] else None
        return dg, dweight, None, None


class D(Operation):
    """(m * g)ᵀ x [T, N, K] and Σ m * g [T, N], the gradients of W and b."""

    @staticmethod
    def forward(g, x, y, slope):
        return product(g.mT, x, y.mT, slope, mask_left=True, row_sums=True)

    @staticmethod
    def backward(ctx, V, v):
        g, x, y = ctx.saved_tensors
        dg = L.apply(x, V, y, ctx.slope, v, None) if ctx.needs_input_grad[0] else None
        dx = X.apply(g, V, y, ctx.slope) if ctx.needs_input_grad[1] else None
        return dg, dx, None, None


# ------------------------------------------------------------------------------------ 3 The public layer

# GPU (its compute capability) → the most multiply-adds, T*B*N*K, at which Triton is at least as fast as PyTorch:
# small layers gain from fewer launches, large ones are better served by cuBLAS. No GPU has been measured yet,
# so "auto" is PyTorch everywhere; `python kernels.py` prints the figures from which to fill the table.
FASTER_UP_TO = {}


def why_not_triton(device):
    """Why Triton cannot run on a device and what to do, in one line; None where it can."""
    if triton is None:
        return "triton is not installed (there is none for macOS and Windows): use backend='torch' or 'auto'"
    if torch.device(device).type != "cuda" and not INTERPRETED:
        return (f"triton cannot compile for {device}: move the tensors to a GPU, use backend='torch', or, for a "
                "test, set TRITON_INTERPRET=1 before triton is first imported")


def choose(device, multiply_adds=0):
    """The backend, "triton" or "torch", that "auto" means on a device for a layer of this size or, left out,
    for the smallest."""
    if torch.device(device).type != "cuda" or why_not_triton(device):
        return "torch"
    return "triton" if multiply_adds <= FASTER_UP_TO.get(torch.cuda.get_device_capability(device), -1) else "torch"


def check(x, weight, bias, slope, addend):
    """Refuses what fused_linear does not define."""
    tensors = [tensor for tensor in (x, weight, bias, addend) if tensor is not None]
    given = lambda: "not " + ", ".join(f"{list(v.shape)} {v.dtype} on {v.device}" for v in tensors)
    if not 0 <= slope < float("inf"):                # nan fails this too
        raise ValueError(f"slope must be finite and at least 0, not {slope}")
    if {tensor.dtype for tensor in tensors} not in ({torch.float32}, {torch.float64}):
        raise TypeError(f"x, weight, bias and addend must all be float32, or all float64; {given()}")
    if len({tensor.device for tensor in tensors}) > 1:
        raise ValueError(f"x, weight, bias and addend must be on one device; {given()}")
    T, N, K = x.shape[:-2], weight.shape[-2:-1], x.shape[-1:]        # each a tuple, T perhaps empty
    if not (x.dim() in (2, 3) and weight.dim() >= 2 and weight.shape in (N + K, T + N + K) and 0 not in K
            and (bias is None or bias.shape in (N, T + N))
            and (addend is None or addend.shape == x.shape[:-1] + N)):
        raise ValueError("x [T, B, K] with K > 0 goes with weight [N, K] or [T, N, K], bias [N] or [T, N] and "
                         f"addend [T, B, N], x [B, K] with the same without T; {given()}")


class Bmm(torch.autograd.Function):
    """What `bmm` does; of any order, for its backward consists of itself."""
    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        return torch.bmm(a, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        transposed = lambda v: v.stride(-1) != 1
        needs_a, needs_b = ctx.needs_input_grad
        multiply = bmm if torch.is_grad_enabled() else torch.bmm     # a last derivative needs no bookkeeping
        da = db = None
        if needs_a:
            da = multiply(b, g.mT).mT if transposed(a) else multiply(g, b.mT)
        if needs_b:
            db = multiply(g.mT, a).mT if transposed(b) else multiply(a.mT, g)
        return da, db


def bmm(a, b):
    """a b, for a [T, n, k] and b [T, k, m], with gradients in the layouts of a and b, as torch.mm has them.

    torch.bmm returns the gradient of a transposed matrix untransposed: to add such a one to others takes several
    times as long as to compute it.
    """
    return Bmm.apply(a, b)


def linear_torch(x, weight, bias, slope, addend):
    """fused_linear in plain PyTorch: for every device, and what the kernel is compared with."""
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        z = F.linear(x, weight, bias)                # [T, B, N] or [B, N]: one product for all tasks
    else:
        z = bmm(x, weight.expand(x.shape[0], *weight.shape[-2:]).mT)                     # [T, B, N]
        z = z if bias is None else z + bias.unsqueeze(-2)
    z = z if addend is None else z + addend
    return z if slope == 1 else F.leaky_relu(z, slope)


def linear_triton(x, weight, bias, slope, addend):
    """fused_linear through the kernel, where every operand has a task axis."""
    shape, (N, K) = x.shape[:-1] + weight.shape[-2:-1], weight.shape[-2:]
    shared = weight.dim() == 2 and (bias is None or bias.dim() == 1)
    # Tasks that share W and b are but more rows of one batch. Their gradients are then summed inside D, and
    # no [T, N, K] is written only to be added up.
    T = 1 if shared else x.shape[0]
    x = x.reshape(T, -1, K)                          # [T, B, K], or [1, T*B, K] if shared
    addend = None if addend is None else addend.reshape(T, -1, N)
    # What else is shared is expanded here, outside L, so that autograd sums its gradient over the tasks.
    weight = weight.expand(T, N, K)
    bias = None if bias is None else bias.expand(T, N)
    return L.apply(x, weight, None, float(slope), bias, addend).reshape(shape)


def fused_linear(x, weight, bias, slope=0.2, *, addend=None, backend="auto"):
    """leaky_relu(x Wᵀ + b + addend, slope), with (reverse-mode) gradients of every order for all four tensors.

    x        [B, K] or [T, B, K]
    weight   [N, K], shared by the tasks, or [T, N, K]
    bias     [N], shared, or [T, N], or None
    slope    finite and at least 0: 0 is ReLU, 1 no activation; beyond 1 the same formula holds. Below 0 the
             output would not tell the sign of its pre-activation.
    addend   of the result's shape, or None. Its gradient is that of the pre-activation: zeros make a probe.
    backend  "torch", "triton", or "auto": what `choose` says for the device and size
    Returns  [B, N] or [T, B, N]. All tensors are float32, or all float64. T is at most 65,535 on a GPU.

    Raises ValueError (slope, shapes, devices, unknown backend), TypeError (dtypes), and RuntimeError where
    "triton" is asked for and cannot be had.
    """
    check(x, weight, bias, slope, addend)
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', not {backend!r}")
    if backend == "auto":
        backend = choose(x.device, x.numel() * weight.shape[-2])
    if backend == "torch":
        return linear_torch(x, weight, bias, slope, addend)
    if reason := why_not_triton(x.device):
        raise RuntimeError(reason)
    return linear_triton(x, weight, bias, slope, addend)


def allow_onednn(shapes):
    """Lets PyTorch compute CPU products with oneDNN, on AMD twice as fast as its default, where they stay float32.

    PyTorch asks oneDNN only if bfloat16 inside a product is allowed. Processors without units for that (AMX)
    compute in float32 all the same, and whether this one does is measured, on products of the (K, N) in shapes.
    Where it does not, the setting is put back.
    """
    setting, rng = torch.backends.mkldnn.matmul, torch.Generator().manual_seed(0)
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    for K, N in shapes:
        x, weight = torch.randn(4, 50, K, generator=rng), torch.randn(K, N, generator=rng)
        for a, b in ((x[0], weight), (x, weight.expand(4, K, N))):
            exact = a.double() @ b.double()
            if (a @ b - exact).norm() > 1e-6 * exact.norm():
                setting.fp32_precision = before
                return


def keep_memory():
    """Lets glibc keep freed memory for the next tensor: by default it hands blocks of megabytes back to the system,
    which fills each with zeros, page by page, when it is wanted again."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)        # other C libraries have none
        # M_MMAP_THRESHOLD: smaller blocks come from the heap; before 2.35, glibc refuses more than 2**25
        mallopt(-3, 2**30) or mallopt(-3, 2**25)
        mallopt(-1, 2**31 - 1)                       # M_TRIM_THRESHOLD: the heap does not shrink


def release_memory():
    """The opposite, once: what is free goes back to the system, so that a measurement of memory can begin."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda *_: 0)(0)


# ------------------------------------------------------------------- 4 Measurement: python kernels.py

LAYERS = {"G1": (100, 256), "G2": (256, 512), "G3": (512, 1024), "G4": (1024, 784),      # name: (K, N)
          "D1": (784, 1024), "D2": (1024, 512), "D3": (512, 256), "D4": (256, 1)}
LEVELS = {"forward": 1, "+backward": 3, "+double": 7}                                    # name: matrix products
fused = functools.partial(fused_linear, backend="triton")


def draw_operands(T, B, K, N, device, dtype=torch.float32):
    """x, W, b, the gradient g of y, and u, V, v for the gradients of x, W, b."""
    shapes = (T, B, K), (T, N, K), (T, N), (T, B, N), (T, B, K), (T, N, K), (T, N)
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=i < 4) for i, shape in enumerate(shapes)]


def run_level(layer, operands, products):
    """y; with 3 products also its gradients from g; with 7 also the gradients of those from u, V, v."""
    x, weight, bias, g, *cotangents = operands
    y = layer(x, weight, bias)                                                           # [T, B, N]
    first = torch.autograd.grad(y, (x, weight, bias), g, create_graph=products == 7) if products > 1 else ()
    second = torch.autograd.grad(first, (x, weight, g), cotangents) if products == 7 else ()
    return y, *first, *second


def worst_error(operands, products):
    """The kernel's largest error against float64 as a share of the largest value, over all results of a level."""
    results = run_level(fused, operands, products)
    # Rounding can change the sign of a pre-activation near 0, so the reference takes the signs found here.
    m = torch.where(results[0] > 0, 1.0, 0.2).double()                                   # [T, B, N]
    exact = lambda x, weight, bias: m * torch.baddbmm(bias.unsqueeze(-2), x, weight.mT)
    doubles = [operand.detach().double().requires_grad_(operand.requires_grad) for operand in operands]
    pairs = zip(results, run_level(exact, doubles, products))
    return max(((result - right).abs().max() / right.abs().max()).item() for result, right in pairs)


def median_seconds(runs, device, rounds=20, repeats=10):
    """The median time of each function. They take turns, so that a change of clock speed meets all alike."""
    times = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, seconds in zip(runs, times):
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            if device == "cuda":
                torch.cuda.synchronize()             # a launch returns at once: wait for the work
            seconds.append((time.perf_counter() - start) / repeats)
    return [statistics.median(seconds[1:]) for seconds in times]                         # the first warms up


def show(*cells):
    print(*(f"{cell:>11}" for cell in cells), flush=True)


def benchmark(device="cuda", layers=LAYERS, tasks=(1, 4, 16), B=64, big=8192):
    """A table of microseconds a layer: Triton, eager PyTorch and torch.compile, beside what the GPU could do.

    With X, W and Y the sizes of x, W and y, n products do 2 n T B N K operations and move n (X + W + 2 Y) - Y
    values: each product its three matrices and, but for the forward, a mask. The roofline is the longer of
    operations and bytes over the ceilings measured; small layers stay in the cache and may pass that of memory.
    """
    square = torch.randn(big, big, device=device)                                        # [big, big]
    other = torch.empty_like(square)
    matmul, copy = median_seconds([lambda: torch.mm(square, square, out=other), lambda: other.copy_(square)], device)
    operation_ceiling, byte_ceiling = 2 * big ** 3 / matmul, 2 * 4 * big ** 2 / copy
    print(f"{precision_of(torch.float32)}: {operation_ceiling:.3g} operations/s, {byte_ceiling:.3g} bytes/s; "
          "times in µs")
    show("layer", "T", "T*B*N*K", "level", "Triton", "eager", "compiled", "eager/Tri.", "of roofline", "error")
    eager = functools.partial(linear_torch, slope=0.2, addend=None)
    for name, (K, N), T in [(name, size, T) for name, size in layers.items() for T in tasks]:
        operands = draw_operands(T, B, K, N, device)
        X, W, Y = T * B * K, T * N * K, T * B * N
        torch.compiler.reset()                       # otherwise torch.compile gives up after a few shapes
        compiled = torch.compile(eager, dynamic=False)
        for level, n in LEVELS.items():
            # What torch.compile makes cannot be differentiated twice, so the last level is without it.
            contenders = (fused, eager) if n == 7 else (fused, eager, compiled)
            runs = [lambda layer=layer: run_level(layer, operands, n) for layer in contenders]
            micro = [seconds * 1e6 for seconds in median_seconds(runs, device)]
            ideal = 1e6 * max(2 * n * X * N / operation_ceiling, 4 * (n * (X + W + 2 * Y) - Y) / byte_ceiling)
            show(name, T, X * N, level, *(f"{value:.1f}" for value in micro), *["-"] * (3 - len(micro)),
                 f"{micro[1] / micro[0]:.2f}", f"{ideal / micro[0]:.1%}", f"{worst_error(operands, n):.1e}")


def resources(capabilities=(80, 90, 100)):
    """Compiles every operation, precision and tile for each capability. Yields capability, precision, tile,
    operation, registers a thread, bytes of shared memory, bytes a thread spills to memory."""
    for capability, (precision, tiles) in itertools.product(capabilities, TILES.items()):
        # A stand-in for Triton's driver, so that the kernel is compiled for a GPU that need not be here.
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        triton.runtime.driver.set_active(types.SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: capability,
            get_current_stream=lambda device: 0))
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        for T in (1, 16)[:len(tiles)]:               # 16 tasks take the large tile
            dtype = torch.float64 if precision == "float64" else torch.float32
            x, weight, bias, y = draw_operands(T, 64, 512, 512, "meta", dtype)[:4]       # shapes without memory
            calls = {"L": kernel_call(x, weight.mT, None, 0.2, bias=bias, addend=y),
                     "L, y given": kernel_call(x, weight.mT, y, 0.2, bias=bias),
                     "X": kernel_call(y, weight, y, 0.2, mask_left=True),
                     "D": kernel_call(y.mT, x, y.mT, 0.2, mask_left=True, row_sums=True)}
            for operation, (grid, arguments) in calls.items():
                compiled = product_kernel.warmup(grid=grid, **arguments)                 # compiles, launches nothing
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    Path(file.name).write_bytes(compiled.asm["cubin"])
                    dump = subprocess.check_output(
                        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name], text=True)
                used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}
                tile = "x".join(str(arguments[side]) for side in ("TILE_M", "TILE_N", "TILE_K"))
                yield (capability, precision, tile, operation, used["REG"], compiled.metadata.shared,
                       used["STACK"] + used["LOCAL"])


def main():
    if triton is None:
        print(why_not_triton("cpu"))
    elif torch.cuda.is_available():
        benchmark()
    elif INTERPRETED:
        show("layer", "level", "error")
        for name, (K, N) in LAYERS.items():
            show(name, "+double", f"{worst_error(draw_operands(1, 32, K, N, 'cpu'), 7):.1e}")
    else:
        show("capability", "precision", "tile", "operation", "registers", "shared", "spilled")
        for row in resources():
            show(*row)
        subprocess.run([sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)


if __name__ == "__main__":
    main()
