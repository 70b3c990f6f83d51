"""Settings and the environment they are read from."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from stream.settings import KafkaSettings, ModelSettings, ProfileSettings, Settings


def test_a_process_reads_the_settings_that_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Settings(
        namespace="a.shop",
        kafka=KafkaSettings(
            bootstrap="127.0.0.1:1", session_timeout_s=6, sasl_password=SecretStr('a "word"')
        ),
        model=ModelSettings(
            base="some/model", releases=Path("some folder"), query_prefix="query: "
        ),
        profile=ProfileSettings(half_lives_s=(1.5, 60.0), weights={"view": 0.25, "click": 0.0}),
    )
    for name in Settings.model_fields:
        assert name == "namespace" or any(
            variable.startswith(f"{name.upper()}_") for variable in settings.environment()
        )
    for variable, value in settings.environment().items():
        monkeypatch.setenv(variable, value)
    assert Settings() == settings
