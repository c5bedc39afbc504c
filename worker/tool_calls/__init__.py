"""The table of families: how models write calls of functions, the first that fits a template."""

from typing import Final

from worker.tool_calls.base import Family
from worker.tool_calls.deepseek import DeepSeek
from worker.tool_calls.hermes import Hermes
from worker.tool_calls.llama import Llama
from worker.tool_calls.mistral import Mistral

FAMILIES: Final[tuple[Family, ...]] = (DeepSeek(), Mistral(), Llama(), Hermes())
