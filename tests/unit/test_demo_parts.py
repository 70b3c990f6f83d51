"""What the demo hands to its worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream.demo_parts import environment_of
from stream.settings import KafkaSettings, ModelSettings, ProfileSettings, Settings


def test_the_worker_reads_the_settings_that_the_demo_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Settings(
        namespace="a.shop",
        kafka=KafkaSettings(bootstrap="127.0.0.1:1", session_timeout_s=6),
        model=ModelSettings(
            base="some/model", releases=Path("some folder"), query_prefix="query: "
        ),
        profile=ProfileSettings(half_lives_s=(1.5, 60.0), weights={"view": 0.25, "click": 0.0}),
    )
    for name in Settings.model_fields:
        assert name == "namespace" or any(
            variable.startswith(f"{name.upper()}_") for variable in environment_of(settings)
        )
    for variable, value in environment_of(settings).items():
        monkeypatch.setenv(variable, value)
    assert Settings() == settings
