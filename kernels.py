"""A linear layer and its LeakyReLU in one GPU kernel, with derivatives of every order.

    y = leaky_relu(x Wᵀ + b)        x [T, B, K], W [T, N, K], b [T, N], y [T, B, N]

T counts tasks, each with weights of its own. Let m = 1 where y > 0 and m = slope elsewhere.
LeakyReLU bends only at 0, so m is a constant when we differentiate, and it can be read off y,
which has the sign of what went in. Then two operations are enough (Σ sums a row):

    L(x, W, b; y) = m * (x Wᵀ + b)        gradients from g:     X(g, W; y) and X(gᵀ, x; yᵀ)
    X(g, W; y)    = (m * g) W, Σ m * g   gradients from u, v: L(W, u, v; yᵀ)ᵀ, X(gᵀ, u; yᵀ)

Their gradients are the two again, which gives every order. Each is one product with a mask, which
a kernel in Triton, a dialect of Python for GPUs, computes, or else a few lines of PyTorch.
Then `replay`: a GPU works off a recorded list of operations without waiting for Python.
"""
import ctypes
import itertools
import os
import re
import subprocess
import sys
from unittest.mock import Mock

import torch

try:
    import triton
    import triton.language as tl
except ImportError:                     # there is none for macOS and Windows
    triton = None

# ------------------------------------------------------------------------------ 1 The product
# A Triton function runs as many programs at once. Here each makes one tile of the result, and its
# values are whole tiles. An `if` on None or on a tl.constexpr is decided when it is compiled.
if triton is not None:
    @triton.jit
    def load_tile(matrices, strides, t, rows, columns, height, width):
        """matrices[t, rows, columns]; what lies outside of [height, width] reads as 0."""
        inside = (rows[:, None] < height) & (columns[None, :] < width)
        offsets = rows[:, None] * strides[1] + columns[None, :] * strides[2]
        return tl.load(matrices + t * strides[0] + offsets, mask=inside, other=0.0)

    @triton.jit
    def product_kernel(
            a, b, y, bias, out, sums, a_strides, b_strides, y_strides, bias_strides, M, N, K,
            SLOPE: tl.constexpr, MASK_LEFT: tl.constexpr, PRECISION: tl.constexpr,
            TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr):
        t = tl.program_id(2).to(tl.int64)            # 64 bits: an offset may pass 2³¹
        rows = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
        columns = tl.program_id(1).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
        acc = tl.zeros((TILE_M, TILE_N), a.dtype.element_ty)
        row_sums = tl.zeros((TILE_M,), a.dtype.element_ty)
        if bias is not None:
            at = bias + t * bias_strides[0] + columns * bias_strides[1]
            acc += tl.load(at, mask=columns < N, other=0.0)[None, :]

        for start in range(0, K, TILE_K):
            inner = start + tl.arange(0, TILE_K).to(tl.int64)    # zeros beyond K add nothing
            left = load_tile(a, a_strides, t, rows, inner, M, K)
            if MASK_LEFT and SLOPE != 1:
                signs = load_tile(y, y_strides, t, rows, inner, M, K)
                left = tl.where(signs > 0, left, left * SLOPE)
            right = load_tile(b, b_strides, t, inner, columns, K, N)
            acc = tl.dot(left, right, acc, PRECISION, out_dtype=acc.dtype)
            row_sums += tl.sum(left, 1)

        if not MASK_LEFT and SLOPE != 1:
            signs = acc if y is None else load_tile(y, y_strides, t, rows, columns, M, N)
            acc = tl.where(signs > 0, acc, acc * SLOPE)
        at = out + (t * M + rows[:, None]) * N + columns[None, :]        # out is contiguous
        tl.store(at, acc, mask=(rows[:, None] < M) & (columns[None, :] < N))
        if sums is not None:                         # all tiles of a row have it, and one writes
            tl.store(sums + t * M + rows, row_sums, mask=(rows < M) & (tl.program_id(1) == 0))


def product(a, b, y, slope, backend, bias=None, mask_left=False, row_sums=False):
    """a b + bias [T, M, N] and, if row_sums, Σ a [T, M], for a [T, M, K] and b [T, K, N].
    m multiplies `a` if mask_left, else the result. It is read off y, or else off the result."""
    if backend != "triton":                          # "auto" too: this need not compile
        times_m = torch.ops.aten.leaky_relu_backward     # (value, y, slope, True) is m * value
        if mask_left and slope != 1:
            a = times_m(a, y, slope, True)
        out = torch.bmm(a, b) if bias is None else torch.baddbmm(bias.unsqueeze(1), a, b)
        if not mask_left and slope != 1:
            out = times_m(out, out if y is None else y, slope, True)
        return out, a.sum(2) if row_sums else None

    T, M, K, N = *a.shape, b.shape[2]
    single = a.dtype == torch.float32
    # Large tiles read each operand less often; small ones leave no part of the GPU without work.
    large = single and T * triton.cdiv(M, 64) * triton.cdiv(N, 64) >= 128
    tile_m, tile_n, tile_k, warps = (64, 64, 32, 4) if large else (16, 32, 64, 2)
    # A float32 as the sum of two TF32 numbers: three products of those, on a GPU's matrix units,
    # are faster than one of float32, and no less exact.
    split = single and torch.version.hip is None and torch.cuda.is_tf32_supported()
    out = a.new_empty(T, M, N)
    sums = a.new_empty(T, M) if row_sums else None
    strides = [() if v is None else v.stride() for v in (a, b, y, bias)]
    with torch.cuda.device_of(a):                    # Triton launches on the current GPU
        product_kernel[triton.cdiv(M, tile_m), triton.cdiv(N, tile_n), T](
            a, b, y, bias, out, sums, *strides, M, N, K, slope, mask_left,
            "tf32x3" if split else "ieee", tile_m, tile_n, tile_k, num_warps=warps)
    return out, sums


