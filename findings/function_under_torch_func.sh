#!/usr/bin/env bash
# torch 2.13.0 (CPU). An autograd.Function that works under torch.func (forward without ctx, and
# setup_context) asks inspect.signature for its forward in *every* call, also where no transform
# is active; a signature that is written down once is used instead. Under torch.func.grad a call
# costs several times as much again, because a new class is made for each.
#
# Guess: to write a Function in the newer form costs nothing where torch.func is not used, and
# under torch.func.grad about as much as under torch.autograd.grad.
# Seen: per call of a Function with six arguments on tiny tensors (microseconds, one machine):
#   ctx in forward 7, setup_context 22, the same with forward.__signature__ set 10,
#   forward and backward under torch.autograd.grad 43, under torch.func.grad 235
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet "torch==2.13.0" numpy 2> pip.log || { cat pip.log; exit 1; }
cat > seen.py <<'PY'
import inspect, statistics, time
import torch

class Older(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, b, c, d, e):
        return x + 1
    @staticmethod
    def backward(ctx, g):
        return g, None, None, None, None, None

class Newer(torch.autograd.Function):
    @staticmethod
    def forward(x, a, b, c, d, e):
        return x + 1
    @staticmethod
    def setup_context(ctx, inputs, output):
        pass
    @staticmethod
    def backward(ctx, g):
        return g, None, None, None, None, None

class Written(Newer):
    @staticmethod
    def forward(x, a, b, c, d, e):
        return x + 1
Written.forward.__signature__ = inspect.signature(lambda *inputs: None)

def call(function):
    return lambda x: function.apply(x, 1, 2, 3, 4, 5)

def by_autograd(x):
    x = x.detach().requires_grad_()
    torch.autograd.grad(call(Newer)(x).sum(), x, create_graph=True)

by_func = torch.func.grad(lambda x: call(Newer)(x).sum())
steps = {"ctx in forward": call(Older), "setup_context": call(Newer),
         "signature written down": call(Written), "by torch.autograd.grad": by_autograd,
         "by torch.func.grad": by_func}
x, seconds = torch.ones(3, requires_grad=True), {name: [] for name in steps}
for _ in range(300):
    for name, step in steps.items():
        began = time.perf_counter()
        for _ in range(10):
            step(x)
        seconds[name].append((time.perf_counter() - began) / 10)
us = {name: 1e6 * statistics.median(values) for name, values in seconds.items()}
for name, value in us.items():
    print(f"{name}: {value:.0f} us")
assert us["setup_context"] > 1.8 * us["ctx in forward"], "changed"
assert us["signature written down"] < 0.75 * us["setup_context"], "changed"
assert us["by torch.func.grad"] > 2 * us["by torch.autograd.grad"], "changed"
PY
venv/bin/python seen.py
