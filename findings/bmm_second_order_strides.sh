#!/usr/bin/env bash
# torch 2.13.0 (CPU). The gradient of a weight that comes through a *second* derivative has the
# strides of the weight if the layer is written with mm, but those of its transpose if it is
# written with bmm, whichever way round the product is written.
#
# Guess: bmm is mm with one more axis, so gradients are laid out alike.
# Seen: mm's derivative formulas look at strides, bmm's do not. One of the two contributions to a
# weight's outer gradient (from the forward product, and from the first derivative by x) is always
# transposed. Adding them up mixes layouts, which on a CPU takes several times as long as the
# product, and meta-learning with an axis of tasks does so for every weight in every inner step.
#
# Output seen:
#   mm,  x W^T: first (6, 1), second (6, 1)
#   bmm, x W^T: first (1, 5), second (6, 1)
#   bmm, W x^T: first (6, 1), second (1, 5)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet "torch==2.13.0" numpy 2> pip.log || { cat pip.log; exit 1; }
cat > seen.py <<'PY'
import torch
from torch.autograd import grad

def strides(layer, tasks):
    x = torch.randn(*tasks, 4, 6, requires_grad=True)
    weight = torch.randn(*tasks, 5, 6, requires_grad=True)
    y = layer(x, weight)
    first, = grad(y.square().sum(), weight, retain_graph=True)
    of_x, = grad(y.sum(), x, create_graph=True)  # depends on the weight alone
    second, = grad(of_x.square().sum(), weight)
    return first.stride()[-2:], second.stride()[-2:]

found = {
    "mm,  x W^T": strides(lambda x, w: torch.mm(x, w.mT), ()),
    "bmm, x W^T": strides(lambda x, w: torch.bmm(x, w.mT), (2,)),
    "bmm, W x^T": strides(lambda x, w: torch.bmm(w, x.mT).mT, (2,))}
for name, (first, second) in found.items():
    print(f"{name}: first {first}, second {second}")
assert list(found.values()) == [((6, 1), (6, 1)), ((1, 5), (6, 1)), ((6, 1), (1, 5))], "changed"
PY
venv/bin/python seen.py
