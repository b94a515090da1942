"""`python -m perceptio_hf` is the command `perceptio`, for environments whose scripts are not on the PATH."""

from perceptio_hf.commands.main import main

main()
