"""`python -m lightning_smoe`."""

from lightning_smoe.cli import main

if __name__ == "__main__":
    main()
