"""With labels: all digits of a class are each other's positives."""

import torch

from contrastive import SupConLoss
from contrastive.data import augment, digits
from contrastive.encoders import SmallCNN
from contrastive.evaluate import evaluate

torch.manual_seed(0)
data, encoder, criterion = digits(), SmallCNN(1, 8), SupConLoss(temperature=0.2)
optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
generator = torch.Generator().manual_seed(0)

for _ in range(15):
    for batch in torch.randperm(len(data.train)).split(200):
        images, labels = data.train[batch], data.train_labels[batch]
        loss = criterion(encoder(augment(images, generator)), encoder(augment(images, generator)), labels=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

print(f"loss {loss.item():.3f}, five nearest neighbours {evaluate(encoder, data)['knn5']:.1%}")
