"""A linear layer and its LeakyReLU in one GPU kernel, with derivatives of every order.

    y = leaky_relu(x Wᵀ + b)        x [T, B, K], W [T, N, K], b [T, N], y [T, B, N]

T counts tasks. Each has weights of its own, so a layer is a batched matrix product.

Let m be 1 where y > 0 and the slope elsewhere. Then y = m * (x Wᵀ + b). LeakyReLU consists of two
straight lines, so for a derivative m is a constant; and y has the sign of what went into the
LeakyReLU, so m can be read off y. Two operations are enough. What stands behind the semicolon
only says where m comes from: in the layer itself y is the result, in its derivatives it is given.

    MaskedLinear(x, W, b; y) = m * (x Wᵀ + b)                               [T, B, N]
    MaskedProduct(g, W; y)   = (m * g) W, and the sum of each row of m * g  [T, B, K], [T, B]

Let g [T, B, N] be the gradient that arrives at MaskedLinear. By the chain rule, the gradients are

    of x:        (m * g) W             = MaskedProduct(g, W; y)
    of W and b:  (m * g)ᵀ x, Σ m * g   = MaskedProduct(gᵀ, x; yᵀ)

Let u [T, B, K] and v [T, B] be the gradients that arrive at the two results of MaskedProduct.
Then the gradients are

    of g:        m * (u Wᵀ + v)        = MaskedLinear(W, u, v; yᵀ)ᵀ
    of W:        (m * g)ᵀ u            = MaskedProduct(gᵀ, u; yᵀ)

(v has a number for each row, but the bias of MaskedLinear one for each column. So that operation
makes the transpose, with W in the place of x and u in that of the weight.)

These are the same two operations again, so autograd can go on to any order. Both are one matrix
product with a mask, computed by a kernel in Triton, a dialect of Python for GPUs, or by PyTorch.
"""
import ctypes
import functools
import inspect
import subprocess
import sys
from pathlib import Path

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no release for macOS and Windows
    triton = None

# ------------------------------------------------------------------------------ 1 The product
# out = mask(a) b + bias, or mask(a b + bias) [T, M, N], of a [T, M, K] and b [T, K, N]. The result
# is cut into tiles, and each program makes one of them:
#
#     for each task t, each TILE_M rows and TILE_N columns of out[t], all at once:
#         acc = the bias of these columns
#         for each TILE_K columns of a[t], which are rows of b[t]:
#             acc += mask(tile of a) @ tile of b
#         tile of out = mask(acc)
#
# An `if` on a tl.constexpr or on None is decided when the kernel is compiled. A matrix is stored by
# rows or, as a transposed one, by columns (*_BY_COLUMNS); its rows or columns lie *_pitch apart,
# and its tasks *_batch. UNIT and its kind are explained at `units`.
if triton is not None:
    @triton.jit
    def load_tile(matrix, pitch, rows, columns, height, width, BY_COLUMNS: tl.constexpr):
        """matrix[rows, columns]. What lies outside of [height, width] reads as 0."""
        inside = (rows[:, None] < height) & (columns[None, :] < width)
        if BY_COLUMNS:
            offsets = rows[:, None] + columns[None, :] * pitch
        else:
            offsets = rows[:, None] * pitch + columns[None, :]
        return tl.load(matrix + offsets, mask=inside, other=0.0)

    @functools.partial(triton.jit, do_not_specialize=[
        "a_batch", "a_pitch", "b_batch", "b_pitch", "y_batch", "y_pitch", "bias_batch",
        "M", "N", "K"])
    def product_kernel(
            a, b, y, bias, out, sums, a_batch, a_pitch, b_batch, b_pitch, y_batch, y_pitch,
            bias_batch, M, N, K, slope: tl.float64, MASK: tl.constexpr,
            A_BY_COLUMNS: tl.constexpr, B_BY_COLUMNS: tl.constexpr, Y_BY_COLUMNS: tl.constexpr,
            UNIT: tl.constexpr, UNIT_M: tl.constexpr, UNIT_N: tl.constexpr, UNIT_K: tl.constexpr,
            PRECISION: tl.constexpr,
            TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr):
        M, N, K = M * UNIT_M, N * UNIT_N, K * UNIT_K
        slope = tl.full((1, 1), slope, a.dtype.element_ty)  # else products would be of float64
        # Which tile is ours? One matrix has fewer than 2³¹ elements, but not all tasks together.
        t = tl.program_id(0).to(tl.int64)
        rows = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
        columns = tl.program_id(2) * TILE_N + tl.arange(0, TILE_N)
        a, b, out = a + t * a_batch * UNIT, b + t * b_batch * UNIT, out + t * M * N

        if y is not None:
            y_t = y + t * y_batch * UNIT

        # Begin with the bias, or with 0.
        acc = tl.zeros((TILE_M, TILE_N), a.dtype.element_ty)
        row_sums = tl.zeros((TILE_M,), a.dtype.element_ty)
        if bias is not None:
            at = bias + t * bias_batch * UNIT + columns
            acc += tl.load(at, mask=columns < N, other=0.0)[None, :]

        # Walk along K. Beyond its end both tiles read as 0, which adds nothing.
        for start in range(0, K, TILE_K):
            inner = start + tl.arange(0, TILE_K)
            left = load_tile(a, a_pitch * UNIT, rows, inner, M, K, A_BY_COLUMNS)
            if MASK == "left":
                signs = load_tile(y_t, y_pitch * UNIT, rows, inner, M, K, Y_BY_COLUMNS)
                left = tl.where(signs > 0, left, left * slope)
            right = load_tile(b, b_pitch * UNIT, inner, columns, K, N, B_BY_COLUMNS)
            acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=acc.dtype)
            if sums is not None:
                row_sums += tl.sum(left, 1)

        # Mask the result and store it. `out` is contiguous.
        if MASK == "result":
            signs = acc
            if y is not None:
                signs = load_tile(y_t, y_pitch * UNIT, rows, columns, M, N, Y_BY_COLUMNS)
            acc = tl.where(signs > 0, acc, acc * slope)
        at = out + rows[:, None] * N + columns[None, :]
        tl.store(at, acc, mask=(rows[:, None] < M) & (columns[None, :] < N))

        # All tiles side by side have the same row sums. The first of them stores these.
        if sums is not None:
            if tl.program_id(2) == 0:
                tl.store(sums + t * M + rows, row_sums, mask=rows < M)


