"""The output of `cast eval --json`: perplexities of several models on the same text."""

from pathlib import Path

from pydantic import BaseModel, ValidationError

from conversion.errors import InputError


class ModelQuality(BaseModel):
    perplexity: float
    tokens: int
    context: int


class Quality(BaseModel):
    models: dict[str, ModelQuality]

    @classmethod
    def read(cls, path: Path) -> "Quality":
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            raise InputError(f"{path} is no output of `cast eval --json`: write it again") from None
