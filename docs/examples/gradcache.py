"""A batch that does not fit, in parts: the gradient of the whole, with what a part's graph takes.

The loss sees embeddings as leaves. Their derivative is known when the encoder makes them again, part by part, and passes it on.
`contrastive train --chunk 100` does this for you.
"""

import torch

from contrastive import InfoNCELoss
from contrastive.data import augment, digits
from contrastive.encoders import SmallCNN

torch.manual_seed(0)
encoder, criterion = SmallCNN(1, 8), InfoNCELoss(temperature=0.2)
images = digits().train[:1000]
views = [augment(images, torch.Generator().manual_seed(seed)) for seed in (0, 1)]

criterion(*map(encoder, views)).backward()  # the whole at once, to compare with
whole = [p.grad.clone() for p in encoder.parameters()]
encoder.zero_grad()

with torch.no_grad():
    leaves = [torch.cat([encoder(part) for part in view.split(100)]).requires_grad_() for view in views]
criterion(*leaves).backward()
for view, leaf in zip(views, leaves, strict=True):
    for part, derivative in zip(view.split(100), leaf.grad.split(100), strict=True):
        encoder(part).backward(derivative)

off = max(float((p.grad - g).abs().max() / g.abs().max()) for p, g in zip(encoder.parameters(), whole, strict=True))
print(f"largest relative difference of a gradient: {off:.0e}")
assert off < 1e-4
