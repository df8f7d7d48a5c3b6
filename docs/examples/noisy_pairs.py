"""Half of the pairs are wrong: InfoNCE beside the unbalanced member, trained on the same batches from the same start."""

from pathlib import Path
from tempfile import TemporaryDirectory

from contrastive.evaluate import evaluate
from contrastive.trainer import TrainConfig, data_of, train

settings = dict(broken=0.5, temperature=0.2, epochs=20, batch_size=200)
with TemporaryDirectory() as folder:
    for loss, options in {"infonce": {}, "unbalanced": {"rho": 0.1}}.items():
        config = TrainConfig(loss=loss, loss_options=options, **settings)
        run = train(config, Path(folder) / loss)
        scores = evaluate(run.encoder, data_of(config))
        print(f"{loss:<11} probe with 10 labels per class {scores['probe@10']:.1%}, five neighbours {scores['knn5']:.1%}")
