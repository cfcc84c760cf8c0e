"""Chat templates in Jinja, with `{% generation %}` around what is supervised.

`mistral_v3` is a complete chat template and is exported with the model; `plain` is LLaVA's format
for captions, where the question is dropped.
"""

from functools import cache
from pathlib import Path

from megatron_dattn.errors import ConfigError


@cache
def read_template(name: str) -> str:
    """The Jinja source of a template.

    Raises:
        ConfigError: there is no template of that name.
    """
    folder = Path(__file__).parent
    path = folder / f"{name}.jinja"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.jinja")))
        raise ConfigError(f"data.template '{name}' is unknown; choose one of {known}")
    return path.read_text(encoding="utf-8")
