"""`python -m stream.compile_ahead`: compile what a worker runs compiled, so that its first start on
this machine need not. What was compiled before is only loaded."""

from __future__ import annotations

from profiles.arithmetic import Layout
from profiles.cache import ProfileCache
from profiles.kernel import Kernel
from profiles.schema import Keys

from .lanes import in_lanes, lanes_of
from .scanning import Scanner
from .user_rows import UserRows


def main() -> None:
    """The machine code does not depend on any setting."""
    nobody = UserRows(0)
    Scanner({}, "USD").scan([], [], 0).contributions(nobody)
    in_lanes(nobody.ids(), lanes_of(nobody.ids(), 1), 1)
    ProfileCache(0, 0).warm_up()
    Kernel(Layout(dimensions=8), Keys("any"), script_sha="", ttl_s=1, chunk=1).warm_up()


if __name__ == "__main__":
    main()
