"""`python -m kveraser`, and so `accelerate launch -m kveraser` and `torchrun -m kveraser`."""

from kveraser.cli.main import main

main()
