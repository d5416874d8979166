#!/usr/bin/env bash
# torch.nn.functional.linear_cross_entropy is told to equal a linear layer with cross_entropy behind it. Where every
# target of a batch is ignored, both losses are NaN, but cross_entropy sends back gradients of zero, and the chunked
# way (`options=LinearCrossEntropyOptions()`) sends back NaN to the hidden states and to the weights.
# Seen with torch 2.13.0 on a CPU. Why it matters: a microbatch without any trained token, such as a chunk of a long
# prompt, costs nothing with the one; with the other it turns an accumulated step, and then the head, into NaN.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PY'
import torch
from torch.nn.functional import cross_entropy, linear, linear_cross_entropy

torch.manual_seed(0)
hidden, weight, targets = torch.randn(64, 16), torch.randn(96, 16), torch.randint(0, 96, (64,))
ignored = torch.full_like(targets, -100)


def plain(x, w, y):
    return cross_entropy(linear(x, w), y)


def chunked(x, w, y):
    return linear_cross_entropy(x, w, y, options=torch.nn.LinearCrossEntropyOptions())


def gradients(loss, *batches):
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    for y in batches:
        loss(x, w, y).backward()
    return x.grad, w.grad


print("torch", torch.__version__)
for name, loss in (("cross_entropy", plain), ("chunked", chunked)):
    grads = gradients(loss, targets, ignored)
    shares = [grad.isnan().float().mean().item() for grad in grads]
    print(f"{name}: share of NaN after a trained and an ignored batch:", shares)

torch.testing.assert_close(gradients(chunked, targets), gradients(plain, targets))
assert all(not g.any() for g in gradients(plain, ignored))
assert all(g.isnan().all() for g in gradients(chunked, ignored))
assert all(g.isnan().all() for g in gradients(chunked, targets, ignored))
torch.testing.assert_close(gradients(plain, targets, ignored), gradients(plain, targets))
PY
