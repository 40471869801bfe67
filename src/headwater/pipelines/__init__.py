"""Pipelines: what a run emits. One kind, one class."""

from headwater.pipelines.base import Pipeline
from headwater.pipelines.chat import ChatPipeline
from headwater.providers.base import Provider
from headwater.settings import Settings


def built_in(provider: Provider, settings: Settings) -> dict[str, Pipeline]:
    """The kinds that come with headwater, by name."""
    return {ChatPipeline.kind: ChatPipeline(provider, settings)}
