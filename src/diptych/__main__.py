"""`python -m diptych`, which is what torchrun starts."""

from diptych.cli import main

main()
