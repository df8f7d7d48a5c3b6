"""MoCo: negatives from a queue, whose entries were made by an encoder that follows the trained one slowly.

With batches of 32, the queue is what makes the negatives many.
"""

import copy

import torch

from contrastive import FeatureQueue, InfoNCELoss
from contrastive.data import augment, digits
from contrastive.encoders import SmallCNN
from contrastive.evaluate import evaluate

torch.manual_seed(0)
data, encoder, criterion = digits(), SmallCNN(1, 8), InfoNCELoss(temperature=0.2)
keys = copy.deepcopy(encoder).requires_grad_(False)
queue = FeatureQueue(1024, 64)
optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
generator = torch.Generator().manual_seed(0)

for _ in range(10):
    for batch in torch.randperm(len(data.train)).split(32):
        images = data.train[batch]
        query, key = encoder(augment(images, generator)), keys(augment(images, generator))
        loss = criterion(query, key, queue=queue)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue.update(key)
        with torch.no_grad():
            for slow, fast in zip(keys.parameters(), encoder.parameters(), strict=True):
                slow.lerp_(fast, 0.01)

print(f"loss {loss.item():.3f}, probe with 10 labels per class {evaluate(encoder, data)['probe@10']:.1%}")
