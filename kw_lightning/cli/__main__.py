"""`python -m kw_lightning.cli` is `kw`: how a sweep starts its runs, and Lightning further processes of each."""

from kw_lightning.cli import main
from kw_lightning.sweep.parent import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    main()
