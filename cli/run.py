"""`freight run`: placeholder while the rendering arrives."""


def run() -> None:
    """Run a file offline."""
