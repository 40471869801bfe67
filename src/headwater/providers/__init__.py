"""Model APIs. `connect` chooses the implementation from the settings."""

from __future__ import annotations

from headwater.providers.base import Provider
from headwater.settings import Settings
from headwater.telemetry import Telemetry


def connect(settings: Settings, telemetry: Telemetry | None = None) -> Provider:
    """The OpenAI-compatible API of the settings, or the built-in demo model when none is set. Raises SettingsError."""
    # Imported here, so that the contract does not know its implementations.
    if settings.demo:
        from headwater.providers.scripted import demo

        return demo()
    from headwater.providers.openai import OpenAIProvider

    return OpenAIProvider.of(settings, telemetry)