# ---------------------------------------------------------------- 2 The two and their gradients
def asked(ctx, i):
    """Does this call of autograd want the gradient of an operation's tensor i?
    ctx.needs_input_grad[i] says only whether that requires one, as W does even in grad(y, x)."""
    node, _ = ctx.next_functions[i]
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:                             # a leaf that autograd.grad asks for
        return True


class L(torch.autograd.Function):
    """m * (x Wᵀ + b) [T, B, N]. b or y may be None; then y is the result."""
    @staticmethod
    def forward(ctx, x, weight, bias, y, *how):      # how: slope, backend
        out, _ = product(x, weight.mT, y, *how, bias)
        ctx.save_for_backward(x, weight, out if y is None else y)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx, g):
        x, weight, y = ctx.saved_tensors
        y = y.detach()                               # m is a constant: nothing runs back through y
        dx = dweight = dbias = None
        if asked(ctx, 0):
            dx, _ = X.apply(g, weight, y, False, *ctx.how)
        if asked(ctx, 1) or asked(ctx, 2):           # if b is None, 2 is y, which nobody asks for
            dweight, dbias = X.apply(g.mT, x, y.mT, asked(ctx, 2), *ctx.how)
        return dx, dweight, dbias, None, None, None


class X(torch.autograd.Function):
    """(m * g) W and, if row_sums, Σ m * g: the gradient of x or, transposed, those of W and b."""
    @staticmethod
    def forward(ctx, g, weight, y, row_sums, *how):
        ctx.save_for_backward(g, weight, y)
        ctx.how = how
        return product(g, weight, y, *how, mask_left=True, row_sums=row_sums)

    @staticmethod
    def backward(ctx, u, v):                         # v is None without row_sums
        g, weight, y = ctx.saved_tensors
        dg = dweight = None
        if asked(ctx, 0):
            dg = L.apply(weight, u, v, y.mT, *ctx.how).mT
        if asked(ctx, 1):
            dweight, _ = X.apply(g.mT, u, y.mT, False, *ctx.how)
        return dg, dweight, None, None, None, None


# ------------------------------------------------ 3 The layer, and a GPU that need not wait
def why_not_triton(device):
    """Why Triton cannot run on a device, in one line; None where it can."""
    if triton is None:
        return "triton is not installed: use backend='torch' or 'auto'"
    # On a CPU there is only an interpreter. With it not even Triton's own library is compiled.
    interpreted = not isinstance(tl.sum, triton.JITFunction)
    if torch.device(device).type != "cuda" and not interpreted:
        return f"triton cannot run on {device} without TRITON_INTERPRET=1: use backend='torch'"


def fused_linear(x, weight, bias, slope=0.2, *, backend="auto"):
    """leaky_relu(x Wᵀ + b, slope) [T, B, N], with (reverse-mode) gradients of every order.

    x [T, B, K], weight [T, N, K], bias [T, N]: float32 or float64, any strides (expand what tasks
    share). Slope 1 is no activation, 0 is ReLU; below 0, y would not tell m. Raises ValueError,
    TypeError (dtypes), and RuntimeError where "triton" is asked for and cannot run.
    """
    tensors = [x, weight, bias]
    found = ", ".join(f"{list(t.shape)} {t.dtype} on {t.device}" for t in tensors)
    fit = (x.dim() == weight.dim() == 3 and x.shape[::2] == weight.shape[::2]
           and bias.shape == weight.shape[:2] and x.device == weight.device == bias.device)
    if {t.dtype for t in tensors} not in ({torch.float32}, {torch.float64}):
        raise TypeError(f"x, weight and bias must all be float32 or all float64, not {found}")
    if not fit:
        raise ValueError(f"not x [T, B, K], weight [T, N, K], bias [T, N] on one device: {found}")
    if not 0 <= slope < float("inf"):                # nan fails this too
        raise ValueError(f"slope must be finite and at least 0, not {slope}")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', not {backend!r}")
    if backend == "triton" and why_not_triton(x.device):
        raise RuntimeError(why_not_triton(x.device))
    return L.apply(x, weight, bias, None, float(slope), backend)


RECORDED = {}