MANY_TILES = 128  # from so many large tiles on, a GPU has enough work


def layout(v):
    """Of matrices [T, R, C]: whether they are stored by columns, the stride of tasks, and that of
    rows (or columns). Contiguous ones have (False, R * C, C), their transposes (True, R * C, C).
    None where memory is contiguous along neither axis."""
    batch, row, column = v.stride()
    if column == 1:
        return False, batch, row
    if row == 1:
        return True, batch, column
    return None


def units(sizes, contiguous, strides):
    """The constants UNIT and UNIT_M, _N, _K of the kernel.

    A GPU copies four numbers at once only where the compiler knows that strides, and the sizes
    along which memory is contiguous, are multiples of 4. So a stride of 784 is passed as 196, and
    the kernel computes 196 * UNIT. Where one of them is no multiple of 4, as 25 shots are, UNIT
    is 1.

    Triton can find this out itself: it compiles a kernel anew for each class of its numbers (1,
    multiples of 16, others), 56 times in a default run. `do_not_specialize` switches that off.
    """
    divided = [*strides, *(sizes[name] for name in contiguous)]
    unit = 4 if all(n % 4 == 0 for n in divided) else 1
    return unit, [unit if name in contiguous else 1 for name in sizes]


def product(a, b, y, slope, backend, bias=None, mask_left=False, row_sums=False):
    """a b + bias [T, M, N] and, if row_sums, the sums of the rows of a [T, M], else None.

    a [T, M, K], b [T, K, N], bias [T, N] or None. The mask m makes it (m * a) b + bias if
    mask_left, else m * (a b + bias). It is read off y, which has the shape of what it multiplies;
    None is the result itself.
    """
    if backend != "triton":  # "auto", too: no first run on a GPU was seen to gain by compiling
        times_m = torch.ops.aten.leaky_relu_backward  # of (value, y, slope, True): m * value
        if mask_left and slope != 1:
            a = times_m(a, y, slope, True)
        out = torch.bmm(a, b) if bias is None else torch.baddbmm(bias.unsqueeze(1), a, b)
        if not mask_left and slope != 1:
            out = times_m(out, out if y is None else y, slope, True)
        return out, a.sum(2) if row_sums else None

    T, M, K, N = *a.shape, b.shape[2]
    out = a.new_empty(T, M, N)
    sums = a.new_empty(T, M) if row_sums else None
    mask = "none" if slope == 1 else "left" if mask_left else "result"
    y = y if mask != "none" else None
    a, b, y = (v if v is None or layout(v) else v.contiguous() for v in (a, b, y))
    bias = bias.contiguous() if bias is not None and bias.stride(1) != 1 else bias
    a_layout, b_layout, y_layout = (layout(v) if v is not None else (False, 0, 0)
                                    for v in (a, b, y))
    bias_batch = 0 if bias is None else bias.stride(0)
    strides = [*a_layout[1:], *b_layout[1:], *y_layout[1:], bias_batch]
    contiguous = {"M" if a_layout[0] else "K", "K" if b_layout[0] else "N", "N"}
    if y is not None:
        contiguous.add("M" if y_layout[0] else "K" if mask_left else "N")
    unit, (unit_m, unit_n, unit_k) = units({"M": M, "N": N, "K": K}, contiguous, strides)
    # Large tiles read a and b less often; small ones leave no part of the GPU without work.
    # These were the fastest of those tried on an H100 with the layers of mtgan.py.
    single = a.dtype == torch.float32
    large = single and T * triton.cdiv(M, 64) * triton.cdiv(N, 64) >= MANY_TILES
    tile_m, tile_n, tile_k, warps = (64, 64, 32, 4) if large else (16, 32, 64, 2)
    with torch.cuda.device_of(a):  # Triton launches on the current GPU
        # A float32 is nearly the sum of two TF32 numbers, which a GPU's matrix units take. Three
        # products of those were faster than one of float32, and had no larger errors.
        split = single and torch.version.hip is None and torch.cuda.is_tf32_supported()
        product_kernel[T, triton.cdiv(M, tile_m), triton.cdiv(N, tile_n)](
            a, b, y, bias, out, sums, *(stride // unit for stride in strides),
            M // unit_m, N // unit_n, K // unit_k, slope=slope, MASK=mask,
            A_BY_COLUMNS=a_layout[0], B_BY_COLUMNS=b_layout[0], Y_BY_COLUMNS=y_layout[0],
            UNIT=unit, UNIT_M=unit_m, UNIT_N=unit_n, UNIT_K=unit_k,
            PRECISION="tf32x3" if split else "ieee",
            TILE_M=tile_m, TILE_N=tile_n, TILE_K=tile_k, num_warps=warps)
    return out, sums


# ----------------------------------------------------------------------- 2 The two operations
class MaskedLinear(torch.autograd.Function):
    """m * (x Wᵀ + b)  # [T, B, N]. If y is None, it is the result itself."""

    @staticmethod
    def forward(x, weight, bias, y, slope, backend):
        return product(x, weight.mT, y, slope, backend, bias)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, y, slope, backend = inputs
        ctx.how = slope, backend
        ctx.save_for_backward(x, weight, output if y is None else y)

    @staticmethod
    def backward(ctx, g):
        x, weight, y = ctx.saved_tensors
        for_x, for_weight, for_bias, *_ = ctx.needs_input_grad
        dx = dweight = dbias = None
        if for_x:
            dx, _ = MaskedProduct.apply(g, weight, y, False, *ctx.how)
        if for_weight or for_bias:
            dweight, dbias = MaskedProduct.apply(g.mT, x, y.mT, for_bias, *ctx.how)
        return dx, dweight, dbias, None, None, None


class MaskedProduct(torch.autograd.Function):
    """(m * g) W and, if row_sums, the sum of each row of m * g, else None."""

    @staticmethod
    def forward(g, weight, y, row_sums, slope, backend):
        return product(g, weight, y, slope, backend, mask_left=True, row_sums=row_sums)

    @staticmethod
    def setup_context(ctx, inputs, output):
        g, weight, y, _, slope, backend = inputs
        ctx.how = slope, backend
        ctx.save_for_backward(g, weight, y)

    @staticmethod
    def backward(ctx, u, v):  # v is None without row_sums
        g, weight, y = ctx.saved_tensors
        for_g, for_weight, *_ = ctx.needs_input_grad
        dg = dweight = None
        if for_g:
            dg = MaskedLinear.apply(weight, u, v, y.mT, *ctx.how).mT
        if for_weight:
            dweight, _ = MaskedProduct.apply(g.mT, u, y.mT, False, *ctx.how)
        return dg, dweight, None, None, None, None


# In every call, PyTorch asks for the signature of `forward`. One that is written down saves time.
MaskedLinear.forward.__signature__ = inspect.signature(lambda *inputs: None)
MaskedProduct.forward.__signature__ = inspect.signature(lambda *inputs: None)

# ------------------------------------------------------------------------------- 3 The layer
default_backend = "auto"  # of layers that are given none


def why_not_triton(device):
    """Why Triton cannot run on a device, in one line; None where it can."""
    if triton is None:
        return "triton is not installed: choose torch or auto"
    # A CPU has only an interpreter. With it, even Triton's own library is not compiled.
    interpreted = not isinstance(tl.sum, triton.JITFunction)
    if torch.device(device).type != "cuda" and not interpreted:
        return f"triton cannot run on {device} without TRITON_INTERPRET=1: choose torch or auto"


def fused_linear(x, weight, bias, slope=0.2, *, backend=None):
    """leaky_relu(x Wᵀ + b, slope) [T, B, N], with reverse-mode gradients of every order.

    x [T, B, K], weight [T, N, K], bias [T, N]: float32 or float64, any strides (expand what tasks
    share). Slope 1 is no activation, 0 is ReLU (but -inf gives nan); below 0, y would not tell m.
    backend: "auto", "torch" or "triton", by default `default_backend`. torch.func's grad and vjp
    work; its vmap and jvp, and torch.autocast, do not.
    Raises ValueError, TypeError (dtypes), and RuntimeError where Triton cannot run.
    """
    backend = backend or default_backend
    tensors = [x, weight, bias]

    def found():
        return ", ".join(f"{list(t.shape)} {t.dtype} on {t.device}" for t in tensors)

    fit = (x.dim() == weight.dim() == 3 and x.shape[::2] == weight.shape[::2]
           and bias.shape == weight.shape[:2] and x.device == weight.device == bias.device)
    if {t.dtype for t in tensors} not in ({torch.float32}, {torch.float64}):
        raise TypeError(f"x, weight and bias must all be float32 or all float64, not {found()}")
    if not fit:
        raise ValueError(f"not x [T, B, K], weight [T, N, K], bias [T, N] on one device: {found()}")
    if not 0 <= slope < float("inf"):  # nan fails this too
        raise ValueError(f"slope must be finite and at least 0, not {slope}")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', not {backend!r}")
    if backend == "triton" and why_not_triton(x.device):
        raise RuntimeError(why_not_triton(x.device))
    return MaskedLinear.apply(x, weight, bias, None, float(slope), backend)


# ------------------------------------------------------------------- 4 Two helpers for speed
class Recorded:
    """A function of tensors that a GPU repeats without waiting for Python.

    Python issues the thousands of operations of a training step more slowly than a GPU works them
    off. So the first call records them as a CUDA graph, which every call replays with new inputs
    (of the same shapes, or ValueError is raised). It overwrites the results of the call before.
    On a CPU, a call just calls the function.

    A recording needs a call before it, to compile kernels. With real inputs that would be a
    training step too many. So its inputs are nan, which a training step has to skip anyway: on
    them, the function must not change anything in place. It may draw random numbers. What else it
    uses, such as the backend, stays as it was when recorded.
    """

    def __init__(self, function):
        self.function, self.graph = function, None

    def __call__(self, *inputs):
        if not inputs[0].is_cuda:
            return self.function(*inputs)
        if self.graph is None:
            self.record(inputs)
        if [v.shape for v in inputs] != [v.shape for v in self.inputs]:
            raise ValueError("the inputs have other shapes than when this was recorded")
        torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        return self.results

    def record(self, inputs):
        device = inputs[0].device
        self.inputs = [torch.full_like(v, float("nan")) for v in inputs]
        with torch.random.fork_rng([device]):
            self.function(*self.inputs)
        self.graph = torch.cuda.CUDAGraph()
        # Graphs of one stream share a workspace of cuBLAS, which is freed with the first of them.
        stream = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.graph(self.graph, stream=stream):
            self.results = self.function(*self.inputs)


def use_whole_cpu():
    """Two settings, for the rest of the process, that make training on a CPU faster."""
    # PyTorch's usual library does not use the full width of every CPU, but oneDNN does. "medium"
    # lets PyTorch ask it. It also lets a CPU that can round to bfloat16 do so: then put it back.
    torch.set_float32_matmul_precision("medium")
    a = torch.rand(256, 256, device="cpu")
    exact = a.double() @ a.double()
    if (torch.mm(a, a) - exact).abs().max() > 1e-6 * exact.max():
        torch.set_float32_matmul_precision("highest")
    # Linux's C library gives freed memory back, and the system fills it with zeros before its next
    # use. Let it keep large blocks, too. Only glibc has these settings; old ones take less.
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
        mmap_threshold, trim_threshold = -3, -1  # their numbers in malloc.h
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)
        mallopt(trim_threshold, 2**31 - 1)


if __name__ == "__main__":  # measure the kernel's error and time
    subprocess.run([sys.executable, Path(__file__).with_name("test_mtgan.py"), "kernel"])
