"""The commands `kw` and `kw-fit`; `python -m kw_lightning` is `kw`, for torchrun and where scripts are not on the path.

Nothing is imported before Ctrl-C is heard.
"""

import sys


def main(command: str = "main") -> None:
    """Run `kw`."""
    try:
        from kw_lightning import cli

        getattr(cli, command)()
    except KeyboardInterrupt:  # while modules are imported; later the commands themselves say more
        sys.stderr.write("Interrupted.\n")
        raise SystemExit(130) from None  # 128 + SIGINT, as shells count it


def fit_main() -> None:
    """Run `kw-fit`."""
    main("fit_main")


if __name__ == "__main__":
    main()
