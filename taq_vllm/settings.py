"""Settings as `--set NAME=VALUE` and files give them, made into a scorer's or a method's own `Settings`."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from pydantic import ValidationError


def settings_from(module: ModuleType, who: str, given: Mapping[str, Any]) -> Any:
    """The given settings over a module's defaults.

    Args:
        module: has `Settings`, a pydantic model.
        who: is asked for, for the message ("scorer taqo", "method gptq").
        given: values by name.

    Raises:
        ValueError: no such setting, or a value that is not allowed; says what was got and which settings there are.
    """
    try:
        return module.Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "settings"
        allowed = ", ".join(module.Settings.model_fields) or "none"
        raise ValueError(
            f"{who}, {where}: got {first['input']!r}: {first['msg']}; its settings are {allowed}"
        ) from error
