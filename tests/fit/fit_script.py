"""`kw-fit` as a file, which Lightning can start once more for the second process."""

from kw_lightning.cli import fit_main

if __name__ == "__main__":
    fit_main()
