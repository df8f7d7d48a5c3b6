"""SimCLR in a loop of your own: two views of every digit, NT-Xent, and a probe on what was learned."""

import torch

from contrastive import NTXentLoss
from contrastive.data import augment, digits
from contrastive.encoders import SmallCNN
from contrastive.evaluate import evaluate

torch.manual_seed(0)
data, encoder, criterion = digits(), SmallCNN(1, 8), NTXentLoss(temperature=0.2)
optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
generator = torch.Generator().manual_seed(0)

for _ in range(15):
    for batch in torch.randperm(len(data.train)).split(200):
        images = data.train[batch]
        loss = criterion(encoder(augment(images, generator)), encoder(augment(images, generator)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

print(f"loss {loss.item():.3f}, probe with 10 labels per class {evaluate(encoder, data)['probe@10']:.1%}")
