"""What the demo shows of the learning loop: the gate's verdicts, and what the worker serves.

It reads a releases folder and the worker's metrics; it trains nothing and decides nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from .demo_watch import Sample
from .live_view import Learning, Verdict

_FIGURE: Final = "recall@20"


def learning(releases_dir: Path, first: Sample, now: Sample) -> Learning:
    """The state of the loop; `first` is a sample from before the first event."""
    from model.releases import decisions  # torch's two seconds, while the worker starts anyway

    return Learning(
        verdicts=tuple(map(_verdict, decisions(releases_dir))),
        swaps=now.swaps - first.swaps,
        flip_s=now.flip_s - first.flip_s,
        migrated=now.migrated - first.migrated,
    )


def _verdict(decision: dict[str, Any]) -> Verdict:
    newest = decision["figures"]["comparison"]["newest"]
    return Verdict(
        accepted=decision["decision"] == "accept",
        name=decision["candidate"] or decision["id"],
        figure=_FIGURE,
        before=float(newest["current"]),
        after=float(newest["candidate"]),
        low=float(newest["low"]),
        high=float(newest["high"]),
        why="; ".join(decision["reasons"]),
    )
