"""`python -m kw_lightning` is `kw`, for torchrun and where scripts are not on the path."""

from kw_lightning.cli import main

if __name__ == "__main__":
    main()