def replay(function, leaves, tensors):
    """function(leaves, tensors), of two lists; the leaves require a gradient.

    A GPU waits for Python, which issues an episode's thousands of operations one by one. So they
    are recorded, once for a function and shapes, as a CUDA graph, and replayed, with new noise
    each time. A replay overwrites its last results.
    """
    if not leaves[0].is_cuda:
        return function(leaves, tensors)
    key = function, *((t.shape, t.dtype, t.device) for t in (*leaves, *tensors))
    if key not in RECORDED:
        inputs = [t.detach().clone() for t in (*leaves, *tensors)]
        own = [t.requires_grad_() for t in inputs[:len(leaves)]], inputs[len(leaves):]
        with torch.random.fork_rng([leaves[0].device]):      # it draws noise, too
            function(*own)                           # as usual: this compiles kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device_of(leaves[0]), torch.cuda.graph(graph):
            results = function(*own)
        RECORDED[key] = graph, inputs, results
    graph, inputs, results = RECORDED[key]
    with torch.no_grad():
        torch._foreach_copy_(inputs, [*leaves, *tensors])
    graph.replay()
    return results


def keep_memory():
    """Lets glibc keep freed memory, which the system would fill with zeros before its next use."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)    # only glibc has it
        mallopt(-3, 2**30) or mallopt(-3, 2**25)     # M_MMAP_THRESHOLD; less for an old glibc
        mallopt(-1, 2**31 - 1)                       # M_TRIM_THRESHOLD


# ------ 4 python kernels.py: measures the kernel on a GPU, elsewhere shows what it compiles to
def draw(T, B, K, N, device, dtype=torch.float32):
    shapes = (T, B, K), (T, N, K), (T, N), (T, B, N)         # x, W, b, g
    return [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]


def run(order, backend, operands, y=None):
    """The result of L; if order > 0 its gradients too, and if order > 1 the gradients of those."""
    x, weight, bias, g = [v.view_as(v) for v in operands]    # as in training, where few are leaves
    results = [L.apply(x, weight, bias, y, 0.2, backend)]
    if order > 0:
        results += torch.autograd.grad(results, [x, weight, bias], g, create_graph=order > 1)
    if order > 1:
        results += torch.autograd.grad(results[1:], [x, weight, g], [x, weight, bias])
    return results


def measure(device, tasks, orders):
    """Prints the kernel's largest error as a share of the largest value and, on a GPU, times."""
    from triton.testing import do_bench_cudagraph            # the GPU's time, not Python's
    layers = [(100, 256), (256, 512), (512, 1024), (1024, 784),      # K, N of G
              (784, 1024), (1024, 512), (512, 256), (256, 1)]        # and of D
    for (K, N), T, order in itertools.product(layers, tasks, orders):
        operands = draw(T, 64, K, N, device)
        results = run(order, "triton", operands)
        # Rounding may flip the sign of a y near 0: the exact results get the signs found here.
        exact = run(order, "torch", [v.double() for v in operands], results[0].detach().double())
        error = max((a - b).abs().max() / b.abs().max() for a, b in zip(results, exact))
        row = f"{K} to {N}, {T} tasks, order {order}: error {error:.1e}"
        if device == "cuda":
            ours, theirs = [1e3 * do_bench_cudagraph(lambda: run(order, backend, operands))
                            for backend in ("triton", "torch")]
            row += f"; {ours:.1f} us, PyTorch {theirs:.1f} us, ratio {theirs / ours:.2f}"
        print(row, flush=True)


def resources(capabilities=(80, 90, 100)):
    """Compiles what a second derivative launches, for GPUs that need not be here. Yields the most
    registers a thread, bytes of shared memory and bytes spilled, after what they are for."""
    kernels = []

    def compile_only(*values, warmup, **options):
        kernels.append(triton.JITFunction.run(product_kernel, *values, warmup=True, **options))

    product_kernel.run = compile_only
    torch.cuda.is_tf32_supported = lambda: True
    for capability, T in itertools.product(capabilities, [1, 16]):
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        triton.runtime.driver.set_active(Mock(get_current_target=lambda: target))
        kernels.clear()
        run(2, "triton", draw(T, 64, 512, 512, "meta"))
        used = []
        for kernel in set(kernels):
            cache = triton.runtime.cache.get_cache_manager(kernel.hash)
            text = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-res-usage",
                                            cache.get_file("product_kernel.cubin")], text=True)
            registers, stack, local = map(int, re.findall(r"(?:REG|STACK|LOCAL):(\d+)", text))
            used.append((registers, kernel.metadata.shared, stack + local))
        yield capability, T, *map(max, zip(*used))


if __name__ == "__main__":
    if triton is None:
        print(why_not_triton("cpu"))
    elif torch.cuda.is_available():
        measure("cuda", tasks=[1, 4, 16], orders=[0, 1, 2])
    elif why_not_triton("cpu") is None:
        measure("cpu", tasks=[1], orders=[2])
    else:
        for row in resources():
            print("sm_{}, T = {}: {} registers, {} bytes shared, {} spilled".format(*row))
        subprocess.run([sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"})
