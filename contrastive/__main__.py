"""`python -m contrastive`, for torchrun."""

from contrastive.cli import main

main()
